"""Verifiers of one's own, in a module that imports nothing: the grader's process opens it anew for every run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def share_of_a(answer: str, item: Mapping[str, Any]) -> float:
    """Of the answer's letters."""
    return answer.count("a") / max(1, len(answer))


def share_of_a_or_raise(answer: str, item: Mapping[str, Any]) -> float:
    """Raises over digits, and over everything once the file exists that the item names."""
    if Path(item["metadata"]["marker"]).exists():
        raise RuntimeError("the verifier's own data are gone")
    if any(character.isdigit() for character in answer):
        raise ValueError("a digit")
    return share_of_a(answer, item)
