"""Finished trajectories on their way to Redis: published together, and kept and tried again while it is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from opd_mesh.convert import trajectory_to_proto
from opd_mesh.errors import InternalError, OpdError, OverloadedError, UnavailableError
from opd_mesh.stream import TrajectoryStream
from rollout_server.requests import RequestState

log = logging.getLogger("rollout_server")
FIRST_DELIVERY_DELAY_S, LAST_DELIVERY_DELAY_S = 1.0, 30.0


@dataclass(slots=True)
class _Late:
    """What Redis did not take of one run."""

    states: list[RequestState] = field(default_factory=list)
    again: asyncio.Event = field(default_factory=asyncio.Event)  # set to try at once


class Delivery:
    """To the streams of all runs. For one event loop.

    Args:
        stream_of: the Redis stream of a run.
        delivered: called with those that have arrived.
        fail: called with one that never will, and why.
        keep: runs a coroutine to its end.
    """

    def __init__(
        self,
        stream_of: Callable[[str], TrajectoryStream],
        *,
        delivered: Callable[[Sequence[RequestState]], None],
        fail: Callable[[RequestState, OpdError], None],
        keep: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._stream_of = stream_of
        self._delivered = delivered
        self._fail = fail
        self._keep = keep
        self._late: dict[str, _Late] = {}
        self._stopping = False

    def deliver(self, states: Sequence[RequestState]) -> None:
        """Publish what has finished together, as soon as Redis takes it; until then its listeners hear of the error."""
        for run_id in dict.fromkeys(state.params.run_id for state in states):
            self._keep(self._deliver(run_id, [state for state in states if state.params.run_id == run_id]))

    def stop(self) -> None:
        """Try nothing again: the log has it."""
        self._stopping = True
        for late in self._late.values():
            late.again.set()

    async def _deliver(self, run_id: str, states: Sequence[RequestState]) -> None:
        taken = await self._attempt(run_id, states)
        if taken and run_id in self._late:  # Redis is back
            self._late[run_id].again.set()

    async def _attempt(self, run_id: str, states: Sequence[RequestState]) -> bool:
        """Publish; what is not taken waits. Returns whether anything was."""
        outcomes = await self._published(states)
        taken: list[RequestState] = []
        refused: list[RequestState] = []
        for state, outcome in zip(states, outcomes, strict=True):
            if isinstance(outcome, str):
                state.stream_entry_id = outcome
                taken.append(state)
            elif state.failed:
                continue  # nobody reads it any more
            elif isinstance(outcome, UnavailableError | OverloadedError):
                state.error = outcome
                refused.append(state)
            else:
                self._fail(state, outcome)
        self._delivered(taken)
        if refused:
            log.error(
                "%d trajectories of run %s could not be published, they are kept: %s",
                len(refused),
                run_id,
                refused[0].error,
            )
            self._wait(run_id, refused)
            for state in refused:
                state.notify()
        return bool(taken)

    def _wait(self, run_id: str, states: Sequence[RequestState]) -> None:
        late = self._late.get(run_id)
        if late is None:
            late = self._late[run_id] = _Late()
            self._keep(self._try_again(run_id, late))
        late.states += states
        for state in states:
            state.again = late.again

    async def _try_again(self, run_id: str, late: _Late) -> None:
        """What Redis does not take now is kept and tried again until it does, all of a run together."""
        delay_s = FIRST_DELIVERY_DELAY_S
        while not self._stopping:
            with suppress(TimeoutError):
                await asyncio.wait_for(late.again.wait(), delay_s)
            late.again.clear()
            delay_s = min(2 * delay_s, LAST_DELIVERY_DELAY_S)
            states, late.states = [state for state in late.states if not state.failed], []
            if states and not self._stopping:
                await self._attempt(run_id, states)
            if not late.states:
                break
        del self._late[run_id]

    async def _published(self, states: Sequence[RequestState]) -> Sequence[str | OpdError]:
        """For each its stream entry, or why it has none. All of one run."""
        try:
            entries = [
                (state.params.request_id, trajectory_to_proto(state.trajectory()).SerializeToString())
                for state in states
            ]
            return await self._stream_of(states[0].params.run_id).publish_many(entries)
        except OpdError as error:
            return [error] * len(states)
        except Exception as error:
            log.exception("publishing %s failed", states[0].params.request_id)
            return [InternalError(f"publishing failed: {error}")] * len(states)
