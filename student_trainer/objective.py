"""Objectives behind one interface: hidden rows and signals in, loss and diagnostics out.

The maths is in ``opd_kernels``; here a recipe's choice becomes one of its values, and the loop never asks which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import opd_kernels
from opd_kernels import Divergence, LinearHead, Signal, linear_divergence
from torch import Tensor

from opd_mesh.config.training import (
    ExOpdConfig,
    ForwardKlConfig,
    JsdConfig,
    ObjectiveConfig,
    ReverseKlConfig,
    SampledTokenConfig,
    TopKConfig,
)


class BatchObjective(Protocol):
    """Loss of R response tokens against N teachers."""

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
    """Σ_i w_i · D(student, teacher_i), computed from hidden states and heads.

    Attributes:
        objective: D.
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
        """See :class:`BatchObjective`."""
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


def build_objective(config: ObjectiveConfig, *, deterministic: bool = False) -> LinearDivergence:
    """The objective a recipe names."""
    objective: opd_kernels.Objective
    match config:
        case ReverseKlConfig():
            objective = opd_kernels.ReverseKL()
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


def reverse_kl_measure(config: ObjectiveConfig, *, deterministic: bool = False) -> LinearDivergence:
    """Reverse KL at temperature 1: what evaluations report, whatever trains."""
    return LinearDivergence(opd_kernels.ReverseKL(), 1.0, config.implementation, deterministic)
