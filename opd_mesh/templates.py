"""Templates of recipes and rubrics: Jinja in its sandbox, where a name that is not there is an error."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opd_mesh.errors import ConfigError


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    # The text is a model's input, not HTML; a trailing newline is part of it.
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)


class TextTemplate:
    """One template, compiled. Raises :class:`ConfigError` naming ``field``, now or when it is rendered."""

    def __init__(self, text: str, field: str) -> None:
        self._field = field
        try:
            self._template: Template = _environment().from_string(text)
        except TemplateError as error:
            raise ConfigError(f"{field}: not a template: {error}", field=field) from error

    def render(self, **values: Any) -> str:
        """The text."""
        try:
            return self._template.render(**values)
        except Exception as error:  # a template can raise whatever its filters and the values' methods raise
            known = ", ".join(values)
            raise ConfigError(
                f"{self._field}: cannot be rendered ({type(error).__name__}: {error}); it knows {known}",
                field=self._field,
            ) from error
