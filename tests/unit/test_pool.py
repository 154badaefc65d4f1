"""Which weights are in memory: the choice, and the pool that carries it out."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.errors import ConfigError, CorruptWeightsError, InternalError, OpdError
from teacher_server.pool import WeightPool, check_fits
from teacher_server.residency import Resident, choose_victims
from teacher_server.scheduling import Waiting, choose_turn, passed_over_by

RESIDENTS = st.lists(st.tuples(st.integers(1, 20), st.booleans(), st.booleans()), max_size=8).map(
    lambda drawn: [
        (Resident(f"w{index}", size, index, in_use), kept) for index, (size, in_use, kept) in enumerate(drawn)
    ]
)


# --- the choice --------------------------------------------------------------------------------------------------
@given(RESIDENTS, st.integers(0, 40), st.integers(1, 100))
def test_victims_make_room_and_no_more_than_is_needed(
    drawn: list[tuple[Resident, bool]], needed: int, budget: int
) -> None:
    residents = [resident for resident, _ in drawn]
    keep = {resident.key for resident, kept in drawn if kept}
    victims = choose_victims(residents, needed, budget, keep=keep)
    free_to_go = {item.key: item.num_bytes for item in residents if not item.in_use and item.key not in keep}
    held = sum(item.num_bytes for item in residents)
    if victims is None:
        assert held - sum(free_to_go.values()) + needed > budget
        return
    assert set(victims) <= free_to_go.keys()
    left = held - sum(free_to_go[name] for name in victims)
    assert left + needed <= budget or not victims
    assert all(left + free_to_go[name] + needed > budget for name in victims)


def test_the_least_recently_used_goes_first() -> None:
    residents = [Resident("old", 4, 1, False), Resident("used", 4, 0, True), Resident("new", 4, 2, False)]
    assert choose_victims(residents, 4, 12) == ["old"]
    assert choose_victims(residents, 4, 12, keep=["old"]) == ["new"]
    assert choose_victims(residents, 8, 12) == ["old", "new"]
    assert choose_victims(residents, 9, 12) is None
    assert choose_victims(residents, 0, 12) == []
    # A small one is not taken where a large one must go anyway.
    mixed = [Resident("small", 1, 0, False), Resident("large", 9, 1, False)]
    assert choose_victims(mixed, 9, 10) == ["large"]


# --- turns -------------------------------------------------------------------------------------------------------
ITEMS = st.lists(st.builds(Waiting, st.sampled_from("abcd"), st.integers(1, 30)), max_size=12)


@given(ITEMS, st.sampled_from([None, "a", "b"]), st.integers(0, 40), st.sets(st.sampled_from("abcd")))
def test_a_turn_goes_to_somebody_who_waits(
    waiting: list[Waiting], current: str | None, served: int, ready: set[str]
) -> None:
    chosen = choose_turn(waiting, current, served_tokens=served, turn_tokens=20, ready=ready)
    teachers = [item.teacher_id for item in waiting]
    if not waiting:
        assert chosen is None
        return
    assert chosen in teachers
    if current in teachers and served < 20:
        assert chosen == current
    if chosen != current and chosen not in ready:
        assert not ready & (set(teachers) - {current})  # nobody who could have begun at once


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), st.sets(st.sampled_from("abcd")))
def test_no_teacher_waits_for_more_than_a_few_turns(arrivals: list[str], ready: set[str]) -> None:
    """Two busy teachers in memory and more that never are: nobody is passed over twice in a row."""
    waiting = [Waiting("x", 5), *(Waiting(name, 5) for name in arrivals), Waiting("y", 5)]
    current, passed = "x", None
    served: list[str] = []
    for _ in range(3 * len(waiting)):
        chosen = choose_turn(
            waiting, current, served_tokens=9, turn_tokens=1, ready={"x", "y", *ready}, passed_over=passed
        )
        assert chosen is not None
        if chosen != current:
            passed = passed_over_by(chosen, waiting, current)
        current = chosen
        served.append(chosen)
        waiting = [item for item in waiting if item.teacher_id != chosen]
        if chosen in "xy":
            waiting.append(Waiting(chosen, 5))  # they never run dry
    assert set(arrivals) <= set(served)


def test_a_teacher_whose_turn_is_over_comes_behind_the_others() -> None:
    waiting = [Waiting("a", 5), Waiting("b", 5), Waiting("c", 5)]
    turn = {"turn_tokens": 20}
    assert choose_turn(waiting, "a", served_tokens=19, ready=["a"], **turn) == "a"
    assert choose_turn(waiting, "a", served_tokens=20, ready=["a"], **turn) == "b"
    assert choose_turn(waiting, "a", served_tokens=20, ready=["a", "c"], **turn) == "c"
    assert choose_turn(waiting[:1], "a", served_tokens=20, ready=["a"], **turn) == "a"
    assert choose_turn(waiting[1:], "a", served_tokens=0, ready=["a"], **turn) == "b"


# --- the pool ----------------------------------------------------------------------------------------------------
class Weights:
    """Notes what is done with it; waits to be let go where told so."""

    log: list[str]

    def __init__(self, name: str, num_bytes: int, log: list[str], gate: threading.Event | None = None) -> None:
        self.name = name
        self.num_bytes = num_bytes
        self.log = log
        self.gate = gate
        self.failure: Exception | None = None

    def check(self) -> None:
        if isinstance(self.failure, OpdError):
            raise self.failure

    def load(self) -> None:
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.failure is not None:
            raise self.failure
        self.log.append(f"+{self.name}")

    def unload(self) -> None:
        self.log.append(f"-{self.name}")


def weights(*sizes: int, log: list[str], gate: threading.Event | None = None) -> list[Weights]:
    return [Weights(name, size, log, gate) for name, size in zip("abcdefgh", sizes, strict=False)]


@pytest.mark.asyncio
async def test_what_is_in_use_stays_and_the_oldest_other_leaves_before_the_next_comes() -> None:
    log: list[str] = []
    a, b, c = weights(4, 4, 4, log=log)
    pool = WeightPool(8)
    async with pool.using([a]):
        assert pool.is_ready([a])
        async with pool.using([b]):
            waiting = asyncio.create_task(pool.using([c]).__aenter__())
            await asyncio.sleep(0.05)
            assert not waiting.done()  # both are in use
        await waiting
        assert log == ["+a", "+b", "-b", "+c"]
        assert pool.resident_bytes == 8
    assert (pool.counters.loads, pool.counters.evictions) == (3, 1)
    await pool.close()
    assert sorted(log[4:]) == ["-a", "-c"]


@pytest.mark.asyncio
async def test_prefetching_is_no_wait_and_spares_what_is_needed_first() -> None:
    log: list[str] = []
    gate = threading.Event()
    a, b, c = weights(4, 4, 4, log=log)
    slow = Weights("slow", 4, log, gate)
    pool = WeightPool(8)
    async with pool.using([a]):
        assert pool.prefetch([slow])
        assert pool.has_begun([slow])
        assert not pool.is_ready([slow])
        assert not pool.prefetch([c])  # one computes, one is on its way
        gate.set()
        async with pool.using([slow]):
            assert log == ["+a", "+slow"]
    assert not pool.prefetch([b], keep=[a, slow])
    assert pool.prefetch([b], keep=[slow])
    async with pool.using([b]):
        assert log == ["+a", "+slow", "-a", "+b"]
    await pool.close()


@pytest.mark.asyncio
async def test_a_failure_to_load_is_told_and_takes_no_room() -> None:
    log: list[str] = []
    (a,) = weights(4, log=log)
    a.failure = CorruptWeightsError("gone")
    pool = WeightPool(4)
    for _ in range(2):
        with pytest.raises(CorruptWeightsError, match="gone"):
            async with pool.using([a]):
                pass
        assert pool.resident_bytes == 0
    assert not pool.prefetch([a])
    a.failure = RuntimeError("out of memory")
    assert pool.prefetch([a])
    with pytest.raises(InternalError, match="weights a cannot be loaded"):
        async with pool.using([a]):
            pass
    a.failure = None
    async with pool.using([a]):
        assert log == ["+a"]
    await pool.close()


@pytest.mark.asyncio
async def test_one_that_cannot_be_loaded_evicts_nobody() -> None:
    log: list[str] = []
    a, b = weights(4, 4, log=log)
    pool = WeightPool(4)
    async with pool.using([a]):
        pass
    b.failure = CorruptWeightsError("gone")
    with pytest.raises(CorruptWeightsError):
        async with pool.using([b]):
            pass
    assert log == ["+a"]
    assert pool.is_ready([a])
    await pool.close()


@pytest.mark.asyncio
async def test_what_will_not_unload_keeps_nobody_out() -> None:
    class Stuck(Weights):
        def unload(self) -> None:
            raise RuntimeError("still busy")

    log: list[str] = []
    stuck, b, c = Stuck("stuck", 2, log), *weights(2, 4, log=log)
    pool = WeightPool(4)
    async with pool.using([stuck, b]):
        pass
    async with pool.using([c]):
        assert log == ["+stuck", "+a", "-a", "+b"]
    await pool.close()


@pytest.mark.asyncio
async def test_a_set_that_failed_is_not_entered_beside_one_that_is_there() -> None:
    log: list[str] = []
    gate = threading.Event()
    base, adapter = Weights("base", 4, log), Weights("adapter", 1, log, gate)
    adapter.failure = RuntimeError("no")
    pool = WeightPool(8)
    pool.prefetch([adapter])
    asyncio.get_running_loop().call_later(0.05, gate.set)
    with pytest.raises(InternalError):
        async with pool.using([base, adapter]):
            raise AssertionError("entered")
    await pool.close()


@pytest.mark.asyncio
async def test_sets_that_are_shared_are_loaded_once() -> None:
    log: list[str] = []
    base, one, two = weights(4, 1, 1, log=log)
    pool = WeightPool(6)
    async with pool.using([base, one]), pool.using([base, two]):
        assert sorted(log) == ["+a", "+b", "+c"]
    with pytest.raises(ConfigError, match="teacher 'x' needs 7 bytes"):
        check_fits("x", [base, one, two, Weights("d", 1, log)], 6)
    await pool.close()


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20),
    st.integers(5, 12),
)
def test_the_budget_holds_at_every_moment(sizes: list[int], calls: list[tuple[int, bool]], budget: int) -> None:
    held = most = 0

    class Counting(Weights):
        def load(self) -> None:
            nonlocal held, most
            held += self.num_bytes
            most = max(most, held)

        def unload(self) -> None:
            nonlocal held
            held -= self.num_bytes

    async def use() -> None:
        pool = WeightPool(budget)
        sets = [Counting(f"w{index}", size, []) for index, size in enumerate(sizes)]
        async with asyncio.timeout(20):
            for index, ahead in calls:
                wanted = sets[index % len(sets)]
                if ahead:
                    pool.prefetch([wanted])
                else:
                    async with pool.using([wanted]):
                        assert pool.is_ready([wanted])
        await pool.close()
        assert held == 0

    asyncio.run(use())
    assert most <= budget
