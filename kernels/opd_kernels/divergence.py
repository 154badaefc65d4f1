"""The one entry to all divergences: what goes in, what comes out, and who computes it.

The letters in names are explained in :mod:`opd_kernels.inputs`, the maths in :mod:`opd_kernels.objectives`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from opd_kernels.checks import check, one_or_more
from opd_kernels.head import LinearHead
from opd_kernels.inputs import STUDENT_STATS, TEACHER_STATS, Divergence, DivergenceInputs
from opd_kernels.objectives import Objective, ReverseKL
from opd_kernels.signals import Signal

# name → module. A module offers `compute(DivergenceInputs) -> Divergence`, and `token_logprobs` of the same, which
# returns `TokenLogprobs`. Imported when asked for, so that an implementation may need a package (Triton) that this
# machine lacks.
IMPLEMENTATIONS: dict[str, str] = {
    "triton": "opd_kernels.triton_backend",
    "torch": "opd_kernels.torch_backend",
    "reference": "opd_kernels.reference",
}


def linear_divergence(
    student_hidden_TD: Tensor,
    student_head: LinearHead,
    teacher_hidden_TE: Tensor | None = None,
    teacher_head: LinearHead | None = None,
    *,
    teachers: Signal | Sequence[Signal] | None = None,
    reference: Signal | None = None,
    sampled_ids_T: Tensor,
    token_weights_T: Tensor | None = None,
    objective: Objective | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    deterministic: bool = False,
    implementation: str = "auto",
) -> Divergence:
    """The divergence of student from teachers, summed over tokens with weights, without a [T, V] tensor.

    Gradients are computed in the forward pass and only of what requires them: a frozen head costs no gradient GEMM.

    Args:
        student_hidden_TD: [T, D] floating; row t predicts response token t.
        student_head: weight [≥V, D].
        teacher_hidden_TE, teacher_head: of one teacher, the usual case: [T, E] floating, E may differ from D, and
            weight [≥V, E]; the same ``vocab_size`` as the student's, padding may differ.
        teachers: instead of these two, one signal of any form, or several teachers for the same tokens: the student is
            projected once for all of them, and their heads must be resident together. Call once per teacher and add
            the losses where they must not be.
        reference: the reference model of :class:`ExOPD`, with its whole distribution.
        sampled_ids_T: [T] integer, the response tokens, each below V.
        token_weights_T: [T], the same for every teacher, or [N, T]; detached; None means 1. Divide by the real tokens
            of the whole batch here, so that no mean of means arises. A weight of 0 leaves a row out of the loss, but
            does not mask it: 0 · NaN is NaN, so what it was computed from must be finite, too.
        objective: ``ReverseKL()`` if None.
        temperature: τ, divides the logits of all sides, after scale and soft-cap.
        chunk_tokens: rows projected at a time; None lets the implementation choose, not knowing T.
        deterministic: batch-invariant: every GEMM has the same shape whatever T is, and a row's statistics and its
            hidden state's gradient have bits that do not depend on the other rows. On a CPU that needs
            ``chunk_tokens=None``: of other numbers of rows, some go through other kernels of its GEMM.
        implementation: "auto", or a key of ``IMPLEMENTATIONS``.

    Raises:
        ValueError: the arguments do not fit each other; the message names the one to mend.
    """
    signals, is_one = one_or_more(teachers, teacher_hidden_TE, teacher_head)
    if token_weights_T is None:
        token_weights_T = torch.ones(student_hidden_TD.shape[:1], device=student_hidden_TD.device)
    weights = token_weights_T.detach()
    inputs = DivergenceInputs(
        student_hidden_TD=student_hidden_TD,
        student_head=student_head,
        teachers=signals,
        reference=reference,
        sampled_ids_T=sampled_ids_T,
        token_weights_NT=weights.expand(len(signals), *weights.shape) if weights.dim() == 1 else weights,
        objective=ReverseKL() if objective is None else objective,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        deterministic=deterministic,
    )
    module = implementation_of(inputs, implementation)
    check(inputs)
    result: Divergence = module.compute(inputs)
    if is_one:
        fields = {name: getattr(result, name) for name in STUDENT_STATS}
        fields |= {name: getattr(result, name)[0] for name in TEACHER_STATS}
        result = Divergence(loss=result.loss, **fields)
    return result


def implementation_of(inputs: DivergenceInputs, name: str) -> ModuleType:
    """The module of that name in ``IMPLEMENTATIONS``, or for "auto" the one that fits the inputs.

    Raises:
        ValueError: there is none, or it needs a package that is not installed.
    """
    if name == "auto":
        name = fitting_implementation(inputs.student_hidden_TD.device, has_float64=inputs.has_float64)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: {name!r} is unknown; choose one of {['auto', *IMPLEMENTATIONS]}")
    if name == "triton" and not _has_triton():
        raise ValueError("implementation: 'triton' needs the package of that name: pip install triton")
    return importlib.import_module(IMPLEMENTATIONS[name])


def fitting_implementation(device: torch.device, *, has_float64: bool) -> str:
    """What "auto" means. Triton's kernels compute in float32 and refuse float64."""
    return "triton" if device.type == "cuda" and not has_float64 and _has_triton() else "torch"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
