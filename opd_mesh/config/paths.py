"""Paths of recipes, made independent of the folder that a command is called from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from opd_mesh.config.domains import DomainConfig
from opd_mesh.config.judging import FrozenJudgeConfig, GrmConfig
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.sections import TeacherRef
from opd_mesh.config.tasks import OthersConfig
from opd_mesh.errors import ConfigError, ModelNotFoundError


def resolve_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that a run can be resumed from anywhere.

    Raises:
        ModelNotFoundError: a model's folder does not exist; names the field.
        ConfigError: the token log of a rollout server that is not ours to start.
    """

    def checked(path: Path | str, field: str) -> Path | str:
        if isinstance(path, str):
            return path  # a URL: the teacher server fetches it, and says what is wrong with it
        if not path.exists():
            raise ModelNotFoundError(
                f"{path} does not exist (from {Path.cwd()}). Give the folder of a Hugging Face checkpoint; the demo's "
                "models are made by `make demo-models`",
                field=field,
            )
        return path.resolve()

    student = recipe.student.replace(path=checked(recipe.student.path, "student.path"))
    teachers: dict[str, TeacherRef] = {}
    for name, teacher in recipe.teachers.items():
        changes = {
            key: checked(value, f"teachers.{name}.{key}")
            for key in ("path", "adapter")
            if (value := getattr(teacher, key)) is not None
        }
        teachers[name] = teacher.replace(**changes)
    domains = {name: with_absolute_paths(domain) for name, domain in recipe.domains.items()}
    rollout = recipe.rollout
    if rollout.log is not None:
        if rollout.peers.addresses:
            raise ConfigError(
                "rollout.log is of the rollout server that `opd run` starts, but rollout.peers.addresses names servers "
                "that run already: give each of them its log, and leave this out",
                field="rollout.log",
            )
        rollout = rollout.replace(log=rollout.log.replace(path=rollout.log.path.resolve()))
    grm = _absolute_grm(recipe.grm, checked)
    return recipe.replace(student=student, teachers=teachers, domains=domains, rollout=rollout, grm=grm)


def _absolute_grm(grm: GrmConfig, checked: Callable[[Path, str], Path | str]) -> GrmConfig:
    changes: dict[str, Any] = {}
    if isinstance(grm.judge, FrozenJudgeConfig):
        changes["judge"] = grm.judge.replace(model=checked(grm.judge.model, "grm.judge.model"))
    if grm.rubrics is not None:
        changes["rubrics"] = grm.rubrics.resolve()
    return grm.replace(**changes) if changes else grm


def with_absolute_grm(part: Mapping[str, Any]) -> dict[str, Any]:
    """Part of a recipe, as it stands in a file, with the absolute paths of its reward model."""
    grm = part.get("grm")
    if not isinstance(grm, Mapping):
        return dict(part)
    found, judge = dict(grm), grm.get("judge")
    if isinstance(grm.get("rubrics"), str):
        found["rubrics"] = str(Path(grm["rubrics"]).resolve())
    if isinstance(judge, Mapping) and isinstance(judge.get("model"), str):
        found["judge"] = {**judge, "model": str(Path(judge["model"]).resolve())}
    return {**part, "grm": found}


SourcesT = TypeVar("SourcesT", DomainConfig, OthersConfig)


def with_absolute_paths(config: SourcesT) -> SourcesT:
    """A domain's files, and those of its other prompts."""
    changes: dict[str, Any] = {}
    for key in ("jsonl", "dataset", "trajectories", "judging", "reward"):
        if (source := getattr(config, key, None)) is not None:
            paths = {name: value.resolve() for name, value in source if isinstance(value, Path)}
            changes[key] = source.replace(**paths)
    if isinstance(config, DomainConfig) and config.others is not None:
        changes["others"] = with_absolute_paths(config.others)
    return config.replace(**changes) if changes else config
