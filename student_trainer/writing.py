"""Responses on their way: asked of a rollout server, awaited on the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from opd_mesh.clients.rollout import RolloutClient, Written
from opd_mesh.errors import OpdError, RequestConflictError
from opd_mesh.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Arrival:
    """A trajectory and the stream entry that holds it until it is acknowledged."""

    trajectory: Trajectory
    entry_id: str


def own_trajectory_id(lineage: int, step: int, index: int) -> str:
    """Unique in the run, over resumes too."""
    return f"l{lineage:04d}-s{step:06d}-p{index:04d}"


def is_own_id(trajectory_id: str) -> bool:
    """Whether an id is of the form that the run gives to its own trajectories (or its evaluations)."""
    return trajectory_id[:1] in ("l", "e") and trajectory_id[1:5].isdigit() and trajectory_id[5:6] == "-"


@dataclass(frozen=True, slots=True)
class Request:
    """One response that is being written, and by whom."""

    server: RolloutClient
    task: asyncio.Task[Written]


class Writing:
    """The responses of one step, until all have come through the stream. For one event loop.

    Args:
        on_arrival: called after each, and when it is certain that one will never come.

    Attributes:
        wanted: ids that have not come.
        arrivals: what has come, in that order.
        suspect: a server knows a request, or the stream a response, with other contents, or what came is unusable. If
            a response does not come, that is why.
        all_written_at: since when every request is answered though some response has not come; None: they are not.
    """

    def __init__(self, on_arrival: Callable[[], None]) -> None:
        self.wanted: set[str] = set()
        self.arrivals: list[Arrival] = []
        self.all_written_at: float | None = None
        self.suspect: OpdError | None = None
        self._on_arrival = on_arrival
        self._requests: dict[str, Request] = {}
        self._ended = asyncio.Event()
        self._error: BaseException | None = None

    def ask(self, request_id: str, server: RolloutClient, work: Coroutine[Any, Any, Written]) -> None:
        """Ask for one more response. All are asked for before the loop goes on."""
        self.wanted.add(request_id)
        task = asyncio.create_task(work)
        self._requests[request_id] = Request(server, task)
        task.add_done_callback(lambda done: self._answered(request_id, done))

    def _answered(self, request_id: str, task: asyncio.Task[Written]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if request_id not in self.wanted:
            return  # it came through the stream: whatever became of the call is of no account
        if isinstance(error, RequestConflictError):
            # A server that was restarted may have written again what it had published already: then that comes.
            self.suspect = error
        elif error is not None:
            self.fail(error)
        elif not task.result().num_scored:  # cancelled from outside before its first token: never published
            self.wanted.discard(request_id)
            self._on_arrival()
            self._end_if_complete()

    def take(self, arrival: Arrival) -> None:
        """One that is wanted has come."""
        self.wanted.remove(arrival.trajectory.trajectory_id)
        self.arrivals.append(arrival)
        self.all_written_at = None
        self._on_arrival()
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        if not self.wanted:
            self._ended.set()

    def fail(self, error: BaseException) -> None:
        """Whoever waits hears of it, now or later; the first error counts."""
        self._error = self._error or error
        self._ended.set()

    @property
    def complete(self) -> bool:
        """All have come."""
        return not self.wanted

    @property
    def ended(self) -> bool:
        """Complete or failed."""
        return self._ended.is_set()

    @property
    def all_answered(self) -> bool:
        """No request is open."""
        return all(request.task.done() for request in self._requests.values())

    async def wait(self) -> None:
        """Until all have come. Raises what a server said of a request, or the stream, of those that have not."""
        await self._ended.wait()
        if self._error is not None and not self.complete:
            raise self._error

    async def close(self) -> dict[str, RolloutClient]:
        """Let go of the calls; returns the servers of those that were not answered, by request id."""
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.task.cancel()
        await asyncio.gather(*(request.task for request in requests.values()), return_exceptions=True)
        return {name: request.server for name, request in requests.items() if request.task.cancelled()}
