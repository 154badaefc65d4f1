"""Rubrics: what an answer is judged by. YAML, validated on load, addressed by digest."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from opd_mesh.config.base import Strict, load_config
from opd_mesh.errors import ConfigError

MAX_POINTS = 101  # of a scale
CHOICES = ("A", "B", "tie")  # of a pair's judge
ROUNDING = 1e-9
NUMBER = re.compile(r"[+-]?[0-9]{1,12}(\.[0-9]{1,12})?")  # a score in a verdict
_DECIMALS = 12


def as_text(score: float) -> str:
    """A point of a scale as a verdict has it: no needless digits."""
    return f"{score:.10g}"


def weighted_mean(weights: Sequence[float], values: Sequence[float]) -> float:
    """Between the least and the greatest of the values: rounding does not lead beyond them."""
    mean = math.fsum(map(operator.mul, weights, values)) / math.fsum(weights)
    return min(max(mean, min(values)), max(values))


class Scale(Strict):
    """Scores from ``min`` to ``max`` in steps, the best last."""

    min: float = Field(1.0, allow_inf_nan=False)
    max: float = Field(5.0, allow_inf_nan=False)
    step: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _has_points(self) -> Self:
        if self.max <= self.min:
            raise ValueError(f"max: {self.max:g} is not above min, {self.min:g}")
        steps = (self.max - self.min) / self.step
        if abs(steps - round(steps)) > ROUNDING:
            raise ValueError(f"step: {self.step:g} does not lead from {self.min:g} to {self.max:g}")
        if steps + 1 > MAX_POINTS + ROUNDING:
            raise ValueError(f"step: {steps + 1:.0f} points are too many to be told apart; at most {MAX_POINTS}")
        for index, point in enumerate(self.points):
            text = as_text(point)
            is_itself = NUMBER.fullmatch(text) is not None and self.nearest(float(text)) == point
            if not is_itself or self.points.index(point) < index:
                raise ValueError(
                    f"step: the point {point!r} cannot be written as a plain number of at most 10 digits; take a scale "
                    "such as 0 to 10 by 1, overall scores are in [0, 1] whatever it is"
                )
        return self

    @property
    def points(self) -> list[float]:
        """Lowest first."""
        count = round((self.max - self.min) / self.step) + 1
        # Rounded, so that -0.3 + 3 · 0.1 is 0, and not -0 either.
        return [round(self.min + index * self.step, _DECIMALS) + 0.0 for index in range(count)]

    def nearest(self, score: float) -> float | None:
        """The point that a number is, or None."""
        if not math.isfinite(score):
            return None
        return next((point for point in self.points if abs(point - score) <= ROUNDING * self.step), None)

    def share(self, score: float) -> float:
        """Where a score stands between the lowest (0) and the best (1)."""
        return min(max((score - self.min) / (self.max - self.min), 0.0), 1.0)


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise ValueError("must be one line: write it folded (>-) in YAML")
    return text


class Criterion(Strict):
    """One thing that is judged, on its own scale."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    description: Annotated[str, AfterValidator(_one_line)] = ""
    scale: Scale = Scale()
    # What points of the scale mean.
    anchors: dict[float, Annotated[str, AfterValidator(_one_line)]] = Field(default_factory=dict)
    # The overall score is the weighted mean over criteria.
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    # At the lowest point of the scale the overall score is 0, whatever the others say.
    hard_requirement: bool = False

    @model_validator(mode="after")
    def _anchors_are_points(self) -> Self:
        for point in self.anchors:
            if self.scale.nearest(point) is None:
                known = ", ".join(map(as_text, self.scale.points[:6])) + (", …" if len(self.scale.points) > 6 else "")
                raise ValueError(f"anchors: {point:g} is no point of the scale ({known})")
        return self


class Rubric(Strict):
    """What is judged, on which scales, and how the judge is asked and answers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    version: str = Field("1", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")
    description: str = ""
    criteria: list[Criterion] = Field(min_length=1, max_length=16)
    # "brief": one line before every score, of at most `max_reason_chars`; "none": scores alone.
    reasons: Literal["brief", "none"] = "brief"
    max_reason_chars: int = Field(300, ge=1, le=4000)
    # "lines": `name: reason | score`, a line for each criterion; "score": of a lone criterion, the score alone.
    form: Literal["lines", "score"] = "lines"
    # Jinja of `prompt`, `answer`, `reference` (may be empty) and, for pairs, `answers`; unset: the text that is built
    # in (opd_mesh.judging.prompt), with the answers between marks that they cannot contain.
    template: str | None = None
    pairwise_template: str | None = None

    @field_validator("criteria")
    @classmethod
    def _names_differ(cls, criteria: list[Criterion]) -> list[Criterion]:
        names = [criterion.name for criterion in criteria]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} stands there more than once")
        if not any(criterion.weight for criterion in criteria):
            raise ValueError("all weights are 0, so there is no overall score")
        return criteria

    @model_validator(mode="after")
    def _form_fits(self) -> Self:
        if self.form == "score" and (len(self.criteria) > 1 or self.reasons != "none"):
            raise ValueError(
                "form: a score alone is of one criterion without a reason; set reasons to none and keep one criterion, "
                "or take lines"
            )
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over its canonical JSON: two rubrics of one digest are the same."""
        value = self.model_dump(mode="json")
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def overall(self, scores: dict[str, float]) -> float:
        """In [0, 1]: the weighted mean of the criteria's shares, 0 where a hard requirement is at its lowest.

        Args:
            scores: a point of the scale, or a mean of points, for every criterion.
        """
        shares = [criterion.scale.share(scores[criterion.name]) for criterion in self.criteria]
        if any(one.hard_requirement and share <= ROUNDING for one, share in zip(self.criteria, shares, strict=True)):
            return 0.0
        return weighted_mean([criterion.weight for criterion in self.criteria], shares)


def load_rubric(path: Path | str) -> Rubric:
    """Read one. Raises :class:`ConfigError` with file and key."""
    return load_config(Rubric, path)


class RubricLibrary:
    """Rubrics by ``name`` (the newest version that was given last in order of names) or ``name@version``.

    Raises:
        ConfigError: a file that is not a rubric, or two rubrics of one name and version that differ.
    """

    def __init__(self, rubrics: list[Rubric]) -> None:
        self._known: dict[str, Rubric] = {}
        for rubric in sorted(rubrics, key=lambda one: (one.name, _version_key(one.version))):
            key = f"{rubric.name}@{rubric.version}"
            if key in self._known and self._known[key].digest != rubric.digest:
                raise ConfigError(f"two rubrics are called {key} and differ; give one another version", field="rubrics")
            self._known[key] = rubric
            self._known[rubric.name] = rubric

    @classmethod
    def of_folder(cls, folder: Path) -> RubricLibrary:
        """Every ``*.yaml`` in a folder."""
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder of rubrics", field="rubrics")
        return cls([load_rubric(path) for path in sorted(folder.glob("*.yaml"))])

    @property
    def names(self) -> list[str]:
        """With their versions."""
        return [key for key in self._known if "@" in key]

    def get(self, name: str) -> Rubric | None:
        """By name, or name@version; None where it is not here."""
        return self._known.get(name)


def _version_key(version: str) -> list[tuple[int, Any]]:
    """1.10 comes after 1.9."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in version.split(".")]
