"""Accuracy: answers of the present student to held-out prompts, graded by the domains' verifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import VerifierError
from student_trainer.rollouts import Rollouts
from student_trainer.tasks import Domain, Grader

CORRECT = 1.0 - 1e-9  # scores are shares of a right answer


class AccuracyEvaluator:
    """Of every domain that has a verifier, trained on or not."""

    def __init__(self, recipe: Recipe, rollouts: Rollouts) -> None:
        self._recipe = recipe
        self._rollouts = rollouts

    async def evaluate(self, domains: Sequence[Domain], grader: Grader, *, lineage: int, step: int) -> dict[str, float]:
        """Metrics by name: ``accuracy/<domain>`` (share of right answers), ``score/<domain>`` (mean score),
        ``unparsed/<domain>`` (share from which no answer could be taken), ``graded/<domain>`` (answers).

        Raises:
            VerifierError: not one answer of a domain could be graded.
        """
        config = self._recipe.evaluation.accuracy
        line: dict[str, float] = {}
        if config is None:
            return line
        for domain in domains:
            if not domain.has_verifier:
                continue
            prompts = domain.held_out(config.split, config.prompts_per_domain)
            specs = [
                self._rollouts.spec(
                    f"e{lineage:04d}-s{step:06d}-{domain.name}-{config.split}-{place}",
                    prompt,
                    replace(
                        self._rollouts.sampling(domain.name, config.split, prompt.index),
                        temperature=config.temperature,
                        top_p=1.0,
                        top_k=0,
                    ),
                    publish=False,
                )
                for place, prompt in enumerate(prompts)
            ]
            written = await self._rollouts.write_unpublished(specs)
            texts = [domain.text(trajectory.scored_token_ids) for trajectory in written]
            grades = await grader.grade(domain.name, list(zip(prompts, texts, strict=True)))
            scores = [grade.score for grade in grades if grade.score is not None]
            if not scores:
                failure = next((grade.failure for grade in grades if grade.failure), "there are no prompts")
                raise VerifierError(
                    f"not one answer could be graded: {failure}", field=f"domains.{domain.name}.verifier"
                )
            line[f"accuracy/{domain.name}"] = sum(score >= CORRECT for score in scores) / len(scores)
            line[f"score/{domain.name}"] = sum(scores) / len(scores)
            line[f"unparsed/{domain.name}"] = sum(not grade.parsed for grade in grades) / len(grades)
            line[f"graded/{domain.name}"] = len(scores)
            lengths = [trajectory.num_scored for trajectory in written]
            line[f"answer_length/{domain.name}"] = sum(lengths) / len(lengths)
        return line
