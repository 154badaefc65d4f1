"""Responses become answers with grades, and answers become figures: for rewards, accuracy and finished models alike."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd_mesh.judging.statistics import cohens_kappa
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory
from student_trainer.rollouts import Rollouts
from student_trainer.tasks import Domain, Grade, Grader, Prompt

CORRECT = 1.0 - 1e-9  # scores are shares of a right answer
CANCELLED = Grade(None, parsed=False, failure="it was cancelled")  # cut short, it is no answer, and no wrong one either


@dataclass(frozen=True, slots=True)
class Answer:
    """One response; without a grade where the domain has no verifier."""

    prompt: Prompt
    trajectory: Trajectory
    text: str
    grade: Grade | None

    def to_json(self, fingerprint: str) -> dict[str, Any]:
        """One line of an answers file."""
        return {
            "trajectory_id": self.trajectory.trajectory_id,
            "domain": self.prompt.domain,
            "prompt_index": self.prompt.index,
            "split": self.prompt.split,
            "token_ids": list(self.trajectory.token_ids),
            "scored_spans": [list(span) for span in self.trajectory.scored_spans],
            "finish_reason": self.trajectory.finish_reason.value,
            "tokenizer_fingerprint": fingerprint,
            "text": self.text,
            "score": self.grade.score if self.grade else None,
            "parsed": self.grade.parsed if self.grade else None,
            "failure": self.grade.failure if self.grade else None,
            **self._verdict(),
        }

    def _verdict(self) -> dict[str, Any]:
        grade = self.grade
        if grade is None or grade.gold is None:
            return {}
        return {"said": grade.said, "gold": grade.gold, "judged_chars": grade.judged_chars}


async def answers_to(
    asked: Sequence[tuple[str, Prompt, SamplingParams]], domain: Domain, rollouts: Rollouts, grader: Grader
) -> list[Answer]:
    """What the served model answers to prompts of one domain, for no training, graded; in the order asked.

    Args:
        asked: request id, prompt, and how its answer is drawn.
    """
    specs = [rollouts.spec(request_id, prompt, sampling, publish=False) for request_id, prompt, sampling in asked]
    written = await rollouts.write_unpublished(specs)
    return await read_answers(
        domain, grader, [(prompt, answer) for (_, prompt, _), answer in zip(asked, written, strict=True)]
    )


async def read_answers(domain: Domain, grader: Grader, responses: Sequence[tuple[Prompt, Trajectory]]) -> list[Answer]:
    """Decoded and, where the domain has a verifier, graded: all of them off the event loop, in the order given."""
    texts = await asyncio.to_thread(lambda: [domain.text(one.scored_token_ids) for _, one in responses])
    grades: list[Grade | None] = [None] * len(responses)
    if domain.has_verifier:
        whole = [place for place, (_, one) in enumerate(responses) if one.finish_reason is not FinishReason.CANCELLED]
        found = await grader.grade(domain.name, [(responses[place][0], texts[place]) for place in whole])
        grades = [CANCELLED] * len(responses)
        for place, grade in zip(whole, found, strict=True):
            grades[place] = grade
    return [
        Answer(prompt, trajectory, text, grade)
        for (prompt, trajectory), text, grade in zip(responses, texts, grades, strict=True)
    ]


def drawn_at(sampling: SamplingParams, temperature: float) -> SamplingParams:
    """How answers are drawn, whatever cuts off tokens of the responses that are trained on."""
    return replace(sampling, temperature=temperature, top_p=1.0, top_k=0, keep_mask=False)


def figures(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Of one domain: ``accuracy`` (share of right answers) and ``score`` (mean), None where nothing was graded;
    ``answers``, and how many of them are ``graded``; how many of the graded are ``unparsed`` (no answer could be
    read), and how many should have a score and have none (``ungraded``: the verifier failed, or it was cancelled);
    ``mean_length`` in tokens, of those that were not cancelled. Of verdicts also ``kappa``: Cohen's, of what they say
    and gold, over those that parsed; None where it is not defined."""
    grades = [answer.grade for answer in answers if answer.grade is not None]
    scores = [grade.score for grade in grades if grade.score is not None]
    whole = [one.trajectory for one in answers if one.trajectory.finish_reason is not FinishReason.CANCELLED]
    found: dict[str, float | None] = {
        "accuracy": sum(score >= CORRECT for score in scores) / len(scores) if scores else None,
        "score": sum(scores) / len(scores) if scores else None,
        "answers": len(answers),
        "graded": len(scores),
        "unparsed": sum(grade.score is not None and not grade.parsed for grade in grades),
        "ungraded": sum(grade.failure is not None for grade in grades),
        "mean_length": sum(trajectory.num_scored for trajectory in whole) / max(1, len(whole)),
    }
    if any(grade.gold is not None for grade in grades):
        said = [
            (round(one.said, 9), round(one.gold, 9)) for one in grades if one.said is not None and one.gold is not None
        ]
        found["kappa"] = cohens_kappa([first for first, _ in said], [second for _, second in said])
    return found
