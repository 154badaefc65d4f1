"""Host memory for teachers' answers between their arrival and their use, with a bound.

An answer's bytes are reserved before it is asked for. When there is no room left, asking waits until the update has
used something up; or, with a folder to spill to, answers that are needed last go to the disk. What the update waits
for is asked for at once, room or not, so the bound is passed by one share of a pass at most and nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_mesh.errors import CancelledByCallerError

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

    def __init__(self, buffer: MarkBuffer, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.rank = 0  # in the order of use; larger is later
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


class MarkBuffer:
    """Of one event loop; answers are used in another thread.

    Args:
        max_bytes: of answers in memory, those on their way included.
        spill_dir: where answers go that have no room; None: asking waits.
    """

    def __init__(self, max_bytes: int, spill_dir: Path | None = None) -> None:
        self._max_bytes = max_bytes
        self._spill_dir = spill_dir
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[BufferedAnswer] = []
        self._held: set[BufferedAnswer] = set()  # answered, in memory, not released
        self._spilling: set[BufferedAnswer] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()  # of the counters that the updating thread adds to
        self._arrivals = 0
        self.bytes_in_memory = 0
        self._counters = BufferCounters()

    def ask(self, num_bytes: int, ask: Ask) -> BufferedAnswer:
        """Ask a teacher as soon as there is room for its answer of ``num_bytes``."""
        self._loop = asyncio.get_running_loop()
        answer = BufferedAnswer(self, num_bytes)
        self._arrivals += 1
        answer.rank = self._arrivals
        self._waiting.append(answer)
        task = asyncio.create_task(self._fetch(answer, ask))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._admit()
        return answer

    async def _fetch(self, answer: BufferedAnswer, ask: Ask) -> None:
        try:
            await answer.admitted.wait()
            tensors = await ask()
        except asyncio.CancelledError:
            self._forget(answer)
            answer.result.set_exception(CancelledByCallerError("the step was given up"))
            raise
        except BaseException as error:  # noqa: BLE001 - handed to who waits for it
            self._forget(answer)
            answer.result.set_exception(error)
        else:
            self._held.add(answer)
            answer.result.set_result(tensors)
            self._admit()

    def expect(self, answers: Iterable[BufferedAnswer]) -> None:
        """The order of use: who waits is admitted in it, and what is needed last is spilled first."""
        for rank, answer in enumerate(answers):
            answer.rank = rank
        self._waiting.sort(key=lambda answer: answer.rank)
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            answer = self._waiting[0]
            if self.bytes_in_memory and self.bytes_in_memory + answer.num_bytes > self._max_bytes:
                if self._spill_dir is not None and not self._spilling:
                    self._spill_one(self._spill_dir)
                return
            self._let_in(answer)

    def _let_in(self, answer: BufferedAnswer) -> None:
        self._waiting.remove(answer)
        answer.in_memory = True
        self.bytes_in_memory += answer.num_bytes
        self._counters.peak_bytes = max(self._counters.peak_bytes, self.bytes_in_memory)
        answer.admitted.set()

    def _spill_one(self, folder: Path) -> None:
        if not self._held:
            return  # all of it is on its way; the next one that arrives may go
        answer = max(self._held, key=lambda held: held.rank)
        self._held.discard(answer)
        self._spilling.add(answer)
        task = asyncio.create_task(self._spill(answer, folder / f"{uuid.uuid4().hex}.bin"))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _spill(self, answer: BufferedAnswer, path: Path) -> None:
        tensors = answer.result.result()
        assert not isinstance(tensors, _Spilled)  # only what is held is spilled
        try:
            spilled = await asyncio.to_thread(_Spilled.write, path, tensors)
        except OSError as error:
            log.warning("%s cannot be written: %s; the answer stays in memory", path, error)
            self._spilling.discard(answer)
            self._held.add(answer)
            self._max_bytes = max(self._max_bytes, self.bytes_in_memory + answer.num_bytes)
            self._admit()
            return
        self._spilling.discard(answer)
        if not answer.in_memory:  # released meanwhile
            path.unlink(missing_ok=True)
        else:
            replacement: Future[Tensors | _Spilled] = Future()
            replacement.set_result(spilled)
            answer.result = replacement
            self._counters.spilled_bytes += answer.num_bytes
            self._leave_memory(answer)
        self._admit()

    def _leave_memory(self, answer: BufferedAnswer) -> None:
        if answer.in_memory:
            answer.in_memory = False
            self.bytes_in_memory -= answer.num_bytes

    def _forget(self, answer: BufferedAnswer) -> None:
        if answer in self._waiting:
            self._waiting.remove(answer)
        self._held.discard(answer)
        self._leave_memory(answer)
        self._admit()

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

    def _drop(self, answer: BufferedAnswer) -> None:
        if answer.result.done() and answer.result.exception() is None:
            said = answer.result.result()
            if isinstance(said, _Spilled):
                said.path.unlink(missing_ok=True)
        self._forget(answer)

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
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for answer in [*self._held, *self._waiting]:
            self._drop(answer)
