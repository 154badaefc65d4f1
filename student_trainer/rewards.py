"""Rewards of responses: the verifier's score, less what their length costs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opd_mesh.trajectory import Trajectory
from student_trainer.answers import read_answers
from student_trainer.tasks import Domain, Grade, Grader, Prompt


@dataclass(frozen=True, slots=True)
class Reward:
    """Of one response.

    Attributes:
        total: score + penalty; None where the response could not be graded, which is no reward of 0.
        penalty: at most 0.
        grade: what the verifier said.
    """

    total: float | None
    penalty: float
    grade: Grade


class Rewards:
    """Grades responses as they arrive, many at a time. For one event loop.

    Args:
        grader: started already.
    """

    def __init__(self, domains: Iterable[Domain], grader: Grader) -> None:
        self._domains = {domain.name: domain for domain in domains}
        self._grader = grader
        self._waiting: list[tuple[Prompt, Trajectory, asyncio.Future[Reward]]] = []
        self._futures: dict[str, asyncio.Future[Reward]] = {}
        self._working: asyncio.Task[None] | None = None

    def ask(self, prompt: Prompt, trajectory: Trajectory) -> None:
        """Have a response graded."""
        future: asyncio.Future[Reward] = asyncio.get_running_loop().create_future()
        self._futures[trajectory.trajectory_id] = future
        self._waiting.append((prompt, trajectory, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())

    async def take(self, trajectory_ids: Sequence[str]) -> list[Reward]:
        """Of responses that were asked for, each once. Raises what keeps the verifiers from working at all."""
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
