"""Generation, ahead of the training by at most ``max_staleness`` versions: step after step of prompts goes out.

Which responses make up a step is fixed by the order of prompts, never by who is done first, so a run that writes ahead
trains on the same prompts in the same order as one that does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from opd_mesh.clients.rollout import GenerateSpec
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import RolloutUnavailableError
from student_trainer.batch import Sample
from student_trainer.checkpoint import TrainerState
from student_trainer.data import Domain, Prompt, next_prompts
from student_trainer.mark_buffer import MarkBuffer
from student_trainer.rollouts import Rollouts
from student_trainer.schedule import steps_to_write
from student_trainer.teachers import Teachers
from student_trainer.writing import Arrival, Writing, own_trajectory_id


@dataclass(slots=True)
class StepInFlight:
    """What one step trains on, while it comes in.

    Attributes:
        cursors, drawn: the place in the data behind the step's prompts.
        samples: arrivals whose marks are asked for, in the order of arrival.
        failure: why marks could not be asked for.
    """

    number: int
    cursors: dict[str, int]
    drawn: dict[str, int]
    writing: Writing
    samples: list[Sample] = field(default_factory=list)
    failure: Exception | None = None

    @property
    def arrivals(self) -> list[Arrival]:
        """What has come."""
        return self.writing.arrivals


class Pipeline:
    """Steps whose responses are being written or wait for their turn. For one event loop."""

    def __init__(self, recipe: Recipe, rollouts: Rollouts, teachers: Teachers, marks: MarkBuffer) -> None:
        self._recipe = recipe
        self._rollouts = rollouts
        self._teachers = teachers
        self._marks = marks
        self._domains: Sequence[Domain] = ()
        self._steps: dict[int, StepInFlight] = {}  # in order; the step that is trained on is not among them
        self._wanted = 0  # the last step that the trainer has asked for
        self._written = self._may_be_written = 0  # the last step asked for, and the last that may be asked for
        self._next: asyncio.Handle | None = None
        self._failure: Exception | None = None
        marks.when_all_admitted(self._ask_for_marks)

    def start(self, domains: Sequence[Domain], progress: TrainerState) -> None:
        """Go on from a place in the data."""
        self._domains = domains
        self._lineage = progress.lineage
        self._written = self._may_be_written = progress.step
        self._cursors, self._drawn = progress.cursors, progress.drawn

    def submit(self, served_version: int) -> None:
        """Ask for the responses of every step that a policy of this version may write: of the first at once, of the
        others step by step, while the loop goes on."""
        recipe = self._recipe
        steps = steps_to_write(
            self._written, served_version, max_staleness=recipe.max_staleness, total_steps=recipe.run.steps
        )
        self._may_be_written = max(self._may_be_written, steps.stop - 1)
        self._begin_next()

    def _begin_next(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._written >= self._may_be_written or self._failure is not None:
            return
        try:
            self._begin(self._written + 1)
        except Exception as error:  # noqa: BLE001 - raised when the step's turn comes
            self._failure = error
        self._next = asyncio.get_running_loop().call_soon(self._begin_next)

    def _begin(self, number: int) -> None:
        prompts, cursors, drawn = next_prompts(
            self._domains, self._recipe.batch.prompts_per_step, self._cursors, self._drawn
        )
        writing = self._rollouts.write(self._specs(number, prompts), self._ask_for_marks)
        self._steps[number] = StepInFlight(number, cursors, drawn, writing)
        self._written, self._cursors, self._drawn = number, cursors, drawn

    def _specs(self, number: int, prompts: Sequence[Prompt]) -> list[GenerateSpec]:
        responses = self._recipe.batch.responses_per_prompt
        specs = []
        for place, prompt in enumerate(prompts):
            for answer in range(responses):
                sampling = self._rollouts.sampling(prompt.domain, "train", prompt.index, answer)
                request_id = own_trajectory_id(self._lineage, number, place * responses + answer)
                specs.append(self._rollouts.spec(request_id, prompt, sampling, publish=True))
        return specs

    def _ask_for_marks(self) -> None:
        """In the order of steps. What the trainer waits for is asked for as it arrives, the rest when all marks of
        earlier steps have been asked for and let into the buffer.

        So a later step never holds room that an earlier one of our own still waits for. Trajectories from outside are
        asked for when their step begins to train, behind what is asked for by then; the update lets in what it needs,
        so that what it trains on is complete whatever the buffer's size.
        """
        for step in self._steps.values():
            if step.failure is not None:
                return
            while len(step.samples) < len(step.arrivals):
                if step.number > self._wanted and self._marks.is_full:
                    return  # called again when the buffer has let all in
                trajectory = step.arrivals[len(step.samples)].trajectory
                try:
                    step.samples.append(self._teachers.ask(trajectory, self._marks))
                except Exception as error:  # noqa: BLE001 - raised when the step's turn comes
                    step.failure = error
                    step.writing.fail(error)
                    return
            if not step.writing.complete:
                return

    @property
    def written(self) -> int:
        """The last step whose responses were asked for."""
        return self._written

    @property
    def backlog(self) -> int:
        """Trajectories of later steps that are here."""
        return sum(len(step.arrivals) for step in self._steps.values())

    def size_of(self, number: int) -> int:
        """Responses of a step that is being written."""
        step = self._steps.get(number)
        return len(step.arrivals) + len(step.writing.wanted) if step else 0

    async def take(self, number: int) -> StepInFlight:
        """The next step, when all its responses have come and their marks are asked for.

        Raises:
            RolloutUnavailableError, StreamUnavailableError: a bounded wait has ended.
            OpdError: what a server says of a request.
        """
        if number not in self._steps and self._failure is not None:
            raise self._failure
        step = self._steps[number]
        self._wanted = number
        self._ask_for_marks()
        await step.writing.wait()
        if step.failure is not None:
            raise step.failure
        del self._steps[number]
        await step.writing.close()
        if not step.samples:
            raise RolloutUnavailableError(f"every response of step {number} was cancelled before its first token")
        return step

    async def close(self) -> None:
        """Nothing is written for nobody: what is outstanding is cancelled, what came too early is let go of.

        A resumed run draws the same prompts again, from the place in its checkpoint.
        """
        self._may_be_written = self._written
        steps, self._steps = list(self._steps.values()), {}
        for step in steps:
            self._rollouts.discarded += [arrival.entry_id for arrival in step.arrivals]
        await self._rollouts.abandon([step.writing for step in steps])
