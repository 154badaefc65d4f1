"""The mini-batch: what was said of every sample, and in which order it is worked off. Pure, without I/O or torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opd_mesh.signals import SignalKind
from opd_mesh.trajectory import Trajectory


class Answer(Protocol):
    """A teacher's answer, here already or on its way."""

    def tensors(self) -> Mapping[str, np.ndarray]:
        """By name, R rows each; waits where it must. Not for the event loop. Raises what the teacher said."""
        ...

    def release(self) -> None:
        """Nobody asks again."""
        ...


@dataclass(frozen=True, slots=True)
class HeldAnswer:
    """One that is in memory and stays."""

    held: Mapping[str, np.ndarray]

    def tensors(self) -> Mapping[str, np.ndarray]:
        """See :class:`Answer`."""
        return self.held

    def release(self) -> None:
        """See :class:`Answer`."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What one teacher says of one trajectory.

    Attributes:
        head_digest: of the head that its hidden states belong to; None for the other signals.
    """

    teacher_id: str
    weight: float
    signal: SignalKind
    head_digest: str | None
    answer: Answer


@dataclass(frozen=True, slots=True)
class Sample:
    """A trajectory with all its marks, those of the reference model where the objective has one, and its advantage
    where it learns from rewards.
    """

    trajectory: Trajectory
    marks: tuple[Mark, ...] = ()
    reference: Mark | None = None
    advantage: float | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return len(self.trajectory.token_ids)

    @property
    def head_digests(self) -> tuple[str, ...]:
        """Of its teachers, sorted, each once."""
        return tuple(sorted({mark.head_digest for mark in self.marks if mark.head_digest is not None}))

    def mark_of(self, teacher_id: str) -> Mark:
        """What this teacher said."""
        return next(mark for mark in self.marks if mark.teacher_id == teacher_id)


def order_by_teacher(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of the same teachers stand together; ties by trajectory id.

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


# --- the plan --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Visit:
    """One pass under the heads of one window.

    Attributes:
        opens: the first visit: the student's hidden states are computed.
        closes: the last one: the gradient goes through the student's trunk.
    """

    window: int
    pass_index: int
    opens: bool
    closes: bool


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a mini-batch is worked off so that every head comes to the device once.

    Attributes:
        windows: digests of the heads that are there together, one window after the other; every head is in one.
        passes: samples of one forward pass.
        visits: in order of windows, so that a window is never come back to.
        suspended: passes that others are worked off between the first and the last visit of. Their activations are not
            kept: the trunk computes them once more at the end.
    """

    windows: tuple[tuple[str, ...], ...]
    passes: tuple[tuple[Sample, ...], ...]
    visits: tuple[Visit, ...]
    suspended: frozenset[int]

    @property
    def head_digests(self) -> frozenset[str]:
        """Of all heads that the mini-batch needs, those of the reference model included."""
        references = [sample.reference for part in self.passes for sample in part]
        return frozenset(digest for window in self.windows for digest in window) | frozenset(
            mark.head_digest for mark in references if mark is not None and mark.head_digest is not None
        )

    def shares(self, visit: Visit) -> dict[tuple[str, ...], list[int]]:
        """See :func:`plan_shares`."""
        window = self.windows[visit.window] if self.windows else ()
        return plan_shares(self.passes[visit.pass_index], window, first_visit=visit.opens)


def plan_batch(samples: Sequence[Sample], *, tokens_per_pass: int, heads_together: int) -> BatchPlan:
    """Order a mini-batch by its teachers' heads.

    Samples of one window stream through it, pass by pass. A sample whose teachers' heads do not fit one window is
    visited once per window; its gradients at the hidden states are collected until the last.
    """
    ordered = order_by_teacher(samples)
    windows = _windows(ordered, heads_together)
    place = {digest: index for index, window in enumerate(windows) for digest in window}
    reach = [tuple(sorted({place[digest] for digest in sample.head_digests})) or (0,) for sample in ordered]
    if all(len(windows_of) == 1 for windows_of in reach):
        runs = [sorted(range(len(ordered)), key=lambda i: (reach[i], i))]  # a pass may go from one window to the next
    else:
        runs = [[i for i in range(len(ordered)) if reach[i] == kind] for kind in sorted(set(reach))]
    passes = [part for run in runs for part in split_into_passes([ordered[i] for i in run], tokens_per_pass)]
    reaches = [sorted({place[digest] for sample in part for digest in sample.head_digests}) or [0] for part in passes]
    # Within a window: what was opened before it, the latest first; what stays in it; what goes on. So the last pass of
    # one window can be the first of the next, with its activations kept.
    order = sorted(
        ((window, index) for index, windows_of in enumerate(reaches) for window in windows_of),
        key=lambda visit: (
            visit[0],
            (0, -visit[1]) if reaches[visit[1]][0] < visit[0] else (1 + (reaches[visit[1]][-1] > visit[0]), visit[1]),
        ),
    )
    visits = tuple(
        Visit(window, index, window == reaches[index][0], window == reaches[index][-1]) for window, index in order
    )
    first = {visit.pass_index: i for i, visit in reversed(list(enumerate(visits)))}
    last = {visit.pass_index: i for i, visit in enumerate(visits)}
    suspended = frozenset(i for i in range(len(passes)) if last[i] - first[i] + 1 != len(reaches[i]))
    return BatchPlan(windows, tuple(tuple(part) for part in passes), visits, suspended)


def _windows(samples: Sequence[Sample], heads_together: int) -> tuple[tuple[str, ...], ...]:
    """Digests in the order in which samples need them, so that those of one sample stand near each other."""
    digests = list(dict.fromkeys(digest for sample in samples for digest in sample.head_digests))
    return tuple(tuple(digests[i : i + heads_together]) for i in range(0, len(digests), heads_together))


def plan_shares(
    samples: Sequence[Sample], window: Sequence[str], *, first_visit: bool
) -> dict[tuple[str, ...], list[int]]:
    """Which teachers mark which samples (by index) in one go, of those whose heads are in the window.

    Marks without a head have a part in the first visit. Every teacher of a sample has a part in exactly one share of
    one visit.
    """
    shares: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        teachers = tuple(
            sorted(
                mark.teacher_id
                for mark in sample.marks
                if mark.head_digest in window or (mark.head_digest is None and first_visit)
            )
        )
        if teachers:
            shares.setdefault(teachers, []).append(index)
    return shares


def marks_in_order(plan: BatchPlan) -> list[Mark]:
    """All marks in the order in which the plan asks for them, references with the first visit of their sample."""
    marks: list[Mark] = []
    for visit in plan.visits:
        samples = plan.passes[visit.pass_index]
        for teachers, indices in plan.shares(visit).items():
            marks += [samples[index].mark_of(teacher) for teacher in teachers for index in indices]
        if visit.opens:
            marks += [sample.reference for sample in samples if sample.reference is not None]
    return marks
