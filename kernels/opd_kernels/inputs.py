"""What implementations get and give.

Letters in names: T response tokens, V ids of the vocabulary (padding left out), D the student's hidden width, E a
teacher's, N teachers, K ids of a top-k signal, C rows of a chunk, B rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.head import LinearHead
from opd_kernels.objectives import LogLikelihood, Objective
from opd_kernels.signals import Signal

OVERLAP_K = 16  # "Rethinking OPD", arXiv 2604.13016
# The logarithm of the smallest normal float32: a log-probability that was lost to underflow is taken for this.
LOGPROB_FLOOR = -87.0
# The mass outside a top-k signal is 1 − Σ of float32 numbers, known to about their rounding.
TAIL_FLOOR = 1e-7


@dataclass(frozen=True, slots=True)
class Divergence:
    """Loss and diagnostics. All are float32, or float64 where the student's hidden states or head are.

    Shapes are [T]; those that a teacher has part in are [N, T] if ``teachers`` were given as a sequence. A diagnostic
    that the teacher's signal does not tell (the entropy of a teacher that gave one log-probability) is NaN.

    Attributes:
        loss: scalar, Σ_i Σ_t weight_it · divergence_it; differentiable in the student's hidden states, head weight and
            bias.
        divergence_T: what the objective sums, not weighted. This and all that follow are detached.
        kl_T: KL(p ‖ q), whatever the objective.
        student_entropy_T: H(p) in nats; [T] always.
        teacher_entropy_T: H(q) in nats.
        student_logprob_T: log p of the sampled id; [T] always.
        teacher_logprob_T: log q of the sampled id.
        overlap_ratio_T: |top-k(p) ∩ top-k(q)| / k with k = min(16, V). Among equal logits, which enter the
            top k is left open.
        overlap_mass_T: the student's probability on that intersection, Σ p_v over v ∈ top-k(p) ∩ top-k(q).
    """

    loss: Tensor
    divergence_T: Tensor
    kl_T: Tensor
    student_entropy_T: Tensor
    teacher_entropy_T: Tensor
    student_logprob_T: Tensor
    teacher_logprob_T: Tensor
    overlap_ratio_T: Tensor
    overlap_mass_T: Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of T given tokens, in nats. float32, or float64 where the hidden states or the head are.

    Attributes:
        logprobs_T: log p of each token; differentiable in the hidden states, head weight and bias, once.
        entropy_T: H(p) of the distribution that each token was one of; detached.
    """

    logprobs_T: Tensor
    entropy_T: Tensor


# Rows of the statistics tensors that implementations fill: [2, T] of the student, [6, N, T] of the teachers.
STUDENT_STATS = ("student_entropy_T", "student_logprob_T")
TEACHER_STATS = (
    "divergence_T",
    "kl_T",
    "teacher_entropy_T",
    "teacher_logprob_T",
    "overlap_ratio_T",
    "overlap_mass_T",
)


@dataclass(frozen=True, slots=True)
class DivergenceInputs:
    """What an implementation gets: checked, and nothing left to default but the chunk.

    With the objective :class:`LogLikelihood`, the log-probabilities alone are wanted: there is one teacher, and its
    signal is empty.
    """

    student_hidden_TD: Tensor
    student_head: LinearHead
    teachers: tuple[Signal, ...]
    reference: Signal | None
    sampled_ids_T: Tensor
    token_weights_NT: Tensor
    objective: Objective | LogLikelihood
    temperature: float
    chunk_tokens: int | None
    deterministic: bool

    @property
    def vocab_size(self) -> int:
        """V: ids that all sides have, without padding."""
        return self.student_head.vocab_size

    @property
    def overlap_k(self) -> int:
        return min(OVERLAP_K, self.vocab_size)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """Of the teachers and, last, the reference model."""
        return self.teachers if self.reference is None else (*self.teachers, self.reference)

    @property
    def has_float64(self) -> bool:
        """Whether there is float64 among the hidden states, head weights and logits."""
        operands = [self.student_hidden_TD, self.student_head.weight]
        for signal in self.signals:
            operands += [x for x in (signal.hidden_TE, signal.logits_TV) if x is not None]
            operands += [] if signal.head is None else [signal.head.weight]
        return any(x.dtype == torch.float64 for x in operands)

    @property
    def result_dtype(self) -> torch.dtype:
        """Of statistics, accumulators and results."""
        wide = torch.promote_types(self.student_hidden_TD.dtype, self.student_head.weight.dtype)
        return torch.float64 if wide == torch.float64 else torch.float32

    def result(self, loss: Tensor, student_2T: Tensor, teachers_6NT: Tensor) -> Divergence:
        """From the statistics tensors (``STUDENT_STATS``, ``TEACHER_STATS``) to named fields [T] and [N, T]."""
        return Divergence(
            loss=loss,
            **dict(zip(STUDENT_STATS, student_2T.unbind(0), strict=True)),
            **dict(zip(TEACHER_STATS, teachers_6NT.unbind(0), strict=True)),
        )
