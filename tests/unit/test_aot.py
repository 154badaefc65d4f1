"""The ahead-of-time compiler of kernels: one kernel for one architecture here, all of them in ``make kernels``."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from divergence_cases import FORMS, cast, make_case, run

pytest.importorskip("triton")

from opd_kernels import TopK, aot, token_logprobs, triton_rows
from opd_kernels.aot import SHARED_BYTES, SIZES, Usage, int_type
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import native_specialize_impl

KERNELS = Path(aot.__file__).parent
# Tests run in Triton's interpreter, where nothing can be compiled, so this is a process of its own. Of "unaligned" the
# compiler knows nothing that it may make use of; "spilling" cannot hold its accumulators.
COMPILE = """
import json
from dataclasses import asdict, replace
from opd_kernels import aot, triton_gemm

by_name = {spec.name: spec for spec in triton_gemm.aot_specs(*aot.SIZES["Qwen3-8B"], "bf16")}
project, grad_weight = by_name["mm[project]"], by_name["mm[grad_weight]"]
plain = {name: kind.removesuffix(":16") for name, kind in project.signature.items()}
specs = {
    "project": project,
    "unaligned": replace(project, signature=plain),
    "spilling": replace(grad_weight, num_warps=4),
}
found = {}
for name, spec in specs.items():
    compiled, log = aot.compile_spec(spec, "sm_90")
    found[name] = {"ttir": compiled.asm["ttir"], "ptx": compiled.asm["ptx"]}
    found[name]["usage"] = asdict(aot.usage_of(spec, "sm_90", compiled, log))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name: "ttir", "ptx" and "usage" of what ``COMPILE`` compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(KERNELS.parent)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FP_FUSION" not in done.stderr  # said explicitly, so that Triton has nothing to warn of
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_usage_is_what_the_assembler_says(compiled: dict[str, Any]) -> None:
    usage = Usage(**compiled["project"]["usage"])
    assert 128 < usage.registers <= 255
    assert usage.shared_bytes == 4 * (128 + 256) * 64 * 2  # four stages of a tile of each operand
    assert usage.faults() == []


def test_a_kernel_that_spills_is_found_out(compiled: dict[str, Any]) -> None:
    usage = Usage(**compiled["spilling"]["usage"])
    assert usage.spill_store_bytes > 0
    assert usage.spill_load_bytes > 0
    assert any(fault.startswith("spills") for fault in usage.faults())
    assert any("serialized" in fault for fault in usage.faults())  # what ptxas warns of


def test_offsets_are_64_bits_wide(compiled: dict[str, Any]) -> None:
    for name in ("project", "unaligned"):
        ttir = compiled[name]["ttir"]
        offsets = re.findall(r"tt\.addptr .*, (?:tensor<\S+x)?(i\d+)>?", ttir)
        assert len(offsets) >= 8
        assert set(offsets) == {"i64"}
        # Every stride is widened before anything is multiplied by it: int32 products are of tile counts only.
        strides = set(re.findall(r"(%stride_\w+)(?=: i32)", ttir))
        assert strides
        for line in ttir.splitlines():
            if re.search(r"arith\.muli .*i32$", line.split(" loc(")[0]):
                assert not any(stride in line for stride in strides), line


def test_alignment_does_not_change_how_products_are_summed(compiled: dict[str, Any]) -> None:
    def instructions(name: str) -> list[str]:
        return re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|fma)[\w.]*", compiled[name]["ptx"])

    assert instructions("project") == instructions("unaligned")
    assert set(instructions("project")) == {"wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"}


@pytest.mark.parametrize("value", [0, 1, 2, 7, 16, -16, 151936, 2**31 - 1, 2**31, 2**31 + 1, -(2**31) - 1])
def test_integers_are_typed_as_a_launch_types_them(value: int) -> None:
    kind, key = native_specialize_impl(BaseBackend, value, False, True, True)
    assert int_type(value) == ("i32:1" if key == 1 else kind + (":16" if key == "D" else ""))
    assert int_type(value, specialize=False) == native_specialize_impl(BaseBackend, value, False, False, True)[0]


USAGE = Usage(
    kernel="mm[project]",
    arch="sm_80",
    dtypes=("bf16",),
    sizes=tuple(SIZES),
    warps=8,
    registers=255,
    spill_store_bytes=0,
    spill_load_bytes=0,
    stack_bytes=0,
    shared_bytes=SHARED_BYTES["sm_80"],
    tensor_memory_columns=0,
    warnings=(),
    seconds=1.0,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_load_bytes": 8}, "spills"),
        ({"shared_bytes": SHARED_BYTES["sm_80"] + 1}, "shared memory"),
        ({"tensor_memory_columns": 513}, "tensor memory"),
        ({"warnings": ("ptxas info : (C7510) Potential Performance Loss",)}, "C7510"),
    ],
)
def test_a_fault_names_the_kernel_and_fails_the_command(
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", "--arch", "sm_80", "--json", str(tmp_path / "kernels.json")])
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # put back what main takes away
    monkeypatch.setattr(aot, "compile_all", lambda archs, processes: [USAGE])
    assert aot.main() == 0
    monkeypatch.setattr(aot, "compile_all", lambda archs, processes: [USAGE, replace(USAGE, **change)])
    assert aot.main() == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "mm[project] (bf16, sm_80" in line
    assert message in line
    kernels = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert [bool(kernel["faults"]) for kernel in kernels] == [False, True]


def test_every_kernel_that_is_launched_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    launched = set()
    kind: Any = type(triton_rows.statistics_kernel)
    getitem = kind.__getitem__

    def recorded(kernel: Any, grid: tuple[int, ...]) -> Any:
        launched.add(kernel)
        return getitem(kernel, grid)

    monkeypatch.setattr(kind, "__getitem__", recorded)
    case = cast(make_case(1, 7, bias=True), torch.bfloat16, device)
    run(case, objective=TopK(3), deterministic=True, chunk_tokens=1, implementation="triton")
    modules = [importlib.import_module(module) for module in aot.MODULES]
    specs = [spec for module in modules for spec in module.aot_specs(*SIZES["Qwen3-8B"], "bf16")]
    assert launched == {spec.fn for spec in specs}


TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
SIZE_CONSTEXPRS = {"V", "STRIDE", "BLOCK_V", "BLOCK_K", "BLOCK_C"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("form", ["plain", "all"])
def test_token_logprobs_launch_what_is_compiled(form: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pointers, of the same types, and the same constants, but for the sizes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    launched = []
    kind: Any = type(triton_rows.statistics_kernel)
    getitem = kind.__getitem__

    def recorded(kernel: Any, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            named = dict(zip(kernel.arg_names, arguments, strict=False))
            pointers = {name: TYPES[value.dtype] for name, value in named.items() if isinstance(value, torch.Tensor)}
            constants = {name: value for name, value in options.items() if name in set(kernel.arg_names)}
            launched.append((kernel, pointers, constants))
            getitem(kernel, grid)(*arguments, **options)

        return launch

    monkeypatch.setattr(kind, "__getitem__", recorded)
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    case = cast(make_case(1, 7, **FORMS[form]), torch_dtype, device)
    hidden, head = case["student_hidden_TD"].requires_grad_(), case["student_head"]
    if head.bias is not None:
        head.bias.requires_grad_()
    result = token_logprobs(hidden, head, case["sampled_ids_T"], implementation="triton")
    result.logprobs_T.sum().backward()
    kernels = [triton_rows.statistics_kernel, triton_rows.statistics_kernel, triton_rows.gradient_kernel]
    assert [kernel for kernel, _, _ in launched] == kernels + [triton_rows.bias_kernel] * (form == "all")

    def without_sizes(constants: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in constants.items() if value is not None and name not in SIZE_CONSTEXPRS}

    compiled = []
    for spec in triton_rows.aot_specs(*SIZES["Qwen3-8B"], dtype):
        pointers = {name: kind.partition(":")[0] for name, kind in spec.signature.items() if kind.startswith("*")}
        compiled.append((spec.fn, pointers, without_sizes(spec.constexprs)))
    for kernel, pointers, constants in launched:
        assert (kernel, pointers, without_sizes(constants)) in compiled
