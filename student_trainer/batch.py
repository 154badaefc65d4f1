"""The mini-batch: which samples share a pass, in which order. Pure functions, without I/O or torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd_mesh.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Mark:
    """What one teacher said of one trajectory: [R, d] hidden states or [R, V] logits."""

    teacher_id: str
    weight: float
    rows: np.ndarray
    is_logits: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """A trajectory with all its marks."""

    trajectory: Trajectory
    marks: tuple[Mark, ...]

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return len(self.trajectory.token_ids)


def order_by_teacher(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of the same teachers stand together, so that a head is loaded once; ties by trajectory id.

    The order does not depend on arrival, which makes it part of determinism.
    """
    return sorted(
        samples, key=lambda sample: (sorted(mark.teacher_id for mark in sample.marks), sample.trajectory.trajectory_id)
    )


def split_into_passes(samples: Sequence[Sample], tokens_per_pass: int) -> list[list[Sample]]:
    """Consecutive samples that fit the token budget together; one that is longer than the budget goes alone."""
    passes: list[list[Sample]] = []
    tokens = 0
    for sample in samples:
        if not passes or tokens + sample.num_tokens > tokens_per_pass:
            passes.append([])
            tokens = 0
        passes[-1].append(sample)
        tokens += sample.num_tokens
    return passes


def teachers_in_order(samples: Sequence[Sample]) -> list[str]:
    """Each teacher once, by first appearance."""
    return list(dict.fromkeys(mark.teacher_id for sample in samples for mark in sample.marks))
