"""How the row kernels are launched: what a chunk's rows cost, in which tiles, with what constants.

One program a row. With float32 logits, V of them a row and a side, HBM sees per element

    statistics   8 bytes read                            entropies, KL, log-probabilities, most values
    overlap      about nothing                           the top 16 of both sides
    gradient     8 bytes read, 2 or 4 written            (JSD and TopK: 8 read once more, for their sums)

next to 8 that the projections write and 2 … 8 that the gradient's GEMMs read. The two passes cannot be one: a row's
normalisers are known at its end, and the rows in flight (two or more an SM, a megabyte each) are past what L2 holds.

Kernels: :mod:`opd_kernels.triton_statistics`, :mod:`opd_kernels.triton_gradient`; the objectives' names in them:
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton

from opd_kernels.aot import AotSpec
from opd_kernels.inputs import OVERLAP_K
from opd_kernels.objectives import JSD, ExOPD, ForwardKL, LogLikelihood, Objective, ReverseKL, SampledToken, TopK
from opd_kernels.triton_gradient import bias_kernel, gradient_kernel
from opd_kernels.triton_statistics import overlap_kernel, statistics_kernel

OBJECTIVES: dict[type[Objective | LogLikelihood], str] = {
    ReverseKL: "reverse_kl",
    ForwardKL: "forward_kl",
    JSD: "jsd",
    ExOPD: "exopd",
    TopK: "top_k",
    SampledToken: "sampled_token",
    LogLikelihood: "sampled_token",  # of no teacher
}
# Whose value needs sums that start from the normalisers: the gradient kernel runs though no gradient is wanted.
TWO_STEP = (JSD, TopK)

# Tiles of 4 float32 a thread, one load of 16 bytes. The statistics keep 7 to 10 numbers for each element of a tile in
# registers: two to four blocks of 8 warps fit an SM where blocks of 16 would leave it with one or two. No barrier
# stands between two tiles.
STATISTICS_BLOCK = 1024
STATISTICS_WARPS = 8
# Nothing is kept from tile to tile here, so two loads a thread and side are under way at a time.
GRADIENT_BLOCK = 2048
GRADIENT_WARPS = 8
# 2 · 16 groups of up to 256 int64 keys in registers: with 4 warps they would be all that there is.
OVERLAP_WARPS = 8
BIAS_TILE = {"BLOCK_C": 32, "BLOCK_V": 128}
BIAS_WARPS = 4
# Multiply-adds are fused: in one row's sums that rounds less, and every row goes the same way.
FUSION: dict[str, Any] = {"enable_fp_fusion": True, "num_stages": 1}


def stride_of(vocab_size: int) -> int:
    """Elements from one row to the next: :mod:`opd_kernels.triton_tiles` says why not V."""
    return -(-vocab_size // 16) * 16


def statistics_block(vocab_size: int) -> int:
    """Ids of a tile, and groups of the overlap."""
    return _power_of_two(vocab_size, 128, STATISTICS_BLOCK)


def _power_of_two(wanted: int, least: int, most: int) -> int:
    return int(max(least, min(most, triton.next_power_of_2(wanted))))


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and what is constant in it: just this is what ``aot_specs`` compiles, too."""

    kernel: Any
    constexprs: dict[str, Any]
    num_warps: int

    def __call__(self, programs: int, *arguments: Any) -> None:
        self.kernel[(programs,)](*arguments, **self.constexprs, num_warps=self.num_warps, **FUSION)


def _row_constexprs(vocab_size: int, student: bool, teacher: bool) -> dict[str, Any]:
    return {
        "V": vocab_size,
        "STRIDE": stride_of(vocab_size),
        "STUDENT_CAPPED": student,
        "TEACHER_CAPPED": teacher,
    }


def statistics(vocab_size: int, objective: str, capped: tuple[bool, bool, bool]) -> Launch:
    constexprs = _row_constexprs(vocab_size, *capped[:2]) | {"REFERENCE_CAPPED": capped[2], "OBJECTIVE": objective}
    # Of the objectives, only these have sums of their own there: fewer variants to compile.
    if objective not in ("forward_kl", "sampled_token"):
        constexprs["OBJECTIVE"] = ""
    constexprs["BLOCK_V"] = statistics_block(vocab_size)
    return Launch(statistics_kernel, constexprs, STATISTICS_WARPS)


def overlap(vocab_size: int, capped: tuple[bool, bool, bool]) -> Launch:
    constexprs = _row_constexprs(vocab_size, *capped[:2]) | {"GROUPS": statistics_block(vocab_size), "TOP": OVERLAP_K}
    return Launch(overlap_kernel, constexprs, OVERLAP_WARPS)


def gradient(vocab_size: int, objective: str, capped: tuple[bool, bool, bool], dtype: torch.dtype, k: int) -> Launch:
    constexprs = _row_constexprs(vocab_size, *capped[:2]) | {
        "REFERENCE_CAPPED": capped[2],
        "OBJECTIVE": objective,
        "SCALED": dtype == torch.float16,
        "BLOCK_V": _power_of_two(vocab_size, 128, GRADIENT_BLOCK),
        "BLOCK_K": _power_of_two(k, 16, 1024),
    }
    return Launch(gradient_kernel, constexprs, GRADIENT_WARPS)


def bias(vocab_size: int) -> Launch:
    return Launch(bias_kernel, {"V": vocab_size, "STRIDE": stride_of(vocab_size), **BIAS_TILE}, BIAS_WARPS)


# --- ahead of time -----------------------------------------------------------------------------------------------
def aot_specs(vocab_size: int, hidden: int, dtype: str) -> list[AotSpec]:
    """Every objective with plain heads, and the heaviest form of a head with the heaviest and with the lightest."""
    del hidden  # the rows are the vocabulary's
    specs = []
    for objective in OBJECTIVES.values():
        specs += _specs(objective, vocab_size, dtype)
    specs += _specs("exopd", vocab_size, dtype, capped=True)
    for given in ("top_k", "sampled_token"):
        specs += _specs(given, vocab_size, dtype, signal="given")
    for capped in (False, True):
        specs += _specs(OBJECTIVES[LogLikelihood], vocab_size, dtype, capped=capped, signal="none")
    specs.append(_spec("bias", bias(vocab_size), {"grad_ptr": dtype}))
    # What the launches above share is compiled once.
    return list({spec.identity: spec for spec in specs}.values())


def _specs(
    objective: str,
    vocab_size: int,
    dtype: str,
    *,
    capped: bool = False,
    signal: Literal["full", "given", "none"] = "full",
) -> list[AotSpec]:
    """``signal``: the teacher's whole distribution, its log-probabilities, or no teacher."""
    full = signal == "full"
    caps = (capped, capped and full, capped and objective == "exopd")
    sides = ["student"] + ["teacher"] * full + ["reference"] * (objective == "exopd")
    present = {"group_max_ptr": "fp32"} if full else {}
    present |= {f"{side}_ptr": "fp32" for side in sides} | {f"{side}_bias_ptr": dtype for side in sides if capped}
    form = ", capped, bias" if capped else ""
    note = form + {"full": "", "given": ", given", "none": ", no teacher"}[signal]
    launch = statistics(vocab_size, objective, caps)
    token = {"token_logprobs_ptr": "fp32"} if signal == "given" and objective == "sampled_token" else {}
    kind = launch.constexprs["OBJECTIVE"] or ("mixture" if objective == "exopd" else "kl")
    specs = [_spec(f"statistics[{kind}{note}]", launch, present | token)]
    if full and objective != "exopd":
        specs.append(_spec("overlap", overlap(vocab_size, caps), present))
    top = {"top_ids_ptr": "i64", "top_student_ptr": "fp32"} if objective == "top_k" else {}
    if objective == "top_k" and not full:
        top |= {"top_logprobs_ptr": "fp32", "tail_logprob_ptr": "fp32"}
    note = form + ("" if full else ", given")  # where there is no teacher, the statistics gave A = 1
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for out, out_dtype in ((dtype, torch_dtype), ("fp32", torch.float32)):
        launch = gradient(vocab_size, objective, caps, out_dtype, 64)
        specs.append(_spec(f"gradient[{objective}{note}, {out}]", launch, present | top | {"grad_ptr": out}))
    return specs


# Arguments that are not pointers, or are pointers that every launch has.
_TYPES = {
    name: "fp32" for side in ("student", "teacher", "reference") for name in (f"{side}_before", f"{side}_after")
} | dict.fromkeys(("lam", "logprob_floor", "slope", "parameter"), "fp32")
_TYPES |= {"k": "i32", "rows": "i32", "teacher_stride": "i32", "sampled_ids_ptr": "*i64:16"}
_TYPES |= dict.fromkeys(
    ("student_2C_ptr", "teacher_6C_ptr", "moments_ptr", "value_ptr", "factor_ptr", "accumulate_ptr"),
    "*fp32:16",
)


def _spec(name: str, launch: Launch, pointers: dict[str, str]) -> AotSpec:
    """``pointers``: element types of those that this launch passes and others may not; what is left is None."""
    names = [name for name in launch.kernel.arg_names if name not in launch.constexprs]
    types = {**_TYPES, **{name: f"*{kind}:16" for name, kind in pointers.items()}}
    return AotSpec(
        name=name,
        fn=launch.kernel,
        signature={name: types[name] for name in names if name in types},
        constexprs={**launch.constexprs, **{name: None for name in names if name not in types}},
        num_warps=launch.num_warps,
        **FUSION,
    )
