"""What became of the share of right answers in a run: rows of a table, and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_mesh.report.data import RunData, mapping, number

# Percentage points that are called a change: a few hundred prompts say no more.
NOTICEABLE_POINTS = 1.0


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """A domain's accuracy on held-out prompts, as shares, first and last evaluation.

    Attributes:
        trained: whether the run trains on it, or only looks at it.
        graded: answers of the last evaluation; ``unparsed`` of them gave no answer.
    """

    domain: str
    trained: bool
    before: float
    after: float | None
    graded: int | None
    unparsed: float | None

    @property
    def points(self) -> float | None:
        """The change, in percentage points."""
        return None if self.after is None else 100 * (self.after - self.before)

    @property
    def tone(self) -> str:
        """Rising is good; what is only looked at may fall, but that is told all the same."""
        if self.points is None or abs(self.points) < NOTICEABLE_POINTS:
            return "flat"
        return "good" if self.points > 0 else "bad"

    @property
    def change(self) -> str:
        """For instance ``+41 points``."""
        return "—" if self.points is None else f"{_signed(self.points)} points"


def accuracy_rows(run: RunData) -> list[AccuracyRow]:
    """Domains in the recipe's order, those that are trained on first."""
    domains = mapping(run.recipe.get("domains"))
    rows = []
    for name in dict.fromkeys([*domains, *run.evaluations.keys_under("accuracy/")]):
        series = run.evaluations.series(f"accuracy/{name}")
        if not series:
            continue
        graded = run.evaluations.series(f"graded/{name}").values
        unparsed = run.evaluations.series(f"unparsed/{name}").values
        rows.append(
            AccuracyRow(
                domain=name,
                trained=number(mapping(domains.get(name)).get("share")) != 0,
                before=series.values[0],
                after=series.values[-1] if len(series.values) > 1 else None,
                graded=int(graded[-1]) if graded else None,
                unparsed=unparsed[-1] if unparsed else None,
            )
        )
    return sorted(rows, key=lambda row: not row.trained)


def accuracy_verdict(rows: Sequence[AccuracyRow]) -> tuple[str, str] | None:
    """A sentence and its tone; None before a second evaluation."""
    trained = [row for row in rows if row.trained and row.after is not None]
    others = [row for row in rows if not row.trained and row.after is not None]
    if not trained and not others:
        return None
    text = "Right answers to held-out prompts: " + ", ".join(_told(row) for row in trained or others)
    if trained and others:
        changes = [row.points for row in others if row.points is not None]
        low, high = _signed(min(changes)), _signed(max(changes))
        text += f"; where it is not trained {low if low == high else f'{low} to {high}'} points"
    tones = {row.tone for row in trained or others}
    tone = "mixed" if {"good", "bad"} <= tones else "bad" if "bad" in tones else "good" if "good" in tones else "flat"
    return text + ".", tone


def _told(row: AccuracyRow) -> str:
    assert row.after is not None  # or it would not be told
    return f"{row.domain} {100 * row.before:.0f} → {100 * row.after:.0f}\u00a0%"


def _signed(points: float) -> str:
    return f"{points:+.0f}".replace("-", "−").replace("+0", "±0").replace("−0", "±0")
