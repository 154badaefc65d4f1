"""Groups: advantages for those that have a reward, counts of the rest, and the step's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from opd_mesh.config.training import GrpoConfig
from opd_mesh.signals import SignalKind
from opd_mesh.trajectory import Trajectory
from student_trainer.batch import HeldAnswer, Mark, Sample
from student_trainer.groups import Groups
from student_trainer.rewards import Reward
from student_trainer.tasks import Grade


class Answer(HeldAnswer):
    """A reference's, which counts how often it was let go of."""

    def __init__(self) -> None:
        super().__init__({})
        object.__setattr__(self, "released", 0)

    def release(self) -> None:
        object.__setattr__(self, "released", self.released + 1)  # type: ignore[attr-defined]


def reward(total: float | None, *, penalty: float = 0.0, parsed: bool = True, failure: str | None = None) -> Reward:
    score = None if total is None else total - penalty
    return Reward(total, penalty, Grade(score, parsed=parsed, failure=failure))


class FakeRewards:
    """By trajectory id."""

    def __init__(self, known: dict[str, Reward]) -> None:
        self.known = known

    async def take(self, names: Sequence[str]) -> list[Reward]:
        return [self.known[name] for name in names]


def sample(name: str, domain: str = "d") -> Sample:
    mark = Mark("reference", 0.0, SignalKind.TOKEN_LOGPROBS, None, Answer())
    return Sample(Trajectory(name, domain, (1, 2), ((1, 2),)), reference=mark)


def new_groups(rewards: dict[str, Reward], **config: Any) -> Groups:
    return Groups(GrpoConfig(advantage_scale="none", **config), FakeRewards(rewards))  # type: ignore[arg-type]


async def test_the_graded_get_advantages_and_the_others_are_left_out_and_counted() -> None:
    groups = new_groups({
        "a": reward(1.0),
        "b": reward(None, parsed=False, failure="the verifier raised: no"),
        "c": reward(0.25, penalty=-0.25),
        "d": reward(0.25, parsed=False),
    })  # fmt: skip
    given = [sample(name) for name in "dcba"]  # as they arrived
    samples, degenerate = await groups.with_advantages(given)
    assert not degenerate
    assert [(one.trajectory.trajectory_id, one.advantage) for one in samples] == [
        ("a", 0.5),
        ("c", -0.25),
        ("d", -0.25),
    ]
    assert groups.taught == 1
    # Only what is left out is let go of: the update asks the others what the reference said.
    assert [one.reference.answer.released for one in given] == [0, 0, 1, 0]  # type: ignore[union-attr]
    assert groups.last_failure == "the verifier raised: no"
    assert groups.take_counted() == {
        "groups_taught": 1, "groups_equal": 0, "groups_single": 0, "samples_dropped": 0, "ungraded": 1, "unparsed": 1,
        "ungraded/d": 0.25, "unparsed/d": pytest.approx(1 / 3),
        "reward/d": 0.5, "score/d": pytest.approx((1.0 + 0.5 + 0.25) / 3), "length_penalty/d": pytest.approx(-0.25 / 3),
    }  # fmt: skip


async def test_degenerate_groups_are_told_and_counted_by_kind() -> None:
    groups = new_groups({
        "a1": reward(0.5), "a2": reward(0.5), "b1": reward(1.0), "b2": reward(None, failure="hung"),
        "c1": reward(None, failure="hung"), "c2": reward(None, failure="crashed"),
    })  # fmt: skip
    found = [await groups.with_advantages([sample(f"{name}{n}", domain=name) for n in (1, 2)]) for name in "abc"]
    assert [degenerate for _, degenerate in found] == [True] * 3
    assert [[one.advantage for one in samples] for samples, _ in found] == [[0.0, 0.0], [0.0], []]
    groups.drop([sample("a1"), sample("a2")])
    counted = groups.take_counted()
    assert {key: value for key, value in counted.items() if "/" not in key} == {
        "groups_taught": 0, "groups_equal": 1, "groups_single": 2, "samples_dropped": 2, "ungraded": 3, "unparsed": 0,
    }  # fmt: skip
    assert (counted["ungraded/b"], counted["ungraded/c"], counted["unparsed/b"]) == (0.5, 1.0, 0.0)
    assert "unparsed/c" not in counted
    assert counted["reward/a"] == 0.5
    assert "reward/c" not in counted  # what was never graded has no mean, and certainly not 0


@pytest.mark.parametrize("sampling", [None, {"max_rounds": 1}])
async def test_what_lengths_alone_tell_apart_is_no_group_for_dynamic_sampling(sampling: Any) -> None:
    known = {"a": reward(1.0), "b": reward(0.5, penalty=-0.5)}  # both are right, one is long
    groups = new_groups(known, dynamic_sampling=sampling)
    samples, degenerate = await groups.with_advantages([sample("a"), sample("b")])
    assert degenerate == (sampling is not None)
    assert [one.advantage for one in samples] == [0.25, -0.25]
    assert (groups.taught, groups.take_counted()["groups_equal"]) == ((0, 1) if sampling else (1, 0))


async def test_counts_are_those_of_one_step() -> None:
    groups = new_groups({"a": reward(1.0), "b": reward(0.0)})
    await groups.with_advantages([sample("a"), sample("b")])
    assert groups.take_counted()["groups_taught"] == 1
    assert groups.taught == 0
    assert "reward/d" not in groups.take_counted()


async def test_the_order_of_arrival_changes_nothing() -> None:
    rewards = {name: reward(value) for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.7))}
    orders = [[sample(name) for name in names] for names in ("abc", "cab")]
    (one, _), (other, _) = [await new_groups(rewards).with_advantages(order) for order in orders]
    assert [(s.trajectory.trajectory_id, s.advantage) for s in one] == [
        (s.trajectory.trajectory_id, s.advantage) for s in other
    ]
