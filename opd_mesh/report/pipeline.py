"""``report.html`` of a pipeline: what its models can do, what students have of the experts' skills, and the cost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from opd_mesh.errors import NotFoundError, PreconditionError
from opd_mesh.pipeline.statistics import RECIPE, RESULTS, ExperimentSummary, SystemSummary, summarize
from opd_mesh.report import tables
from opd_mesh.report.data import mapping, read_run
from opd_mesh.report.page import flat, missing_package, render, sections, write
from opd_mesh.report.runs import TrainingRun, training_runs
from opd_mesh.report.words import format_count, format_duration

EXPERT, MIXED = "expert on its own domain", "mixed training"
# Kind → colour of the palette; None is the neutral ink.
COLOURS = {"base": None, EXPERT: 6, "OPD": 0, "soup": 1, MIXED: 2, "cold start": 5}
MAX_JUDGING_FIGURES = 12
OVER_ALL = "Mean over domains"
# Status of the results → (in words, tone); whatever else was there may have been killed since.
_STATUS = {"finished": ("finished", "ok"), "failed": ("failed", "bad"), "stopped": ("stopped", "busy")}


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a pipeline's, and not a single run's."""
    return (folder / RECIPE).is_file() or (folder / RESULTS).is_file()


def build_pipeline_report(folder: Path) -> Path:
    """Write ``FOLDER/report.html`` (replacing it atomically) from what the pipeline has left so far; returns its path.

    Raises:
        NotFoundError: neither results nor a training run are there.
        PreconditionError: matplotlib or Jinja is not installed.
    """
    notes: list[str] = []
    recipe = _recipe(folder / RECIPE, notes)
    summary = _summary(folder, notes)
    runs = training_runs(folder)
    if summary is None and not runs and not recipe:
        raise NotFoundError(f"{folder} holds no training run and no results to report on", field="run_dir")
    status = _STATUS.get(summary.status if summary else "", ("in progress, or interrupted", "busy"))
    evaluated = summary is not None and bool(summary.systems)
    section = mapping(recipe.get("pipeline"))
    phases, phase_rows = tables.phase_rows(summary) if summary else ([], [])
    text = render(
        "pipeline.html.j2",
        name=summary.name if summary else str(section.get("name") or folder.resolve().name),
        status=status,
        verdict=tables.verdict(summary) if summary is not None and evaluated else (_progress(runs), "flat"),
        tiles=_tiles(summary, runs, section),
        stages=_stages(recipe),
        warnings=[(run, text) for run in runs for text in run.warnings],
        notes=[*notes, *(summary.notes if summary else ())],
        domains=list(summary.domains) if summary else [],
        accuracies=tables.accuracy_rows(summary) if summary else [],
        experts=tables.experts_row(summary) if summary else None,
        recovered=tables.recovered_rows(summary) if summary else [],
        paired=tables.paired_rows(summary) if summary else [],
        seeds=len(summary.seeds) if summary else 0,
        ungraded=_counted(summary) if summary else [],
        figures=_figures(summary) if summary else [],
        figure_keys=_keys(summary) if summary else [],
        phases=[{"before": "before", "sft": "after SFT", "grpo": "after GRPO"}.get(phase, phase) for phase in phases],
        phase_rows=phase_rows,
        choices=_choices(summary) if summary else [],
        cost=_cost(summary) if summary else [],
        judging=_judging(folder, runs),
        judges=tables.judge_rows(summary) if summary else [],
        judge_columns=tables.JUDGE_COLUMNS,
        probes=tables.probe_rows(summary) if summary else [],
        probe_columns=tables.PROBE_COLUMNS,
        run_rows=[(run, _validation(run)) for run in runs],
        commands=_commands(folder),
        settings=[(key, flat(value)) for key, value in sections(recipe)],
        run_dir=str(folder.resolve()),
    )
    return write(folder / "report.html", text)


# --- what is there -----------------------------------------------------------------------------------------------
def _summary(folder: Path, notes: list[str]) -> ExperimentSummary | None:
    try:
        return summarize(folder)
    except NotFoundError:
        return None
    except (PreconditionError, KeyError, TypeError, AttributeError, ValueError) as error:
        notes.append(f"{RESULTS} cannot be read and was left out: {error}")
        return None


def _recipe(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return mapping(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read ({' '.join(str(error).split())}) and was left out.")
        return {}


def _stages(recipe: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, kind, what it is made from) for the header."""
    told = []
    for name, stage in mapping(recipe.get("stages")).items():
        values = mapping(stage)
        teachers = [*mapping(values.get("teachers"))]
        sources = [values.get("from"), *(values.get("of") or [])]
        words = ", ".join(str(source) for source in sources if source)
        taught = ", ".join(teachers or [*mapping(values.get("domains"))])
        told.append((name, str(values.get("kind", "")).replace("_", " "), " · ".join(filter(None, (words, taught)))))
    return told


def _progress(runs: Sequence[TrainingRun]) -> str:
    if not runs:
        return "Nothing has been trained yet."
    done = sum(run.status in ("done", "finished") for run in runs)
    return f"{done} of the {len(runs)} training runs that were begun are finished; no model has been evaluated yet."


# --- figures -----------------------------------------------------------------------------------------------------
def _group(summary: ExperimentSummary, system: SystemSummary, domain: str | None) -> tuple[str, bool]:
    """(kind in the legend, whether it is an expert elsewhere)."""
    taught = [one for one, expert in summary.roles.experts.items() if expert == system.name]
    if taught:
        return EXPERT, domain not in taught
    if system.name == summary.roles.base:
        return "base", False
    kind = tables.kind_of(summary, system)
    return {"mixed": MIXED, "start": "base"}.get(kind, kind), False


def _keys(summary: ExperimentSummary) -> list[Any]:
    from opd_mesh.report.figures import Key, css_colour

    groups = dict.fromkeys(_group(summary, system, None)[0] for system in summary.systems.values())
    return [Key(group, css_colour(COLOURS.get(group, 7))) for group in groups]


def _figures(summary: ExperimentSummary) -> list[Any]:
    """The grouped plot: a panel for the mean and one for each domain, all to one scale."""
    try:
        from markupsafe import Markup

        from opd_mesh.report.dots import Dot, draw_dots
        from opd_mesh.report.figures import FigureCard
    except ImportError as error:
        raise missing_package(error) from error
    cards = []
    for number, domain in enumerate([None, *summary.domains]):
        dots = []
        for name, system in summary.systems.items():
            estimate = system.mean if domain is None else system.domains.get(domain)
            if estimate is None:
                continue
            group, elsewhere = _group(summary, system, domain)
            low, high = (None if end is None else 100 * end for end in (estimate.low, estimate.high))
            dots.append(Dot(name, 100 * estimate.mean, low, high, COLOURS.get(group, 7), hollow=elsewhere))
        if not dots:
            continue
        title = OVER_ALL if domain is None else domain
        svg = draw_dots(f"dots{number}", dots, f"Accuracy of every model: {title}", marks=_marks(summary, domain))
        cards.append(FigureCard(title, "", Markup(svg)))  # the markup is our own; texts are escaped in draw_dots()
    return cards


def _judging(folder: Path, runs: Sequence[TrainingRun]) -> list[Any]:
    """Of runs that learn to judge, the newest: how right their answers and verdicts became."""
    judged = [(run, read_run(folder / run.folder)) for run in runs if run.judges][-MAX_JUDGING_FIGURES:]
    if not judged:
        return []
    try:
        from opd_mesh.report.figures import judging_figure
    except ImportError as error:
        raise missing_package(error) from error
    cards = [
        judging_figure(data, number, run.name if run.seed is None else f"{run.name}, seed {run.seed}")
        for number, (run, data) in enumerate(judged)
    ]
    return [card for card in cards if card is not None]


def _marks(summary: ExperimentSummary, domain: str | None) -> list[float]:
    """Where the base is and where the experts are: between the two lies the gain."""
    base = summary.systems.get(summary.roles.base or "")
    expert = summary.systems.get(summary.roles.experts.get(domain or "", ""))
    if domain is None:
        found = [base.mean if base else None, summary.experts_mean]
    else:
        found = [system.domains.get(domain) if system else None for system in (base, expert)]
    return [100 * estimate.mean for estimate in found if estimate is not None]


# --- tables ------------------------------------------------------------------------------------------------------
def _tiles(summary: ExperimentSummary | None, runs: Sequence[TrainingRun], section: dict[str, Any]) -> list[Any]:
    """(what, figure, remark)"""
    seeds = summary.seeds if summary else section.get("seeds") or []
    seconds = [run.seconds for run in runs if run.seconds is not None]
    tokens = [run.tokens for run in runs if run.tokens is not None]
    tiles = [
        ("Seeds", str(len(seeds)) if seeds else "—", ", ".join(str(seed) for seed in seeds)),
        ("Models compared", str(len(summary.systems)) if summary else "—", ""),
        ("Training runs", str(len(runs)) if runs else "—", "in this folder, sweeps included"),
        ("Steps", format_count(sum(run.steps for run in runs)) if runs else "—", "of all runs"),
        ("Tokens trained", format_count(sum(tokens)) if tokens else "—", "of all runs"),
        ("Training time", format_duration(sum(seconds)) if seconds else "—", "of all runs, added up"),
        ("Time of all jobs", format_duration(summary.job_seconds if summary else None), "sweeps and answers included"),
        ("Time on the clock", format_duration(summary.wall_s if summary else None), "of all calls of opd run"),
    ]
    return [tile for tile in tiles if tile[1] != "—"]


def _counted(summary: ExperimentSummary) -> list[str]:
    """What was not graded or not parsed, by system; nothing where all was."""
    told = []
    for name, system in summary.systems.items():
        lost = {
            key: sum(counts[key] for counts in system.counts.values()) for key in ("answers", "ungraded", "unparsed")
        }
        if lost["ungraded"] or lost["unparsed"]:
            told.append(
                f"{name}: of {lost['answers']:,} answers {lost['ungraded']:,} could not be graded (left out), and "
                f"{lost['unparsed']:,} held no answer that could be read (wrong)"
            )
    return told


def _choices(summary: ExperimentSummary) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Stage → (values, validation accuracy, whether it was chosen) of each option of its sweep."""
    told = []
    for stage, choice in summary.chosen.items():
        rows = []
        for number, option in enumerate(choice.get("options") or []):
            values = ", ".join(f"{key} = {value}" for key, value in mapping(option.get("values")).items())
            rows.append((values, f"{100 * option['accuracy']:.1f} %", number == choice.get("option")))
        told.append((stage, rows))
    return told


def _cost(summary: ExperimentSummary) -> list[tuple[str, str, str, str]]:
    """(stage, steps, tokens trained, time)"""
    return [
        (
            name,
            format_count(cost.get("steps")),
            format_count(cost.get("tokens_trained")),
            format_duration(cost.get("seconds")),
        )
        for name, cost in summary.cost.items()
    ]


def _validation(run: TrainingRun) -> str:
    own = {domain: value for domain, value in run.accuracies.items() if domain in run.trained} or run.accuracies
    return ", ".join(f"{domain} {100 * value:.0f} %" for domain, value in own.items())


def _commands(folder: Path) -> list[tuple[str, str]]:
    """(what it does, command)"""
    there = folder.resolve()
    recipe = shlex.quote(str(there / RECIPE))
    return [
        ("Do it again in a folder of its own", f"opd run {recipe} --run-dir NEW_FOLDER"),
        ("Go on here; what is done is kept", f"opd run --resume {shlex.quote(str(there))}"),
        ("Write this page again", f"opd report {shlex.quote(str(there))}"),
    ]


def results_json(summary: ExperimentSummary, command: str) -> str:
    """The text of an experiment's JSON."""
    return json.dumps(summary.to_json(command), indent=1, ensure_ascii=False) + "\n"
