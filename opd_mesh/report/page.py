"""What all pages share: the templates' environment, settings as rows, and a file that is replaced as a whole."""

from __future__ import annotations

import os
import re
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from opd_mesh.errors import PreconditionError
from opd_mesh.report.words import format_count, format_duration, format_kl
from opd_mesh.stream_redis import redacted_url

SECRET_KEY = re.compile(r"passw|secret|api_?key|credential|private_key", re.I)


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder.

    Raises:
        PreconditionError: Jinja is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing_package(error) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names and messages come from recipes and from other machines
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(kl=format_kl, count=format_count, duration=format_duration)
    written_at = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return environment.get_template(template).render(written_at=written_at, **values)


def missing_package(error: ImportError) -> PreconditionError:
    """What to do about it."""
    return PreconditionError(
        f"a report needs the package {error.name}: pip install 'opd-mesh[trainer]'", field="run_dir"
    )


def sections(recipe: dict[str, Any]) -> list[tuple[str, Any]]:
    """Top-level values together first, then one table per section."""
    plain = {key: value for key, value in recipe.items() if not isinstance(value, dict)}
    nested = [(key, value) for key, value in recipe.items() if isinstance(value, dict) and value]
    return ([("general", plain)] if plain else []) + nested


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested settings → (dotted key, text). Passwords do not reach the page: a report is made to be passed on."""
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in flat(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, dict):
        return [(path, "—")] if path else []
    if value is not None and SECRET_KEY.search(path.rsplit(".", 1)[-1]):
        return [(path, "***")]
    if isinstance(value, list | tuple):
        return [(path, ", ".join(_scalar(item) for item in value) or "—")]
    return [(path, _scalar(value))]


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "—"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {text}" for key, text in flat(value))
    text = str(value)
    return redacted_url(text) if "://" in text and not re.search(r"\s", text) else text


def write(path: Path, page: str) -> Path:
    """Whoever has the page open never sees half of one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".report-", suffix=".html")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
