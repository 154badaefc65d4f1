"""Answers of finished models to the prompts of a recipe's domains: for evaluation, and for others to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from opd_mesh.config.base import Strict
from opd_mesh.config.recipe import Recipe


class AnswersConfig(Strict):
    """``python -m student_trainer.answering``: who answers what, and how."""

    # Domains, efforts, rollout servers and seed. Its student has the architecture and the tokenizer of all models; its
    # objective, optimizer and teachers are of no account.
    recipe: Recipe
    # Name → checkpoint, or the folder of a PEFT adapter on the recipe's student.
    models: dict[str, Path] = Field(min_length=1)
    # Model → the domains that it answers; unset: all.
    domains: dict[str, list[str]] = Field(default_factory=dict)
    split: Literal["train", "validation", "test"] = "test"
    prompts_per_domain: int = Field(300, ge=1)
    responses_per_prompt: int = Field(1, ge=1)
    # 0: greedy.
    temperature: float = Field(0.0, ge=0, le=100)

    @model_validator(mode="after")
    def _names_are_known(self) -> AnswersConfig:
        for model, domains in self.domains.items():
            if model not in self.models:
                raise ValueError(f"domains: {model!r} is none of the models {', '.join(self.models)}")
            for domain in domains:
                if domain not in self.recipe.domains:
                    raise ValueError(
                        f"domains.{model}: {domain!r} is none of the domains {', '.join(self.recipe.domains)}"
                    )
        return self

    def domains_of(self, model: str) -> list[str]:
        """That it answers, in the recipe's order."""
        wanted = self.domains.get(model)
        return [name for name in self.recipe.domains if wanted is None or name in wanted]
