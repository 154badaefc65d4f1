"""The run, top-down: prepare, steps, evaluation, checkpoints, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from opd_mesh import telemetry
from opd_mesh.clients.rollout import RolloutClient
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import DivergedError, NotFoundError, OpdError, PreconditionError
from opd_mesh.models.tokenizer import tokenizer_fingerprint
from opd_mesh.policy import PolicyId
from student_trainer.accuracy import AccuracyEvaluator
from student_trainer.batch import Sample, marks_in_order, plan_batch
from student_trainer.checkpoint import LoadedCheckpoint, TrainerState, load_newest, save_checkpoint
from student_trainer.diagnostics import Diagnostics
from student_trainer.evaluation import Evaluator
from student_trainer.external import take_external
from student_trainer.heads import HeadStore
from student_trainer.identity import RunIdentity
from student_trainer.mark_buffer import BufferedAnswer, MarkBuffer
from student_trainer.objective import build_objective
from student_trainer.optimizer import Optimizer
from student_trainer.pipeline import Pipeline
from student_trainer.policy_feed import PolicyFeed
from student_trainer.preflight import (
    check_implementation,
    check_lengths,
    check_replicas,
    check_tokenizers,
    check_vocabularies,
)
from student_trainer.rollouts import Rollouts
from student_trainer.run_state import MetricsLog, Phase, RunState
from student_trainer.save_requests import SaveRequests
from student_trainer.schedule import check_staleness, staleness
from student_trainer.step_metrics import Clock, metrics_line
from student_trainer.stopping import StepGivenUpError, Stopping
from student_trainer.student import Student
from student_trainer.summary import summarize, write_summary
from student_trainer.supply import AnswerSupply, Gathered, Supply
from student_trainer.tasks import Domain, Grader, open_domains
from student_trainer.teachers import Teachers
from student_trainer.update import UpdateResult, apply_gradients, compute_gradients
from student_trainer.writing import Arrival

log = logging.getLogger("student_trainer")


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
        self.objective = build_objective(recipe, student)
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
        self.supply: Supply = AnswerSupply(recipe)
        if recipe.writes:
            self.supply = Pipeline(recipe, self.rollouts, self.teachers, self.marks)
        self._ends = Stopping()
        self.feed = PolicyFeed(self.push_policy, self.rollouts, self.state, on_failure=self._ends.fail)
        self.domains: list[Domain] = []
        self.grader = Grader([])  # of the domains, once they are open
        self.evaluations = MetricsLog(run_dir / "evaluations.jsonl")
        self.evaluator = Evaluator(recipe, run_dir, student, self.teachers, self.rollouts, self.heads)
        self.accuracy = AccuracyEvaluator(recipe, self.rollouts)
        self.diagnostics = Diagnostics(recipe.diagnostics)
        self.warnings: list[str] = []
        self._preparing: asyncio.Task[None] | None = None
        self._giving_up: asyncio.Future[None] | None = None
        self._unacknowledged: list[str] = []
        self._saves = SaveRequests()
        self._saved: tuple[Path, int] | None = None  # newest checkpoint and its step
        self._started = time.monotonic()

    # --- the whole ---------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """From the first connection to the report. Raises what ended the run early, after a checkpoint."""
        try:
            with contextlib.suppress(StepGivenUpError):
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
        except (Exception, asyncio.CancelledError) as error:
            await self.end_early(error)
            raise
        finally:
            await self.feed.close()
            await self.marks.give_up()
            await self.teachers.close()
            await self.grader.close()
            await self.rollouts.close()

    # --- before the first step ---------------------------------------------------------------------------------
    async def prepare(self) -> None:
        """Connect, check, load the checkpoint, fetch heads, give the policy away, evaluate."""
        with self.doing("connecting to teachers and rollout servers"):
            await self.teachers.connect()
            await self.rollouts.connect()
            self.identity.bind(self.run_dir, self.models())
        with self.doing("checking tokenizers, lengths and heads"):
            self.warn(await check_tokenizers(self.recipe, self.student, self.teachers))
            check_vocabularies(self.student, self.teachers)
            check_lengths(self.recipe, self.teachers)
            await check_replicas(self.recipe, self.teachers)
            for teacher_id, digest in self.teachers.head_digests.items():
                if digest not in self.heads:
                    self.heads.add(await self.teachers.get_head(teacher_id))
        with self.doing("reading prompts"):
            self.domains += await asyncio.to_thread(open_domains, self.recipe, self.student.tokenizer)
            self.grader = Grader(self.domains)
            if self.recipe.policy_gradient is not None or self.recipe.evaluation.accuracy is not None:
                await self.grader.start()
        if self.resume:
            with self.doing("loading the newest checkpoint"):
                try:
                    self.restore(await asyncio.to_thread(load_newest, self.run_dir / "checkpoints"))
                except NotFoundError:
                    log.warning("the run ended before its first checkpoint: it begins again at step 0")
                self.metrics.resume(self.progress.step)
                self.evaluations.resume(self.progress.step)
                self.warn(self.diagnostics.take_all(self.metrics.lines))
        self.progress.lineage = self.identity.lineage
        self.supply.start(self.domains, self.progress, self.grader)
        if self.recipe.writes:  # otherwise it is given when it is evaluated
            with self.doing("updating the rollout policy"):
                await self.feed.give()
        if self.recipe.needs_rollouts:
            self.feed.watch()
        await self.rollouts.watch.start_over()
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

    async def push_policy(self, clients: Sequence[RolloutClient] | None = None) -> float:
        """Give the present weights to every rollout server, or to some; returns how long decoding stood still."""
        weights = await asyncio.to_thread(self.student.policy_weights)
        policy = PolicyId(self.run_id, self.progress.lineage, self.progress.step, weights.digest)
        pause_s = await self.rollouts.push_policy(policy, weights, merged=self.student.merged_weights, clients=clients)
        if clients is None:
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
            whole = False
            try:
                gathered = await self._ends.wait(self.gather_samples(number, clock))
                check_staleness(
                    [arrival.trajectory for arrival in gathered.arrivals],
                    self.progress.step,
                    max_staleness=self.recipe.max_staleness,
                )
                external = take_external(self.rollouts, self.progress, self.recipe) if self.recipe.distils else []
                samples = gathered.samples + [self.teachers.ask(item.trajectory, self.marks) for item in external]
                ages = [staleness(sample.trajectory, self.progress.step) for sample in samples]
                counted: dict[str, float] = {
                    "staleness": max(ages),
                    "staleness_mean": sum(ages) / len(ages),
                    "external": len(external),
                    "backlog": self.supply.backlog,
                    **gathered.counted,
                }
                with self.doing("updating the student"), self._ends.cause_of_cancellation():
                    result = await self.update(gathered, external, samples, clock)
                whole = True
            finally:
                if not whole:  # otherwise nothing of this step is left, and the next one's marks stay
                    await self.marks.give_up()
                resident, buffered = self.heads.peak, self.marks.take_counters()
                self.heads.release_all()
            clock.move(buffered.waited_s, "update", "score")
            counted |= {
                "wire_bytes": self.teachers.wire_bytes - before[0],
                "teacher_retries": self.teachers.retries - before[1],
                "heads_loaded": self.heads.loads - before[2],
                "heads_resident": resident,
                "marks_peak_bytes": buffered.peak_bytes,
                "marks_spilled_bytes": buffered.spilled_bytes,
            }
            try:
                if self.recipe.writes and self.recipe.max_staleness:
                    self.feed.give_ahead(then=self.write_ahead)
                elif self.recipe.writes:
                    with clock("policy"), self.doing("updating the rollout policy"):
                        await self._ends.wait(self.feed.give())
            finally:  # the step is done, whether or not the servers could be told
                counted["seconds/policy_swap"] = self.feed.swap_s
                counted["rollout_idle_s"] = self.rollouts.watch.take_idle_s()
                line = metrics_line(self.progress, samples, result, clock)
                self.state.step = number
                self.metrics.write(line | counted)
                self.warn(self.diagnostics.take(self.metrics.lines[-1]))
                self.state.notify()
        every = self.recipe.evaluation.every_steps
        if every and number % every == 0:
            await self.evaluate()

    def warn(self, texts: Sequence[str]) -> None:
        """Tell people now, and in the summary."""
        for text in texts:
            log.warning("%s", text)
        self.warnings += texts
        self.state.warnings = tuple(self.warnings)

    async def gather_samples(self, number: int, clock: Clock) -> Gathered:
        """What the step trains on; every response that the student writes is marked as soon as it arrives."""
        with clock("rollout"):
            if self.recipe.writes:
                self.supply.submit(self.feed.served_version)
            what = "writing" if self.recipe.writes else "reading"
            with self.doing(f"{what} {self.supply.size_of(number)} responses"), clock("wait_rollout"):
                return await self.supply.take(number)

    def write_ahead(self) -> None:
        """Every server holds the newest policy: later steps may be written, unless the run is to hold."""
        if self.state.not_paused.is_set() and not self.stopping:
            self.supply.submit(self.feed.served_version)

    async def update(
        self, gathered: Gathered, external: list[Arrival], samples: list[Sample], clock: Clock
    ) -> UpdateResult:
        """Gradients while the marks arrive, then one optimizer step, when nobody reads the weights any more."""
        batch = self.recipe.batch
        # In deterministic mode the order of computation does not depend on how many heads fit the device.
        together = 1 if self.recipe.run.deterministic else batch.heads_resident
        plan = plan_batch(samples, tokens_per_pass=batch.tokens_per_pass, heads_together=together)
        self.marks.expect([mark.answer for mark in marks_in_order(plan) if isinstance(mark.answer, BufferedAnswer)])
        with clock("update"):
            self.optimizer.zero_grad()
            loss, means = await asyncio.to_thread(compute_gradients, plan, self.student, self.objective, self.heads)
        self.rollouts.watch.look()  # here, so that the answers are there when the step ends, and nobody waits for them
        async with contextlib.AsyncExitStack() as changing:
            with clock("policy"):
                await changing.enter_async_context(self.feed.changing_weights())
            with clock("update"):
                result = await asyncio.to_thread(apply_gradients, self.optimizer, plan, loss, means)
            self.advance(gathered, external, result)
        return result

    def advance(self, gathered: Gathered, external: list[Arrival], result: UpdateResult) -> None:
        """The weights are those of the next version, and the place in the data goes with them."""
        self.progress.step = gathered.number
        self.progress.cursors, self.progress.drawn = gathered.cursors, gathered.drawn
        self.progress.tokens_trained += result.tokens
        self.progress.consumed_external += [arrival.trajectory.trajectory_id for arrival in external]
        self._unacknowledged += [arrival.entry_id for arrival in (*gathered.arrivals, *external)]

    # --- stopping --------------------------------------------------------------------------------------------------
    @property
    def stopping(self) -> bool:
        """The run ends after the step in progress."""
        return self._ends.asked

    @stopping.setter
    def stopping(self, asked: bool) -> None:
        self._ends.asked = asked

    def stop(self) -> None:
        """End after the step in progress; at once where there is none yet."""
        self.stopping = True
        if self._preparing is not None:
            self._preparing.cancel()

    def give_up_step(self) -> None:
        """Stop now: a step that still waits for responses or marks is not finished, the last whole one counts."""
        self._ends.now()
        self.feed.drop()
        self._giving_up = asyncio.ensure_future(self.marks.give_up())
        self._giving_up.add_done_callback(lambda done: done.cancelled() or done.result())

    async def evaluate(self) -> None:
        """One line of evaluations.jsonl, once per step at most, by the newest policy.

        Raises:
            StepGivenUpError: the run stops, and does not wait for this.
        """
        step, lineage = self.progress.step, self.progress.lineage
        if any(line["step"] == step for line in self.evaluations.lines):
            return
        with self.doing("evaluating on held-out prompts"):
            await self._ends.wait(self.feed.given())
            if self.recipe.needs_rollouts and not self.recipe.writes:  # servers are given only what is evaluated
                await self._ends.wait(self.feed.give())
            if self.feed.dropped:
                raise StepGivenUpError
            line = await self._ends.wait(self.evaluator.evaluate(self.domains, lineage=lineage, step=step))
            line |= await self._ends.wait(self.accuracy.evaluate(self.domains, self.grader, lineage=lineage, step=step))
        if line:
            self.evaluations.write({"step": step} | line)
        await self.rollouts.watch.start_over()  # what the servers did meanwhile belongs to no step

    # --- checkpoints and the end -------------------------------------------------------------------------------
    async def request_save(self) -> tuple[Path, int]:
        """A checkpoint after the step in progress."""
        if self.state.ended:
            raise PreconditionError(f"the run is {self.state.phase}")
        return await self._saves.wait()

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
        self._saves.answer(self._saved)

    async def finish(self) -> None:
        """Last checkpoint, last evaluation, the student, the summary."""
        await self.supply.close()
        await self.save_checkpoint()
        whole = self.progress.step >= self.recipe.run.steps
        if whole:
            try:
                await self._ends.wait(self.feed.given())
                await self.evaluate()
            except StepGivenUpError:
                whole = False
        await self.feed.close()  # a resumed run gives its policy anew
        with self.doing("saving the student"):
            await asyncio.to_thread(self.student.save, self.run_dir / "student")
        self.summarize("finished" if whole else "interrupted")
        self.state.set(Phase.FINISHED, "done")
        if self._saved is not None:
            self._saves.answer(self._saved)

    def end_unbegun(self) -> None:
        """Stopped while it connected and checked: what there was before is as it was."""
        text = f"stopped before step {self.progress.step + 1}"
        log.warning("the run was %s", text)
        if self.metrics.lines:
            self.summarize("interrupted")
        self._saves.refuse(f"the run was {text}")
        self.state.set(Phase.FINISHED, text)

    async def end_early(self, error: BaseException) -> None:
        """Keep what there is, and say why."""
        text = str(error) or type(error).__name__
        log.error("the run ends at step %d: %s", self.progress.step, text)
        await self.supply.close()
        try:
            if self._unsaved_steps and (self.feed.weights_are_whole or isinstance(error, DivergedError)):
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
            self._saves.refuse(f"the run ended: {text}")
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
