"""What a pipeline came to, as rows of tables: the same for the page, the terminal and the document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_mesh.pipeline.statistics import ExperimentSummary, SystemSummary
from opd_mesh.report.bootstrap import Estimate

KINDS = {"base": "base", "model": "start", "cold_start": "cold start", "opd": "OPD", "soup": "soup"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A number with its interval, as text.

    Attributes:
        best: of the students in its column.
        own: an expert on the domain that it teaches.
        seeds: the seeds' own values, for who wants to know.
    """

    value: str = "—"
    interval: str = ""
    best: bool = False
    own: bool = False
    seeds: str = ""
    tone: str = "flat"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: what it is about, and a cell for each domain and, last, their mean."""

    name: str
    kind: str
    cells: list[Cell]
    student: bool = False


def kind_of(summary: ExperimentSummary, system: SystemSummary) -> str:
    """What a system is, in a word or two."""
    taught = [domain for domain, expert in summary.roles.experts.items() if expert == system.name]
    if taught:
        return f"expert of {', '.join(taught)}"
    if system.name in summary.roles.students and system.kind in ("specialist", "base"):
        return "mixed"
    return KINDS.get(system.kind, system.kind)


def _kind_beside(name: str, summary: ExperimentSummary) -> str:
    """Nothing where the name says it already."""
    kind = kind_of(summary, summary.systems[name])
    return "" if kind.lower() == name.lower() else kind


def percent(estimate: Estimate | None, digits: int = 1) -> tuple[str, str]:
    """0.843 → ("84.3", "82.1–86.4"); the second is empty where there is no interval."""
    if estimate is None:
        return "—", ""
    value = _number(estimate.mean, digits)
    if estimate.low is None or estimate.high is None:
        return value, ""
    low, high = _number(estimate.low, digits), _number(estimate.high, digits)
    return value, f"{low} to {high}" if "−" in low + high else f"{low}–{high}"


def _number(share: float, digits: int) -> str:
    """In percent, with a minus sign, and without one before what rounds to 0."""
    value = f"{100 * share:z.{digits}f}"
    return value.replace("-", "−")


def accuracy_rows(summary: ExperimentSummary) -> list[Row]:
    """Systems in the recipe's order."""
    best = {domain: summary.best(domain) for domain in [*summary.domains, None]}
    rows = []
    for name, system in summary.systems.items():
        cells = []
        for domain in summary.domains:
            own = summary.roles.experts.get(domain) == name
            seeds = system.seeds.get(domain, {})
            cells.append(_cell(system.domains.get(domain), seeds, best=name in best[domain], own=own))
        cells.append(_cell(system.mean, system.mean_seeds, best=name in best[None]))
        rows.append(Row(name, _kind_beside(name, summary), cells, name in summary.roles.students))
    return rows


def _cell(estimate: Estimate | None, seeds: Mapping[int, float], *, best: bool = False, own: bool = False) -> Cell:
    value, interval = percent(estimate)
    told = ", ".join(f"seed {seed}: {100 * accuracy:.1f}" for seed, accuracy in seeds.items())
    return Cell(value, interval, best, own, told)


def experts_row(summary: ExperimentSummary) -> Row | None:
    """Each expert on its own domain: what a student is to reach."""
    experts = summary.roles.experts
    if summary.experts_mean is None or set(experts) != set(summary.domains):
        return None
    own = [summary.systems[experts[domain]].domains.get(domain) for domain in summary.domains]
    return Row("each expert on its own", "", [Cell(*percent(one)) for one in [*own, summary.experts_mean]])


def recovered_rows(summary: ExperimentSummary) -> list[Row]:
    """Students' shares of the experts' gain, in percent."""
    rows = []
    for name, system in summary.systems.items():
        if system.recovered is not None:
            values = [system.recovered.get(domain) for domain in summary.domains]
            cells = [Cell(*percent(one, 0)) for one in [*values, system.mean_recovered]]
            rows.append(Row(name, _kind_beside(name, summary), cells, student=True))
    return rows


def paired_rows(summary: ExperimentSummary) -> list[Row]:
    """The headline student less each other, in percentage points; the tone tells on which side of 0 the interval is."""
    return [
        Row(
            f"{pair.a} − {pair.b}",
            _kind_beside(pair.b, summary),
            [_difference(pair.domains.get(domain)) for domain in summary.domains] + [_difference(pair.over_all)],
        )
        for pair in summary.paired
    ]


def _difference(estimate: Estimate | None) -> Cell:
    value, interval = percent(estimate)
    if estimate is None:
        return Cell()
    tone = "flat"
    if estimate.low is not None and estimate.high is not None:
        tone = "good" if estimate.low > 0 else "bad" if estimate.high < 0 else "flat"
    return Cell(_plus(value, estimate.mean), interval, tone=tone)


def phase_rows(summary: ExperimentSummary) -> tuple[list[str], list[Row]]:
    """(phases, specialists' validation accuracies on what they are trained for, mean over seeds)."""
    phases = list(dict.fromkeys(phase for told in summary.phases.values() for phase in told))
    order = ("before", "sft", "grpo", "training")
    phases.sort(key=lambda phase: order.index(phase) if phase in order else len(order))
    rows = []
    for name, told in summary.phases.items():
        domains = list(dict.fromkeys(domain for found in told.values() for domain in found))
        taught = [domain for domain, expert in summary.roles.experts.items() if expert == name]
        for domain in [domain for domain in domains if domain in taught] if taught else domains:
            cells = []
            for phase in phases:
                seeds = told.get(phase, {}).get(domain, {})
                mean = Estimate(sum(seeds.values()) / len(seeds)) if seeds else None
                cells.append(_cell(mean, {}) if mean is None else _phase_cell(mean, seeds))
            rows.append(Row(name, domain if domain != name else "", cells))
    return phases, rows


def _phase_cell(mean: Estimate, seeds: Mapping[str, float]) -> Cell:
    return Cell(percent(mean)[0], seeds=", ".join(f"seed {seed}: {100 * one:.1f}" for seed, one in seeds.items()))


JUDGE_COLUMNS = ("parsed", "agreement", "κ", "distance", "calibration error", "length bias", "first", "order decides")
PROBE_COLUMNS = ("parsed", "score", "raised")


def judge_rows(summary: ExperimentSummary) -> list[Row]:
    """Models as judges, one row for each judging domain that is no probe; columns are ``JUDGE_COLUMNS``."""
    rows = []
    for model, domain, lines in _judged(summary, probed=False):
        bias = [one["length_bias"] for one in lines]
        place = [one["position_bias"] for one in lines]
        gold = [one["agreement"] for one in lines]
        cells = [
            _parsed(lines),
            _mean_cell(gold, "exact", _share),
            _mean_cell(gold, "kappa", _decimal),
            _mean_cell(gold, "distance", _decimal),
            _mean_cell([one["calibration"] for one in lines], "error", _decimal),
            _mean_cell(bias, "partial", _signed),
            _mean_cell(place, "first", _signed_share),
            _mean_cell(place, "changes", _share),
        ]
        rows.append(Row(model, domain, cells))
    return rows


def probe_rows(summary: ExperimentSummary) -> list[Row]:
    """What probes did to judges, one row for each probing domain; columns are ``PROBE_COLUMNS``."""
    rows = []
    for model, domain, lines in _judged(summary, probed=True):
        probed = [one["probed"] for one in lines]
        cells = [_parsed(lines), _mean_cell(probed, "shift", _signed), _mean_cell(probed, "raised", _share)]
        rows.append(Row(model, f"{lines[0]['probe']} ({domain})", cells))
    return rows


def _judged(summary: ExperimentSummary, *, probed: bool) -> Iterator[tuple[str, str, Sequence[Mapping[str, Any]]]]:
    for model, domains in summary.judges.items():
        for domain, lines in domains.items():
            if lines and (lines[0].get("probe") is not None) == probed:
                yield model, domain, lines


def _parsed(lines: Sequence[Mapping[str, Any]]) -> Cell:
    asked = sum(one["asked"] for one in lines)
    return Cell(_share(sum(one["verdicts"] for one in lines) / asked)) if asked else Cell()


def _mean_cell(figures: Sequence[Mapping[str, Any] | None], key: str, told: Callable[[float], str]) -> Cell:
    """The mean over seeds of those that know it."""
    known = [one[key] for one in figures if one is not None and one[key] is not None]
    return Cell(told(sum(known) / len(known))) if known else Cell()


def _share(value: float) -> str:
    return f"{_number(value, 1)} %"


def _signed_share(value: float) -> str:
    return _plus(_share(value), value)


def _decimal(value: float) -> str:
    return f"{value:z.3f}".replace("-", "−")


def _signed(value: float) -> str:
    return _plus(_decimal(value), value)


def _plus(text: str, value: float) -> str:
    return f"+{text}" if value > 0 else text


def verdict(summary: ExperimentSummary) -> tuple[str, str]:
    """What came of it in a sentence, and its tone."""
    headline = summary.roles.headline
    if headline is None:
        return "No student is among the models that were evaluated.", "flat"
    student = summary.systems[headline]
    sentence, tone = "", "flat"
    known = {domain: value for domain, value in (student.recovered or {}).items() if value is not None}
    if student.mean_recovered is not None and known:
        weakest = min(known, key=lambda domain: known[domain].mean)
        sentence = (
            f"{headline} has {_told(student.mean_recovered)} of the experts' gain over the base in the mean, and "
            f"{100 * known[weakest].mean:.0f}\u00a0% in its weakest domain, {weakest}"
        )
        least = min(student.mean_recovered.mean, known[weakest].mean)
        tone = "good" if least >= 0.85 else "mixed" if student.mean_recovered.mean > 0.5 else "bad"
    elif student.mean is not None:
        sentence = f"{headline} answers {_told(student.mean)} right in the mean over domains"
    soup = next((pair for pair in summary.paired if summary.systems[pair.b].kind == "soup"), None)
    if sentence and soup is not None:
        points = percent(Estimate(abs(soup.over_all.mean)))[0]
        side = "ahead of" if soup.over_all.mean > 0 else "behind"
        beside = "as accurate as" if points == "0.0" else f"{points} points of accuracy {side}"
        sentence += f"; it is {beside} {soup.b}, the average of weights"
    return (f"{sentence}." if sentence else f"{headline} has not been evaluated on every domain."), tone


def _told(estimate: Estimate) -> str:
    value, interval = percent(estimate, 0)
    return f"{value}\u00a0% ({interval})" if interval else f"{value}\u00a0%"
