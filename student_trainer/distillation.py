"""Distillation: Σ_i w_i · D(student, teacher_i), from hidden states and heads, one window of heads after the other.

The maths is in ``opd_kernels``. Letters: R response tokens of a pass, N teachers of a share, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import opd_kernels
import torch
from opd_kernels import Divergence, LinearHead, Signal, linear_divergence
from torch import Tensor

from opd_mesh.config.training import (
    DivergenceConfig,
    ExOpdConfig,
    ForwardKlConfig,
    ImportanceConfig,
    JsdConfig,
    SampledTokenConfig,
    TopKConfig,
)
from student_trainer.batch import Sample
from student_trainer.heads import HeadStore
from student_trainer.importance import importance_ratios
from student_trainer.passes import OpenPass, TokenMeans, sampled_ids
from student_trainer.shares import Share, shares_of

# Divergence field [N, R] → metric prefix, averaged over a teacher's tokens.
TEACHER_METRICS = {
    "kl_T": "kl",
    "teacher_entropy_T": "entropy",
    "overlap_ratio_T": "overlap",
    "overlap_mass_T": "overlap_mass",
}


class Measure(Protocol):
    """A divergence of R response tokens from N teachers."""

    def __call__(
        self,
        student_hidden_RD: Tensor,
        student_head: LinearHead,
        teachers: Sequence[Signal],
        *,
        reference: Signal | None,
        sampled_ids_R: Tensor,
        token_weights_NR: Tensor,
    ) -> Divergence:
        """``loss`` is the weighted sum over tokens; the weights hold w_i / (tokens of the whole mini-batch)."""
        ...


@dataclass(frozen=True, slots=True)
class LinearDivergence:
    """:func:`opd_kernels.linear_divergence` with a recipe's settings.

    Attributes:
        deterministic: a token's loss and gradient do not depend on which others share its pass.
    """

    objective: opd_kernels.Objective
    temperature: float = 1.0
    implementation: str = "auto"
    deterministic: bool = False

    def __call__(
        self,
        student_hidden_RD: Tensor,
        student_head: LinearHead,
        teachers: Sequence[Signal],
        *,
        reference: Signal | None,
        sampled_ids_R: Tensor,
        token_weights_NR: Tensor,
    ) -> Divergence:
        """See :class:`Measure`."""
        return linear_divergence(
            student_hidden_RD,
            student_head,
            teachers=teachers,
            reference=reference,
            sampled_ids_T=sampled_ids_R,
            token_weights_T=token_weights_NR,
            objective=self.objective,
            temperature=self.temperature,
            implementation=self.implementation,
            deterministic=self.deterministic,
        )


def build_divergence(config: DivergenceConfig, *, deterministic: bool = False) -> LinearDivergence:
    """The divergence that a recipe names."""
    objective: opd_kernels.Objective = opd_kernels.ReverseKL()
    match config:
        case ForwardKlConfig():
            objective = opd_kernels.ForwardKL()
        case JsdConfig():
            objective = opd_kernels.JSD(config.beta)
        case ExOpdConfig():
            objective = opd_kernels.ExOPD(config.lam)
        case TopKConfig():
            objective = opd_kernels.TopK(config.k)
        case SampledTokenConfig():
            objective = opd_kernels.SampledToken()
    return LinearDivergence(objective, config.temperature, config.implementation, deterministic)


def reverse_kl_measure(implementation: str = "auto", *, deterministic: bool = False) -> LinearDivergence:
    """Reverse KL at temperature 1: what evaluations report, whatever trains."""
    return LinearDivergence(opd_kernels.ReverseKL(), 1.0, implementation, deterministic)


# --- the objective ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Distillation:
    """See :class:`student_trainer.objective.Objective`. A batch is averaged over its response tokens, all of them."""

    measure: Measure
    importance: ImportanceConfig | None = None

    @classmethod
    def of(cls, config: DivergenceConfig, *, deterministic: bool = False) -> Distillation:
        """As a recipe wants it."""
        return cls(build_divergence(config, deterministic=deterministic), config.importance)

    def of_batch(
        self, samples: Sequence[Sample], head: LinearHead, heads: HeadStore, means: TokenMeans
    ) -> _BatchDivergence:
        """See :class:`student_trainer.objective.Objective`."""
        total_tokens = sum(sample.trajectory.num_scored for sample in samples)
        return _BatchDivergence(self, head, heads, means, total_tokens)


@dataclass(frozen=True, slots=True)
class _BatchDivergence:
    objective: Distillation
    head: LinearHead
    heads: HeadStore
    means: TokenMeans
    total_tokens: int

    def of_pass(self, current: OpenPass) -> _PassDivergence:
        return _PassDivergence(self, current)


class _PassDivergence:
    def __init__(self, whole: _BatchDivergence, current: OpenPass) -> None:
        self._whole = whole
        self._current = current
        # Of every token: Σ_i w_i KL_i, and the student's entropy, however many teachers mark it.
        self._kl_R = torch.zeros(len(current.leaf_Rd), dtype=torch.float64, device=current.device)
        self._entropy_R = torch.zeros_like(self._kl_R)
        self._importance_R: Tensor | None = None
        if (importance := whole.objective.importance) is not None:
            self._importance_R = self._weigh(importance.truncate_at)

    def _weigh(self, truncate_at: float) -> Tensor:
        """Importance weights of all tokens, from the rows that are here anyway."""
        trajectories = [sample.trajectory for sample in self._current.batch]
        temperatures = [one.sampling.temperature for one in trajectories for _ in range(one.num_scored)]
        logprobs = [value for one in trajectories for value in one.sampling_logprobs]
        device = self._current.device
        ratios_R = importance_ratios(
            self._current.leaf_Rd.detach(),
            self._whole.head,
            sampled_ids(self._current.batch, device),
            torch.tensor(temperatures, device=device),
            torch.tensor(logprobs, device=device),
        )
        weights_R = ratios_R.clamp(max=truncate_at)
        self._whole.means.add("importance/mean", weights_R)
        self._whole.means.add("importance/truncated", (ratios_R > truncate_at).double())
        return weights_R

    def visit(self, shares: Mapping[tuple[str, ...], Sequence[int]]) -> float:
        """One share of teachers after the other."""
        whole, current, loss = self._whole, self._current, 0.0
        for share in shares_of(current.batch, shares, whole.heads, current.device):
            divergence = whole.objective.measure(
                current.leaf_Rd[share.index_R],
                whole.head,
                share.teachers,
                reference=share.reference,
                sampled_ids_R=share.sampled_ids_R,
                token_weights_NR=self._weighted(share) / whole.total_tokens,
            )
            divergence.loss.backward()
            loss += float(divergence.loss.detach())
            self._take(share, divergence)
            self._kl_R[share.index_R] += (share.weights_NR * divergence.kl_T.double()).sum(0)
            self._entropy_R[share.index_R] = divergence.student_entropy_T.double()
            share.release()
            del share  # its heads leave before the next ones arrive
        return loss

    def _weighted(self, share: Share) -> Tensor:
        """w_i of each of its rows, times the row's importance weight where there is one."""
        if self._importance_R is None:
            return share.weights_NR
        return share.weights_NR * self._importance_R[share.index_R].to(share.weights_NR.dtype)

    def _take(self, share: Share, divergence: Divergence) -> None:
        means = self._whole.means
        for attribute, prefix in TEACHER_METRICS.items():
            for teacher_id, values_R in zip(share.teacher_ids, getattr(divergence, attribute), strict=True):
                means.add(f"{prefix}/{teacher_id}", values_R)
        # The gap of Li et al., "Rethinking On-Policy Distillation", arXiv 2604.13016.
        gap_NR = (divergence.teacher_entropy_T - divergence.student_entropy_T).abs()
        for teacher_id, gap_R in zip(share.teacher_ids, gap_NR, strict=True):
            means.add(f"entropy_gap/{teacher_id}", gap_R)
        per_domain = {
            "overlap_domain": divergence.overlap_ratio_T,
            "overlap_mass_domain": divergence.overlap_mass_T,
            "entropy_gap_domain": gap_NR,
        }
        for prefix, values_NR in per_domain.items():
            for domain, rows in share.rows_of_domain.items():
                means.add(f"{prefix}/{domain}", values_NR[:, rows])

    def close(self) -> None:
        """See :class:`student_trainer.objective.PassLoss`."""
        means = self._whole.means
        means.add("entropy/student", self._entropy_R)
        for domain, kl_R in self._current.by_domain(self._kl_R):
            means.add(f"kl_domain/{domain}", kl_R)
        for domain, entropy_R in self._current.by_domain(self._entropy_R):
            means.add(f"entropy_domain/{domain}", entropy_R)
        for sample in self._current.batch:
            if sample.reference is not None:
                sample.reference.answer.release()
