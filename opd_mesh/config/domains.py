"""Domains: where prompts come from, and who marks what the student writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from opd_mesh.config.base import Strict


class ReasoningGymSource(Strict):
    """Prompts drawn from a reasoning-gym task family."""

    task: str
    # Arguments of the family's dataset (for example ``min_terms``), without seed and size.
    params: dict[str, Any] = Field(default_factory=dict)


class JsonlSource(Strict):
    """Prompts of one's own: a JSONL file with ``prompt`` (text) or ``messages`` (chat turns) on every line."""

    path: Path
    # Lines held out for evaluation, from the end of the file; unset: as many as evaluation asks for.
    heldout: Path | None = None


class DomainConfig(Strict):
    """One kind of prompt and the teachers that mark it."""

    reasoning_gym: ReasoningGymSource | None = None
    jsonl: JsonlSource | None = None
    # Teacher id → weight w_i of Eq. 29 (DeepSeek-V4 report).
    teachers: dict[str, float] = Field(min_length=1)
    # Share of this domain among the prompts of a step, relative to the others.
    share: float = Field(1.0, gt=0)
    # Put before the conversation as a system turn, where set.
    system_prompt: str | None = None
    max_new_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> DomainConfig:
        if (self.reasoning_gym is None) == (self.jsonl is None):
            raise ValueError("name exactly one source: reasoning_gym or jsonl")
        for teacher, weight in self.teachers.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"teachers.{teacher}: the weight must be above 0 and finite, got {weight}")
        return self
