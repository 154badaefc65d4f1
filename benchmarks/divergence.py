"""Reverse KL between two heads, forward and backward: ours against plain torch, TRL and Liger. Time and extra memory.

Float32 on CPU; hidden states and heads in, the loss (a mean over tokens) and the student's two gradients out. Refuses
to report unless each implementation's loss and gradients equal the float64 reference at a small size, and the loss and
a row of each gradient agree among all of them at each size that is timed.

Each implementation lives in a process of its own, as in a training run: its allocator and thread pools are in the
state its own steps left. The processes are asked in turn for one round each (A B C D A B C D), and a ratio is taken
within each round. Beside them run the four GEMMs that no implementation can do without, bare: same chunk as ours,
outputs allocated once.

Extra memory is measured twice, in a fresh process that has warmed up on a tiny case, over the returned gradients:
"process" is the growth of the resident set to its high-water mark, with the BLAS library's workspaces, and "allocator"
counts what torch's allocator held at most, on the main thread alone. The ratios are of the former.

The ratios compare with what runs as plain Python: `torch.compile` asks for a C++ compiler and for minutes at every new
shape. What it makes of plain torch and of Liger's loss, whose default it is, stands beside them, as
`with_compiled_peers`.

    python benchmarks/divergence.py            # one JSON object on stdout; needs the extra `bench`
    python benchmarks/divergence.py --quick    # small sizes: does it run
    python benchmarks/divergence.py --sweep    # time and memory of the settings that were tried for each peer
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

OURS, GEMMS = "ours", "bare_gemms"
# Relative to the largest entry. All but the reference compute in float32, in different orders.
REFERENCE_TOLERANCE, AGREEMENT_TOLERANCE = 2e-5, 1e-4
TARGETS = {"time_vs_fastest_peer": 0.85, "memory_vs_leanest_peer": 0.25, "memory_growth_8x": 1.1}


@dataclass(frozen=True)
class Case:
    """N tokens, a vocabulary of V ids, student and teacher both of width d."""

    tokens: int
    vocab_size: int
    width: int

    @property
    def returned_bytes(self) -> int:
        """Of the gradients: hidden states and student's head."""
        return 4 * self.width * (self.tokens + self.vocab_size)


CASES = (Case(2048, 49152, 576), Case(512, 151_936, 1024))
QUICK_CASES = (Case(96, 4099, 64),)
GATE_CASE, TINY_CASE = Case(67, 1003, 60), Case(8, 257, 32)


@dataclass(frozen=True)
class Contestant:
    """A process of the benchmark: one implementation at one setting, or the bare GEMMs."""

    name: str
    implementation: str
    settings: dict[str, Any]


# With torch.compile and without, which are different bargains: minutes of compilation per shape, and a C++ compiler.
# Liger's "compiled" are its own defaults. The others are the fastest of --sweep, or all but as fast and leaner. TRL's
# tile is a constant of its module, no option, and as shipped.
PEERS = (
    Contestant("torch", "torch", {"kl_div": False, "compiled": False}),
    Contestant("torch_compiled", "torch", {"kl_div": False, "compiled": True}),
    Contestant("trl", "trl", {}),
    Contestant("liger", "liger", {"compiled": False, "chunk_size": 256}),
    Contestant("liger_compiled", "liger", {"compiled": True, "chunk_size": 1024}),
)
SWEEP: dict[str, list[dict[str, Any]]] = {
    "torch": [{"kl_div": kl_div, "compiled": compiled} for compiled in (False, True) for kl_div in (False, True)],
    "trl": [{}, {"tile": (512, 32768)}, {"tile": (128, 32768)}, {"tile": (512, 8192)}],
    "liger": [
        {"compiled": compiled, "chunk_size": chunk_size}
        for compiled in (False, True)
        for chunk_size in (64, 128, 256, 512, 1024)
    ],
}


# --- what is measured --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Inputs:
    """Logits have a standard deviation of about 2; student and teacher share half of their variance."""

    student_hidden_TD: Tensor
    student_weight_VD: Tensor
    teacher_hidden_TD: Tensor
    teacher_weight_VD: Tensor
    sampled_ids_T: Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        import torch

        generator = torch.Generator().manual_seed(0)

        def pair(rows: int, scale: float) -> tuple[Tensor, Tensor]:
            student, teacher = (torch.randn(rows, case.width, generator=generator).mul_(scale) for _ in range(2))
            return student, teacher.add_(student).mul_(0.5**0.5)

        student_hidden, teacher_hidden = pair(case.tokens, 1.0)
        student_weight, teacher_weight = pair(case.vocab_size, 2.0 / case.width**0.5)
        ids = torch.randint(case.vocab_size, (case.tokens,), generator=generator)
        return cls(
            student_hidden.requires_grad_(), student_weight.requires_grad_(), teacher_hidden, teacher_weight, ids
        )

    def touched(self) -> Inputs:
        """Itself, each page mapped into this process: it must not count as growth later."""
        for field_ in fields(self):
            getattr(self, field_.name).detach().sum()
        return self


def ours_loss(inputs: Inputs, chunk_tokens: int | None = None, implementation: str = "auto") -> Tensor:
    """``linear_divergence``, diagnostics and all."""
    import torch
    from opd_kernels import LinearHead, linear_divergence

    tokens = len(inputs.sampled_ids_T)
    return linear_divergence(
        inputs.student_hidden_TD,
        LinearHead(inputs.student_weight_VD),
        inputs.teacher_hidden_TD,
        LinearHead(inputs.teacher_weight_VD),
        sampled_ids_T=inputs.sampled_ids_T,
        token_weights_T=torch.full((tokens,), 1.0 / tokens),
        chunk_tokens=chunk_tokens,
        implementation=implementation,
    ).loss


def torch_loss(inputs: Inputs, kl_div: bool, compiled: bool) -> Tensor:
    """Whole logits, by autograd."""
    import torch

    loss_of = torch.compile(plain_loss) if compiled else plain_loss
    return loss_of(
        inputs.student_hidden_TD, inputs.student_weight_VD, inputs.teacher_hidden_TD, inputs.teacher_weight_VD, kl_div
    )


def plain_loss(
    student_hidden_TD: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_TD: Tensor,
    teacher_weight_VD: Tensor,
    kl_div: bool,
) -> Tensor:
    """As a page of a notebook has it."""
    import torch
    from torch.nn import functional as F

    log_p_TV = torch.log_softmax(F.linear(student_hidden_TD, student_weight_VD), dim=-1)
    with torch.no_grad():
        log_q_TV = torch.log_softmax(F.linear(teacher_hidden_TD, teacher_weight_VD), dim=-1)
    if kl_div:
        return F.kl_div(log_q_TV, log_p_TV, reduction="batchmean", log_target=True)
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum() / len(log_p_TV)


def trl_loss(inputs: Inputs, tile: tuple[int, int] | None = None) -> Tensor:
    """What ``DistillationTrainer`` calls. Its tile is a constant of the module, no option; ``tile`` overrides it."""
    from trl.kernels import chunked_divergence as trl_divergence

    if tile is not None:
        trl_divergence.TOKEN_CHUNK_SIZE, trl_divergence.VOCAB_CHUNK_SIZE = tile
    divergence_T, _entropy_T = trl_divergence.ChunkedDivergenceFunction.apply(
        inputs.student_hidden_TD,
        inputs.student_weight_VD,
        None,
        inputs.teacher_hidden_TD,
        inputs.teacher_weight_VD,
        None,
        1.0,  # beta: KL(student || teacher)
    )
    return divergence_T.mean()


def liger_loss(inputs: Inputs, compiled: bool, chunk_size: int) -> Tensor:
    """``beta=1`` is KL(student || teacher), and a mean over tokens; without the hard loss its labels do not matter."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled, chunk_size=chunk_size
    )
    return loss_of(
        inputs.student_hidden_TD,
        inputs.student_weight_VD,
        inputs.teacher_hidden_TD,
        inputs.teacher_weight_VD,
        inputs.sampled_ids_T,
    )


LOSSES: dict[str, Callable[..., Tensor]] = {
    OURS: ours_loss,
    "torch": torch_loss,
    "trl": trl_loss,
    "liger": liger_loss,
}


class Seconds(NamedTuple):
    """Wall time, and processor time of all threads."""

    wall: float
    cpu: float


class Stopwatch:
    """Seconds between the two ends of a ``with``."""

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = Seconds(time.perf_counter() - self._start[0], time.process_time() - self._start[1])


# --- in the child process ----------------------------------------------------------------------------------------
class Implementation:
    """One implementation at one setting, with the inputs of one case at a time."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, settings
        self.inputs: Inputs | None = None

    def load(self, inputs: Inputs) -> None:
        """Take the inputs, which lie in memory that all processes share."""
        import torch

        torch._dynamo.reset()  # a second shape would be compiled for shapes of any size, and slower
        self.inputs = inputs.touched()

    def step(self) -> float:
        """Forward and backward, gradients left in the leaves as an optimizer wants them; returns the loss."""
        assert self.inputs is not None
        loss = LOSSES[self.name](self.inputs, **self.settings)
        loss.backward()
        return loss.item()

    def clear(self) -> None:
        """As ``optimizer.zero_grad()``."""
        assert self.inputs is not None
        self.inputs.student_hidden_TD.grad = self.inputs.student_weight_VD.grad = None

    def round(self) -> Seconds:
        """Of a step."""
        self.clear()
        with Stopwatch() as watch:
            self.step()
        self.clear()
        return watch.seconds

    def results(self) -> dict[str, list[float]]:
        """Loss, and the last row of each gradient: one goes over the whole vocabulary, the other over all tokens."""
        assert self.inputs is not None
        self.clear()
        loss, found = self.step(), {}
        for name, leaf in (("hidden", self.inputs.student_hidden_TD), ("head", self.inputs.student_weight_VD)):
            assert leaf.grad is not None
            found[f"gradient of the {name}"] = leaf.grad[-1].tolist()
        self.clear()
        return {"loss": [loss], **found}

    def errors(self) -> dict[str, float]:
        """By result: the largest difference from the float64 reference, relative to the largest entry."""
        import torch

        assert self.inputs is not None
        leaves = [self.inputs.student_hidden_TD, self.inputs.student_weight_VD]

        def results(loss: Tensor) -> list[Tensor]:
            return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, leaves))]

        expected = results(ours_loss(self.inputs, implementation="reference"))
        found = results(LOSSES[self.name](self.inputs, **self.settings))
        names = ("loss", "gradient of the hidden", "gradient of the head")
        return {
            name: float((x - y).abs().max() / y.abs().max()) for name, x, y in zip(names, found, expected, strict=True)
        }

    def peak_bytes(self, returned: int) -> dict[str, int | None]:
        """Most that one step held at once, over the gradients it returns."""
        self.clear()
        process = process_peak_bytes(self.step)
        self.clear()
        allocator = allocator_peak_bytes(self.step)
        self.clear()
        return {"allocator": allocator - returned, "process": None if process is None else process - returned}


class Gemms:
    """The four GEMMs of a step, by chunks of rows, and nothing else."""

    def __init__(self, chunk_tokens: int | None) -> None:
        self.chunk_tokens = chunk_tokens

    def load(self, inputs: Inputs) -> None:
        """Take the inputs, allocate the outputs."""
        import torch

        self.inputs = inputs.touched()
        tokens, vocab_size = len(inputs.student_hidden_TD), len(inputs.student_weight_VD)
        chunk = min(self.chunk_tokens or default_chunk_tokens(vocab_size), tokens)
        self.logits_2CV = torch.zeros(2, chunk, vocab_size)
        self.grad_hidden_TD = torch.zeros(inputs.student_hidden_TD.shape)
        self.grad_weight_VD = torch.zeros(inputs.student_weight_VD.shape)

    def round(self) -> Seconds:
        """Of all chunks."""
        import torch

        inputs, (student_CV, teacher_CV) = self.inputs, self.logits_2CV
        tokens, chunk = len(inputs.sampled_ids_T), len(student_CV)
        self.grad_weight_VD.zero_()
        with torch.no_grad(), Stopwatch() as watch:
            for begin in range(0, tokens, chunk):
                rows = slice(begin, min(begin + chunk, tokens))
                count = rows.stop - begin
                hidden_CD, grad_CV = inputs.student_hidden_TD[rows], teacher_CV[:count]
                torch.mm(hidden_CD, inputs.student_weight_VD.T, out=student_CV[:count])
                torch.mm(inputs.teacher_hidden_TD[rows], inputs.teacher_weight_VD.T, out=grad_CV)
                torch.mm(grad_CV, inputs.student_weight_VD, out=self.grad_hidden_TD[rows])
                self.grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
        return watch.seconds


def default_chunk_tokens(vocab_size: int) -> int:
    """Rows that ours projects at a time."""
    from opd_kernels.torch_backend import default_chunk_tokens

    return default_chunk_tokens(vocab_size)


def process_peak_bytes(step: Callable[[], Any]) -> int | None:
    """Growth of the resident set during ``step`` to its high-water mark; None where Linux's /proc is not there."""

    def resident_bytes(key: str) -> int:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found
        return int(found[1]) << 10

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the C library kept would hide growth
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    except (OSError, AttributeError):
        return None
    before = resident_bytes("VmRSS")
    step()
    return resident_bytes("VmHWM") - before


def allocator_peak_bytes(step: Callable[[], Any]) -> int:
    """Most bytes that torch's allocator gave out during ``step`` and had not yet got back."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return peak_of([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])


def peak_of(changes: list[int]) -> int:
    """Largest running sum, 0 at least."""
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


def serve(pipe: Connection, contestant: Contestant, threads: int | None) -> None:
    """Answer (method, arguments) until None comes or the parent is gone."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    settings = contestant.settings
    target = Gemms(**settings) if contestant.name == GEMMS else Implementation(contestant.implementation, settings)
    try:
        while (call := pipe.recv()) is not None:
            method, arguments = call
            pipe.send(getattr(target, method)(*arguments))
    except EOFError:
        pass


# --- in the parent -----------------------------------------------------------------------------------------------
class Refusal(Exception):
    """A figure would not be worth reporting."""


@dataclass
class Child:
    """A contestant in a process of its own, from ``with`` to its end."""

    contestant: Contestant
    threads: int | None
    pipe: Connection = field(init=False)

    @property
    def name(self) -> str:
        return self.contestant.name

    def __enter__(self) -> Child:
        import torch.multiprocessing

        spawn = torch.multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, self.contestant, self.threads), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self.pipe.send(None)
        self._process.join()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method in the process, and wait."""
        try:
            self.pipe.send((method, arguments))
            return self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise Refusal(f"{self.name} died in {method}(); its traceback is above") from None


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def check_against_reference(child: Child) -> None:
    """The first gate."""
    child.ask("load", Inputs.of(GATE_CASE))
    for name, error in child.ask("errors").items():
        if not error <= REFERENCE_TOLERANCE:
            raise Refusal(f"{child.name}: the {name} is {error:.1e} from the float64 reference at {GATE_CASE}")


def check_agreement(case: Case, results: list[tuple[str, dict[str, list[float]]]]) -> None:
    """The second gate: all against the first, at full size."""
    first, expected = results[0]
    for name, found in results[1:]:
        for what, values in expected.items():
            largest = max(map(abs, values))
            errors = [abs(x - y) / largest for x, y in zip(found[what], values, strict=True)]
            if not all(error <= AGREEMENT_TOLERANCE for error in errors):
                raise Refusal(f"{name}: the {what} differs from that of {first} by {max(errors):.1e} at {case}")


def peak_bytes(contestant: Contestant, case: Case, inputs: Inputs, threads: int | None) -> dict[str, int | None]:
    """In a fresh process, warm but for the case itself.

    What is compiled must know the case, so the BLAS library's workspaces are there already and do not count for it.
    """
    with Child(contestant, threads) as child:
        child.ask("load", Inputs.of(TINY_CASE))
        child.ask("round")
        child.ask("load", inputs)
        if contestant.settings.get("compiled"):
            child.ask("round")
        return child.ask("peak_bytes", case.returned_bytes)


def time_rounds(children: list[Child], case: Case, inputs: Inputs, rounds: int) -> list[list[Seconds]]:
    """By child and round, after one round that does not count."""
    for child in children:
        child.ask("load", inputs)
    check_agreement(case, [(child.name, child.ask("results")) for child in children if child.name != GEMMS])
    for child in children:
        child.ask("round")
    seconds: list[list[Seconds]] = [[] for _ in children]
    for _ in range(rounds):
        for child, mine in zip(children, seconds, strict=True):
            mine.append(child.ask("round"))
    return seconds


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Of pairs taken in the same round."""
    return round(statistics.median(x / y for x, y in zip(numerators, denominators, strict=True)), 4)


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def time_ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Ours against the peers and the bare GEMMs."""
    peers = [name for name in seconds if name not in (OURS, GEMMS)]
    fastest = min(peers, key=lambda peer: statistics.median(seconds[peer]))
    return {
        "fastest_peer": fastest,
        "time_vs_fastest_peer": median_ratio(seconds[OURS], seconds[fastest]),
        "time_vs_each_peer": {peer: median_ratio(seconds[OURS], seconds[peer]) for peer in peers},
        "sgemm_fraction": median_ratio(seconds[GEMMS], seconds[OURS]),
    }


def memory_ratios(peaks: dict[str, int | None]) -> dict[str, Any]:
    """Ours against the peers; nothing where nothing was measured."""
    by_name = {name: peak for name, peak in peaks.items() if peak is not None}
    if len(by_name) < len(peaks):
        return {"leanest_peer": None, "memory_vs_leanest_peer": None}
    ours = by_name.pop(OURS)
    leanest = min(by_name, key=by_name.__getitem__)
    return {"leanest_peer": leanest, "memory_vs_leanest_peer": round(ours / by_name[leanest], 4)}


def mebibytes(peak: dict[str, int | None]) -> dict[str, float | None]:
    """One decimal."""
    return {name: None if value is None else round(value / 2**20, 1) for name, value in peak.items()}


def uncompiled(by_name: dict[str, Any]) -> dict[str, Any]:
    """Without the contestants that torch.compile runs."""
    return {name: value for name, value in by_name.items() if not name.endswith("_compiled")}


def measure(case: Case, children: list[Child], rounds: int) -> dict[str, Any]:
    """The entry of a case."""
    inputs = Inputs.of(case)
    say(f"{case}: time")
    taken = {
        child.name: mine for child, mine in zip(children, time_rounds(children, case, inputs, rounds), strict=True)
    }
    wall, cpu = ({name: [getattr(x, kind) for x in mine] for name, mine in taken.items()} for kind in Seconds._fields)
    say(f"{case}: memory")
    peaks = {
        child.name: peak_bytes(child.contestant, case, inputs, child.threads)
        for child in children
        if child.name != GEMMS
    }
    memory = {name: peak["process"] for name, peak in peaks.items()}
    return {
        **asdict(case),
        **time_ratios(uncompiled(wall)),
        **memory_ratios(uncompiled(memory)),
        "with_compiled_peers": {**time_ratios(wall), **memory_ratios(memory)},
        "of_cpu_time": time_ratios(uncompiled(cpu)),
        "seconds": {name: spread(values) for name, values in wall.items()},
        "cpu_seconds": {name: spread(values) for name, values in cpu.items()},
        "peak_extra_mib": {name: mebibytes(peak) for name, peak in peaks.items()},
    }


def run(cases: tuple[Case, ...], rounds: int, threads: int | None, chunk_tokens: int | None) -> dict[str, Any]:
    """All measurements."""
    import torch

    ours = Contestant(OURS, OURS, {"chunk_tokens": chunk_tokens})
    contestants = [ours, *PEERS, Contestant(GEMMS, GEMMS, {"chunk_tokens": chunk_tokens})]
    entries = []
    for case in cases:
        with contextlib.ExitStack() as stack:
            children = [stack.enter_context(Child(contestant, threads)) for contestant in contestants]
            for child in children:
                if child.name != GEMMS:
                    check_against_reference(child)
            chunk = min(chunk_tokens or default_chunk_tokens(case.vocab_size), case.tokens)
            entries.append({**measure(case, children, rounds), "chunk_tokens": chunk})
    say("memory by tokens")
    base = QUICK_CASES[0] if cases == QUICK_CASES else CASES[0]
    # By the allocator: the resident set also grows by the inputs' pages, which this process reads for the first time.
    few, many = (
        peak_bytes(ours, case, Inputs.of(case), threads)["allocator"]
        for case in (replace(base, tokens=base.tokens // 4), replace(base, tokens=base.tokens * 2))
    )
    assert few
    assert many
    return {
        "cases": entries,
        "memory_growth_8x": round(many / few, 4),
        "targets": TARGETS,
        "settings": {peer.name: peer.settings for peer in PEERS},
        "threads": threads or torch.get_num_threads(),
        "rounds": rounds,
        "versions": {name: version(name) for name in ("torch", "trl", "liger-kernel")},
    }


def sweep(cases: tuple[Case, ...], rounds: int, threads: int | None) -> dict[str, Any]:
    """Seconds and memory of each setting of each peer; the settings of one peer take turns."""
    entries = []
    for case in cases:
        inputs = Inputs.of(case)
        for name, settings in SWEEP.items():
            say(f"{case}: {name}")
            contestants = [Contestant(f"{name} {setting}", name, setting) for setting in settings]
            peaks = [peak_bytes(contestant, case, inputs, threads) for contestant in contestants]
            with contextlib.ExitStack() as stack:
                children = [stack.enter_context(Child(contestant, threads)) for contestant in contestants]
                seconds = time_rounds(children, case, inputs, rounds)
            for contestant, peak, times in zip(contestants, peaks, seconds, strict=True):
                entry = {
                    **asdict(case),
                    **asdict(contestant),
                    "seconds": spread([x.wall for x in times]),
                    "cpu_seconds": spread([x.cpu for x in times]),
                    "peak_extra_mib": mebibytes(peak),
                }
                say(str(entry))
                entries.append(entry)
    return {"sweep": entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="that count, after one that does not")
    parser.add_argument("--threads", type=int, help="of every implementation; torch's own choice if not given")
    parser.add_argument("--vocab-size", type=int, help="only the case with this vocabulary")
    parser.add_argument("--chunk-tokens", type=int, help="rows that ours projects at a time; else its own choice")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--sweep", action="store_true", help="the peers' settings instead")
    arguments = parser.parse_args()
    cases: tuple[Case, ...] = QUICK_CASES if arguments.quick else CASES
    if arguments.vocab_size is not None:
        cases = tuple(case for case in cases if case.vocab_size == arguments.vocab_size)
        if not cases:
            parser.error(f"--vocab-size: no case has {arguments.vocab_size}")
    if arguments.quick and arguments.chunk_tokens is None:
        arguments.chunk_tokens = 8
    for module in ("trl", "liger_kernel"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            parser.exit(2, f"a peer is missing ({error}): pip install -e '.[bench]'\n")
    try:
        if arguments.sweep:
            result = sweep(cases, arguments.rounds, arguments.threads)
        else:
            result = run(cases, arguments.rounds, arguments.threads, arguments.chunk_tokens)
    except Refusal as refusal:
        parser.exit(2, f"refusing to report: {refusal}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
