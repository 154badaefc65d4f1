"""Answers of finished models to the prompts of a recipe's domains: for evaluation, and for others to learn from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from opd_mesh.config.base import Strict
from opd_mesh.config.recipe import Recipe

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"  # of a folder and of request ids


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

    @field_validator("models")
    @classmethod
    def _names_are_of_folders(cls, models: dict[str, Path]) -> dict[str, Path]:
        for name in models:
            if not re.fullmatch(NAME, name):
                raise ValueError(
                    f"{name!r} names a folder of answers: take letters, digits, dots, dashes and underscores, and "
                    "begin with a letter or digit"
                )
        return models

    @model_validator(mode="after")
    def _prompts_are_there(self) -> AnswersConfig:
        answered = {name for model in self.models for name in self.domains_of(model)}
        for name, domain in self.recipe.domains.items():
            if self.split == "test" and name in answered and not domain.has_test_prompts:
                raise ValueError(
                    f"split: domain {name} has no test prompts; give it a share of them "
                    f"(recipe.domains.{name}.splits.test), or answer validation or train"
                )
        return self

    @model_validator(mode="after")
    def _responses_differ(self) -> AnswersConfig:
        if self.temperature == 0 and self.responses_per_prompt > 1:
            raise ValueError(
                f"responses_per_prompt: at temperature 0 the {self.responses_per_prompt} responses to a prompt are all "
                "the same; raise temperature, or ask for one"
            )
        return self

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
