"""What may end a run before its last step: a stop, and a failure beside the main sequence."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from opd_mesh.errors import CancelledByCallerError

T = TypeVar("T")


class StepGivenUpError(Exception):
    """The run stops, and the step or the evaluation in progress could not be waited for."""


class Stopping:
    """For one event loop.

    Attributes:
        asked: the run ends after the step in progress.
        failure: what has failed beside the main sequence.
    """

    def __init__(self) -> None:
        self.asked = False
        self.failure: Exception | None = None
        self._waiting: asyncio.Future[Any] | None = None

    def now(self) -> None:
        """Whatever the run waits for is not waited for any longer."""
        self.asked = True
        self._end_waiting()

    def fail(self, error: Exception) -> None:
        """The run cannot go on; it ends with this error."""
        self.failure = self.failure or error
        self._end_waiting()

    def _end_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` returns, unless :meth:`now` or :meth:`fail` end it."""
        self._waiting = asyncio.ensure_future(work)
        if self.failure is not None:
            self._waiting.cancel()
        with self.cause_of_cancellation():
            return await self._waiting

    @contextmanager
    def cause_of_cancellation(self) -> Iterator[None]:
        """Raises why something inside was cancelled, where that is known.

        Raises:
            StepGivenUpError: the run stops.
        """
        try:
            yield
        except (asyncio.CancelledError, CancelledByCallerError):
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # else somebody cancels the run itself
                if self.failure is not None:
                    raise self.failure from None
                if self.asked:
                    raise StepGivenUpError from None
            raise
