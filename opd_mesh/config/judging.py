"""Judging in a recipe: domains whose prompts ask for verdicts, and rewards that a generative reward model gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from opd_mesh.config.base import Strict
from opd_mesh.config.services import JudgeSamplingConfig, PeerConfig, RolloutEngineConfig

Corruption = Literal["swap", "exchange", "change", "other"]
CORRUPTIONS: tuple[Corruption, ...] = ("swap", "change", "other")
Probe = Literal["length", "verdict", "instruction"]


# --- verdicts to be learned ------------------------------------------------------------------------------------
class JudgingSource(Strict):
    """Prompts that ask for a verdict by a rubric, and the verdict that is right (gold)."""

    # A file of opd_mesh.config.rubrics.
    rubric: Path
    # Answers with their gold, a line of JSON each: ``prompt`` and ``answer`` (text), ``gold`` (the overall score in
    # [0, 1], or criterion → point of its scale), and perhaps ``reference`` and ``reasons`` (criterion → text).
    path: Path | None = None
    # Or: answers to items of another domain of the recipe, by turns the right one and a wrong one. Its verifier is the
    # truth, and its splits are this domain's, too.
    domain: str | None = None
    # What becomes of the right answer, so that it is wrong: two neighbouring characters change places (swap), or any
    # two (exchange); a character becomes another that such answers have; it is the answer to another item.
    corruptions: list[Corruption] = Field(list(CORRUPTIONS), min_length=1)
    # With `domain`: the right and the wrong answer stand side by side, in either order, and the verdict says which.
    pairwise: bool = False
    # With `domain`: what is done to every answer for a better score and not a better answer (opd_mesh.judging.probes).
    # Gold is that of the answer as it was, so that accuracy and `raised` tell whom it took in; to learn from, too.
    probe: Probe | None = None
    # With `domain`: what the judge is shown beside the answer.
    reference: Literal["none", "answer"] = "none"
    # Verdicts are decoded under the rubric's grammar, so that each parses.
    constrained: bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.path is None) == (self.domain is None):
            raise ValueError("name one of path (answers with gold verdicts) and domain (whose answers are judged)")
        if self.path is not None:
            for name in ("corruptions", "pairwise", "probe", "reference"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: belongs to domain; a file's lines hold all that is judged")
        if self.pairwise and self.probe is not None:
            raise ValueError("probe: is of one answer that is judged by itself; leave out pairwise, or probe")
        if len(set(self.corruptions)) < len(self.corruptions):
            raise ValueError("corruptions: one stands there twice")
        return self


# --- rewards ---------------------------------------------------------------------------------------------------
def _file_or_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.endswith((".yaml", ".yml")):
        return Path(value)
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?", value) is None:
        raise ValueError(f"{value!r} is neither a file (….yaml) nor a name, or name@version, of a rubric of the GRM")
    return value


# A file (``….yaml``), or the name of one that the GRM holds (``name`` or ``name@version``).
RubricSource: TypeAlias = Annotated[Path | str, BeforeValidator(_file_or_name)]


class GrmReward(Strict):
    """The reward of a response is its overall score by a rubric, as the recipe's ``grm`` judges."""

    name: Literal["grm"]
    rubric: RubricSource
    # Votes for each response; their mean is the reward.
    samples: int = Field(1, ge=1, le=64)
    # What the judge is shown beside the response: nothing, or the item's gold answer.
    reference: Literal["none", "answer"] = "none"


class FrozenJudgeConfig(Strict):
    """A model that judges and does not learn, on a rollout server that ``opd run`` starts."""

    model: Path
    engine: RolloutEngineConfig = RolloutEngineConfig()


class GrmConfig(Strict):
    """The generative reward model of a run: servers that exist, or how the one judges that ``opd run`` starts."""

    peers: PeerConfig = PeerConfig()
    # "policy": the run's own rollout servers, so that the actor is the judge; or a model of its own.
    judge: Literal["policy"] | FrozenJudgeConfig = "policy"
    # A folder of rubrics, for domains that name theirs.
    rubrics: Path | None = None
    constrained: bool = True
    sampling: JudgeSamplingConfig = JudgeSamplingConfig()
    max_verdict_tokens: int = Field(512, ge=1)
    max_prompt_chars: int = Field(32768, ge=1)
    max_answer_chars: int = Field(32768, ge=1)
    # Of the judge.
    system_prompt: str | None = None

    @model_validator(mode="after")
    def _settings_are_ours(self) -> Self:
        if self.peers.addresses and self.replace(peers=PeerConfig()) != GrmConfig():
            raise ValueError(
                "peers.addresses: servers that run already judge by their own settings; leave the other keys out"
            )
        return self

    def check(self, reward: GrmReward, field: str, policy_engine: RolloutEngineConfig) -> None:
        """Raises :class:`ValueError`, as a pydantic validator should, for a reward that this GRM cannot give.

        Args:
            policy_engine: of the run's rollout servers.
        """
        if self.peers.addresses:
            return  # of its settings nothing is known yet
        if self.judge == "policy" and self.constrained and policy_engine.engine == "vllm":
            raise ValueError(
                f"{field}: the policy judges, and rollout.engine.engine vllm takes no grammars; choose transformers, "
                "set grm.constrained to false, or name another grm.judge"
            )
        context = (policy_engine if self.judge == "policy" else self.judge.engine).max_context_tokens
        if self.max_verdict_tokens >= context:
            raise ValueError(
                f"grm.max_verdict_tokens: {self.max_verdict_tokens} tokens of a verdict leave no room for a prompt in "
                f"the max_context_tokens ({context}) of the engine that judges; lower the one or raise the other"
            )
        if reward.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"{field}.samples: at grm.sampling.temperature 0 all {reward.samples} votes are the same; set a "
                "temperature above 0, or samples to 1"
            )
        if isinstance(reward.rubric, str) and self.rubrics is None:
            raise ValueError(
                f"{field}.rubric: {reward.rubric!r} is a name, but there is no grm.rubrics, the folder to find it in; "
                "name that, or a file (….yaml)"
            )
