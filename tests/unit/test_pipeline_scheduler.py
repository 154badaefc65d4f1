"""Jobs side by side: order, bound, failure, stop. With jobs that are coroutines, and no clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.pipeline.scheduler import JobFailedError, JobStoppedError, run_jobs


class Jobs:
    """Jobs that end when they are let go."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.ended: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.running: set[str] = set()
        self.most = 0
        self._gates: dict[str, asyncio.Future[None]] = {}

    async def work(self, job: str) -> None:
        self.began.append(job)
        self.events.append(("began", job))
        self.running.add(job)
        self.most = max(self.most, len(self.running))
        gate = self._gates[job] = asyncio.get_running_loop().create_future()
        try:
            await gate
            self.ended.append(job)
            self.events.append(("ended", job))
        finally:
            self.running.discard(job)

    async def let_go(self, job: str, error: BaseException | None = None) -> None:
        if error is None:
            self._gates[job].set_result(None)
        else:
            self._gates[job].set_exception(error)
        await settle()


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


DIAMOND = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


async def test_inputs_come_first_and_as_many_run_at_once_as_may() -> None:
    jobs = Jobs()
    running = asyncio.create_task(run_jobs(DIAMOND, jobs.work, limit=2, stop=asyncio.Event()))
    await settle()
    assert jobs.began == ["a"]
    await jobs.let_go("a")
    assert jobs.began == ["a", "b", "c"]
    await jobs.let_go("c")
    assert "d" not in jobs.began
    await jobs.let_go("b")
    await jobs.let_go("d")
    assert await running is True


async def test_of_several_that_could_begin_the_first_does() -> None:
    jobs = Jobs()
    needs: dict[str, list[str]] = {"late": ["x"], "x": [], "y": [], "z": []}
    running = asyncio.create_task(run_jobs(needs, jobs.work, limit=1, stop=asyncio.Event()))
    for expected in ("x", "late", "y", "z"):
        await settle()
        assert jobs.began[-1] == expected
        await jobs.let_go(expected)
    assert await running is True


@given(
    st.integers(1, 4),
    st.lists(st.lists(st.integers(0, 100), max_size=3), min_size=1, max_size=9),
    st.randoms(use_true_random=False),
)
def test_every_plan_is_done_in_order_and_within_the_bound(limit: int, picks: list[list[int]], random: object) -> None:
    needs: dict[str, list[str]] = {
        str(place): sorted({str(pick % place) for pick in before}) if place else []
        for place, before in enumerate(picks)
    }
    jobs = Jobs()

    async def whole() -> bool:
        running = asyncio.create_task(run_jobs(needs, jobs.work, limit=limit, stop=asyncio.Event()))
        while not running.done():
            await settle()
            if jobs.running:
                await jobs.let_go(random.choice(sorted(jobs.running)))  # type: ignore[attr-defined]
        return await running

    assert asyncio.run(whole()) is True
    assert sorted(jobs.ended) == sorted(needs)
    assert jobs.most <= limit
    for job, before in needs.items():
        for other in before:
            assert jobs.events.index(("ended", other)) < jobs.events.index(("began", job))


async def test_a_failure_stops_new_ones_and_waits_for_those_that_run() -> None:
    jobs, stop = Jobs(), asyncio.Event()
    needs: dict[str, list[str]] = {"a": [], "b": [], "c": [], "after": ["a"]}
    running = asyncio.create_task(run_jobs(needs, jobs.work, limit=2, stop=stop))
    await settle()
    await jobs.let_go("a", ValueError("no"))
    assert stop.is_set()
    assert jobs.began == ["a", "b"]
    assert not running.done()
    await jobs.let_go("b", JobStoppedError())
    with pytest.raises(JobFailedError) as error:
        await running
    assert error.value.job_id == "a"
    assert isinstance(error.value.__cause__, ValueError)


async def test_the_first_of_two_failures_is_told() -> None:
    jobs = Jobs()
    running = asyncio.create_task(run_jobs({"a": [], "b": []}, jobs.work, limit=2, stop=asyncio.Event()))
    await settle()
    await jobs.let_go("b", ValueError("first"))
    await jobs.let_go("a", ValueError("second"))
    with pytest.raises(JobFailedError, match="b"):
        await running


@pytest.mark.parametrize("ending", [None, JobStoppedError()])
async def test_a_stop_from_outside_is_no_failure(ending: Exception | None) -> None:
    jobs, stop = Jobs(), asyncio.Event()
    running = asyncio.create_task(run_jobs({"a": [], "b": ["a"]}, jobs.work, limit=1, stop=stop))
    await settle()
    stop.set()
    await settle()
    assert not running.done()  # what runs ends by itself
    await jobs.let_go("a", ending)
    assert await running is False
    assert jobs.began == ["a"]


async def test_a_stop_when_all_is_done_changes_nothing() -> None:
    jobs, stop = Jobs(), asyncio.Event()
    running = asyncio.create_task(run_jobs({"a": []}, jobs.work, limit=1, stop=stop))
    await settle()
    stop.set()
    await jobs.let_go("a")
    assert await running is True


async def test_cancelled_from_outside_it_leaves_nothing_running() -> None:
    jobs = Jobs()
    running = asyncio.create_task(run_jobs({"a": [], "b": []}, jobs.work, limit=2, stop=asyncio.Event()))
    await settle()
    assert jobs.running == {"a", "b"}
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert jobs.running == set()


async def test_nothing_to_do_is_done() -> None:
    async def never(job: str) -> None:
        raise AssertionError(job)

    work: Callable[[str], Awaitable[None]] = never
    assert await run_jobs({}, work, limit=3, stop=asyncio.Event()) is True
