"""The last lines of `opd run`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_summary(console: Console, run_dir: Path) -> None:
    """Of one run: accuracy and held-out KL by domain, as far as measured, and where to look."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    for table in (_accuracies(run_dir), _divergences(summary)):
        if table is not None:
            console.print(table)
    console.print(f"{summary['status']} after {summary['steps']} steps, {summary['wall_s']:.0f} s", highlight=False)
    _print_places(console, run_dir, "student", "report.html")


def print_pipeline_summary(console: Console, folder: Path) -> None:
    """Of a pipeline: accuracies of all models, what the student has of the experts' gain, and where to look.

    Raises:
        NotFoundError: there are no results yet.
        PreconditionError: they cannot be read.
    """
    from opd_mesh.pipeline.statistics import summarize
    from opd_mesh.report import tables

    summary = summarize(folder)
    rows = tables.accuracy_rows(summary)
    if rows:
        shown = Table(title="right answers to held-out prompts, % (95% interval)", caption_justify="left")
        shown.add_column("model", overflow="fold")
        for domain in [*summary.domains, "mean"]:
            shown.add_column(escape(domain), justify="right")
        for row in rows:
            name = f"{escape(row.name)}\n[dim]{escape(row.kind)}[/]"
            shown.add_row(
                name, *(_cell(cell) for cell in row.cells), style="bold" if row.name in summary.best() else ""
            )
        experts = tables.experts_row(summary)
        if experts is not None:
            shown.add_section()
            shown.add_row(experts.name, *(_cell(cell) for cell in experts.cells))
        shown.caption = "green: best student; blue: expert on its domain"
        console.print(shown)
    for text in [tables.verdict(summary)[0], *summary.notes]:
        console.print(text, highlight=False, markup=False)
    _print_places(console, folder, "results.json", "report.html")


def _cell(cell: Any) -> str:
    colour = "green" if cell.best else "blue" if cell.own else ""
    value = f"[{colour}]{cell.value}[/]" if colour else cell.value
    return f"{value}\n[dim]{cell.interval}[/]" if cell.interval else value


def _accuracies(run_dir: Path) -> Table | None:
    """Before and after, in every domain that a verifier grades; None without an evaluation."""
    path = run_dir / "evaluations.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    lines = [line for line in lines if any(key.startswith("accuracy/") for key in line)]
    if not lines:
        return None
    first, last = lines[0], lines[-1]
    table = _table("right answers to held-out prompts, %")
    for key in [key for key in last if key.startswith("accuracy/")]:
        after = 100 * last[key]
        if len(lines) > 1 and key in first:
            before = 100 * first[key]
            table.add_row(
                escape(key.removeprefix("accuracy/")), f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}"
            )
        else:
            table.add_row(escape(key.removeprefix("accuracy/")), "—", f"{after:.1f}", "—")
    return table


def _divergences(summary: Mapping[str, Any]) -> Table | None:
    after = summary.get("heldout_kl_after")
    if not after:
        return None
    table = _table("held-out reverse KL to the domain's teacher (nats per token)")
    for domain, before in summary["heldout_kl_before"].items():
        if domain in after:
            change = after[domain] / before - 1 if before else 0.0
            table.add_row(escape(domain), f"{before:.3f}", f"{after[domain]:.3f}", f"{change:+.0%}")
    return table


def _table(title: str) -> Table:
    table = Table(title=title)
    for column in ("domain", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    return table


def _print_places(console: Console, folder: Path, *names: str) -> None:
    for name in names:
        if (folder / name).exists():
            console.print(f"{name}: {folder / name}", highlight=False, markup=False)
