"""Held-out evaluation: reverse KL to the domain's teachers on responses that never change.

Two sets per domain, on the same held-out prompts: one sampled once from the first student, one sampled once from the
domain's (heaviest) teacher. Beside them stands the on-policy KL: fresh responses of the present student.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from opd_mesh.config.recipe import Recipe
from opd_mesh.convert import trajectory_from_json, trajectory_to_json
from opd_mesh.sampling import sample_tokens
from opd_mesh.signals import SignalKind
from opd_mesh.torch_tensors import from_numpy
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory
from student_trainer.batch import HeldAnswer, Mark, Sample, plan_batch
from student_trainer.distillation import Measure, reverse_kl_measure
from student_trainer.heads import HeadStore
from student_trainer.rollouts import Rollouts
from student_trainer.shares import shares_of
from student_trainer.student import Student
from student_trainer.tasks import Domain
from student_trainer.teachers import Teachers

log = logging.getLogger("student_trainer")
DRAW_ROWS = 64  # of logits [rows, V] at a time when a teacher's response is drawn
SetName = Literal["student_responses", "teacher_responses"]
SET_NAMES: tuple[SetName, ...] = get_args(SetName)


@dataclass(frozen=True, slots=True)
class HeldoutKl:
    """Mean over tokens, in nats."""

    kl: float
    tokens: int


def mean_response_length(trajectories: Sequence[Trajectory]) -> float:
    """In tokens."""
    return sum(trajectory.num_scored for trajectory in trajectories) / max(1, len(trajectories))


@torch.no_grad()
def heldout_kl(
    samples: Sequence[Sample],
    student: Student,
    heads: HeadStore,
    measure: Measure,
    *,
    tokens_per_pass: int,
) -> HeldoutKl:
    """Σ_i w_i KL(student ‖ teacher_i) of the samples, by ``measure``, a reverse KL."""
    total, tokens = 0.0, 0
    plan = plan_batch(samples, tokens_per_pass=tokens_per_pass, heads_together=1)
    hidden: dict[int, Tensor] = {}
    for visit in plan.visits:
        batch = plan.passes[visit.pass_index]
        if visit.opens:
            rows = student.hidden_rows(
                [sample.trajectory.token_ids for sample in batch],
                [sample.trajectory.predicting_positions for sample in batch],
            )
            hidden[visit.pass_index] = torch.cat(rows)
            tokens += len(hidden[visit.pass_index])
        rows_Rd = hidden[visit.pass_index]
        for share in shares_of(batch, plan.shares(visit), heads, rows_Rd.device):
            divergence = measure(
                rows_Rd[share.index_R],
                student.head,
                share.teachers,
                reference=None,
                sampled_ids_R=share.sampled_ids_R,
                token_weights_NR=share.weights_NR,
            )
            total += float(divergence.loss)
            del share  # its heads leave before the next ones arrive
        if visit.closes:
            del hidden[visit.pass_index]
    heads.release_all()
    return HeldoutKl(total / max(1, tokens), tokens)


async def sample_from_teacher(
    teachers: Teachers, teacher_id: str, heads: HeadStore, drafts: Sequence[Trajectory]
) -> list[Trajectory]:
    """Responses drawn from a teacher through its scoring service alone, exactly, in few rounds.

    A draw is a pure function of (logits, seed, position), so decoding can be done by fixed point (Jacobi decoding):
    score a whole draft at once, draw every position from the teacher's distribution given the draft before it, and
    keep the draw up to and including the first position where it differs from the draft: everything up to there was
    drawn behind a true prefix. The rest of the draw is the next draft. The student's own responses are the first.

    Args:
        drafts: the student's responses to the prompts, with the sampling parameters to use.
    """

    decodings = [_FixedPoint(draft) for draft in drafts]
    while open_ones := [decoding for decoding in decodings if not decoding.ended]:
        # In step with each other, so that every round is one batch at the teacher.
        marks = await asyncio.gather(*(teachers.rows(decoding.trial(), teacher_id) for decoding in open_ones))
        for decoding, rows in zip(open_ones, marks, strict=True):
            drawn = await asyncio.to_thread(_draw, rows, teachers, teacher_id, heads, decoding.sampling, decoding.known)
            decoding.take(drawn)
    return [decoding.response() for decoding in decodings]


class _FixedPoint:
    """One response on its way: the first ``known`` tokens of the guess are certain."""

    def __init__(self, draft: Trajectory) -> None:
        self._draft = draft
        self.sampling = draft.sampling
        self._prompt = draft.token_ids[: draft.scored_spans[0][0]]
        self._length = self.sampling.max_new_tokens
        filler = self.sampling.stop_token_ids[0] if self.sampling.stop_token_ids else 0
        self._guess = (list(draft.scored_token_ids) + [filler] * self._length)[: self._length]
        self.known = 0

    @property
    def ended(self) -> bool:
        return self.known == self._length or self._stop is not None

    @property
    def _stop(self) -> int | None:
        return next((i for i in range(self.known) if self._guess[i] in self.sampling.stop_token_ids), None)

    def trial(self) -> Trajectory:
        """The whole guess, to be marked from the first uncertain token on."""
        start = len(self._prompt)
        return self._as_trajectory(self._guess, (start + self.known, start + self._length))

    def take(self, drawn: Sequence[int]) -> None:
        """Keep what was drawn behind a true prefix; the rest is the next guess."""
        agreed = self.known
        while agreed < self._length and self._guess[agreed] == drawn[agreed - self.known]:
            agreed += 1
        self._guess[self.known :] = drawn
        self.known = min(agreed + 1, self._length)

    def response(self) -> Trajectory:
        """The finished response."""
        end = self.known if self._stop is None else self._stop + 1
        reason = FinishReason.LENGTH if self._stop is None else FinishReason.STOP
        start = len(self._prompt)
        return replace(self._as_trajectory(self._guess[:end], (start, start + end)), finish_reason=reason)

    def _as_trajectory(self, tokens: Sequence[int], span: tuple[int, int]) -> Trajectory:
        return replace(
            self._draft,
            token_ids=(*self._prompt, *tokens),
            scored_spans=(span,),
            sampling_logprobs=(),
            policy_logprobs=(),
            policy_versions=(),
        )


@torch.no_grad()
def _draw(
    rows: np.ndarray,
    teachers: Teachers,
    teacher_id: str,
    heads: HeadStore,
    sampling: SamplingParams,
    first_position: int,
) -> list[int]:
    hidden = teachers.full_signals[teacher_id] is SignalKind.HIDDEN_STATES
    head = heads.get(teachers.head_digests[teacher_id]) if hidden else None
    tokens: list[int] = []
    for said in from_numpy(rows).split(DRAW_ROWS):
        logits = said if head is None else head.logits(said.to(head.weight.device, head.weight.dtype))
        positions = range(first_position + len(tokens), first_position + len(tokens) + len(said))
        sampled = sample_tokens(logits, [sampling] * len(said), positions, logits.shape[1])
        for error in sampled.errors:
            if error is not None:
                raise error
        tokens.extend(sampled.token_ids_B.tolist())
    return tokens


class HeldoutSets:
    """The fixed responses and their marks, on disk in ``RUN_DIR/heldout``, so that a resumed run uses the same."""

    def __init__(self, folder: Path, head_digests: Callable[[], Mapping[str, str]] = dict) -> None:
        self._folder = folder
        self._head_digests = head_digests
        self._samples: dict[tuple[str, str], list[Sample]] = {}

    def _mark(self, mark: dict[str, Any], index: int, tensors: Mapping[str, np.ndarray]) -> Mark:
        teacher_id = mark["teacher"]
        place = f"{index}.{teacher_id}"
        if "signal" in mark:
            said = {part: tensors[f"{place}.{part}"] for part in mark["tensors"]}
            return Mark(teacher_id, mark["weight"], SignalKind(mark["signal"]), mark["head"], HeldAnswer(said))
        # As runs wrote it before there were several signals: one tensor, and the head that the teacher has.
        signal = SignalKind.LOGITS if mark["logits"] else SignalKind.HIDDEN_STATES
        head = None if mark["logits"] else self._head_digests()[teacher_id]
        return Mark(teacher_id, mark["weight"], signal, head, HeldAnswer({str(signal): tensors[place]}))

    def path(self, domain: str, name: str) -> Path:
        """Of the trajectories of one set."""
        return self._folder / f"{domain}.{name}.jsonl"

    def add(self, domain: str, name: SetName, samples: Sequence[Sample]) -> None:
        """Keep a set, marks first, so that a set with its trajectories in place is whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self.path(domain, name)
        tensors, meta = {}, []
        for index, sample in enumerate(samples):
            marks = []
            for mark in sample.marks:
                for part, array in mark.answer.tensors().items():
                    tensors[f"{index}.{mark.teacher_id}.{part}"] = np.ascontiguousarray(array, dtype=np.float32)
                marks.append(
                    {
                        "teacher": mark.teacher_id,
                        "weight": mark.weight,
                        "signal": mark.signal,
                        "head": mark.head_digest,
                        "tensors": list(mark.answer.tensors()),
                    }
                )
            meta.append(json.dumps({"trajectory": trajectory_to_json(sample.trajectory), "marks": marks}))
        save_file(tensors, path.with_suffix(".safetensors"))
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in meta), encoding="utf-8")
        partial.replace(path)
        self._samples[domain, name] = list(samples)

    def get(self, domain: str, name: SetName) -> list[Sample] | None:
        """A set, or None if it was never made."""
        if (domain, name) not in self._samples and self.path(domain, name).exists():
            path = self.path(domain, name)
            tensors = load_file(path.with_suffix(".safetensors"))
            samples = []
            for index, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
                value = json.loads(line)
                marks = tuple(self._mark(mark, index, tensors) for mark in value["marks"])
                samples.append(Sample(trajectory_from_json(value["trajectory"]), marks))
            self._samples[domain, name] = samples
        return self._samples.get((domain, name))


class Evaluator:
    """Makes the fixed sets at the first evaluation (step 0), and measures on them from then on."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        student: Student,
        teachers: Teachers,
        rollouts: Rollouts,
        heads: HeadStore,
    ) -> None:
        self._recipe = recipe
        self._student = student
        self._teachers = teachers
        self._rollouts = rollouts
        self._heads = heads
        self._measure = reverse_kl_measure(recipe.objective.implementation, deterministic=recipe.run.deterministic)
        self._sets = HeldoutSets(run_dir / "heldout", lambda: teachers.head_digests)

    async def evaluate(self, domains: Sequence[Domain], *, lineage: int, step: int) -> dict[str, float]:
        """Metrics by name: ``heldout_kl/<domain>`` (both sets), ``heldout_kl/<domain>/<set>``,
        ``on_policy_kl/<domain>``, ``response_length/<domain>``."""
        line: dict[str, float] = {}
        if not self._recipe.evaluation.prompts_per_domain:
            return line
        for domain in domains:
            if not domain.config.teachers:
                continue
            if not self._teachers.tells_all(domain.name):
                log.warning(
                    "domain %s is not evaluated: a teacher of it does not tell its whole distribution", domain.name
                )
                continue
            fresh = await self._fresh_responses(domain, lineage=lineage, step=step)
            if step == 0:
                await self._make_sets(domain, fresh)
            sets = {name: self._sets.get(domain.name, name) for name in SET_NAMES}
            measured = {name: await asyncio.to_thread(self._kl, samples) for name, samples in sets.items() if samples}
            for name, found in measured.items():
                line[f"heldout_kl/{domain.name}/{name}"] = found.kl
            tokens = sum(found.tokens for found in measured.values())
            if tokens:
                line[f"heldout_kl/{domain.name}"] = sum(found.kl * found.tokens for found in measured.values()) / tokens
            on_policy = await asyncio.to_thread(self._kl, fresh)
            line[f"on_policy_kl/{domain.name}"] = on_policy.kl
            line[f"response_length/{domain.name}"] = mean_response_length([sample.trajectory for sample in fresh])
        return line

    def _kl(self, samples: Sequence[Sample]) -> HeldoutKl:
        return heldout_kl(
            samples,
            self._student,
            self._heads,
            self._measure,
            tokens_per_pass=self._recipe.batch.tokens_per_pass,
        )

    async def _fresh_responses(self, domain: Domain, *, lineage: int, step: int) -> list[Sample]:
        specs = [
            self._rollouts.spec(
                f"e{lineage:04d}-s{step:06d}-{domain.name}-{prompt.index}",
                prompt,
                self._rollouts.sampling(domain.name, "heldout", prompt.index),
                publish=False,
            )
            for prompt in domain.heldout
        ]
        written = [trajectory for trajectory in await self._rollouts.write_unpublished(specs) if trajectory.num_scored]
        return list(await asyncio.gather(*(self._teachers.mark(trajectory) for trajectory in written)))

    async def _make_sets(self, domain: Domain, fresh: Sequence[Sample]) -> None:
        if self._sets.get(domain.name, "student_responses") is None:
            self._sets.add(domain.name, "student_responses", fresh)
        wanted = self._recipe.evaluation.teacher_responses
        if wanted and self._sets.get(domain.name, "teacher_responses") is None:
            weights = domain.config.teachers
            heaviest = max(weights, key=lambda teacher_id: weights[teacher_id])
            drafts = [sample.trajectory for sample in fresh]
            responses = await sample_from_teacher(self._teachers, heaviest, self._heads, drafts)
            samples = await asyncio.gather(*(self._teachers.mark(response) for response in responses))
            self._sets.add(domain.name, "teacher_responses", samples)
