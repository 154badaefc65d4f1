"""Host memory for teachers' answers between their arrival and their use, with a bound.

An answer's bytes are reserved before it is asked for. When there is no room left, asking waits until the update has
used something up; or, with a folder to spill to, answers that are needed last go to the disk. What the update waits
for is asked for at once, room or not, so the bound is passed by one share of a pass at most and nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_mesh.errors import CancelledByCallerError, InternalError

log = logging.getLogger("student_trainer")
Tensors = Mapping[str, np.ndarray]
Ask = Callable[[], Coroutine[Any, Any, Tensors]]


@dataclass(slots=True)
class BufferCounters:
    """Since the last :meth:`MarkBuffer.take_counters`."""

    peak_bytes: int = 0
    spilled_bytes: int = 0
    waited_s: float = 0.0  # that the update waited for answers


class BufferedAnswer:
    """One answer on its way through the buffer; an :class:`student_trainer.batch.Answer`."""

    def __init__(self, buffer: MarkBuffer, num_bytes: int, rank: int) -> None:
        self.num_bytes = num_bytes
        self.rank = rank  # in the order of use; larger is later
        self.admitted = asyncio.Event()
        self.in_memory = False
        self.result: Future[Tensors | _Spilled] = Future()
        self._buffer = buffer

    def tensors(self) -> Tensors:
        """See :class:`student_trainer.batch.Answer`."""
        if not self.result.done():
            self._buffer.demand(self)
            started = time.monotonic()
            self.result.exception()  # waits
            self._buffer.count_wait(time.monotonic() - started)
        said = self.result.result()
        return said.read() if isinstance(said, _Spilled) else said

    def release(self) -> None:
        """See :class:`student_trainer.batch.Answer`."""
        self._buffer.release(self)

    def settle(self, outcome: Tensors | _Spilled | BaseException) -> None:
        """What whoever waits, or asks from now on, gets; what it held before is let go of."""
        replacement: Future[Tensors | _Spilled] = self.result if not self.result.done() else Future()
        if isinstance(outcome, BaseException):
            replacement.set_exception(outcome)
        else:
            replacement.set_result(outcome)
        self.result = replacement

    def spilled(self) -> Path | None:
        """The file, where it is on the disk."""
        done = self.result.done() and self.result.exception() is None
        said = self.result.result() if done else None
        return said.path if isinstance(said, _Spilled) else None


@dataclass(frozen=True, slots=True)
class _Spilled:
    path: Path
    forms: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]

    @classmethod
    def write(cls, path: Path, tensors: Tensors) -> _Spilled:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for array in tensors.values():
                file.write(np.ascontiguousarray(array).view(np.uint8).data)
        return cls(path, tuple((name, array.dtype, array.shape) for name, array in tensors.items()))

    def read(self) -> Tensors:
        tensors = {}
        with self.path.open("rb") as file:
            for name, dtype, shape in self.forms:
                flat = np.fromfile(file, np.uint8, int(np.prod(shape)) * dtype.itemsize)
                tensors[name] = flat.view(dtype).reshape(shape)
        return tensors


def _nothing() -> None: ...


class MarkBuffer:
    """Of one event loop; answers are used in another thread.

    Args:
        max_bytes: of answers in memory, those on their way included.
        spill_dir: where answers go that have no room, emptied here; None: asking waits.
    """

    def __init__(self, max_bytes: int, spill_dir: Path | None = None) -> None:
        self._max_bytes = max_bytes
        self._spill_dir = spill_dir
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unreleased: set[BufferedAnswer] = set()
        self._waiting: list[BufferedAnswer] = []
        self._held: set[BufferedAnswer] = set()  # answered, in memory, not being spilled
        self._spilling: BufferedAnswer | None = None
        self._giving_up = False
        self._all_admitted: Callable[[], None] = _nothing
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()  # of the counters that the updating thread adds to
        self._asked = 0
        self.bytes_in_memory = 0
        self._counters = BufferCounters()
        if spill_dir is not None:
            shutil.rmtree(spill_dir, ignore_errors=True)  # of a run that was killed

    def when_all_admitted(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` on the event loop whenever no answer waits for room any more."""
        self._all_admitted = tell

    @property
    def is_full(self) -> bool:
        """Answers wait for room."""
        return bool(self._waiting)

    def ask(self, num_bytes: int, ask: Ask) -> BufferedAnswer:
        """Ask a teacher as soon as there is room for its answer of ``num_bytes``."""
        self._loop = asyncio.get_running_loop()
        self._asked += 1
        answer = BufferedAnswer(self, num_bytes, self._asked)
        self._unreleased.add(answer)
        self._waiting.append(answer)
        self._start(self._fetch(answer, ask))
        self._admit()
        return answer

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, answer: BufferedAnswer, ask: Ask) -> None:
        await answer.admitted.wait()
        if answer not in self._unreleased:  # let go of while it waited
            return
        try:
            tensors = await ask()
        except Exception as error:  # noqa: BLE001 - handed to who waits for it
            self._leave_memory(answer)
            answer.settle(error)
        else:
            if answer in self._unreleased:
                self._held.add(answer)
                answer.settle(tensors)
        self._admit()

    def expect(self, answers: Sequence[BufferedAnswer]) -> None:
        """The order of use: who waits is admitted in it, and what is needed last is spilled first."""
        for rank, answer in reversed(list(enumerate(answers))):
            answer.rank = rank  # of its first use, where it has several
        self._waiting.sort(key=lambda answer: answer.rank)
        self._admit()

    def _admit(self) -> None:
        while self._waiting and not self._giving_up:
            answer = self._waiting[0]
            if self.bytes_in_memory and self.bytes_in_memory + answer.num_bytes > self._max_bytes:
                self._spill_one()
                return
            self._let_in(answer)

    def _let_in(self, answer: BufferedAnswer) -> None:
        self._remove_waiting(answer)
        answer.in_memory = True
        self.bytes_in_memory += answer.num_bytes
        self._counters.peak_bytes = max(self._counters.peak_bytes, self.bytes_in_memory)
        answer.admitted.set()

    def _remove_waiting(self, answer: BufferedAnswer) -> None:
        self._waiting.remove(answer)
        if not self._waiting and not self._giving_up:
            assert self._loop is not None  # set by the first ask
            self._loop.call_soon(self._all_admitted)  # soon: it may ask for more, from within an ask

    def _spill_one(self) -> None:
        """What is needed last; the next one follows when it is on the disk."""
        if self._spill_dir is None or self._spilling is not None or not self._held:
            return
        self._spilling = max(self._held, key=lambda held: held.rank)
        self._held.discard(self._spilling)
        self._start(self._spill(self._spilling, self._spill_dir / f"{uuid.uuid4().hex}.bin"))

    async def _spill(self, answer: BufferedAnswer, path: Path) -> None:
        try:
            if answer in self._unreleased:  # else it was used up before this began
                await self._write_out(answer, path)
        finally:
            self._spilling = None
        self._admit()

    async def _write_out(self, answer: BufferedAnswer, path: Path) -> None:
        tensors = answer.result.result()
        assert not isinstance(tensors, _Spilled)  # only what is held is spilled
        writing = asyncio.ensure_future(asyncio.to_thread(_Spilled.write, path, tensors))
        try:
            spilled = await asyncio.shield(writing)
        except OSError as error:
            log.warning("%s cannot be written: %s. Answers wait for room from now on", path, error)
            self._spill_dir = None
            with contextlib.suppress(OSError):
                path.unlink()
            if answer in self._unreleased:
                self._held.add(answer)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            path.unlink(missing_ok=True)
            raise
        else:
            if answer in self._unreleased:
                answer.settle(spilled)
                self._counters.spilled_bytes += answer.num_bytes
                self._leave_memory(answer)
            else:
                path.unlink(missing_ok=True)

    def _leave_memory(self, answer: BufferedAnswer) -> None:
        if answer.in_memory:
            answer.in_memory = False
            self.bytes_in_memory -= answer.num_bytes

    # --- from the updating thread --------------------------------------------------------------------------------
    def demand(self, answer: BufferedAnswer) -> None:
        """Somebody waits for it: no bound keeps it back."""
        self._call(self._let_in_now, answer)

    def _let_in_now(self, answer: BufferedAnswer) -> None:
        if answer in self._waiting:
            self._let_in(answer)

    def release(self, answer: BufferedAnswer) -> None:
        """Its memory, or its file, is free."""
        self._call(self._drop, answer)

    def _drop(self, answer: BufferedAnswer, why: BaseException | None = None) -> None:
        if answer not in self._unreleased:
            return
        self._unreleased.discard(answer)
        self._held.discard(answer)
        if answer in self._waiting:
            self._remove_waiting(answer)
            answer.admitted.set()  # its task ends
        if (path := answer.spilled()) is not None:
            path.unlink(missing_ok=True)
        self._leave_memory(answer)
        # Samples and plan live until the end of the step; the numbers do not.
        answer.settle(why or InternalError("this answer has been released"))
        self._admit()

    def _call(self, method: Callable[[BufferedAnswer], None], answer: BufferedAnswer) -> None:
        assert self._loop is not None  # set by the first ask
        self._loop.call_soon_threadsafe(method, answer)

    def count_wait(self, seconds: float) -> None:
        """The update stood still for so long."""
        with self._lock:
            self._counters.waited_s += seconds

    # --- the end of a step ---------------------------------------------------------------------------------------
    def take_counters(self) -> BufferCounters:
        """What was counted since the last call."""
        with self._lock:
            counters, self._counters = self._counters, BufferCounters(peak_bytes=self.bytes_in_memory)
        return counters

    async def give_up(self) -> None:
        """Cancel what is asked for; who waits for it gets :class:`CancelledByCallerError`. All memory is free then."""
        self._giving_up = True
        try:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._spilling = None  # of a task that was cancelled before it began
            for answer in list(self._unreleased):
                self._drop(answer, CancelledByCallerError("the step was given up"))
        finally:
            self._giving_up = False
