"""Paths of recipes, made independent of the folder that a command is called from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from opd_mesh.config.domains import DomainConfig
from opd_mesh.config.recipe import Recipe, TeacherRef
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
    return recipe.replace(student=student, teachers=teachers, domains=domains, rollout=rollout)


SourcesT = TypeVar("SourcesT", DomainConfig, OthersConfig)


def with_absolute_paths(config: SourcesT) -> SourcesT:
    """A domain's files, and those of its other prompts."""
    changes: dict[str, Any] = {}
    for key in ("jsonl", "dataset", "trajectories"):
        if (source := getattr(config, key, None)) is not None:
            paths = {name: value.resolve() for name, value in source if isinstance(value, Path)}
            changes[key] = source.replace(**paths)
    if isinstance(config, DomainConfig) and config.others is not None:
        changes["others"] = with_absolute_paths(config.others)
    return config.replace(**changes) if changes else config
