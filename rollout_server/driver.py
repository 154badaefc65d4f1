"""The engine's thread: commands go in, token events come out, and the event loop never waits for the model."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from opd_mesh.errors import UnavailableError
from rollout_server.decode_engine import DecodeEngine, TokenEvent

log = logging.getLogger("rollout_server")
ResultT = TypeVar("ResultT")
Command = tuple[Future[Any], Callable[[], Any]]


class EngineDriver:
    """Drives one :class:`DecodeEngine` in a thread of its own.

    Args:
        on_events: called on the event loop with the events of each step.
        on_failure: called on the event loop where a step itself raised; the thread has ended then.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        on_events: Callable[[Sequence[TokenEvent]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.engine = engine
        self._on_events = on_events
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def paused(self) -> bool:
        """Whether decoding stands still."""
        return self._paused

    async def pause(self) -> None:
        """Returns once no token will be drawn any more."""
        await self.call(lambda: setattr(self, "_paused", True))

    async def resume(self) -> None:
        """Go on."""
        await self.call(lambda: setattr(self, "_paused", False))

    async def call(self, function: Callable[[], ResultT]) -> ResultT:
        """Run ``function`` in the engine's thread, between two steps, and wait for its result."""
        future: Future[ResultT] = Future()
        self._commands.put((future, function))
        if self._ended:  # nobody takes from the queue any more
            self._refuse_queued()
        return await asyncio.wrap_future(future)

    def _run(self) -> None:
        try:
            while True:
                while not self._commands.empty() or self._paused or self.engine.idle:
                    command = self._commands.get()
                    if command is None:
                        return
                    future, function = command
                    if not future.set_running_or_notify_cancel():
                        continue
                    try:
                        future.set_result(function())
                    except BaseException as error:  # noqa: BLE001 - handed to the caller
                        future.set_exception(error)
                events = self.engine.step()
                if events:
                    self._loop.call_soon_threadsafe(self._on_events, events)
        except BaseException as error:
            log.exception("the decode loop failed")
            self._loop.call_soon_threadsafe(self._on_failure, error)
        finally:
            self._ended = True
            self._refuse_queued()

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
