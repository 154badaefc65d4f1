"""The run, top-down: prepare, steps, evaluation, checkpoints, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch

from opd_mesh import telemetry
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import (
    CancelledByCallerError,
    DivergedError,
    NotFoundError,
    OpdError,
    PreconditionError,
    RolloutUnavailableError,
)
from opd_mesh.models.checkpoint import state_digest
from opd_mesh.models.tokenizer import tokenizer_fingerprint
from opd_mesh.policy import PolicyId
from opd_mesh.torch_tensors import to_numpy
from opd_mesh.trajectory import Trajectory
from student_trainer.batch import Sample, marks_in_order, plan_batch
from student_trainer.checkpoint import LoadedCheckpoint, TrainerState, load_newest, save_checkpoint
from student_trainer.data import Domain, next_prompts
from student_trainer.evaluation import Evaluator
from student_trainer.heads import HeadStore
from student_trainer.identity import RunIdentity
from student_trainer.mark_buffer import BufferedAnswer, MarkBuffer
from student_trainer.objective import build_objective
from student_trainer.optimizer import Optimizer
from student_trainer.preflight import (
    check_implementation,
    check_lengths,
    check_replicas,
    check_tokenizers,
    check_vocabularies,
)
from student_trainer.rollouts import Arrival, Rollouts, own_trajectory_id
from student_trainer.run_state import MetricsLog, Phase, RunState
from student_trainer.step_metrics import Clock, metrics_line
from student_trainer.student import Student
from student_trainer.summary import summarize, write_summary
from student_trainer.teachers import Teachers
from student_trainer.update import UpdateResult, apply_gradients, compute_gradients

log = logging.getLogger("student_trainer")
# Cursors and prompts drawn behind the step, its trajectories, and these with the marks that are asked for.
Gathered: TypeAlias = tuple[dict[str, int], dict[str, int], list[Arrival], list[Sample]]


class StepGivenUpError(Exception):
    """The run stops, and the step in progress could not be waited for."""


class Trainer:
    """One run. :meth:`run` does all of it; the other methods are its parts, in order.

    Args:
        student: loaded already, for loading is the one thing that is slow and cannot be waited for on the loop.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, student: Student, *, device: str, resume: bool) -> None:
        self.recipe = recipe
        self.run_dir = run_dir
        self.student = student
        self.resume = resume
        self.identity = RunIdentity.open(run_dir, recipe.run.name)
        self.run_id = self.identity.run_id
        self.fingerprint = tokenizer_fingerprint(student.tokenizer.get_vocab())
        self.metrics = MetricsLog(run_dir / "metrics.jsonl")
        self.state = RunState(self.run_id, recipe.run.steps, self.metrics)
        self.progress = TrainerState()
        check_implementation(recipe, device)
        self.objective = build_objective(recipe.objective, deterministic=recipe.run.deterministic)
        self.optimizer = Optimizer(
            recipe.optimizer,
            student.trainable(),
            total_steps=recipe.run.steps,
            embeddings=student.embedding_names(),
        )
        self.heads = HeadStore(
            run_dir / "heads", device, resident=recipe.batch.heads_resident + (recipe.reference_id is not None)
        )
        self.teachers = Teachers(recipe, self.fingerprint)
        self.marks = MarkBuffer(
            recipe.batch.marks_memory_bytes, run_dir / "spill" if recipe.batch.marks_spill else None
        )
        self.rollouts = Rollouts(
            recipe,
            run_id=self.run_id,
            tokenizer_fingerprint=self.fingerprint,
            eos_token_id=student.tokenizer.eos_token_id,
            vocab_size=student.vocab_size,
        )
        self.domains: list[Domain] = []
        self.evaluations = MetricsLog(run_dir / "evaluations.jsonl")
        self.evaluator = Evaluator(recipe, run_dir, student, self.teachers, self.rollouts, self.heads)
        self.warnings: list[str] = []
        self.stopping = False
        # False while the weights are between two steps: what they are then must not become a checkpoint.
        self._weights_hold = True
        self._gathering: asyncio.Task[Gathered] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._giving_up: asyncio.Future[None] | None = None
        self._unacknowledged: list[str] = []
        self._saves: list[asyncio.Future[tuple[Path, int]]] = []
        self._saved: tuple[Path, int] | None = None  # newest checkpoint and its step
        self._started = time.monotonic()

    # --- the whole ---------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """From the first connection to the report. Raises what ended the run early, after a checkpoint."""
        try:
            self._preparing = asyncio.ensure_future(self.prepare())
            try:
                await self._preparing
            except asyncio.CancelledError:
                if not (self.stopping and self._preparing.cancelled()):
                    raise
                self.end_unbegun()
                return
            self.state.set(Phase.RUNNING)
            while self.progress.step < self.recipe.run.steps and not self.stopping:
                await self.between_steps()
                if not self.stopping:
                    await self.step()
            await self.finish()
        except StepGivenUpError:
            await self.finish()
        except (Exception, asyncio.CancelledError) as error:
            await self.end_early(error)
            raise
        finally:
            await self.teachers.close()
            await self.rollouts.close()

    # --- before the first step ---------------------------------------------------------------------------------
    async def prepare(self) -> None:
        """Connect, check, load the checkpoint, fetch heads, give the policy away, evaluate."""
        with self.doing("connecting to teachers and rollout servers"):
            await self.teachers.connect()
            await self.rollouts.connect()
            self.identity.bind(self.run_dir, self.models())
        with self.doing("checking tokenizers, lengths and heads"):
            self.warnings += await check_tokenizers(self.recipe, self.student, self.teachers)
            check_vocabularies(self.student, self.teachers)
            check_lengths(self.recipe, self.teachers)
            await check_replicas(self.recipe, self.teachers)
            for teacher_id, digest in self.teachers.head_digests.items():
                if digest not in self.heads:
                    self.heads.add(await self.teachers.get_head(teacher_id))
        with self.doing("reading prompts"):
            engine = self.recipe.rollout.engine
            for name, domain in self.recipe.domains.items():
                room = engine.max_context_tokens - (domain.max_new_tokens or self.recipe.rollout.max_new_tokens)
                prompts = await asyncio.to_thread(
                    Domain, name, domain, self.recipe, self.student.tokenizer, max_prompt_tokens=room
                )
                self.domains.append(prompts)
        if self.resume:
            with self.doing("loading the newest checkpoint"):
                try:
                    self.restore(await asyncio.to_thread(load_newest, self.run_dir / "checkpoints"))
                except NotFoundError:
                    log.warning("the run ended before its first checkpoint: it begins again at step 0")
                self.metrics.resume(self.progress.step)
                self.evaluations.resume(self.progress.step)
        self.progress.lineage = self.identity.lineage
        await self.push_policy()
        every = self.recipe.evaluation.every_steps
        if self.progress.step == 0 or (every and self.progress.step % every == 0):
            await self.evaluate()

    def models(self) -> dict[str, str]:
        """Digest by role of everything that the run's numbers depend on."""
        cards = self.teachers.cards
        return (
            {"student": self.student.initial_digest}
            | {f"teacher/{teacher_id}": card.teacher_digest for teacher_id, card in cards.items()}
            | {f"head/{teacher_id}": card.head.digest for teacher_id, card in cards.items()}
        )

    def restore(self, checkpoint: LoadedCheckpoint) -> None:
        """Take over weights, optimizer, and the place in the data."""
        parameters = dict(self.student.trainable())
        if parameters.keys() != checkpoint.student.keys():
            raise PreconditionError(
                f"{checkpoint.path} holds other parameters than the recipe trains; was student.lora changed?"
            )
        with torch.no_grad():
            for name, tensor in checkpoint.student.items():
                parameters[name].copy_(tensor)
        self.optimizer.load_state_tensors(checkpoint.optimizer, checkpoint.state.step)
        self.progress = checkpoint.state
        self.state.step = self.progress.step
        self._saved = checkpoint.path, self.progress.step
        self._started = time.monotonic() - self.progress.wall_s
        log.info("resumed from %s", checkpoint.path)

    async def push_policy(self) -> float:
        """Give the present weights to every rollout server; returns the seconds that decoding stood still."""
        with self.doing("updating the rollout policy"):
            tensors = self.student.policy_tensors()
            digest = await asyncio.to_thread(state_digest, tensors)
            policy = PolicyId(self.run_id, self.progress.lineage, self.progress.step, digest)
            arrays = [(name, to_numpy(tensor)) for name, tensor in tensors]
            pause_s = await self.rollouts.push_policy(policy, arrays)
        self.state.policy = policy
        return pause_s

    # --- one step ----------------------------------------------------------------------------------------------
    async def between_steps(self) -> None:
        """Checkpoints that are due or asked for, and pauses."""
        every = self.recipe.checkpoint.every_steps
        if self._saves or (self.progress.step % every == 0 and self._unsaved_steps):
            await self.save_checkpoint()
        while not self.state.not_paused.is_set() and not self.stopping:
            self.state.set(Phase.PAUSED)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.state.not_paused.wait(), timeout=0.2)
            if self._saves:
                await self.save_checkpoint()
        if self.state.phase is Phase.PAUSED:
            self.state.set(Phase.RUNNING)

    async def step(self) -> None:
        """Prompts → trajectories → marks → update → policy → one line of metrics."""
        number = self.progress.step + 1
        with telemetry.span("trainer.step", {telemetry.RUN_ID: self.run_id, telemetry.STEP: number}):
            clock = Clock()
            before = self.teachers.wire_bytes, self.teachers.retries, self.heads.loads
            try:
                self._gathering = asyncio.ensure_future(self.gather_samples(number, clock))
                cursors, drawn, arrivals, samples = await self._gathering
                external = self.take_external()
                samples += [sample for _, sample in external]
                with self.doing("updating the student"), clock("update"):
                    result = await self.update(samples)
            except (asyncio.CancelledError, CancelledByCallerError):
                task = asyncio.current_task()
                if self.stopping and task is not None and not task.cancelling():
                    raise StepGivenUpError from None
                raise
            finally:
                await self.marks.give_up()  # of a step that has failed; otherwise nothing is left
                resident, buffered = self.heads.peak, self.marks.take_counters()
                self.heads.release_all()
            clock.move(buffered.waited_s, "update", "score")
            staleness = max(self._staleness(sample.trajectory) for sample in samples)
            self.progress.step = number
            self.progress.cursors, self.progress.drawn = cursors, drawn
            self.progress.tokens_trained += result.tokens
            self.progress.consumed_external += [arrival.trajectory.trajectory_id for arrival, _ in external]
            self._unacknowledged += [arrival.entry_id for arrival in arrivals]
            self._unacknowledged += [arrival.entry_id for arrival, _ in external]
            self._weights_hold = True
            counted: dict[str, float] = {
                "wire_bytes": self.teachers.wire_bytes - before[0],
                "teacher_retries": self.teachers.retries - before[1],
                "heads_loaded": self.heads.loads - before[2],
                "heads_resident": resident,
                "marks_peak_bytes": buffered.peak_bytes,
                "marks_spilled_bytes": buffered.spilled_bytes,
            }
            try:
                with clock("policy"):
                    counted["seconds/policy_swap"] = await self.push_policy()
            finally:  # the step is done, whether or not the servers could be told
                counted |= {"staleness": staleness, "external": len(external)}
                line = metrics_line(self.progress, samples, result, clock)
                self.state.step = number
                self.metrics.write(line | counted)
                self.state.notify()
        every = self.recipe.evaluation.every_steps
        if every and number % every == 0:
            await self.evaluate()

    async def update(self, samples: list[Sample]) -> UpdateResult:
        """Gradients while the marks arrive, then one optimizer step."""
        batch = self.recipe.batch
        # In deterministic mode the order of computation does not depend on how many heads fit the device.
        together = 1 if self.recipe.run.deterministic else batch.heads_resident
        plan = plan_batch(samples, tokens_per_pass=batch.tokens_per_pass, heads_together=together)
        self.marks.expect([mark.answer for mark in marks_in_order(plan) if isinstance(mark.answer, BufferedAnswer)])
        self.optimizer.zero_grad()
        loss, means = await asyncio.to_thread(compute_gradients, plan, self.student, self.objective, self.heads)
        self._weights_hold = False
        return await asyncio.to_thread(apply_gradients, self.optimizer, plan, loss, means)

    def stop(self) -> None:
        """End after the step in progress; at once where there is none yet."""
        self.stopping = True
        if self._preparing is not None:
            self._preparing.cancel()

    def give_up_step(self) -> None:
        """Stop now: a step that still waits for responses or marks is not finished, the last whole one counts."""
        self.stopping = True
        if self._gathering is not None:
            self._gathering.cancel()
        self._giving_up = asyncio.ensure_future(self.marks.give_up())
        self._giving_up.add_done_callback(lambda done: done.cancelled() or done.result())

    async def gather_samples(self, number: int, clock: Clock) -> Gathered:
        """Write the step's responses; every trajectory is marked as soon as it arrives."""
        batch = self.recipe.batch
        prompts, cursors, drawn = next_prompts(
            self.domains, batch.prompts_per_step, self.progress.cursors, self.progress.drawn
        )
        specs = []
        for place, prompt in enumerate(prompts):
            for answer in range(batch.responses_per_prompt):
                index = place * batch.responses_per_prompt + answer
                sampling = self.rollouts.sampling(prompt.domain, "train", prompt.index, answer)
                request_id = own_trajectory_id(self.progress.lineage, number, index)
                specs.append(self.rollouts.spec(request_id, prompt, sampling, publish=True))
        arrivals: list[Arrival] = []
        samples: list[Sample] = []
        with self.doing(f"writing {len(specs)} responses"), clock("rollout"):
            async for arrival in self.rollouts.write(specs):
                arrivals.append(arrival)
                samples.append(self.teachers.ask(arrival.trajectory, self.marks))
        if not samples:
            raise RolloutUnavailableError(f"every response of step {number} was cancelled before its first token")
        return cursors, drawn, arrivals, samples

    def take_external(self) -> list[tuple[Arrival, Sample]]:
        """Trajectories from outside that are fresh enough, their marks asked for."""
        taken: list[Arrival] = []
        consumed = set(self.progress.consumed_external)
        while self.rollouts.external and len(taken) < self.recipe.batch.max_external_per_step:
            arrival = self.rollouts.external.popleft()
            trajectory = arrival.trajectory
            if trajectory.trajectory_id in consumed:
                self.rollouts.discarded.append(arrival.entry_id)
            elif (
                trajectory.lineage != self.progress.lineage
                or not 0 <= self._staleness(trajectory) <= self.recipe.max_staleness
            ):
                self.rollouts.discarded.append(arrival.entry_id)
                self.progress.dropped_external += 1
            else:
                consumed.add(trajectory.trajectory_id)
                taken.append(arrival)
        return [(arrival, self.teachers.ask(arrival.trajectory, self.marks)) for arrival in taken]

    def _staleness(self, trajectory: Trajectory) -> int:
        """Our version minus the oldest among the response's tokens."""
        return self.progress.step - min(trajectory.policy_versions, default=self.progress.step)

    async def evaluate(self) -> None:
        """One line of evaluations.jsonl, once per step at most."""
        step = self.progress.step
        if not self.recipe.evaluation.prompts_per_domain or any(
            line["step"] == step for line in self.evaluations.lines
        ):
            return
        with self.doing("evaluating on held-out prompts"):
            line = await self.evaluator.evaluate(self.domains, lineage=self.progress.lineage, step=step)
        if line:
            self.evaluations.write({"step": step} | line)

    # --- checkpoints and the end -------------------------------------------------------------------------------
    async def request_save(self) -> tuple[Path, int]:
        """A checkpoint after the step in progress."""
        if self.state.ended:
            raise PreconditionError(f"the run is {self.state.phase}")
        future: asyncio.Future[tuple[Path, int]] = asyncio.get_running_loop().create_future()
        self._saves.append(future)
        return await future

    async def save_checkpoint(self) -> None:
        """Durable, then the stream's entries are acknowledged, then whoever asked is told. Once per step."""
        self.progress.wall_s = time.monotonic() - self._started
        if self._saved is None or self._saved[1] != self.progress.step:
            with self.doing("writing a checkpoint"):
                path = await asyncio.to_thread(
                    save_checkpoint,
                    self.run_dir / "checkpoints",
                    dict(self.student.trainable()),
                    self.optimizer.state_tensors(),
                    self.progress,
                    keep=self.recipe.checkpoint.keep,
                )
            self._saved = path, self.progress.step
        entries, self._unacknowledged = self._unacknowledged, []
        await self.rollouts.acknowledge(entries)
        self._answer_saves()

    def _answer_saves(self) -> None:
        waiting, self._saves = self._saves, []
        for future in waiting:
            if not future.done():
                assert self._saved is not None  # whoever waits is answered after a checkpoint
                future.set_result(self._saved)

    def _refuse_saves(self, why: str) -> None:
        for future in self._saves:
            if not future.done():
                future.set_exception(PreconditionError(why))

    async def finish(self) -> None:
        """Last checkpoint, last evaluation, the student, the summary."""
        await self.save_checkpoint()
        whole = self.progress.step >= self.recipe.run.steps
        if whole:
            await self.evaluate()
        with self.doing("saving the student"):
            await asyncio.to_thread(self.student.save, self.run_dir / "student")
        self.summarize("finished" if whole else "interrupted")
        self.state.set(Phase.FINISHED, "done")
        self._answer_saves()

    def end_unbegun(self) -> None:
        """Stopped while it connected and checked: what there was before is as it was."""
        text = f"stopped before step {self.progress.step + 1}"
        log.warning("the run was %s", text)
        if self.metrics.lines:
            self.summarize("interrupted")
        self._refuse_saves(f"the run was {text}")
        self.state.set(Phase.FINISHED, text)

    async def end_early(self, error: BaseException) -> None:
        """Keep what there is, and say why."""
        text = str(error) or type(error).__name__
        log.error("the run ends at step %d: %s", self.progress.step, text)
        try:
            if self._unsaved_steps and (self._weights_hold or isinstance(error, DivergedError)):
                await self.save_checkpoint()
        except OpdError as failure:
            # Redis may be what has gone. The checkpoint is whole by then; what it could not acknowledge comes again.
            log.warning("after the checkpoint: %s", failure)
        except Exception:
            log.exception("while writing the last checkpoint")  # not in the place of what ended the run
        try:
            if self.metrics.lines:
                self.summarize("failed", error=text)
        except Exception:
            log.exception("while writing the summary")
        finally:
            self._refuse_saves(f"the run ended: {text}")
            self.state.set(Phase.FAILED, "ended early", error=text)

    @property
    def _unsaved_steps(self) -> int:
        """Steps that no checkpoint holds."""
        return self.progress.step - (self._saved[1] if self._saved else 0)

    def summarize(self, status: str, *, error: str = "") -> None:
        """``summary.json``."""
        summary = summarize(
            run_id=self.run_id,
            status=status,
            error=error,
            steps=self.progress.step,
            tokens_trained=self.progress.tokens_trained,
            wall_s=time.monotonic() - self._started,
            domains=self.recipe.domains,
            evaluations=self.evaluations.lines,
            cards=self.teachers.cards,
            warnings=self.warnings,
        )
        write_summary(self.run_dir, summary)

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """What the run is doing, for watchers and the log."""
        self.state.set(activity=activity)
        log.debug("%s", activity)
        yield
