"""The mini-batch: order, passes, and the plan by which every head comes to the device once."""

from __future__ import annotations

import random
from itertools import groupby, zip_longest

from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.signals import SignalKind
from opd_mesh.trajectory import Trajectory
from student_trainer.batch import (
    HeldAnswer,
    Mark,
    Sample,
    Visit,
    marks_in_order,
    order_by_teacher,
    plan_batch,
    plan_shares,
    split_into_passes,
)

# Two adapters of one base share its head; one teacher sends logits and has none.
HEADS = {"a": "A", "a2": "A", "b": "B", "c": "C", "d": "D", "plain": None}


def mark(teacher: str) -> Mark:
    digest = HEADS[teacher]
    return Mark(teacher, 1.0, SignalKind.HIDDEN_STATES if digest else SignalKind.LOGITS, digest, HeldAnswer({}))


def sample(name: str, teachers: list[str], tokens: int = 3, reference: str | None = None) -> Sample:
    trajectory = Trajectory(name, "d", token_ids=tuple(range(tokens)), scored_spans=((1, 2),))
    said_by_reference = None if reference is None else mark(reference)
    return Sample(trajectory, tuple(mark(teacher) for teacher in teachers), said_by_reference)


TEACHERS = st.lists(st.sampled_from(list(HEADS)), min_size=1, max_size=4, unique=True)
SAMPLES = st.lists(st.tuples(TEACHERS, st.integers(2, 40)), max_size=15).map(
    lambda drawn: [sample(f"t{index:02d}", *parts) for index, parts in enumerate(drawn)]
)


def names(samples: list[Sample]) -> list[str]:
    return [each.trajectory.trajectory_id for each in samples]


@given(SAMPLES, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_arrival(samples: list[Sample], chance: random.Random) -> None:
    arrived = list(samples)
    chance.shuffle(arrived)
    ordered = order_by_teacher(arrived)
    assert names(ordered) == names(order_by_teacher(samples))
    assert sorted(names(ordered)) == sorted(names(samples))


@given(SAMPLES)
def test_samples_of_the_same_teachers_stand_together(samples: list[Sample]) -> None:
    runs = [
        key for key, _ in groupby(order_by_teacher(samples), lambda one: frozenset(m.teacher_id for m in one.marks))
    ]
    assert len(runs) == len(set(runs))


@given(SAMPLES, st.integers(1, 80))
def test_passes_split_the_batch_within_the_budget(samples: list[Sample], budget: int) -> None:
    passes = split_into_passes(samples, budget)
    assert [name for part in passes for name in names(part)] == names(samples)  # a partition, in order
    for part, following in zip_longest(passes, passes[1:], fillvalue=[]):
        tokens = sum(one.num_tokens for one in part)
        assert part
        assert tokens <= budget or len(part) == 1
        assert not following or tokens + following[0].num_tokens > budget  # no pass ends early


def test_passes_of_a_known_batch() -> None:
    samples = [sample("a", ["a"], 8), sample("b", ["a"], 30), sample("c", ["a"], 5), sample("d", ["a"], 5)]
    assert [names(part) for part in split_into_passes(samples, 10)] == [["a"], ["b"], ["c", "d"]]
    assert split_into_passes([], 10) == []


# --- the plan ----------------------------------------------------------------------------------------------------
def device_loads(samples: list[Sample], budget: int, together: int) -> tuple[list[str], int]:
    """Digests in the order in which a device with room for ``together`` heads, least recently used first, loads them,
    and the largest number that was there at once."""
    plan = plan_batch(samples, tokens_per_pass=budget, heads_together=together)
    there: list[str] = []
    loads: list[str] = []
    most = 0
    for visit in plan.visits:
        part = plan.passes[visit.pass_index]
        for teachers in plan.shares(visit):
            for teacher in teachers:
                digest = next(m.head_digest for one in part for m in one.marks if m.teacher_id == teacher)
                if digest is None:
                    continue
                if digest not in there:
                    loads.append(digest)
                    del there[: max(0, len(there) - together + 1)]
                else:
                    there.remove(digest)
                there.append(digest)
                most = max(most, len(there))
    return loads, most


@given(SAMPLES, st.integers(1, 80), st.integers(1, 5))
def test_every_head_is_loaded_once_in_the_room_there_is(samples: list[Sample], budget: int, together: int) -> None:
    loads, most = device_loads(samples, budget, together)
    wanted = {m.head_digest for one in samples for m in one.marks if m.head_digest is not None}
    assert sorted(loads) == sorted(wanted)
    assert most <= together
    assert plan_batch(samples, tokens_per_pass=budget, heads_together=together).head_digests == wanted


@given(SAMPLES, st.integers(1, 80), st.integers(1, 5))
def test_every_mark_has_a_part_in_one_share_of_one_visit(samples: list[Sample], budget: int, together: int) -> None:
    plan = plan_batch(samples, tokens_per_pass=budget, heads_together=together)
    parts = sorted(
        (plan.passes[visit.pass_index][index].trajectory.trajectory_id, teacher)
        for visit in plan.visits
        for teachers, indices in plan.shares(visit).items()
        for index in indices
        for teacher in teachers
    )
    assert parts == sorted((one.trajectory.trajectory_id, m.teacher_id) for one in samples for m in one.marks)
    assert sorted(name for part in plan.passes for name in names(list(part))) == sorted(names(samples))
    ordered = marks_in_order(plan)
    assert sorted(map(id, ordered)) == sorted(id(m) for one in samples for m in one.marks)


@given(SAMPLES, st.integers(1, 80), st.integers(1, 5))
def test_visits_open_and_close_every_pass_once_and_never_come_back_to_a_window(
    samples: list[Sample], budget: int, together: int
) -> None:
    plan = plan_batch(samples, tokens_per_pass=budget, heads_together=together)
    assert [visit.window for visit in plan.visits] == sorted(visit.window for visit in plan.visits)
    kept = 0
    running: set[int] = set()
    for visit in plan.visits:
        assert visit.opens == (visit.pass_index not in running)
        running.add(visit.pass_index)
        # Activations of one pass at most are in memory, whatever is going on.
        kept = max(kept, len(running - plan.suspended))
        if visit.closes:
            running.remove(visit.pass_index)
    assert not running
    assert kept <= 1
    if all(len(one.head_digests) <= 1 for one in samples):
        assert not plan.suspended


@given(SAMPLES, st.integers(1, 80), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_arrival(
    samples: list[Sample], budget: int, together: int, chance: random.Random
) -> None:
    arrived = list(samples)
    chance.shuffle(arrived)
    first = plan_batch(samples, tokens_per_pass=budget, heads_together=together)
    second = plan_batch(arrived, tokens_per_pass=budget, heads_together=together)
    assert first.visits == second.visits
    assert [names(list(part)) for part in first.passes] == [names(list(part)) for part in second.passes]


def test_one_teacher_each_streams_through_in_few_passes() -> None:
    mixed = [sample(f"t{index}", [teacher]) for index, teacher in enumerate(["a", "b", "c"] * 2 + ["a", "b"])]
    plan = plan_batch(mixed, tokens_per_pass=100, heads_together=1)
    assert [names(list(part)) for part in plan.passes] == [["t0", "t3", "t6", "t1", "t4", "t7", "t2", "t5"]]
    assert plan.visits == (Visit(0, 0, True, False), Visit(1, 0, False, False), Visit(2, 0, False, True))
    assert not plan.suspended


def test_passes_with_several_heads_are_suspended_but_for_the_last() -> None:
    plan = plan_batch([sample(f"t{i}", ["a", "b"], 8) for i in range(3)], tokens_per_pass=10, heads_together=1)
    assert [(visit.window, visit.pass_index) for visit in plan.visits] == [
        (0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0),
    ]  # fmt: skip
    assert plan.suspended == {0, 1}
    assert not plan_batch([sample("t", ["a", "b"])], tokens_per_pass=10, heads_together=1).suspended
    whole = plan_batch([sample(f"t{i}", ["a", "b"], 8) for i in range(3)], tokens_per_pass=10, heads_together=2)
    assert not whole.suspended
    assert all(list(whole.shares(visit)) == [("a", "b")] for visit in whole.visits)


def test_references_are_asked_for_once() -> None:
    samples = [sample("x", ["a", "b"], reference="c"), sample("y", ["b"], reference="c")]
    plan = plan_batch(samples, tokens_per_pass=3, heads_together=1)
    assert sorted(m.teacher_id for m in marks_in_order(plan)) == ["a", "b", "b", "c", "c"]
    assert plan.head_digests == {"A", "B", "C"}


def test_teachers_that_fit_together_share_a_projection() -> None:
    samples = [sample("x", ["c", "a"]), sample("y", ["a", "b", "c", "plain"]), sample("z", ["b"])]
    assert plan_shares(samples, ["A", "C"], first_visit=False) == {("a", "c"): [0, 1]}
    assert plan_shares(samples, ["B"], first_visit=True) == {("b", "plain"): [1], ("b",): [2]}
