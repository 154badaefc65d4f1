"""What a step trains on: the interface, and answers that the domains hold."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError
from opd_mesh.trajectory import Trajectory
from student_trainer.batch import Sample
from student_trainer.checkpoint import TrainerState
from student_trainer.tasks import Domain, Grader, next_prompts
from student_trainer.writing import Arrival, own_trajectory_id


@dataclass(slots=True)
class Gathered:
    """What one step trains on.

    Attributes:
        cursors, drawn: the place in the data behind the step's prompts.
        arrivals: of the samples that came through the stream.
        counted: metrics of how it came about.
    """

    number: int
    cursors: dict[str, int]
    drawn: dict[str, int]
    samples: list[Sample]
    arrivals: list[Arrival] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)


class Supply(Protocol):
    """Samples, step by step. For one event loop."""

    @property
    def backlog(self) -> int:
        """Trajectories of later steps that are here."""
        ...

    def start(self, domains: Sequence[Domain], progress: TrainerState, grader: Grader) -> None:
        """Go on from a place in the data. ``grader`` knows the domains' verifiers."""
        ...

    def submit(self, served_version: int) -> None:
        """A policy of this version is served, so more may be written."""
        ...

    def size_of(self, number: int) -> int:
        """Responses of a step."""
        ...

    async def take(self, number: int) -> Gathered:
        """The next step, when all of it is there. Raises why it will never be."""
        ...

    async def close(self) -> None:
        """Nothing more is taken."""
        ...


class AnswerSupply:
    """Prompts with the answers that the domains hold. See :class:`Supply`."""

    backlog = 0

    def __init__(self, recipe: Recipe) -> None:
        self._prompts_per_step = recipe.batch.prompts_per_step
        self._max_tokens = recipe.rollout.engine.max_context_tokens
        self._domains: dict[str, Domain] = {}

    def start(self, domains: Sequence[Domain], progress: TrainerState, grader: Grader) -> None:
        """See :class:`Supply`."""
        self._domains = {domain.name: domain for domain in domains}
        self._lineage = progress.lineage
        self._cursors, self._drawn = progress.cursors, progress.drawn

    def submit(self, served_version: int) -> None:
        """Nobody writes."""

    def size_of(self, number: int) -> int:
        """See :class:`Supply`."""
        return self._prompts_per_step

    async def take(self, number: int) -> Gathered:
        """See :class:`Supply`."""
        gathered = await asyncio.to_thread(self._draw, number)
        self._cursors, self._drawn = gathered.cursors, gathered.drawn
        return gathered

    def _draw(self, number: int) -> Gathered:
        prompts, cursors, drawn = next_prompts(
            list(self._domains.values()), self._prompts_per_step, self._cursors, self._drawn
        )
        samples = []
        for place, prompt in enumerate(prompts):
            solution = self._domains[prompt.domain].solution(prompt)
            start = len(prompt.token_ids)
            if start + len(solution) > self._max_tokens:
                raise ConfigError(
                    f"domain {prompt.domain}: item {prompt.index} is {start + len(solution)} tokens long, prompt "
                    f"({start}) and answer ({len(solution)}); rollout.engine.max_context_tokens allows "
                    f"{self._max_tokens}: raise it, or leave such items out",
                    field=f"domains.{prompt.domain}",
                )
            trajectory = Trajectory(
                trajectory_id=own_trajectory_id(self._lineage, number, place),
                domain=prompt.domain,
                token_ids=(*prompt.token_ids, *solution),
                scored_spans=((start, start + len(solution)),),
            )
            samples.append(Sample(trajectory))
        return Gathered(number, cursors, drawn, samples)

    async def close(self) -> None:
        """See :class:`Supply`."""
