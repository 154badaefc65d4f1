"""Domains: where prompts come from, how answers are verified, and who marks what the student writes.

The parts of a domain are in :mod:`opd_mesh.config.tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from opd_mesh.config.base import Strict
from opd_mesh.config.judging import GrmReward, JudgingSource
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
    "GrmReward",
    "JsonlSource",
    "JudgingSource",
    "ReasoningGymSource",
    "TrajectoriesSource",
]


class DomainConfig(Strict):
    """One kind of prompt, what a good answer is, and the teachers that mark it."""

    reasoning_gym: ReasoningGymSource | None = None
    jsonl: JsonlSource | None = None
    dataset: DatasetSource | None = None
    trajectories: TrajectoriesSource | None = None
    judging: JudgingSource | None = None
    # Jinja templates of ``question``, ``answer`` and ``metadata``; unset: the question and the gold answer as they are.
    # The prompt takes the place of the last turn; the answer is what SFT learns.
    prompt: str | None = None
    answer: str | None = None
    # Of a judging domain always `verdict`.
    verifier: VerifierConfig | None = None
    # What responses earn under a policy gradient; unset: the verifier's score. Set: the verifier only evaluates.
    reward: GrmReward | None = None
    # Unset: validation prompts come from other seeds or lines than the training prompts, and there are no test prompts.
    splits: SplitsConfig | None = None
    # One of the recipe's efforts; unset: the chat template alone gives the form.
    effort: str | None = None
    # Added to that score; unset: the effort's.
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

    @property
    def answering_domain(self) -> str | None:
        """The domain whose answers this one judges."""
        return None if self.judging is None else self.judging.domain

    @property
    def is_probe(self) -> bool:
        """What it shows a judge is dressed up for a better score: no skill is measured by it."""
        return self.judging is not None and self.judging.probe is not None

    @property
    def is_rewarded(self) -> bool:
        """Whether responses can earn anything."""
        return self.verifier is not None or self.reward is not None

    @model_validator(mode="before")
    @classmethod
    def _verdicts_are_verified(cls, value: Any) -> Any:
        """Gold verdicts are known, so there is nothing to choose."""
        if isinstance(value, dict) and value.get("judging") is not None and value.get("verifier") is None:
            return {**value, "verifier": {"name": "verdict"}}
        return value

    @model_validator(mode="after")
    def _one_source(self) -> DomainConfig:
        sources = (self.reasoning_gym, self.jsonl, self.dataset, self.trajectories, self.judging)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("name exactly one source: reasoning_gym, jsonl, dataset, trajectories or judging")
        for teacher, weight in self.teachers.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"teachers.{teacher}: the weight must be above 0 and finite, got {weight}")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> DomainConfig:
        if self.trajectories is not None:
            own = ("prompt", "answer", "verifier", "reward", "effort", "length_penalty", "others", "system_prompt")
            for key in own:
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: trajectories are token ids and are learned as they are; leave it out")
        if self.judging is not None:
            for key in ("prompt", "answer", "reward", "others"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: the rubric says what is asked, and what earns how much; leave it out")
        if (self.verifier is not None and self.verifier.name == "verdict") != (self.judging is not None):
            raise ValueError("verifier: verdict and judging go together; name another verifier, or none")
        if self.verifier is not None and self.verifier.name == "reasoning_gym" and self.reasoning_gym is None:
            raise ValueError("verifier: reasoning_gym scores answers to its own prompts only; name another verifier")
        if self.splits is not None:
            for key, name in (("jsonl", "heldout"), ("dataset", "heldout_split")):
                if getattr(getattr(self, key), name, None) is not None:
                    raise ValueError(f"splits: {key}.{name} holds prompts out already; leave one of the two out")
        return self


def with_judged_splits(domains: Mapping[str, DomainConfig]) -> dict[str, DomainConfig]:
    """The domains, those that judge another's answers with its splits.

    Raises:
        ValueError: there is none to be judged, as a pydantic validator should.
    """
    found = dict(domains)
    for name, config in domains.items():
        judged = config.answering_domain
        if judged is None:
            continue
        field = f"{name}.judging.domain"
        answering = domains.get(judged)
        if answering is None:
            raise ValueError(f"{field}: {judged!r} is none of the domains {', '.join(domains)}")
        if answering.judging is not None or answering.trajectories is not None:
            raise ValueError(f"{field}: {judged} holds no questions with answers; name one that does")
        if answering.verifier is None:
            raise ValueError(f"{field}: which answers are right is for the verifier of {judged} to say; give it one")
        if config.splits not in (None, answering.splits):
            raise ValueError(
                f"{name}.splits: an item belongs to the split of the one that is judged; leave it out, and set "
                f"{judged}.splits"
            )
        found[name] = config.replace(splits=answering.splits)
    return found
