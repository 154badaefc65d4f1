"""Parts of recipes: put over each other, changed by a sweep, and made a whole one whose errors name the stage."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

from opd_mesh.config.base import parse_config
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError

# Sections that are one of several models, and the one that is meant where none is named: under another name they are
# replaced, not merged.
_CHOICES = {"objective": "reverse_kl", "optimizer": "adamw"}
_SECTIONS = (*_CHOICES, "run", "student", "rollout", "batch", "evaluation", "checkpoint")
# What is the pipeline's to say, and where it says it.
_NOT_HERE = {
    "domains": "stages choose from the pipeline's `domains`",
    "efforts": "they stand at the top of the pipeline's recipe",
    "teachers": "a stage's own `teachers` names stages",
    "student.path": "it comes from the pipeline's `model`, or from the stage that `from` names",
    "run.name": "it comes from the stage's name",
    "run.seed": "it is one of `pipeline.seeds`",
    "rollout.log.path": "every job has its token log in its own folder",
}


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's value from parts, later ones over earlier ones, key by key."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = _over(whole.get(key), value, default=_CHOICES.get(key))
    return whole


def _over(below: Any, above: Any, *, default: str | None = None) -> Any:
    """``default``: of one of several models, the name of what has none."""
    if not isinstance(below, dict) or not isinstance(above, Mapping):
        return copy.deepcopy(above)
    if default is not None and above.get("name", below.get("name", default)) != below.get("name", default):
        return copy.deepcopy(dict(above))
    result = dict(below)
    for key, value in above.items():
        result[key] = _over(below.get(key), value)
    return result


def has(part: Mapping[str, Any], path: str) -> bool:
    """Whether a dotted key stands in a part of a recipe."""
    value: Any = part
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True


def with_value(part: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The part with one dotted key set."""
    nested: Any = value
    for key in reversed(path.split(".")):
        nested = {key: nested}
    return merged(part, nested)


def combinations(sweep: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """All of a sweep, in its order: the last key changes fastest. Without a sweep: one, that changes nothing."""
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def check_part(part: Mapping[str, Any], field: str) -> None:
    """Raises :class:`ConfigError` for what a part of a recipe must leave to the pipeline."""
    for key, where in _NOT_HERE.items():
        if has(part, key):
            raise ConfigError(f"{field}.{key}: leave it out; {where}", field=f"{field}.{key}")
    for section in _SECTIONS:
        if section in part and not isinstance(part[section], Mapping):
            raise ConfigError(f"{field}.{section}: write a mapping", field=f"{field}.{section}")


def whole_recipe(
    value: Mapping[str, Any], *, own: Mapping[str, Any], defaults: Mapping[str, Any], field: str
) -> Recipe:
    """Validate what a job will run.

    Args:
        value: all parts merged.
        own, defaults: the two that a person wrote, to tell which of them is wrong.
        field: where ``own`` stands in the pipeline's recipe.

    Raises:
        ConfigError: with ``field`` as the file has it.
    """
    try:
        return parse_config(Recipe, dict(value), source=field)
    except ConfigError as error:
        place = error.field or ""
        if place.startswith("(") or not place:
            where = field
        elif not has(own, place) and has(defaults, place):
            where = f"defaults.{place}"
        else:
            where = f"{field}.{place}"
        raise ConfigError(error.message, field=where) from error
