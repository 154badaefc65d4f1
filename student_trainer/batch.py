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
    """A trajectory with all its marks, and those of the reference model where the objective has one."""

    trajectory: Trajectory
    marks: tuple[Mark, ...]
    reference: Mark | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return len(self.trajectory.token_ids)

    def mark_of(self, teacher_id: str) -> Mark:
        """What this teacher said."""
        return next(mark for mark in self.marks if mark.teacher_id == teacher_id)


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


def plan_shares(samples: Sequence[Sample], heads_resident: int) -> dict[tuple[str, ...], list[int]]:
    """Which teachers mark which samples (by index) in one go: at most ``heads_resident`` teachers together.

    Every teacher of a sample has a part in exactly one share of it, and a share stands in the plan once, so with one
    head at a time each head is needed once.
    """
    shares: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        teachers = sorted(mark.teacher_id for mark in sample.marks)
        for start in range(0, len(teachers), heads_resident):
            shares.setdefault(tuple(teachers[start : start + heads_resident]), []).append(index)
    return shares
