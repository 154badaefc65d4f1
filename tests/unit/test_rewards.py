"""Rewards: grades less what length costs, asked for one by one, graded together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from opd_mesh.errors import ConfigError
from opd_mesh.trajectory import FinishReason, Trajectory
from student_trainer.rewards import Rewards, reward_of
from student_trainer.tasks import Grade, Prompt


class FakeDomain:
    """Text: the response's ids; every token costs a tenth."""

    has_verifier = True

    def __init__(self, name: str) -> None:
        self.name = name

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def length_penalty(self, num_tokens: int) -> float:
        return -0.1 * num_tokens


class FakeGrader:
    """The score is the first id in tenths; 99 cannot be graded, 98 breaks the grader itself."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[str]]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def grade(self, domain: str, entries: Sequence[tuple[Prompt, str]]) -> list[Grade]:
        self.batches.append((domain, [text for _, text in entries]))
        await self.gate.wait()
        grades = []
        for _, text in entries:
            first = int(text.split()[0])
            if first == 98:
                raise ConfigError("the child cannot be started again", field="domains.a.verifier")
            grades.append(
                Grade(None, parsed=False, failure="raised") if first == 99 else Grade(first / 10, parsed=True)
            )
        return grades


def response(name: str, ids: Sequence[int], domain: str = "a") -> Trajectory:
    return Trajectory(name, domain, (1, *ids), ((1, 1 + len(ids)),))


def new_rewards() -> tuple[Rewards, FakeGrader]:
    grader = FakeGrader()
    return Rewards([FakeDomain("a"), FakeDomain("b")], grader), grader  # type: ignore[list-item, arg-type]


def ask(rewards: Rewards, name: str, ids: Sequence[int], domain: str = "a") -> None:
    rewards.ask(Prompt(domain, 0, (1,)), response(name, ids, domain))


def test_a_reward_is_the_score_less_its_length() -> None:
    domain: Any = FakeDomain("a")
    found = reward_of(domain, response("x", (7, 2, 3)), Grade(0.7, parsed=True))
    assert (found.total, found.penalty) == (pytest.approx(0.4), pytest.approx(-0.3))
    ungraded = reward_of(domain, response("x", (7, 2, 3)), Grade(None, parsed=False, failure="hung"))
    assert ungraded.total is None
    assert ungraded.penalty == pytest.approx(-0.3)
    assert ungraded.grade.failure == "hung"


async def test_rewards_come_in_the_order_asked_for_them_whatever_was_graded_first() -> None:
    rewards, _ = new_rewards()
    for name, first, domain in (("x", 1, "a"), ("y", 2, "b"), ("z", 3, "a")):
        ask(rewards, name, (first,), domain)
    found = await rewards.take(["z", "y", "x"])
    assert [reward.total for reward in found] == pytest.approx([0.2, 0.1, 0.0])
    await rewards.close()


async def test_what_arrives_meanwhile_is_graded_together() -> None:
    """One round for the first, one for all that came while it was graded, a domain at a time."""
    rewards, grader = new_rewards()
    grader.gate.clear()
    ask(rewards, "0", (5,))
    await asyncio.sleep(0)
    for number, domain in enumerate("abab", start=1):
        ask(rewards, str(number), (number,), domain)
    grader.gate.set()
    await rewards.take([str(number) for number in range(5)])
    assert grader.batches == [("a", ["5"]), ("a", ["1", "3"]), ("b", ["2", "4"])]
    ask(rewards, "later", (6,))  # and once all is done it begins again
    assert (await rewards.take(["later"]))[0].total == pytest.approx(0.5)
    await rewards.close()


async def test_a_verifier_that_fails_takes_nobody_else_with_it() -> None:
    rewards, _ = new_rewards()
    ask(rewards, "bad", (99,))
    ask(rewards, "good", (5,))
    bad, good = await rewards.take(["bad", "good"])
    assert (bad.total, bad.grade.failure) == (None, "raised")
    assert good.total == pytest.approx(0.4)
    await rewards.close()


async def test_what_was_cancelled_midway_is_not_graded() -> None:
    rewards, grader = new_rewards()
    cut = replace(response("cut", (7, 7)), finish_reason=FinishReason.CANCELLED)
    rewards.ask(Prompt("a", 0, (1,)), cut)
    ask(rewards, "whole", (5,))
    found, whole = await rewards.take(["cut", "whole"])
    assert (found.total, found.grade.failure) == (None, "it was cancelled")
    assert whole.total == pytest.approx(0.4)
    assert grader.batches == [("a", ["5"])]
    await rewards.close()


async def test_what_keeps_the_verifiers_from_working_is_raised_where_rewards_are_waited_for() -> None:
    rewards, _ = new_rewards()
    ask(rewards, "broken", (98,))
    ask(rewards, "beside", (1,))
    for name in ("beside", "broken"):
        with pytest.raises(ConfigError, match="cannot be started again"):
            await rewards.take([name])
    ask(rewards, "later", (6,))
    assert (await rewards.take(["later"]))[0].total == pytest.approx(0.5)
    await rewards.close()


async def test_closing_lets_go_of_who_waits() -> None:
    rewards, grader = new_rewards()
    grader.gate.clear()
    ask(rewards, "x", (1,))
    ask(rewards, "unread", (1,))
    waiting = asyncio.create_task(rewards.take(["x"]))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.wait_for(rewards.close(), 5)
    grader.gate.set()
    assert len(asyncio.all_tasks()) == 1
