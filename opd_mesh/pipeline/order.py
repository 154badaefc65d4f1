"""Which stage needs which, and the order that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from opd_mesh.config.pipeline import (
    MODEL,
    BaseStage,
    ColdStartStage,
    EvaluateStage,
    OpdStage,
    PipelineRecipe,
    SoupStage,
    SpecialistStage,
    Stage,
)
from opd_mesh.errors import ConfigError
from opd_mesh.pipeline.partial import merged

SFT = ("sft",)
GRPO = ("grpo", "dapo", "dr_grpo")
OPD = ("reverse_kl", "forward_kl", "jsd", "exopd", "top_k", "sampled_token")


def objectives(stage: Stage, key: str) -> tuple[str, ...]:
    """What the part ``key`` of a stage may train by; the first is the default."""
    return GRPO if key == "grpo" else OPD if isinstance(stage, OpdStage) else SFT


def references(value: Mapping[str, Any]) -> list[str]:
    """Stages that an objective names as its reference, from the value of a recipe."""
    objective = value.get("objective")
    if not isinstance(objective, Mapping):
        return []
    kl = objective.get("kl")
    found = [objective.get("reference"), kl.get("reference") if isinstance(kl, Mapping) else None]
    return [name for name in found if isinstance(name, str)]


def _named(name: str, stage: Stage, defaults: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, stage) wherever a stage names another."""
    place = f"stages.{name}"
    parts: dict[str, Mapping[str, Any] | None] = {}
    match stage:
        case BaseStage():
            parts = {"recipe": stage.recipe}
        case SpecialistStage():
            yield f"{place}.from", stage.from_
            parts = {"sft": stage.sft, "grpo": stage.grpo}
        case ColdStartStage():
            yield f"{place}.from", stage.from_
            yield from ((f"{place}.teachers.{domain}", teacher) for domain, teacher in stage.teachers.items())
            parts = {"recipe": stage.recipe}
        case OpdStage():
            yield f"{place}.from", stage.from_
            for domain, teachers in stage.teachers.items():
                yield from ((f"{place}.teachers.{domain}", teacher) for teacher in teachers)
            parts = {"recipe": stage.recipe}
        case SoupStage():
            yield from ((f"{place}.of", model) for model in stage.of)
        case EvaluateStage():
            yield from ((f"{place}.models", model) for model in stage.models)
    for key, part in parts.items():
        if part is not None:
            whole = merged({"objective": {"name": objectives(stage, key)[0]}}, defaults, part)
            yield from ((f"{place}.{key}.objective", other) for other in references(whole))


def _domains_named(name: str, stage: Stage) -> Iterator[tuple[str, str]]:
    match stage:
        case BaseStage() | SpecialistStage():
            yield from ((f"stages.{name}.domains", domain) for domain in stage.domains)
        case ColdStartStage() | OpdStage():
            yield from ((f"stages.{name}.teachers", domain) for domain in stage.teachers)
    if isinstance(stage, OpdStage):
        yield from ((f"stages.{name}.shares", domain) for domain in stage.shares)


def _check_names(pipeline: PipelineRecipe) -> dict[str, list[str]]:
    """Stage → those it needs. Raises :class:`ConfigError` for names that do not exist, or hold no model."""
    stages = pipeline.stages
    needs: dict[str, list[str]] = {}
    with_models = [name for name, stage in stages.items() if not isinstance(stage, EvaluateStage)]
    for name, stage in stages.items():
        needs[name] = []
        for field, other in _named(name, stage, pipeline.defaults):
            if other == MODEL:
                continue
            if other not in with_models:
                what = "only evaluates and has no model" if other in stages else "is no stage"
                raise ConfigError(
                    f"{field}: {other!r} {what}; stages with a model are {', '.join([MODEL, *with_models])}",
                    field=field,
                )
            needs[name].append(other)
        for field, domain in _domains_named(name, stage):
            if domain not in pipeline.domains:
                raise ConfigError(f"{field}: {domain!r} is none of {', '.join(pipeline.domains)}", field=field)
    return needs


def in_order(pipeline: PipelineRecipe) -> list[str]:
    """Stages, each behind those that it needs, else as the recipe has them.

    Raises:
        ConfigError: an unknown name, or stages that need each other.
    """
    needs = _check_names(pipeline)
    ordered: list[str] = []
    path: list[str] = []

    def visit(name: str) -> None:
        if name in ordered:
            return
        if name in path:
            circle = [*path[path.index(name) :], name]
            field = f"stages.{circle[0]}"
            raise ConfigError(f"{field}: the stages {' → '.join(circle)} need each other", field=field)
        path.append(name)
        for other in needs[name]:
            visit(other)
        path.pop()
        ordered.append(name)

    for name in pipeline.stages:
        visit(name)
    return ordered
