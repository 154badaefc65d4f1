"""The recipe of a pipeline: a base model, specialists, and what unites and compares them, as stages.

It is told from a run's recipe by its key ``stages``. What stages make of each other is in :mod:`opd_mesh.pipeline`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import yaml
from pydantic import ConfigDict, Discriminator, Field, ModelWrapValidatorHandler, Tag, field_validator, model_validator

from opd_mesh.config.base import Strict, load_config
from opd_mesh.config.domains import DomainConfig, EffortConfig, with_judged_splits
from opd_mesh.config.recipe import Recipe

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$"
# Where a stage is named, this is the model that the pipeline begins with.
MODEL = "model"
# Part of a run's recipe, as it stands in the file; it is validated as part of the whole one.
PartialRecipe: TypeAlias = dict[str, Any]


# --- the model that everything begins with ---------------------------------------------------------------------
class InitConfig(Strict):
    """A model with random weights, drawn from the pipeline's seed, and a tokenizer of characters and whole numbers."""

    # Of transformers: `model_type`, and what is to differ from its defaults. The vocabulary's size and the ids of BOS,
    # EOS and padding come from the tokenizer.
    config: dict[str, Any]
    # <pad>, <bos>, <eos> and <unk> come before them.
    characters: str = Field(min_length=1)
    # The whole numbers below this are one token each, after the characters, which have no digits then.
    numbers: int = Field(0, ge=0, le=100_000)
    # Special tokens of more than one character, for instance "<think>".
    extra_tokens: list[str] = Field(default_factory=list)
    # Above the tokenizer's own size, ids that no text holds fill the rest; unset: the tokenizer's.
    vocab_size: int | None = Field(None, ge=1)

    @field_validator("config")
    @classmethod
    def _names_its_type(cls, config: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(config.get("model_type"), str):
            raise ValueError("name the architecture, for example model_type: llama")  # noqa: TRY004 - pydantic's
        if "vocab_size" in config:
            raise ValueError("vocab_size: it comes from the tokenizer; a larger one stands beside config, not in it")
        return config

    @field_validator("characters")
    @classmethod
    def _each_once(cls, characters: str) -> str:
        twice = sorted({character for character in characters if characters.count(character) > 1})
        if twice:
            raise ValueError(f"{', '.join(map(repr, twice))} occur more than once")
        return characters

    @model_validator(mode="after")
    def _digits_are_tokens_once(self) -> Self:
        if self.numbers and (digits := sorted(set(self.characters) & set("0123456789"))):
            raise ValueError(f"characters: take {''.join(digits)} out: with numbers, a run of digits is one token")
        return self

    @model_validator(mode="after")
    def _there_is_room(self) -> Self:
        if self.vocab_size is not None and self.vocab_size < self.tokenizer_size:
            raise ValueError(f"vocab_size: the tokenizer has {self.tokenizer_size} tokens, {self.vocab_size} are fewer")
        return self

    @property
    def tokenizer_size(self) -> int:
        """Tokens that the tokenizer knows."""
        return 4 + len(self.characters) + self.numbers + len(self.extra_tokens)


class ModelConfig(Strict):
    """A checkpoint, or one made on the spot."""

    path: Path | None = None
    init: InitConfig | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of path (a checkpoint folder) and init (random weights)")
        return self


# --- stages ----------------------------------------------------------------------------------------------------
class StageConfig(Strict):
    """What all stages share."""

    # `from` is a word of Python's own.
    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, dict) and "from" in value and "from_" in cls.model_fields:
            value = {("from_" if key == "from" else key): part for key, part in value.items()}
        return super()._refuse_unknown_keys(value, handler)  # type: ignore[operator, no-any-return]


class StageDomain(Strict):
    """A domain's part in a stage."""

    # Of the stage's prompts, relative to its other domains; unset: the domain's own.
    share: float | None = Field(None, gt=0, allow_inf_nan=False)
    # The template of what SFT learns, in this stage alone; unset: the domain's own.
    answer: str | None = None


def _named(value: Any) -> Any:
    """``[add, sort]`` is short for ``{add: {}, sort: {}}``."""
    return {name: {} for name in value} if isinstance(value, list) else value


class TrainingStage(StageConfig):
    """A stage that trains."""

    # Dotted keys into the stage's recipe → values. On the first seed every combination is trained; what has the best
    # mean accuracy on the validation prompts of the stage's own domains is used for every seed.
    sweep: dict[str, list[Any]] = Field(default_factory=dict)

    @field_validator("sweep")
    @classmethod
    def _has_values(cls, sweep: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in sweep.items():
            if not values:
                raise ValueError(f"{key}: give at least one value")
            if any(values.count(value) > 1 for value in values):
                raise ValueError(f"{key}: a value stands there twice")
        return sweep


class DomainsStage(TrainingStage):
    """A stage that trains on domains of its own choice."""

    domains: dict[str, StageDomain] = Field(min_length=1)

    @field_validator("domains", mode="before")
    @classmethod
    def _list_of_names(cls, value: Any) -> Any:
        return _named(value)


class BaseStage(DomainsStage):
    """SFT of the pipeline's model on the gold answers of domains."""

    kind: Literal["base"]
    recipe: PartialRecipe


class SpecialistStage(DomainsStage):
    """SFT, then GRPO, or one of them, on a domain; on several it is a mixed model."""

    kind: Literal["specialist"]
    from_: str = Field(alias="from")
    sft: PartialRecipe | None = None
    grpo: PartialRecipe | None = None


class ResponsesConfig(Strict):
    """What the cold start's teachers write: answers to training prompts of their domains."""

    prompts_per_domain: int = Field(1000, ge=1)
    responses_per_prompt: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)


class ColdStartStage(TrainingStage):
    """SFT on what the teachers write, before distillation."""

    kind: Literal["cold_start"]
    from_: str = Field(alias="from")
    # Domain → the stage whose model writes.
    teachers: dict[str, str] = Field(min_length=1)
    responses: ResponsesConfig = ResponsesConfig()
    recipe: PartialRecipe


class OpdStage(TrainingStage):
    """On-policy distillation from the models of other stages."""

    kind: Literal["opd"]
    from_: str = Field(alias="from")
    # Domain → the stage whose model marks it, or several with weights.
    teachers: dict[str, dict[str, float]] = Field(min_length=1)
    # Of domains among the prompts of a step; unset: the domain's own.
    shares: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    recipe: PartialRecipe

    @field_validator("teachers", mode="before")
    @classmethod
    def _one_teacher(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            domain: {teachers: 1.0} if isinstance(teachers, str) else teachers for domain, teachers in value.items()
        }


class SoupStage(StageConfig):
    """The weighted mean of models' weights."""

    kind: Literal["soup"]
    of: list[str] = Field(min_length=2)
    # One each, relative to the others; unset: all alike.
    weights: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None


class EvaluateStage(StageConfig):
    """Answers of models to held-out prompts of domains, graded by their verifiers."""

    kind: Literal["evaluate"]
    models: list[str] = Field(min_length=1)
    # Unset: all that have a verifier.
    domains: list[str] | None = Field(None, min_length=1)
    split: Literal["validation", "test"] = "test"
    prompts_per_domain: int = Field(300, ge=1)
    # 0: greedy.
    temperature: float = Field(0.0, ge=0, le=100)


_KINDS = ("base", "specialist", "cold_start", "opd", "soup", "evaluate")


def _kind_of(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


Stage: TypeAlias = Annotated[
    Annotated[BaseStage, Tag("base")]
    | Annotated[SpecialistStage, Tag("specialist")]
    | Annotated[ColdStartStage, Tag("cold_start")]
    | Annotated[OpdStage, Tag("opd")]
    | Annotated[SoupStage, Tag("soup")]
    | Annotated[EvaluateStage, Tag("evaluate")],
    Discriminator(
        _kind_of,
        custom_error_type="unknown_kind",
        custom_error_message=f"write {{kind: …}} with the stage's kind, one of {', '.join(_KINDS)}",
    ),
]


# --- the whole -------------------------------------------------------------------------------------------------
class PipelineSection(Strict):
    """Name and manner."""

    name: str = Field("pipeline", pattern=NAME)
    # Everything is done once for each.
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field([0], min_length=1)
    # That run at once.
    jobs: int = Field(1, ge=1)

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands there twice")
        return seeds


class PipelineRecipe(Strict):
    """``opd run RECIPE`` where the recipe has ``stages``. Paths are relative to the working directory."""

    pipeline: PipelineSection = PipelineSection()
    model: ModelConfig
    # As in a run's recipe, without teachers: those are named by the stages.
    domains: dict[str, DomainConfig] = Field(min_length=1)
    efforts: dict[str, EffortConfig] = Field(default_factory=dict)
    # Parts of a run's recipe that stand under every training run's own.
    defaults: PartialRecipe = Field(default_factory=dict)
    stages: dict[str, Stage] = Field(min_length=1)

    @field_validator("domains")
    @classmethod
    def _stages_name_teachers(cls, domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        for name, domain in domains.items():
            if domain.teachers:
                raise ValueError(f"{name}.teachers: a stage names its teachers; take them out of the domain")
        return with_judged_splits(domains)

    @field_validator("stages")
    @classmethod
    def _names_are_free(cls, stages: dict[str, Any]) -> dict[str, Any]:
        for name in stages:
            if name == MODEL:
                raise ValueError(f"{name}: that is what the pipeline begins with; choose another name")
            if re.fullmatch(NAME, name) is None:
                raise ValueError(
                    f"{name!r}: a name has up to 48 letters (a to z), digits, '.', '_' and '-', and begins with one of "
                    "the first two"
                )
        return stages


def load_recipe(path: Path | str) -> Recipe | PipelineRecipe:
    """Read a recipe of either sort. Raises :class:`ConfigError` with the file, line or key."""
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        value = None  # what is wrong is for its loading to say
    if isinstance(value, dict) and "stages" in value:
        return load_config(PipelineRecipe, path)
    return load_config(Recipe, path)
