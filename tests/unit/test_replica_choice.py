"""Which replica gets the next item, against what a reader would expect of the word; and how answers are compared."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from opd_mesh.clients import replicas as replicas_module
from opd_mesh.clients.replica import Health, Replica, is_literal, resolve_records
from opd_mesh.clients.replica_choice import Candidate, Policy, choose_replica, rendezvous_ranking
from opd_mesh.clients.replicas import ReplicaSet
from opd_mesh.config.services import ChannelConfig
from opd_mesh.errors import UnavailableError
from student_trainer.preflight import REPLICA_TOLERANCE, Tolerance, first_disagreement

ADDRESSES = [f"10.0.0.{index}:7001" for index in range(1, 7)]
POLICIES: list[Policy] = ["round_robin", "rendezvous"]
candidate_lists = st.lists(
    st.builds(
        Candidate,
        address=st.sampled_from(ADDRESSES),
        usable=st.booleans(),
        in_flight=st.integers(0, 6),
        max_in_flight=st.integers(1, 6),
    ),
    unique_by=lambda candidate: candidate.address,
)


def choose(
    candidates: list[Candidate], policy: Policy = "round_robin", *, teacher_id: str = "a", turn: int = 0, spill: int = 3
) -> str | None:
    return choose_replica(candidates, policy=policy, teacher_id=teacher_id, turn=turn, spill_in_flight=spill)


@given(candidate_lists, st.sampled_from(POLICIES), st.text(max_size=5), st.integers(0, 99), st.integers(1, 6))
def test_never_one_that_is_not_usable_or_full_and_always_one_if_there_is(
    candidates: list[Candidate], policy: Policy, teacher_id: str, turn: int, spill: int
) -> None:
    free = {each.address for each in candidates if each.usable and each.in_flight < each.max_in_flight}
    chosen = choose(candidates, policy, teacher_id=teacher_id, turn=turn, spill=spill)
    assert chosen in free if free else chosen is None


@given(candidate_lists, st.integers(0, 99))
def test_round_robin_takes_one_with_the_least_in_flight(candidates: list[Candidate], turn: int) -> None:
    chosen = choose(candidates, turn=turn)
    free = {each.address: each.in_flight for each in candidates if each.usable and each.in_flight < each.max_in_flight}
    if chosen is not None:
        assert free[chosen] == min(free.values())


@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 60), st.data())
def test_round_robin_spreads_one_after_the_other(count: int, first: int, items: int, data: st.DataObject) -> None:
    dead = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    candidates = [Candidate(ADDRESSES[index], index not in dead, 0, 9) for index in range(count)]
    chosen = Counter(choose(candidates, turn=first + turn) for turn in range(items))
    shares = [chosen[candidate.address] for candidate in candidates if candidate.usable]
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == items


def idle(addresses: list[str]) -> list[Candidate]:
    return [Candidate(address, True, 0, 9) for address in addresses]


@given(st.permutations(ADDRESSES), st.text(), st.integers(0, 99))
def test_rendezvous_keeps_a_teacher_in_one_place_whatever_the_order_and_the_turn(
    addresses: list[str], teacher_id: str, turn: int
) -> None:
    wanted = choose(idle(ADDRESSES), "rendezvous", teacher_id=teacher_id)
    assert choose(idle(addresses), "rendezvous", teacher_id=teacher_id, turn=turn) == wanted


@given(st.sets(st.sampled_from(ADDRESSES), min_size=2), st.sampled_from(ADDRESSES))
def test_rendezvous_moves_only_the_teachers_of_the_one_that_leaves(present: set[str], leaving: str) -> None:
    before, after = sorted(present), sorted(present - {leaving})
    for teacher_id in map(str, range(50)):
        home = choose(idle(before), "rendezvous", teacher_id=teacher_id)
        if home != leaving:
            assert choose(idle(after), "rendezvous", teacher_id=teacher_id) == home


def test_rendezvous_spreads_teachers() -> None:
    homes = Counter(rendezvous_ranking(f"teacher-{index}", ADDRESSES)[0] for index in range(600))
    assert set(homes) == set(ADDRESSES)
    assert all(60 <= count <= 140 for count in homes.values())  # 100 each, and four standard deviations


def test_rendezvous_goes_down_the_ranking_when_the_first_is_busy_or_away() -> None:
    first, second, third = rendezvous_ranking("a", ADDRESSES[:3])

    def chosen(**in_flight: int) -> str | None:
        order = dict(zip((first, second, third), ("first", "second", "third"), strict=True))
        candidates = [
            Candidate(address, in_flight.get(name, 0) >= 0, in_flight.get(name, 0), 6)
            for address, name in order.items()
        ]
        found = choose(candidates, "rendezvous", spill=3)
        return order[found] if found else None

    assert chosen(first=2) == "first"
    assert chosen(first=3) == "second"
    assert chosen(first=-1) == "second"  # not usable
    assert chosen(first=3, second=3, third=2) == "third"
    assert chosen(first=5, second=4, third=5) == "second"  # all beyond the bound: the one with the least
    assert chosen(first=6, second=6, third=6) is None


@pytest.mark.parametrize(
    ("host", "literal"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("teachers.mesh.svc", False), ("1.2.3", False)],
)
def test_what_is_resolved(host: str, literal: bool) -> None:
    assert is_literal(host) is literal


async def test_records_of_a_host() -> None:
    assert await resolve_records("localhost", 7001) == ["127.0.0.1:7001"]
    assert await resolve_records("::1", 7001) == ["[::1]:7001"]


# --- places, and who waits for them ----------------------------------------------------------------------------------
@asynccontextmanager
async def replica_set(
    *healths: Health, teacher_ids: tuple[str, ...] = ("a",), room: int = 2
) -> AsyncIterator[ReplicaSet]:
    """One nobody looks after: the replicas are as the test says, and nothing is sent to them."""

    async def admit(_: Replica) -> None:
        raise AssertionError

    addresses = [f"127.0.0.1:{port}" for port in range(1, len(healths) + 1)]
    places = ReplicaSet(addresses, "opd.v1.TeacherService", ChannelConfig(max_in_flight=room), admit)
    places._started = True
    for replica, health in zip(places.all, healths, strict=True):
        replica.health, replica.teacher_ids = health, frozenset(teacher_ids)
    yield places
    await places.close()


async def arrived(places: ReplicaSet, count: int) -> None:
    """Every task that wants a place has one, or waits."""
    for _ in range(3):
        await asyncio.sleep(0)
    assert sum(map(len, places._waiting.values())) == count


async def test_choices_grow_with_the_items_not_with_their_square_while_one_replica_is_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices = 0

    def counted(*arguments: object, **options: object) -> str | None:
        nonlocal choices
        choices += 1
        return choose_replica(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(replicas_module, "choose_replica", counted)
    items, teacher_ids = 4000, ("a", "b", "c")
    names = (Health.SERVING, Health.UNREACHABLE, Health.SERVING)
    async with replica_set(*names, teacher_ids=teacher_ids, room=8) as places:
        begin = asyncio.Event()

        async def item(number: int) -> None:
            with await places.place(teacher_ids[number % 3], 1, ()):
                await begin.wait()

        tasks = [asyncio.create_task(item(number)) for number in range(items)]
        await arrived(places, items - 16)
        assert choices <= 2 * items
        begin.set()
        await asyncio.gather(*tasks)
        assert not places._waiting
        assert choices <= 4 * items
        # News is for everybody, and costs a choice a teacher.
        held = [await places.place("a", 1, ()) for _ in range(16)]
        tasks = [asyncio.create_task(item(number)) for number in range(items)]
        await arrived(places, items)
        before = choices
        places._tell()
        assert choices - before == 3
        for place in held:
            place.release()
        await asyncio.gather(*tasks)


async def test_places_go_to_the_first_come_whatever_the_teacher() -> None:
    order: list[int] = []
    async with replica_set(Health.SERVING, Health.UNREACHABLE, teacher_ids=("a", "b"), room=1) as places:
        held = await places.place("a", 1, ())

        async def item(number: int) -> None:
            with await places.place("ab"[number % 3 == 0], 1, ()):
                order.append(number)

        tasks = [asyncio.create_task(item(number)) for number in range(12)]
        await arrived(places, 12)
        tasks[4].cancel()
        await arrived(places, 11)
        held.release()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [number for number in range(12) if number != 4]


async def test_one_that_must_avoid_the_free_replica_holds_up_nobody() -> None:
    async with replica_set(Health.SERVING, Health.SERVING, room=1) as places:
        one, two = [await places.place("a", 1, ()) for _ in range(2)]
        picky = asyncio.create_task(places.place("a", 1, [one.replica.address]))
        easy = asyncio.create_task(places.place("a", 1, ()))
        await arrived(places, 2)
        one.release()
        assert (await easy).replica is one.replica
        assert not picky.done()
        two.release()
        assert (await picky).replica is two.replica


async def test_whoever_waits_when_the_client_is_closed_is_told() -> None:
    async with replica_set(Health.SERVING, Health.SERVING, room=1) as places:
        for _ in range(2):
            await places.place("a", 1, ())
        waiting = [asyncio.create_task(places.place("a", 1, ())) for _ in range(3)]
        await arrived(places, 3)
        await places.close()
        for result in [*await asyncio.gather(*waiting, return_exceptions=True)]:
            assert isinstance(result, UnavailableError)
            assert "was closed" in str(result)
        with pytest.raises(UnavailableError, match="was closed"):
            await places.place("a", 1, ())


# --- the pre-flight's comparison -------------------------------------------------------------------------------------
def answers(rows: int = 8, width: int = 16, dtype: object = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(scale=3.0, size=(rows, width)).astype(dtype)


EXACT = REPLICA_TOLERANCE["float32"]


@pytest.mark.parametrize("tolerance", [None, EXACT])
def test_equal_answers_agree(tolerance: Tolerance | None) -> None:
    assert first_disagreement(answers(), answers(), tolerance) is None


def test_one_bit_is_enough_in_deterministic_mode_and_little_otherwise() -> None:
    other = answers()
    other.view(np.uint32)[5, 3] ^= 1
    found = first_disagreement(answers(), other, None)
    assert found is not None
    assert (found.row, found.count) == (5, 1)
    assert 0 < found.size < 1e-6
    assert first_disagreement(answers(), other, EXACT) is None


def test_the_first_position_and_the_size_of_the_difference_are_told() -> None:
    other = answers()
    other[3, 2] += 1.0
    other[6] += 30.0
    found = first_disagreement(answers(), other, EXACT)
    assert found is not None
    assert (found.row, found.count) == (3, 2)
    assert found.size == pytest.approx(1.0 / np.linalg.norm(answers()[3]), rel=1e-5)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_a_number_agrees_with_nothing(broken: float) -> None:
    other = answers()
    other[2, 0] = broken
    for pair in ((answers(), other), (other, answers())):
        found = first_disagreement(*pair, REPLICA_TOLERANCE["bfloat16"])
        assert found is not None


def test_answers_of_another_shape_disagree() -> None:
    assert first_disagreement(answers(8), answers(7), EXACT) is not None


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_the_last_place_of_a_coarse_dtype_is_allowed_and_ten_are_not(name: str, dtype: object) -> None:
    one = answers(dtype=dtype)
    for places, agrees in ((1, True), (64, False)):
        other = (one.view(np.uint16) + places).view(dtype)
        assert (first_disagreement(one, other, REPLICA_TOLERANCE[name]) is None) is agrees


def test_a_few_positions_may_hang_on_a_rounding_and_a_tail_may_not() -> None:
    for bad, agrees in (([1, 5], True), (range(26, 32), False)):
        other = answers(32)
        other[list(bad)] *= 1.3
        found = first_disagreement(answers(32), other, REPLICA_TOLERANCE["bfloat16"])
        assert (found is None) is agrees
        if found is not None:
            assert (found.row, found.count) == (26, 6)
