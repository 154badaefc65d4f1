"""What every configuration model shares: strictness, the nearest known name, and YAML."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from opd_mesh.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def _problem(place: tuple[int | str, ...], message: str, value: Any) -> InitErrorDetails:
    error = PydanticCustomError("invalid_config", "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=place, input=value)


class Strict(BaseModel):
    """Unknown keys are refused with the nearest known name; instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        known = list(cls.model_fields)
        unknown = [key for key in value if key not in known] if isinstance(value, dict) else []
        if not unknown:
            return handler(value)
        problems = []
        for key in unknown:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(sorted(known))}"
            problems.append(_problem((str(key),), f"unknown key {key!r}; {hint}", value[key]))
        try:  # the known keys may be wrong, too: a reader wants to see all problems at once
            handler({key: part for key, part in value.items() if key in known})
        except ValidationError as error:
            problems += [_problem(item["loc"], item["msg"], item["input"]) for item in error.errors()]
        raise ValidationError.from_exception_data(cls.__name__, problems)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).model_validate({**self.model_dump(), **changes})


def choice(default: str | None, known: tuple[str, ...], what: str) -> Discriminator:
    """Tells the models of a union apart by ``name``; without one it is ``default``, or an error where that is None."""

    def name_of(value: Any) -> Any:
        return value.get("name", default) if isinstance(value, dict) else getattr(value, "name", None)

    return Discriminator(
        name_of,
        custom_error_type="unknown_name",
        custom_error_message=f"write {{name: …}} with the {what}'s name, one of {', '.join(known)}",
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys silently; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`: keys beside it take precedence, that is its use
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a scalar", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _keys(place: tuple[int | str, ...], value: Any) -> list[int | str]:
    """The path as the file has it: pydantic also names which of several models was chosen (``objective.jsd.beta``)."""
    keys: list[int | str] = []
    for depth, part in enumerate(place):
        is_last = depth + 1 == len(place)
        if isinstance(value, dict) and part not in value and (not is_last or part == value.get("name")):
            continue
        keys.append(part)
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
    return keys


def parse_config(model: type[ConfigT], value: Any, *, source: str) -> ConfigT:
    """Validate ``value``.

    Raises:
        ConfigError: one line per problem, each with the path of the key; ``field`` is the first path.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            path = ".".join(str(part) for part in _keys(item["loc"], value)) or "(top level)"
            message = item["msg"].removeprefix("Value error, ")
            problems.append((path, message))
        text = "\n".join(f"  {path}: {message}" for path, message in problems)
        raise ConfigError(f"{source} is not valid:\n{text}", field=problems[0][0]) from error


def load_config(model: type[ConfigT], path: Path | str) -> ConfigT:
    """Read and validate a YAML file. Raises :class:`ConfigError` with the file, line or key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}", field="path") from error
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping at the top level, found {type(value).__name__}")
    return parse_config(model, value, source=str(path))


def dump_config(config: BaseModel, path: Path) -> None:
    """Write a configuration as YAML that :func:`load_config` reads back."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
