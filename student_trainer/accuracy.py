"""Accuracy: answers of the present student to held-out prompts, graded by the domains' verifiers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from opd_mesh.config.recipe import Recipe
from opd_mesh.config.sections import AccuracyConfig
from opd_mesh.errors import ConfigError, VerifierError
from student_trainer.answers import Answer, answers_to, drawn_at, figures
from student_trainer.rollouts import Rollouts
from student_trainer.tasks import Domain, Grader


class AccuracyEvaluator:
    """Of every domain that has a verifier, trained on or not.

    Raises:
        ConfigError: accuracy is asked for, and no domain has one.
    """

    def __init__(self, recipe: Recipe, rollouts: Rollouts) -> None:
        if recipe.evaluation.accuracy is not None and not any(one.verifier for one in recipe.domains.values()):
            raise ConfigError(
                "evaluation.accuracy: no domain has a verifier to grade answers; name one (domains.….verifier), or "
                "leave accuracy out",
                field="evaluation.accuracy",
            )
        self._recipe = recipe
        self._rollouts = rollouts

    async def evaluate(self, domains: Sequence[Domain], grader: Grader, *, lineage: int, step: int) -> dict[str, float]:
        """Metrics by name: ``accuracy/<domain>`` (share of right answers), ``score/<domain>`` (mean score),
        ``unparsed/<domain>`` (share from which no answer could be taken), all of ``graded/<domain>`` answers;
        ``ungraded/<domain>`` (answers without a score), ``answer_length/<domain>`` (mean, tokens). Of
        verdicts also ``kappa/<domain>``, their agreement with gold beyond chance, where it is defined.

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
            answers = await self._answers(domain, grader, config, f"e{lineage:04d}-s{step:06d}")
            found = figures(answers)
            if found["accuracy"] is None or found["score"] is None or not found["graded"]:
                failures = (answer.grade.failure for answer in answers if answer.grade and answer.grade.failure)
                raise VerifierError(
                    f"not one answer could be graded: {next(failures, 'there are no prompts')}",
                    field=f"domains.{domain.name}.verifier",
                )
            line[f"accuracy/{domain.name}"] = found["accuracy"]
            line[f"score/{domain.name}"] = found["score"]
            line[f"unparsed/{domain.name}"] = (found["unparsed"] or 0) / found["graded"]
            line[f"graded/{domain.name}"] = found["graded"]
            line[f"ungraded/{domain.name}"] = found["ungraded"] or 0
            line[f"answer_length/{domain.name}"] = found["mean_length"] or 0.0
            if (kappa := found.get("kappa")) is not None:
                line[f"kappa/{domain.name}"] = kappa
        return line

    async def _answers(self, domain: Domain, grader: Grader, config: AccuracyConfig, name: str) -> list[Answer]:
        prompts = await asyncio.to_thread(domain.held_out, config.split, config.prompts_per_domain)
        asked = [
            (
                f"{name}-{domain.name}-{config.split}-{place}",
                prompt,
                drawn_at(self._rollouts.sampling(domain.name, config.split, prompt.index), config.temperature),
            )
            for place, prompt in enumerate(prompts)
        ]
        return await answers_to(asked, domain, self._rollouts, grader)
