"""Objectives behind one interface: hidden rows and marks in, loss and diagnostics out.

An objective is a small class that declares its divergence; the loop never asks which one it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from opd_kernels import LinearHead
from opd_kernels.divergence import Divergence, linear_divergence
from torch import Tensor

from opd_mesh.config.recipe import ObjectiveConfig


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """What one teacher said of R tokens: hidden states [R, E] with the head that belongs to them, or logits [R, V]."""

    hidden_RE: Tensor | None = None
    head: LinearHead | None = None
    logits_RV: Tensor | None = None


class Objective(Protocol):
    """Loss of R response tokens against one teacher."""

    def __call__(
        self,
        student_hidden_RD: Tensor,
        student_head: LinearHead,
        teacher: TeacherRows,
        *,
        sampled_ids_R: Tensor,
        token_weights_R: Tensor,
    ) -> Divergence:
        """``loss`` is the weighted sum over tokens; the weights hold w_i / (tokens of the whole mini-batch)."""
        ...


@dataclass(frozen=True)
class ReverseKl:
    """Σ_i w_i · KL(student ‖ teacher_i), exact over the vocabulary (DeepSeek-V4 report, arXiv 2606.19348, Eq. 29)."""

    config: ObjectiveConfig

    def __call__(
        self,
        student_hidden_RD: Tensor,
        student_head: LinearHead,
        teacher: TeacherRows,
        *,
        sampled_ids_R: Tensor,
        token_weights_R: Tensor,
    ) -> Divergence:
        """See :class:`Objective`."""
        hidden = teacher.hidden_RE
        if hidden is not None and teacher.head is not None:
            hidden = hidden.to(teacher.head.weight.dtype)  # a narrower wire is widened once, here
        return linear_divergence(
            student_hidden_RD,
            student_head,
            hidden,
            teacher.head,
            teacher_logits_TV=None if teacher.logits_RV is None else teacher.logits_RV.to(torch.float32),
            sampled_ids_T=sampled_ids_R,
            token_weights_T=token_weights_R,
            objective="reverse_kl",
            temperature=self.config.temperature,
            implementation=self.config.implementation,
        )


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective a recipe names."""
    return {"reverse_kl": ReverseKl}[config.name](config)
