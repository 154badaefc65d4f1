"""What a step says of itself: seconds by phase, and its line of ``metrics.jsonl``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opd_mesh.trajectory import FinishReason, Trajectory
from student_trainer.batch import Sample
from student_trainer.checkpoint import TrainerState
from student_trainer.update import UpdateResult


class Clock:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time inside to ``name``."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def move(self, seconds: float, source: str, target: str) -> None:
        """Part of a phase belongs to another."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def total(self) -> float:
        """Since the step began."""
        return time.monotonic() - self._started


def metrics_line(
    progress: TrainerState, samples: Sequence[Sample], result: UpdateResult, clock: Clock
) -> dict[str, float]:
    """One line of metrics.jsonl (DESIGN §7), but for what only the loop knows: staleness, wire bytes, heads loaded."""
    lengths = [sample.trajectory.num_scored for sample in samples]
    total_s = clock.total()
    line: dict[str, float] = {
        "step": progress.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "tokens": result.tokens,
        "tokens_per_s": result.tokens / total_s,
        "policy_version": progress.step,
        "lineage": progress.lineage,
        "response_length": sum(lengths) / len(lengths),
        "samples": len(samples),
        "external_dropped": progress.dropped_external,
        "passes": result.passes,
        "heads_needed": result.heads,
        "seconds/step": total_s,
    }
    by_domain: dict[str, list[Trajectory]] = {}
    for sample in samples:
        by_domain.setdefault(sample.trajectory.domain, []).append(sample.trajectory)
    for domain, trajectories in by_domain.items():
        line[f"response_length/{domain}"] = sum(one.num_scored for one in trajectories) / len(trajectories)
        cut = sum(one.finish_reason is FinishReason.LENGTH for one in trajectories)
        line[f"truncated/{domain}"] = cut / len(trajectories)
    return line | result.metrics | {f"seconds/{name}": seconds for name, seconds in clock.seconds.items()}
