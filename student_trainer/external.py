"""Trajectories from outside: which of them a step takes."""

from __future__ import annotations

from opd_mesh.config.recipe import Recipe
from student_trainer.checkpoint import TrainerState
from student_trainer.rollouts import Rollouts
from student_trainer.schedule import staleness
from student_trainer.writing import Arrival


def take_external(rollouts: Rollouts, progress: TrainerState, recipe: Recipe) -> list[Arrival]:
    """Those that are fresh enough, each once; the others are dropped and counted."""
    taken: list[Arrival] = []
    consumed = set(progress.consumed_external)
    while rollouts.external and len(taken) < recipe.batch.max_external_per_step:
        arrival = rollouts.external.popleft()
        trajectory = arrival.trajectory
        if trajectory.trajectory_id in consumed:
            rollouts.discarded.append(arrival.entry_id)
        elif (
            trajectory.lineage != progress.lineage
            or not 0 <= staleness(trajectory, progress.step) <= recipe.max_staleness
        ):
            rollouts.discarded.append(arrival.entry_id)
            progress.dropped_external += 1
        else:
            consumed.add(trajectory.trajectory_id)
            taken.append(arrival)
    return taken
