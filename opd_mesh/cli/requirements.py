"""What the installed opd-mesh asks for, read from its own metadata, and how to install the rest.

No `packaging` here: the base installation does not bring it, and a machine where something is missing is the very one
to be examined.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "opd-mesh"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One line of a distribution's requirements, as far as a person asks."""

    name: str
    specifiers: str  # "<2.14,>=2.13"
    extra: str  # "" for what is always needed

    @classmethod
    def parse(cls, line: str) -> Requirement:
        """``torch<2.14,>=2.13; extra == 'model'`` → its parts."""
        head, _, marker = line.partition(";")
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*])?\s*\(?([^)]*)\)?\s*$", head)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if match is None:
            raise ValueError(f"unreadable requirement {line!r}")
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        return cls(name, match[2].replace(" ", ""), extra[1] if extra else "")


def satisfies(version: str, specifiers: str) -> bool:
    """Whether a version is inside ``>=a,<b``. Numbers alone are compared: ``2.13.0+cpu`` is 2.13, 3.0rc1 is 3.0."""

    def numbers(text: str) -> list[int]:
        release = re.match(r"\d+(?:\.\d+)*", text.split("+")[0])
        parts = [int(part) for part in release[0].split(".")] if release else []
        while parts and parts[-1] == 0:
            parts.pop()
        return parts

    have = numbers(version)
    for specifier in filter(None, specifiers.split(",")):
        match = re.match(r"(>=|<=|==|!=|~=|>|<)(.+)$", specifier)
        if match is None:
            raise ValueError(f"unreadable version range {specifiers!r}")
        operator, text = match.groups()
        bound = numbers(text)
        series = [int(part) for part in re.findall(r"\d+", text)][:-1]
        holds = {
            ">=": have >= bound,
            "<=": have <= bound,
            "==": have == bound,
            "!=": have != bound,
            ">": have > bound,
            "<": have < bound,
            "~=": have >= bound and have[: len(series)] == series,
        }
        if not holds[operator]:
            return False
    return True


def requirements() -> list[Requirement]:
    """Of the installed opd-mesh, all extras."""
    return [Requirement.parse(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]


def install_command(extra: str) -> str:
    """How to install an extra of this very installation: from its source tree where it is one."""
    target = DISTRIBUTION
    text = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    origin = json.loads(text) if text else {}
    editable = bool(origin.get("dir_info", {}).get("editable"))
    if str(origin.get("url", "")).startswith("file://"):
        target = unquote(urlsplit(origin["url"]).path)
    extras = f"[{extra}]" if extra else ""
    return f"{sys.executable} -m pip install {'-e ' if editable else ''}'{target}{extras}'"


def version_of(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
