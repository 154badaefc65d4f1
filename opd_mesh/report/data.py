"""What a run has left behind, read tolerantly: a run in progress, a cut last line and absent keys are normal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opd_mesh.errors import NotFoundError

# How loud a file's defects are: the first few by line, the rest as a number.
MAX_LISTED_DEFECTS = 3


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over optimizer steps: ``values[i]`` was written at ``steps[i]``; all finite, steps ascending."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True, slots=True)
class Log:
    """Lines of numbers, merged by step, ascending; a resumed run's rewound steps are replaced."""

    records: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str) -> Series:
        """The finite values of one metric; empty when it was never written."""
        steps, values = [], []
        for record in self.records:
            value = number(record.get(key))
            if value is not None:
                steps.append(record["step"])
                values.append(value)
        return Series(steps, values)

    def keys_under(self, prefix: str) -> list[str]:
        """What follows ``prefix`` in the metrics' names, in order of first appearance: teachers, phases, sets."""
        found: dict[str, None] = {}
        for record in self.records:
            found.update((key[len(prefix) :], None) for key in record if key.startswith(prefix) and key != prefix)
        return list(found)

    @property
    def last_step(self) -> int:
        return self.records[-1]["step"] if self.records else 0


@dataclass(slots=True)
class RunData:
    """The files of a run, parsed.

    Attributes:
        metrics: metrics.jsonl, a line per optimizer step.
        evaluations: evaluations.jsonl, a line per evaluation on held-out prompts; the first is of step 0.
        recipe: as resolved; empty when the file is absent.
        summary: empty while the run goes on.
        notes: what was wrong with the files, for the reader of the report.
    """

    run_dir: Path
    metrics: Log = field(default_factory=Log)
    evaluations: Log = field(default_factory=Log)
    recipe: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return max(self.metrics.last_step, self.evaluations.last_step)


def load_run(run_dir: Path) -> RunData:
    """Read ``recipe.yaml``, ``metrics.jsonl``, ``evaluations.jsonl`` and ``summary.json``.

    Raises:
        NotFoundError: no such folder, or nothing in it to show (no readable line of metrics or evaluations).
    """
    if not run_dir.is_dir():
        raise NotFoundError(f"there is no run directory {run_dir}", field="run_dir")
    run = read_run(run_dir)
    if not run.metrics.records and not run.evaluations.records:
        raise NotFoundError(
            f"{run_dir} holds no metrics to report on: metrics.jsonl (a line per optimizer step) and evaluations.jsonl "
            "(a line per evaluation) are absent or have no complete line",
            field="run_dir",
        )
    return run


def read_run(run_dir: Path) -> RunData:
    """The same, though there may be nothing yet."""
    run = RunData(run_dir)
    run.metrics = _read_log(run_dir / "metrics.jsonl", run.notes)
    run.evaluations = _read_log(run_dir / "evaluations.jsonl", run.notes)
    run.recipe = _read_mapping(run, run_dir / "recipe.yaml", yaml.safe_load)
    run.summary = _read_mapping(run, run_dir / "summary.json", json.loads, expected=False)
    return run


def number(value: Any) -> float | None:
    """``value`` as a finite float; None for anything else (NaN, infinity, text, true and false)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return as_float if math.isfinite(as_float) else None


def mapping(value: Any) -> dict[str, Any]:
    """``value`` where it is a mapping (with text keys), else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def median(values: Iterable[float]) -> float | None:
    """None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _read_log(path: Path, notes: list[str]) -> Log:
    if not path.is_file():
        return Log()
    by_step: dict[int, dict[str, Any]] = {}
    last = -1
    unreadable: list[int] = []
    not_finite: dict[str, list[int]] = {}
    # Line ends of the file format only: str.splitlines would also cut at U+2028 inside a string.
    lines = path.read_bytes().split(b"\n")
    for line_number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            record = json.loads(raw)
            step = record["step"]
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise ValueError("step")
        except (ValueError, KeyError, TypeError, RecursionError):
            # The last line without a line end is being written right now; that is no defect.
            if line_number < len(lines):
                unreadable.append(line_number)
            continue
        if step < last:  # resumed from a checkpoint: these steps were taken again
            by_step = {old: kept for old, kept in by_step.items() if old < step}
        last = step
        by_step.setdefault(step, {}).update(record)
    for step in sorted(by_step):
        for key, value in by_step[step].items():
            if isinstance(value, float) and not math.isfinite(value):
                not_finite.setdefault(key, []).append(step)
    if unreadable:
        notes.append(f"{path.name}: {_some('line', unreadable)} cannot be read and was left out.")
    for key, steps in not_finite.items():
        notes.append(f"{key} was not a finite number at {_some('step', steps)}; the plots show a gap there.")
    return Log([by_step[step] for step in sorted(by_step)])


def _read_mapping(run: RunData, path: Path, parse: Any, *, expected: bool = True) -> dict[str, Any]:
    if not path.is_file():
        if expected:
            run.notes.append(f"{path.name} is absent, so settings and names are missing from this page.")
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.notes.append(f"{path.name} cannot be read ({re.sub(chr(10), ' ', str(error))}) and was left out.")
        return {}
    if not isinstance(value, dict):
        run.notes.append(f"{path.name} does not hold a mapping and was left out.")
        return {}
    return mapping(value)


def _some(noun: str, numbers: list[int]) -> str:
    listed = ", ".join(str(item) for item in numbers[:MAX_LISTED_DEFECTS])
    more = len(numbers) - MAX_LISTED_DEFECTS
    return f"{noun}{'s' if len(numbers) > 1 else ''} {listed}" + (f" and {more} more" if more > 0 else "")
