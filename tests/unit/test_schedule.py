"""Writing ahead: whatever the timing, no token is older than the bound, and the run goes on."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.errors import InternalError
from opd_mesh.policy import PolicyId
from opd_mesh.trajectory import Trajectory
from student_trainer.rollout_watch import lacks_policy
from student_trainer.schedule import check_staleness, staleness, steps_to_write


@pytest.mark.parametrize(
    ("written", "served", "bound", "steps"),
    [
        (0, 0, 0, [1]),
        (1, 0, 0, []),
        (1, 1, 0, [2]),
        (0, 0, 1, [1, 2]),
        (2, 1, 1, [3]),
        (0, 0, 3, [1, 2, 3, 4]),
        (4, 4, 3, [5, 6]),  # the run has no more
        (4, 4, 0, [5]),  # resumed at step 4
    ],
)
def test_steps_whose_responses_may_be_asked_for(written: int, served: int, bound: int, steps: list[int]) -> None:
    assert list(steps_to_write(written, served, max_staleness=bound, total_steps=6)) == steps


def test_the_oldest_token_counts() -> None:
    trajectory = Trajectory("t", "d", (1, 2, 3, 4), ((1, 4),), policy_versions=(3, 5, 4))
    assert staleness(trajectory, 6) == 3
    assert staleness(Trajectory("t", "d", (1, 2), ((1, 2),)), 6) == 0


def test_a_response_outside_the_bound_is_not_trained_on() -> None:
    def written(*versions: int) -> Trajectory:
        return Trajectory("t", "d", (1, *versions), ((1, 1 + len(versions)),), policy_versions=versions)

    check_staleness([written(3, 5, 4), written(6, 6), written(4)], 6, max_staleness=3)
    for bad in (written(6, 2, 6), written(5, 7)):
        with pytest.raises(InternalError, match=f"versions {min(bad.policy_versions)} to {max(bad.policy_versions)}"):
            check_staleness([written(6), bad], 6, max_staleness=3)


@given(
    st.integers(0, 4),
    st.integers(1, 8),
    st.integers(0, 3),
    st.lists(st.sampled_from(["token", "finish", "train", "serve"]), max_size=120),
    st.randoms(use_true_random=False),
)
def test_no_token_is_ever_older_than_the_bound(
    bound: int, steps: int, first: int, events: list[str], chance: random.Random
) -> None:
    """A naive model of the run: servers write, the trainer trains, policies travel, in any order."""
    total = first + steps
    trained = served = first  # versions
    open_steps: dict[int, list[int]] = {}
    finished: dict[int, list[int]] = {}
    done = []

    def ask(written: int) -> None:
        for number in steps_to_write(written, served, max_staleness=bound, total_steps=total):
            open_steps[number] = []

    def happen(event: str) -> None:
        nonlocal trained, served
        match event:
            case "token" if open_steps:  # by a server that has the newest policy already, or one that has not
                open_steps[chance.choice(list(open_steps))].append(chance.choice([served, trained]))
            case "finish" if open_steps:
                number = chance.choice(list(open_steps))
                finished[number] = [*open_steps.pop(number), chance.choice([served, trained])]
            case "serve" if served < trained:
                served = trained
                ask(max([*open_steps, *finished, *done], default=first))
            # The weights do not move while they are being sent.
            case "train" if trained + 1 in finished and served == trained:
                versions = finished.pop(trained + 1)
                age = staleness(Trajectory("t", "d", (0,), (), policy_versions=tuple(versions)), trained)
                assert 0 <= age <= bound
                trained += 1
                done.append(trained)

    ask(first)
    for event in events:
        happen(event)
    for _ in range(steps):  # and nothing waits for ever
        for event in ("serve", *["finish"] * (bound + 1), "train"):
            happen(event)
    assert done == list(range(first + 1, total + 1))


def test_a_server_lacks_the_policy_when_it_has_none_or_an_older_one_of_ours() -> None:
    current = PolicyId("run", 2, 5, "digest")
    assert lacks_policy(None, current)
    assert lacks_policy(PolicyId("run", 2, 4, "x"), current)
    assert lacks_policy(PolicyId("run", 1, 9, "x"), current)
    assert not lacks_policy(current, current)
    assert not lacks_policy(PolicyId("run", 2, 6, "x"), current)
    assert not lacks_policy(PolicyId("another", 1, 1, "x"), current)
