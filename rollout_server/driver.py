"""The engine's thread: commands go in, token events come out, and the event loop never waits for the model."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from opd_mesh.errors import LogFullError, UnavailableError
from rollout_server.engine import RolloutEngine, TokenEvent

log = logging.getLogger("rollout_server")
ResultT = TypeVar("ResultT")
Command = tuple[Future[Any], Callable[[], Any]]
LOG_FULL_RETRY_S = 0.5


class EngineDriver:
    """Drives one :class:`RolloutEngine` in a thread of its own.

    Args:
        record: called in this thread with the events of each step before anyone sees them; returns those that are in
            the log. Where it raises :class:`LogFullError` nothing new is drawn until it no longer does.
        on_events: called on the event loop with what ``record`` returned.
        on_failure: called on the event loop where a step or ``record`` itself raised; the thread has ended then.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        *,
        record: Callable[[Sequence[TokenEvent]], Sequence[TokenEvent]],
        on_events: Callable[[Sequence[TokenEvent]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.engine = engine
        self._record = record
        self._on_events = on_events
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._unrecorded: Sequence[TokenEvent] = ()  # drawn, while the log's disk is full
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self._ended = False
        self._idle_s = 0.0
        self._idle_since: float | None = None
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def paused(self) -> bool:
        """Whether decoding stands still because somebody asked for it."""
        return self._paused

    @property
    def idle_s(self) -> float:
        """Seconds in which there was nothing to do, or nothing could be done: paused, or the log's disk full."""
        since = self._idle_since
        return self._idle_s + (time.monotonic() - since if since is not None else 0.0)

    @property
    def busy_s(self) -> float:
        """The other seconds since the engine was made."""
        return time.monotonic() - self._started - self.idle_s

    async def pause(self) -> None:
        """Returns once no token will be drawn any more. Raises :class:`InternalError` where the engine is broken."""

        def pause() -> None:
            self.engine.pause()
            self._paused = True

        await self.call(pause)

    async def resume(self) -> None:
        """Go on. Raises :class:`InternalError` where the engine is broken."""

        def resume() -> None:
            self._paused = False
            self.engine.resume()

        await self.call(resume)

    async def call(self, function: Callable[[], ResultT]) -> ResultT:
        """Run ``function`` in the engine's thread, between two steps, and wait for its result."""
        future: Future[ResultT] = Future()
        self._commands.put((future, function))
        if self._ended:  # nobody takes from the queue any more
            self._refuse_queued()
        return await asyncio.wrap_future(future)

    def _run(self) -> None:
        try:
            while self._obey():
                self._deliver(self._unrecorded or self.engine.step())
        except BaseException as error:
            log.exception("the decode loop failed")
            self._loop.call_soon_threadsafe(self._on_failure, error)
        finally:
            self._ended = True
            self._refuse_queued()

    def _obey(self) -> bool:
        """Run what has been asked for, and wait while there is nothing else to do; False: end."""
        waited_for_log = False
        while True:
            full = bool(self._unrecorded) and not waited_for_log
            at_rest = self._paused or full or (self.engine.idle and not self._unrecorded)
            if at_rest and self._idle_since is None:
                self._idle_since = time.monotonic()
            try:
                # Forever while at rest, for a moment while the disk is full, not at all while there is work.
                wait_s = LOG_FULL_RETRY_S if full else None
                command = self._commands.get(block=at_rest, timeout=wait_s)
            except queue.Empty:
                if full:
                    waited_for_log = True
                    continue
                if self._idle_since is not None:
                    self._idle_s += time.monotonic() - self._idle_since
                    self._idle_since = None
                return True
            if command is None:
                return False
            future, function = command
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                future.set_exception(error)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        try:
            recorded = self._record(events) if events else ()
        except LogFullError as error:
            if not self._unrecorded:
                log.warning("decoding stands still: %s", error)
            self._unrecorded = events
            return
        if self._unrecorded:
            log.warning("the log can be written again, decoding goes on")
            self._unrecorded = ()
        if recorded:
            self._loop.call_soon_threadsafe(self._on_events, recorded)

    def _refuse_queued(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None and command[0].set_running_or_notify_cancel():
                command[0].set_exception(UnavailableError("the decode loop has ended; restart the server"))

    async def close(self) -> None:
        """End the thread between two steps."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
