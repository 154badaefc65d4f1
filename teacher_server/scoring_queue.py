"""Between the event loop and the engines: items wait here, leave in batches, and run in one thread.

The event loop never waits for a model, so health answers during a forward pass.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from opd_mesh import telemetry
from opd_mesh.config.services import TeacherServerConfig
from opd_mesh.errors import InternalError, OpdError, OverloadedError, UnavailableError
from teacher_server.engine import ScoreJob, TeacherEngine
from teacher_server.pool import WeightPool
from teacher_server.scheduling import Waiting, choose_batch, choose_turn, passed_over_by, teachers_in_order

log = logging.getLogger("teacher_server")
Answer = dict[str, np.ndarray]
# An idle engine waits for more while items keep coming within so long, and ten times as long at most.
BURST_WAIT_S = 0.002
MAX_BURST_WAITS = 10


@dataclass(slots=True, eq=False)
class _Entry:
    teacher_id: str
    job: ScoreJob
    future: asyncio.Future[Answer]


def _checked_score(engine: TeacherEngine, jobs: Sequence[ScoreJob]) -> list[Answer | OpdError]:
    """A file that was overwritten where it lies is seen through its mapping: such an answer is nobody's."""
    for weights in engine.weight_sets:
        weights.check()
    answers = engine.score(jobs)
    for weights in engine.weight_sets:
        weights.check()
    return answers


class ScoringQueue:
    """Batched by teacher under a token budget; teachers take turns, so that the pool exchanges weights seldom.

    Args:
        engines: by teacher id.
        pool: holds the engines' weights.
    """

    def __init__(self, engines: Mapping[str, TeacherEngine], pool: WeightPool, config: TeacherServerConfig) -> None:
        self._engines = engines
        self.pool = pool
        self._config = config
        # One in deterministic mode, so that a batch's composition never depends on arrival.
        self._max_batch_items = 1 if config.deterministic else config.max_items_in_flight
        self._entries: list[_Entry] = []
        self._in_engine: list[_Entry] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._runner: asyncio.Task[None] | None = None
        self._turn: str | None = None
        self._turn_tokens = 0
        self._passed_over: str | None = None
        self._closed = False
        self.batches = 0
        self.tokens = 0

    def start(self) -> None:
        """Begin to serve the queue."""
        self._runner = asyncio.create_task(self._run())

    async def score(self, teacher_id: str, job: ScoreJob) -> Answer:
        """Wait for the answer. Cancelling takes the item out of the queue.

        Raises:
            OverloadedError: the queue is full; ``retry_delay_s`` says when to come again.
            OpdError: the error of this job.
        """
        if self._closed:
            raise UnavailableError("the teacher server is stopping")
        if len(self._entries) >= self._config.max_queue_items:
            raise OverloadedError(f"{len(self._entries)} items are waiting already", retry_delay_s=1.0)
        entry = _Entry(teacher_id, job, asyncio.get_running_loop().create_future())
        self._entries.append(entry)
        self._arrived.set()
        if self._in_engine and not self.pool.has_begun(self._engines[teacher_id].weight_sets):
            self._look_ahead()
        try:
            return await entry.future
        finally:
            if entry in self._entries:
                self._entries.remove(entry)

    async def _run(self) -> None:
        while True:
            if not self._arrived.is_set():
                await self._arrived.wait()
                await self._let_burst_land()
            await asyncio.sleep(0)  # what was just answered goes out, and what arrived comes in
            teacher_id = self._choose_turn()
            if teacher_id is None:
                self._arrived.clear()
                continue
            engine = self._engines[teacher_id]
            batch: list[_Entry] = []
            try:
                async with self.pool.using(engine.weight_sets):
                    # Chosen only now: while the weights were loaded, more may have come for them, or all been given up.
                    batch = self._take_batch(teacher_id)
                    if batch:
                        self._in_engine = batch
                        self._look_ahead()
                        self._answer(batch, await self._compute(teacher_id, engine, batch))
            except OpdError as error:
                log.warning("the weights of teacher %r cannot be had: %s", teacher_id, error)
                self._fail(teacher_id, batch, error)
            except Exception as error:
                # Whatever it is, the queue goes on: other teachers are well.
                log.exception("the engine of teacher %r failed on %d items", teacher_id, len(batch))
                why = f"the engine failed: {type(error).__name__}; the server's log has the stack"
                self._fail(teacher_id, batch, InternalError(why))
            finally:
                self._in_engine = []

    async def _let_burst_land(self) -> None:
        """Items of one burst are decoded one by one; the first alone would be a batch of its own."""
        for _ in range(MAX_BURST_WAITS):
            waiting = len(self._entries)
            if (
                self._max_batch_items == 1
                or not self._entries
                or sum(entry.job.num_tokens for entry in self._entries)
                >= max(self._batch_tokens(entry.teacher_id) for entry in self._entries)
            ):
                return
            await asyncio.sleep(BURST_WAIT_S)
            if len(self._entries) == waiting:
                return

    def _waiting(self) -> list[Waiting]:
        return [Waiting(entry.teacher_id, entry.job.num_tokens) for entry in self._entries]

    def _choose_turn(self) -> str | None:
        waiting = self._waiting()
        if self._config.pool.order == "arrival":
            teacher_id = waiting[0].teacher_id if waiting else None
        else:
            teacher_id = choose_turn(
                waiting,
                self._turn,
                served_tokens=self._turn_tokens,
                turn_tokens=self._config.pool.turn_tokens,
                ready=[name for name, engine in self._engines.items() if self.pool.is_ready(engine.weight_sets)],
                passed_over=self._passed_over,
            )
            if teacher_id != self._turn:
                self._passed_over = passed_over_by(teacher_id, waiting, self._turn)
        if teacher_id is not None and (teacher_id != self._turn or self._turn_tokens >= self._config.pool.turn_tokens):
            self._turn, self._turn_tokens = teacher_id, 0
        return teacher_id

    def _take_batch(self, teacher_id: str) -> list[_Entry]:
        chosen = choose_batch(
            self._waiting(),
            teacher_id,
            token_budget=self._batch_tokens(teacher_id),
            max_items=self._max_batch_items,
            in_order=self._config.pool.order == "arrival",
        )
        batch = [self._entries[index] for index in chosen]
        for entry in batch:
            self._entries.remove(entry)
        return batch

    def _batch_tokens(self, teacher_id: str) -> int:
        most = self._engines[teacher_id].facts.most_batch_tokens
        return min(self._config.batch_tokens, most or self._config.batch_tokens)

    def _look_ahead(self) -> None:
        """While a teacher computes, bring the weights of the next one that lacks them."""
        if not self._config.pool.prefetch:
            return
        needed_before = set(self._engines[self._in_engine[0].teacher_id].weight_sets)
        for teacher_id in teachers_in_order(self._waiting()):
            sets = self._engines[teacher_id].weight_sets
            if not self.pool.has_begun(sets):
                self.pool.prefetch(sets, keep=needed_before)
                return
            needed_before |= set(sets)

    async def _compute(self, teacher_id: str, engine: TeacherEngine, batch: list[_Entry]) -> list[Answer | OpdError]:
        tokens = sum(entry.job.num_tokens for entry in batch)
        self.batches += 1
        self.tokens += tokens
        self._turn_tokens += tokens
        with telemetry.span("teacher.forward", {telemetry.TEACHER: teacher_id, telemetry.TOKENS: tokens}):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, _checked_score, engine, [entry.job for entry in batch])

    def _answer(self, batch: list[_Entry], answers: list[Answer | OpdError]) -> None:
        for entry, answer in zip(batch, answers, strict=True):
            if entry.future.done():
                continue  # given up meanwhile
            if isinstance(answer, OpdError):
                entry.future.set_exception(answer)
            else:
                entry.future.set_result(answer)

    def _fail(self, teacher_id: str, batch: Sequence[_Entry], error: OpdError) -> None:
        """Those in the batch, or, where none could be made, all that wait for the teacher."""
        failed = list(batch) or [entry for entry in self._entries if entry.teacher_id == teacher_id]
        for entry in failed:
            if entry in self._entries:
                self._entries.remove(entry)
            if not entry.future.done():
                entry.future.set_exception(error)

    async def close(self) -> None:
        """Refuse new items, fail those that are not answered yet, end the thread after the pass in progress."""
        self._closed = True
        unanswered = [*self._in_engine, *self._entries]
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        for entry in unanswered:
            if not entry.future.done():
                entry.future.set_exception(UnavailableError("the teacher server is stopping"))
        await asyncio.to_thread(self._thread.shutdown)
        await self.pool.close()
        for engine in self._engines.values():
            engine.close()
