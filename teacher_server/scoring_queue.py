"""Between the event loop and the engines: items wait here, leave in batches, and run in one thread.

The event loop never waits for a model, so health answers during a forward pass.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from opd_mesh import telemetry
from opd_mesh.errors import InternalError, OpdError, OverloadedError, UnavailableError
from teacher_server.engine import ScoreJob, TeacherEngine
from teacher_server.scheduling import Waiting, choose_batch

log = logging.getLogger("teacher_server")


@dataclass(slots=True, eq=False)
class _Entry:
    teacher_id: str
    job: ScoreJob
    future: asyncio.Future[dict[str, np.ndarray]]


class ScoringQueue:
    """First come, first served, batched by teacher under a token budget.

    Args:
        engines: by teacher id.
        token_budget: tokens in one forward pass.
        max_items: waiting, over all clients; beyond it :class:`OverloadedError`.
        max_batch_items: 1 in deterministic mode, so that a batch's composition never depends on arrival.
    """

    def __init__(
        self, engines: Mapping[str, TeacherEngine], *, token_budget: int, max_items: int, max_batch_items: int
    ) -> None:
        self._engines = engines
        self._token_budget = token_budget
        self._max_items = max_items
        self._max_batch_items = max_batch_items
        self._entries: list[_Entry] = []
        self._in_engine: list[_Entry] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._runner: asyncio.Task[None] | None = None
        self._closed = False
        self.batches = 0
        self.tokens = 0

    def start(self) -> None:
        """Begin to serve the queue."""
        self._runner = asyncio.create_task(self._run())

    async def score(self, teacher_id: str, job: ScoreJob) -> dict[str, np.ndarray]:
        """Wait for the answer. Cancelling takes the item out of the queue.

        Raises:
            OverloadedError: the queue is full; ``retry_delay_s`` says when to come again.
            OpdError: the error of this job.
        """
        if self._closed:
            raise UnavailableError("the teacher server is stopping")
        if len(self._entries) >= self._max_items:
            raise OverloadedError(f"{len(self._entries)} items are waiting already", retry_delay_s=1.0)
        entry = _Entry(teacher_id, job, asyncio.get_running_loop().create_future())
        self._entries.append(entry)
        self._arrived.set()
        try:
            return await entry.future
        finally:
            if entry in self._entries:
                self._entries.remove(entry)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            # Items that arrive in one burst are decoded one by one: give the burst one turn of the loop to land.
            await asyncio.sleep(0)
            waiting = [Waiting(entry.teacher_id, entry.job.num_tokens) for entry in self._entries]
            chosen = choose_batch(waiting, token_budget=self._token_budget, max_items=self._max_batch_items)
            if not chosen:
                self._arrived.clear()
                continue
            batch = [self._entries[index] for index in chosen]
            for entry in batch:
                self._entries.remove(entry)
            self._in_engine = batch
            engine = self._engines[batch[0].teacher_id]
            tokens = sum(entry.job.num_tokens for entry in batch)
            answers: list[dict[str, np.ndarray] | OpdError]
            try:
                with telemetry.span(
                    "teacher.forward", {telemetry.TEACHER: batch[0].teacher_id, telemetry.TOKENS: tokens}
                ):
                    answers = await loop.run_in_executor(self._thread, engine.score, [entry.job for entry in batch])
            except Exception as error:
                log.exception("the engine of teacher %r failed on %d items", batch[0].teacher_id, len(batch))
                failure = InternalError(f"the engine failed: {type(error).__name__}; the server's log has the stack")
                answers = [failure] * len(batch)
            self._in_engine = []
            self.batches += 1
            self.tokens += tokens
            for entry, answer in zip(batch, answers, strict=True):
                if entry.future.done():
                    continue  # given up meanwhile
                if isinstance(answer, OpdError):
                    entry.future.set_exception(answer)
                else:
                    entry.future.set_result(answer)

    async def close(self) -> None:
        """Refuse new items, fail those that are not answered yet, end the thread after the pass in progress."""
        self._closed = True
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        for entry in [*self._in_engine, *self._entries]:
            if not entry.future.done():
                entry.future.set_exception(UnavailableError("the teacher server is stopping"))
        await asyncio.to_thread(self._thread.shutdown)
        for engine in self._engines.values():
            engine.close()
