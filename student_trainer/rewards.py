"""Rewards of responses: the verifier's score, or a judge's, less what their length costs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from opd_mesh.policy import PolicyId
from opd_mesh.trajectory import Trajectory
from student_trainer.answers import read_answers
from student_trainer.tasks import Domain, Grade, Grader, Prompt


@dataclass(frozen=True, slots=True)
class Judged:
    """Of one response that a judge scored.

    Attributes:
        judge: the policy that judged.
        variance: of the score over the votes that parsed.
        votes, unparsed: how many were asked for, and how many of them were no verdicts.
    """

    judge: PolicyId
    variance: float
    votes: int
    unparsed: int


@dataclass(frozen=True, slots=True)
class Reward:
    """Of one response.

    Attributes:
        total: score + penalty; None where the response could not be graded, which is no reward of 0.
        penalty: at most 0.
        grade: what the verifier said, or the judge.
    """

    total: float | None
    penalty: float
    grade: Grade
    judged: Judged | None = None


class Judge(Protocol):
    """Rewards of some domains: see :class:`student_trainer.judged_rewards.GroupJudge`."""

    def judges(self, domain: str) -> bool:
        """Whether these are."""
        ...

    def ask(self, prompt: Prompt, trajectory: Trajectory) -> None:
        """Have a response judged."""
        ...

    async def take(self, trajectory_ids: Sequence[str]) -> list[Reward]:
        """Of one group."""
        ...

    async def close(self) -> None:
        """Let go of what nobody waits for."""
        ...


class Rewards:
    """Grades responses as they arrive, many at a time. For one event loop.

    Args:
        grader: started already.
        judge: of domains whose rewards are not their verifiers'.
    """

    def __init__(self, domains: Iterable[Domain], grader: Grader, judge: Judge | None = None) -> None:
        self._judge = judge
        self._domains = {domain.name: domain for domain in domains}
        self._grader = grader
        self._waiting: list[tuple[Prompt, Trajectory, asyncio.Future[Reward]]] = []
        self._futures: dict[str, asyncio.Future[Reward]] = {}
        self._judged: set[str] = set()  # responses that the judge has and that are not taken
        self._working: asyncio.Task[None] | None = None

    def ask(self, prompt: Prompt, trajectory: Trajectory) -> None:
        """Have a response graded."""
        if self._judge is not None and self._judge.judges(prompt.domain):
            self._judged.add(trajectory.trajectory_id)
            self._judge.ask(prompt, trajectory)
            return
        future: asyncio.Future[Reward] = asyncio.get_running_loop().create_future()
        self._futures[trajectory.trajectory_id] = future
        self._waiting.append((prompt, trajectory, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())

    async def take(self, trajectory_ids: Sequence[str]) -> list[Reward]:
        """Of responses to one prompt that were asked for, each once. Raises what keeps the verifiers, or the judge,
        from working at all."""
        if self._judge is not None and self._judged.issuperset(trajectory_ids):
            self._judged.difference_update(trajectory_ids)
            return await self._judge.take(trajectory_ids)
        return list(await asyncio.gather(*(self._futures.pop(name) for name in trajectory_ids)))

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                for name in dict.fromkeys(prompt.domain for prompt, _, _ in batch):
                    await self._grade(self._domains[name], [item for item in batch if item[0].domain == name])
            except Exception as error:  # noqa: BLE001 - raised where the rewards are waited for
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    async def _grade(self, domain: Domain, items: Sequence[tuple[Prompt, Trajectory, asyncio.Future[Reward]]]) -> None:
        answers = await read_answers(domain, self._grader, [(prompt, trajectory) for prompt, trajectory, _ in items])
        for (_, trajectory, future), answer in zip(items, answers, strict=True):
            assert answer.grade is not None  # rewards need a verifier: the recipe has checked it
            if not future.done():
                future.set_result(reward_of(domain, trajectory, answer.grade))

    async def close(self) -> None:
        """Let go of what nobody waits for."""
        if self._judge is not None:
            await self._judge.close()
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()


def reward_of(domain: Domain, trajectory: Trajectory, grade: Grade) -> Reward:
    """The score, less the length penalty of the domain or of its effort."""
    penalty = domain.length_penalty(trajectory.num_scored)
    return Reward(None if grade.score is None else grade.score + penalty, penalty, grade)
