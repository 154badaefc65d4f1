"""Jobs side by side, inputs first, in the order given."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any


class JobFailedError(Exception):
    """A job could not be done; ``__cause__`` says why."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id


class JobStoppedError(Exception):
    """A job has ended because it was asked to, before it was done."""


async def run_jobs(
    needs: Mapping[str, Collection[str]],
    work: Callable[[str], Awaitable[None]],
    *,
    limit: int,
    stop: asyncio.Event,
) -> bool:
    """Do every job once all that it needs are done; of several that could begin, the first.

    When ``stop`` is set no job begins any more, and those that run are waited for: they are to end by themselves, with
    :class:`JobStoppedError` where they are not done. A job that fails sets it.

    Args:
        needs: job → jobs that come before it; the order of the keys is that of preference.
        limit: jobs that run at once.

    Returns:
        Whether all are done: False where ``stop`` was set from outside before the end.

    Raises:
        JobFailedError: the first that failed, when nothing runs any more.
    """
    waiting = dict(needs)
    done: set[str] = set()
    running: dict[asyncio.Task[None], str] = {}
    failure: tuple[str, BaseException] | None = None
    stopped = asyncio.create_task(stop.wait())
    try:
        while True:
            ready = [job for job, before in waiting.items() if done.issuperset(before)]
            while ready and len(running) < limit and not stop.is_set():
                job = ready.pop(0)
                del waiting[job]
                running[asyncio.create_task(_call(work, job), name=job)] = job
            if not running:
                break
            watched: set[asyncio.Task[Any]] = {*running} if stop.is_set() else {*running, stopped}
            ended, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task in ended]:
                job = running.pop(task)
                error = asyncio.CancelledError() if task.cancelled() else task.exception()
                if error is None:
                    done.add(job)
                elif not isinstance(error, JobStoppedError):
                    failure = failure or (job, error)
                    stop.set()
    finally:
        stopped.cancel()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    if failure is not None:
        raise JobFailedError(failure[0]) from failure[1]
    return not waiting and done.issuperset(needs)


async def _call(work: Callable[[str], Awaitable[None]], job: str) -> None:
    await work(job)
