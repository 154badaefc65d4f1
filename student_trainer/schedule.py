"""When responses are written ahead of the training, and how old they are then: pure, without I/O.

The policy has a version: the optimizer steps behind it. Step m trains with version m − 1 and makes version m. Its
responses are asked for once every server holds version m − 1 − ``max_staleness``, or a later one. A version never falls
while the run goes on, so no token of step m is older than that, however long its response takes.
"""

from __future__ import annotations

from collections.abc import Iterable

from opd_mesh.errors import InternalError
from opd_mesh.trajectory import Trajectory


def steps_to_write(written: int, served_version: int, *, max_staleness: int, total_steps: int) -> range:
    """Steps whose responses may be asked for now.

    Args:
        written: the last step whose responses were asked for already.
        served_version: the oldest that any rollout server may still hold.
    """
    return range(written + 1, min(total_steps, served_version + 1 + max_staleness) + 1)


def staleness(trajectory: Trajectory, version: int) -> int:
    """``version`` minus the oldest among the response's tokens; 0 where these do not say."""
    return version - min(trajectory.policy_versions, default=version)


def check_staleness(trajectories: Iterable[Trajectory], version: int, *, max_staleness: int) -> None:
    """Of our own, before they are trained on. Raises :class:`InternalError` where the schedule was not kept."""
    for trajectory in trajectories:
        oldest, newest = version - staleness(trajectory, version), max(trajectory.policy_versions, default=version)
        if newest > version or oldest < version - max_staleness:
            raise InternalError(
                f"response {trajectory.trajectory_id} has tokens of versions {oldest} to {newest}, but version "
                f"{version} is trained, with max_staleness {max_staleness}"
            )
