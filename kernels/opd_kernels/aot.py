"""Compile the Triton kernels ahead of time, for devices that need not be there, and read what the assembler says.

    python -m opd_kernels.aot [--arch sm_90 …] [--json FILE]

Registers, spills and the stack are those that ptxas prints while it makes the very cubin that a launch would load;
shared and tensor memory are what Triton asks the driver for. The exit status is 1 if a kernel spills, does not fit its
device, or makes ptxas warn (that it serializes matrix instructions, say).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Each offers aot_specs(vocab_size, hidden, dtype).
MODULES = ("opd_kernels.triton_gemm", "opd_kernels.triton_rows")
SIZES = {
    "SmolLM2-135M": (49152, 576),
    "Qwen3-8B": (151936, 4096),
    "DeepSeek-V4": (129280, 7168),
}
DTYPES = ("bf16", "fp16")
# What one block may have of each device (CUDA C Programming Guide, "Technical Specifications per Compute Capability").
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True, slots=True)
class AotSpec:
    """One compilation of a kernel.

    Attributes:
        name: of the row in the report; names the variant, too ("gradient[reverse_kl, bf16]").
        fn: the ``@triton.jit`` function.
        signature: type of each argument that is not a constexpr, by name: "*bf16", "*fp32", "i32", "i64", "fp32", with
            what the runtime would find out about the value appended: ":16" for a multiple of 16 (of a pointer: an
            address aligned to 16 bytes), ":1" for a 1. :func:`int_type` says it of an integer.
        constexprs: value of each ``tl.constexpr`` argument, by name.
        num_warps, num_stages, enable_fp_fusion: as given to the launch.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = False

    @property
    def identity(self) -> str:
        """Equal for specs that are the same compilation."""
        parts = (sorted(self.signature.items()), sorted((k, str(v)) for k, v in self.constexprs.items()))
        return repr((self.name, self.fn.__name__, *parts, self.num_warps, self.num_stages, self.enable_fp_fusion))


def int_type(value: int, *, specialize: bool = True) -> str:
    """Type of an integer argument as a launch sees it; ``specialize=False`` for what is in ``do_not_specialize``."""
    kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    if not specialize:
        return kind
    return kind + (":1" if value == 1 else ":16" if value % 16 == 0 else "")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one compiled kernel takes of a device; ``registers`` and ``stack_bytes`` are per thread."""

    kernel: str
    arch: str
    dtypes: tuple[str, ...]
    sizes: tuple[str, ...]
    warps: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    warnings: tuple[str, ...]
    seconds: float

    def faults(self) -> list[str]:
        """Why this kernel must not be shipped; empty if it may."""
        found = list(self.warnings)
        if self.spill_store_bytes or self.spill_load_bytes:
            found.append(f"spills ({self.spill_store_bytes} bytes stored, {self.spill_load_bytes} loaded)")
        if self.shared_bytes > SHARED_BYTES[self.arch]:
            found.append(f"takes {self.shared_bytes} bytes of shared memory; a block has {SHARED_BYTES[self.arch]}")
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(
                f"takes {self.tensor_memory_columns} columns of tensor memory; there are {TENSOR_MEMORY_COLUMNS}"
            )
        return found


def compile_spec(spec: AotSpec, arch: str) -> tuple[Any, str]:
    """→ what ``triton.compile`` returns, and what ptxas said."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(spec.fn.arg_names)
    signature, constexprs, attrs = {}, dict(spec.constexprs), {}
    for index, name in enumerate(names):
        kind, _, hint = spec.signature.get(name, "constexpr").partition(":")
        if hint and spec.fn.params[index].do_not_specialize:
            raise ValueError(f"{spec.name}: a launch does not look at the value of {name}, the signature says {hint!r}")
        if hint == "1":
            kind, constexprs[name] = "constexpr", 1
        elif hint == "16":
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif hint:
            raise ValueError(f"{spec.name}: signature of {name}: {hint!r} is neither 16 nor 1")
        signature[name] = kind
    if unknown := (spec.signature.keys() | spec.constexprs.keys()) - set(names):
        raise ValueError(f"{spec.name}: {sorted(unknown)} are not arguments of {spec.fn.__name__}{tuple(names)}")
    if missing := [name for name in names if signature[name] == "constexpr" and name not in constexprs]:
        raise ValueError(f"{spec.name}: {missing} are neither in the signature nor in constexprs")
    options = {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": spec.enable_fp_fusion,
    }
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # from a cache, nothing would be said
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(fn=spec.fn, signature=signature, constexprs=constexprs, attrs=attrs),
            target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
            options=options,
        )
    return compiled, log.getvalue()


def usage_of(
    spec: AotSpec,
    arch: str,
    compiled: Any,
    log: str,
    *,
    dtypes: tuple[str, ...] = (),
    sizes: tuple[str, ...] = (),
    seconds: float = 0.0,
) -> Usage:
    """What ``compile_spec`` returned, read.

    Raises:
        RuntimeError: the assembler did not say what it used.
    """
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if spills is None or registers is None:
        raise RuntimeError(f"{spec.name}, {arch}: no resource usage in what ptxas said:\n{log}")
    return Usage(
        kernel=spec.name,
        arch=arch,
        dtypes=dtypes,
        sizes=sizes,
        warps=compiled.metadata.num_warps,
        registers=int(registers[1]),
        spill_store_bytes=int(spills[2]),
        spill_load_bytes=int(spills[3]),
        stack_bytes=int(spills[1]),
        shared_bytes=compiled.metadata.shared,
        tensor_memory_columns=compiled.metadata.tmem_size or 0,
        warnings=tuple(line.strip() for line in log.splitlines() if re.search(r"warning|error|Performance Loss", line)),
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """A spec, by where to find it: a jitted function does not travel between processes."""

    module: str
    index: int
    arch: str
    dtypes: tuple[str, ...]  # it is the same compilation for all of these,
    sizes: tuple[str, ...]  # and these

    def run(self) -> Usage:
        spec = importlib.import_module(self.module).aot_specs(*SIZES[self.sizes[0]], self.dtypes[0])[self.index]
        from triton.errors import TritonError

        start = time.perf_counter()
        try:
            compiled, log = compile_spec(spec, self.arch)
        except (TritonError, RuntimeError) as error:  # Triton's own do not travel between processes, either
            raise RuntimeError(f"{spec.name} ({self.dtypes[0]}, {self.arch}, {self.sizes[0]}): {error}") from None
        seconds = round(time.perf_counter() - start, 2)
        return usage_of(spec, self.arch, compiled, log, dtypes=self.dtypes, sizes=self.sizes, seconds=seconds)


def jobs(archs: Iterable[str], modules: Iterable[str] = MODULES) -> list[_Job]:
    """Every spec of every module, each compilation once."""
    found: dict[tuple[str, str], _Job] = {}
    for module, dtype, size in itertools.product(modules, DTYPES, SIZES):
        specs = importlib.import_module(module).aot_specs(*SIZES[size], dtype)
        for arch, (index, spec) in itertools.product(archs, enumerate(specs)):
            job = found.setdefault((spec.identity, arch), _Job(module, index, arch, (dtype,), (size,)))
            found[spec.identity, arch] = replace(job, dtypes=_with(job.dtypes, dtype), sizes=_with(job.sizes, size))
    return list(found.values())


def _with(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return names if name in names else (*names, name)


def table(usages: Sequence[Usage]) -> str:
    """A Markdown table with a row for each kernel: the most of all dtypes and sizes, one architecture after another."""
    archs = list(dict.fromkeys(use.arch for use in usages))
    cells: list[tuple[str, ...]] = [("kernel", "warps", f"registers ({' / '.join(archs)})", "shared memory", "spilled")]
    for kernel in dict.fromkeys(use.kernel for use in usages):
        uses = [use for use in usages if use.kernel == kernel]
        registers = [max(use.registers for use in uses if use.arch == arch) for arch in archs]
        shared = [max(use.shared_bytes for use in uses if use.arch == arch) for arch in archs]
        spilled = max(use.spill_store_bytes + use.spill_load_bytes for use in uses)
        each = (" / ".join(map(str, numbers)) for numbers in (registers, shared))
        cells.append((kernel, str(max(use.warps for use in uses)), *each, str(spilled)))
    lines = [" | ".join(row) for row in cells]
    lines.insert(1, " | ".join("---" for _ in cells[0]))
    return "\n".join(f"| {line} |" for line in lines)


def compile_all(archs: Sequence[str], processes: int) -> list[Usage]:
    """In ``processes`` processes, with a cache of Triton's that is empty before and gone afterwards."""
    todo = jobs(archs)
    with tempfile.TemporaryDirectory(prefix="opd-aot-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=min(processes, len(todo)), mp_context=context) as pool:
            return list(pool.map(_Job.run, todo))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m opd_kernels.aot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=sorted(SHARED_BYTES), help="only these; all otherwise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here, too")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    arguments = parser.parse_args()
    # The interpreter's functions cannot be compiled; this process and those it starts only compile.
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    start = time.perf_counter()
    usages = compile_all(arguments.arch or list(SHARED_BYTES), arguments.processes)
    print(table(usages))
    print(f"\n{len(usages)} kernels, Triton {triton.__version__}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    faults = [
        f"{use.kernel} ({', '.join(use.dtypes)}, {use.arch}, {', '.join(use.sizes)}): {fault}"
        for use in usages
        for fault in use.faults()
    ]
    if arguments.json is not None:
        kernels = [asdict(use) | {"faults": use.faults()} for use in usages]
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=2) + "\n")
    for fault in faults:
        print(f"opd_kernels.aot: {fault}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
