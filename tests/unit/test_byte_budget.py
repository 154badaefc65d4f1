"""The bound on answers that wait for their reader."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from teacher_server.byte_budget import ByteBudget


@given(sizes=st.lists(st.integers(1, 15), max_size=20), limit=st.integers(1, 10))
def test_never_more_than_the_limit_unless_alone(sizes: list[int], limit: int) -> None:
    async def play() -> None:
        budget, inside, done = ByteBudget(limit), set[int](), []

        async def one(index: int, size: int) -> None:
            async with budget.hold(size):
                inside.add(index)
                assert budget.held == sum(sizes[i] for i in inside)
                assert budget.held <= limit or len(inside) == 1
                await asyncio.sleep(0)
                inside.remove(index)
            done.append(index)

        await asyncio.gather(*(one(index, size) for index, size in enumerate(sizes)))
        assert sorted(done) == list(range(len(sizes)))
        assert budget.held == 0

    asyncio.run(play())


async def test_a_waiter_that_is_cancelled_holds_nothing() -> None:
    budget = ByteBudget(4)
    async with budget.hold(4):

        async def wait() -> None:
            async with budget.hold(1):
                raise AssertionError("there was no room")

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert budget.held == 4
    assert budget.held == 0
