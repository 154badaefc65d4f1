"""Generation, ahead of the training by at most ``max_staleness`` versions: step after step of prompts goes out.

Which responses make up a step is fixed by the order of prompts, never by who is done first, so a run that writes ahead
trains on the same prompts in the same order as one that does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import RolloutUnavailableError, VerifierError
from student_trainer.batch import Sample
from student_trainer.checkpoint import TrainerState
from student_trainer.groups import Groups
from student_trainer.judged_rewards import open_judge
from student_trainer.mark_buffer import MarkBuffer
from student_trainer.rewards import Rewards
from student_trainer.rollouts import Rollouts
from student_trainer.schedule import steps_to_write
from student_trainer.supply import Gathered
from student_trainer.tasks import Domain, Grader, Prompt, next_prompts
from student_trainer.teachers import Teachers
from student_trainer.writing import Arrival, Writing, own_trajectory_id


@dataclass(slots=True)
class StepInFlight:
    """What one step trains on, while it comes in.

    Attributes:
        cursors, drawn: the place in the data behind the step's prompts.
        writings: one; a step whose groups taught nothing asks for more.
        prompts: of every response that was asked for, by trajectory id.
        samples: arrivals whose marks are asked for, in the order of arrival.
        failure: why marks could not be asked for.
    """

    number: int
    cursors: dict[str, int]
    drawn: dict[str, int]
    writings: list[Writing]
    prompts: dict[str, Prompt]
    samples: list[Sample] = field(default_factory=list)
    failure: Exception | None = None

    @property
    def writing(self) -> Writing:
        """That which is not complete, if any is."""
        return self.writings[-1]

    @property
    def arrivals(self) -> list[Arrival]:
        """What has come."""
        return [arrival for writing in self.writings for arrival in writing.arrivals]


class Pipeline:
    """Steps whose responses are being written or wait for their turn. For one event loop."""

    def __init__(self, recipe: Recipe, rollouts: Rollouts, teachers: Teachers, marks: MarkBuffer) -> None:
        self._recipe = recipe
        self._groups: Groups | None = None
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

    def start(self, domains: Sequence[Domain], progress: TrainerState, grader: Grader) -> None:
        """Go on from a place in the data."""
        self._domains = domains
        if (objective := self._recipe.policy_gradient) is not None:
            self._groups = Groups(objective, Rewards(domains, grader, open_judge(self._recipe, domains)))
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
        step = StepInFlight(number, {}, {}, [], {})
        self._ask(step, self._recipe.batch.prompts_per_step)
        self._steps[number] = step
        self._written = number

    def _ask(self, step: StepInFlight, count: int) -> None:
        """For the responses to so many more prompts."""
        prompts, self._cursors, self._drawn = next_prompts(self._domains, count, self._cursors, self._drawn)
        step.cursors, step.drawn = self._cursors, self._drawn
        specs = []
        for prompt in prompts:
            for answer in range(self._recipe.batch.responses_per_prompt):
                sampling = self._rollouts.sampling(prompt.domain, "train", prompt.index, answer)
                request_id = own_trajectory_id(self._lineage, step.number, len(step.prompts))
                step.prompts[request_id] = prompt
                specs.append(self._rollouts.spec(request_id, prompt, sampling, publish=True))
        step.writings.append(self._rollouts.write(specs, self._ask_for_marks))

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
            arrivals = step.arrivals
            while len(step.samples) < len(arrivals):
                if step.number > self._wanted and self._marks.is_full:
                    return  # called again when the buffer has let all in
                trajectory = arrivals[len(step.samples)].trajectory
                try:
                    step.samples.append(self._teachers.ask(trajectory, self._marks))
                    if self._groups is not None:
                        self._groups.ask(step.prompts[trajectory.trajectory_id], trajectory)
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

    async def take(self, number: int) -> Gathered:
        """The next step, when all its responses have come, their marks are asked for, and their rewards are known.

        Raises:
            RolloutUnavailableError, StreamUnavailableError: a bounded wait has ended.
            OpdError: what a server says of a request.
            VerifierError: not one response could be graded, or the reward model is out of reach.
        """
        if number not in self._steps and self._failure is not None:
            raise self._failure
        step = self._steps[number]
        self._wanted = number
        samples = await self._complete(step) if self._groups is None else await self._in_groups(step, self._groups)
        counted = {} if self._groups is None else self._groups.take_counted()
        del self._steps[number]
        for writing in step.writings:
            await writing.close()
        return Gathered(number, step.cursors, step.drawn, samples, step.arrivals, counted)

    async def _complete(self, step: StepInFlight) -> list[Sample]:
        """All samples of what has been asked for so far."""
        self._ask_for_marks()
        await step.writing.wait()
        if step.failure is not None:
            raise step.failure
        if not step.samples:
            raise RolloutUnavailableError(f"every response of step {step.number} was cancelled before its first token")
        return step.samples

    async def _in_groups(self, step: StepInFlight, groups: Groups) -> list[Sample]:
        """Samples with advantages; groups that teach nothing are replaced, where the objective says so."""
        responses = self._recipe.batch.responses_per_prompt
        wanted = self._recipe.batch.prompts_per_step
        rounds = groups.objective.dynamic_sampling.max_rounds if groups.objective.dynamic_sampling else 0
        kept: list[Sample] = []
        idle: list[Sample] = []  # of groups that teach nothing
        taken = 0
        while True:
            samples = await self._complete(step)
            of_group: dict[int, list[Sample]] = {}
            places = {name: place for place, name in enumerate(step.prompts)}
            for sample in samples[taken:]:
                of_group.setdefault(places[sample.trajectory.trajectory_id] // responses, []).append(sample)
            taken = len(samples)
            for _, group in sorted(of_group.items()):
                advantaged, degenerate = await groups.with_advantages(group)
                (idle if degenerate else kept).extend(advantaged)
            missing = wanted - groups.taught
            if missing <= 0 or rounds == 0:
                break
            rounds -= 1
            self._ask(step, missing)
        if groups.objective.dynamic_sampling and kept:
            groups.drop(idle)
            for sample in idle:
                if sample.reference is not None:
                    sample.reference.answer.release()
            idle = []
        if not kept and not idle:
            raise VerifierError(
                f"not one response of step {step.number} could be graded: {groups.last_failure}. A verifier (or judge) "
                "that fails gives no rewards, so there is nothing to learn from; mend it, then `opd run --resume`",
                field="domains",
            )
        return kept + idle

    async def close(self) -> None:
        """Nothing is written for nobody: what is outstanding is cancelled, what came too early is let go of.

        A resumed run draws the same prompts again, from the place in its checkpoint.
        """
        self._may_be_written = self._written
        steps, self._steps = list(self._steps.values()), {}
        for step in steps:
            self._rollouts.discarded += [arrival.entry_id for arrival in step.arrivals]
        await self._rollouts.abandon([writing for step in steps for writing in step.writings])
        if self._groups is not None:
            await self._groups.close()
