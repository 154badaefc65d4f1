"""Domains: where prompts come from, how answers are verified, and who marks what the student writes.

The parts of a domain are in :mod:`opd_mesh.config.tasks`.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from opd_mesh.config.base import Strict
from opd_mesh.config.tasks import (
    DEFAULT_EFFORTS,
    DatasetSource,
    EffortConfig,
    JsonlSource,
    LengthPenalty,
    OthersConfig,
    ReasoningGymSource,
    SplitsConfig,
    TrajectoriesSource,
    VerifierConfig,
)

__all__ = [
    "DEFAULT_EFFORTS",
    "DatasetSource",
    "DomainConfig",
    "EffortConfig",
    "JsonlSource",
    "ReasoningGymSource",
    "TrajectoriesSource",
]


class DomainConfig(Strict):
    """One kind of prompt, what a good answer is, and the teachers that mark it."""

    reasoning_gym: ReasoningGymSource | None = None
    jsonl: JsonlSource | None = None
    dataset: DatasetSource | None = None
    trajectories: TrajectoriesSource | None = None
    # Jinja templates of ``question``, ``answer`` and ``metadata``; unset: the question and the gold answer as they are.
    # The prompt takes the place of the last turn; the answer is what SFT learns.
    prompt: str | None = None
    answer: str | None = None
    verifier: VerifierConfig | None = None
    # Unset: validation prompts come from other seeds or lines than the training prompts, and there are no test prompts.
    splits: SplitsConfig | None = None
    # One of the recipe's efforts; unset: the chat template alone gives the form.
    effort: str | None = None
    # Added to the verifier's score; unset: the effort's.
    length_penalty: LengthPenalty | None = None
    others: OthersConfig | None = None
    # Teacher id → weight w_i of Eq. 29 (DeepSeek-V4 report).
    teachers: dict[str, float] = Field(default_factory=dict)
    # Share of this domain among the prompts of a step, relative to the others; 0: evaluated, never trained on.
    share: float = Field(1.0, ge=0, allow_inf_nan=False)
    # Put before the conversation as a system turn, where set.
    system_prompt: str | None = None
    # Of a response; unset: the effort's, else rollout.max_new_tokens.
    max_new_tokens: int | None = Field(None, ge=1)

    @property
    def has_test_prompts(self) -> bool:
        """``splits`` keeps some out, beside those for validation."""
        return self.splits is not None and self.splits.test > 0

    @model_validator(mode="after")
    def _one_source(self) -> DomainConfig:
        sources = (self.reasoning_gym, self.jsonl, self.dataset, self.trajectories)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("name exactly one source: reasoning_gym, jsonl, dataset or trajectories")
        for teacher, weight in self.teachers.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"teachers.{teacher}: the weight must be above 0 and finite, got {weight}")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> DomainConfig:
        if self.trajectories is not None:
            for key in ("prompt", "answer", "verifier", "effort", "length_penalty", "others", "system_prompt"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: trajectories are token ids and are learned as they are; leave it out")
        if self.verifier is not None and self.verifier.name == "reasoning_gym" and self.reasoning_gym is None:
            raise ValueError("verifier: reasoning_gym scores answers to its own prompts only; name another verifier")
        if self.splits is not None:
            for key, name in (("jsonl", "heldout"), ("dataset", "heldout_split")):
                if getattr(getattr(self, key), name, None) is not None:
                    raise ValueError(f"splits: {key}.{name} holds prompts out already; leave one of the two out")
        return self
