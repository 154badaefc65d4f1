"""The mini-batch: order and passes."""

from __future__ import annotations

import random
from itertools import groupby, zip_longest

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.trajectory import Trajectory
from student_trainer.batch import Mark, Sample, order_by_teacher, plan_shares, split_into_passes

ROWS = np.zeros((1, 1), np.float32)


def sample(name: str, teachers: list[str], tokens: int = 3) -> Sample:
    trajectory = Trajectory(name, "d", token_ids=tuple(range(tokens)), scored_spans=((1, 2),))
    return Sample(trajectory, tuple(Mark(teacher, 1.0, ROWS, False) for teacher in teachers))


TEACHERS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True)
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


def test_with_one_teacher_each_a_head_is_needed_once() -> None:
    mixed = [sample(f"t{index}", [teacher]) for index, teacher in enumerate("abcabcab")]
    ordered = order_by_teacher(mixed)
    assert [one.marks[0].teacher_id for one in ordered] == list("aaabbbcc")
    assert names(ordered) == ["t0", "t3", "t6", "t1", "t4", "t7", "t2", "t5"]
    assert plan_shares(ordered, 1) == {("a",): [0, 1, 2], ("b",): [3, 4, 5], ("c",): [6, 7]}


@given(SAMPLES, st.integers(1, 4))
def test_every_mark_has_a_part_in_one_share(samples: list[Sample], heads_resident: int) -> None:
    shares = plan_shares(samples, heads_resident)
    parts = sorted(
        (index, teacher) for teachers, indices in shares.items() for index in indices for teacher in teachers
    )
    assert parts == sorted((i, mark.teacher_id) for i, one in enumerate(samples) for mark in one.marks)
    assert all(1 <= len(teachers) <= heads_resident for teachers in shares)


def test_teachers_that_fit_together_share_a_projection() -> None:
    samples = [sample("x", ["c", "a"]), sample("y", ["a", "b", "c"]), sample("z", ["b"])]
    assert plan_shares(samples, 2) == {("a", "c"): [0], ("a", "b"): [1], ("c",): [1], ("b",): [2]}
    assert plan_shares(samples, 1) == {("a",): [0, 1], ("c",): [0, 1], ("b",): [1, 2]}


@given(SAMPLES, st.integers(1, 80))
def test_passes_split_the_batch_within_the_budget(samples: list[Sample], budget: int) -> None:
    passes = split_into_passes(samples, budget)
    assert [name for part in passes for name in names(part)] == names(samples)  # a partition, in order
    for part, following in zip_longest(passes, passes[1:], fillvalue=[]):
        tokens = sum(one.num_tokens for one in part)
        assert part
        assert tokens <= budget or len(part) == 1
        if following:  # no pass is closed early
            assert tokens + following[0].num_tokens > budget


def test_one_longer_than_the_budget_goes_alone() -> None:
    samples = [sample("a", ["t"], 4), sample("b", ["t"], 11), sample("c", ["t"], 5), sample("d", ["t"], 5)]
    assert [names(part) for part in split_into_passes(samples, 10)] == [["a"], ["b"], ["c", "d"]]
    assert split_into_passes([], 10) == []
