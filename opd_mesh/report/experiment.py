"""The measured table of an experiment for the documentation: ``docs/NAME.json`` of the pipeline's name, and its part of
``docs/experiment.md``, between two marks.

    python -m opd_mesh.report.experiment RUN_DIR --docs docs --command "make experiment"
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from opd_mesh.config.pipeline import NAME
from opd_mesh.errors import OpdError, PreconditionError
from opd_mesh.pipeline.statistics import ExperimentSummary, summarize
from opd_mesh.report import tables
from opd_mesh.report.page import write
from opd_mesh.report.pipeline import results_json
from opd_mesh.report.words import format_count, format_duration

PAGE = "experiment.md"


def marks_of(name: str) -> tuple[str, str]:
    """What stands before and behind the part of an experiment."""
    return f"<!-- {name}: what is between these marks is generated -->", f"<!-- {name}: end -->"


def experiment_markdown(summary: ExperimentSummary, command: str) -> str:
    """Tables in Markdown: accuracies, recovered gain, paired differences, specialists, sweeps, cost."""
    seeds = len(summary.seeds)
    columns = [*summary.domains, "mean"]
    experts = tables.experts_row(summary)
    parts = [
        f"Made by `{command}`: {seeds} seed{'s' if seeds != 1 else ''} ({', '.join(map(str, summary.seeds))}). "
        + tables.verdict(summary)[0],
        "**Accuracy**, % of held-out prompts, the mean over seeds with its 95% interval (seeds and prompts resampled). "
        "Bold: the best student of a column; underlined: an expert on its own domain.",
        _table(["model", *columns], [*tables.accuracy_rows(summary), *([experts] if experts else [])]),
    ]
    if recovered := tables.recovered_rows(summary):
        parts += [
            "**Recovered gain**, % of what the domain's expert gained over the base.",
            _table(["student", *columns], recovered),
        ]
    if paired := tables.paired_rows(summary):
        parts += [
            "**Paired differences**, percentage points on the same prompts under the same seeds.",
            _table(["difference", *columns], paired),
        ]
    phases, rows = tables.phase_rows(summary)
    if rows:
        parts += [
            "**Specialists**, % of validation prompts of their own domain, the mean over seeds.",
            _table(["specialist", *phases], rows),
        ]
    if summary.chosen:
        parts += ["**Sweeps**, by mean validation accuracy on the first seed.", _sweeps(summary)]
    if summary.cost:
        cost = [
            [
                name,
                format_count(one.get("steps")),
                format_count(one.get("tokens_trained")),
                format_duration(one.get("seconds")),
            ]
            for name, one in summary.cost.items()
        ]
        parts += [
            "**Cost** of a stage's own training, the mean over seeds, without its sweep.",
            _lines(["stage", "steps", "tokens trained", "time"], cost),
        ]
    if summary.wall_s is not None and summary.job_seconds is not None:
        parts.append(
            f"All jobs together, sweeps and answers included, took {format_duration(summary.job_seconds)}; on the "
            f"clock it was {format_duration(summary.wall_s)}."
        )
    parts += [f"- {_escaped(note)}" for note in summary.notes]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Sequence[tables.Row]) -> str:
    return _lines(
        columns,
        [[f"{row.name} ({row.kind})" if row.kind else row.name, *(_cell(cell) for cell in row.cells)] for row in rows],
        escape=1,
    )


def _cell(cell: tables.Cell) -> str:
    value = f"**{cell.value}**" if cell.best else f"<u>{cell.value}</u>" if cell.own else cell.value
    return f"{value} ({cell.interval})" if cell.interval else value


def _sweeps(summary: ExperimentSummary) -> str:
    rows = []
    for stage, choice in summary.chosen.items():
        for number, option in enumerate(choice.get("options") or []):
            values = ", ".join(f"{key} = {value}" for key, value in option["values"].items())
            chosen = "yes" if number == choice.get("option") else ""
            rows.append([stage, values, f"{100 * option['accuracy']:.1f}", chosen])
    return _lines(["stage", "values", "%", "chosen"], rows)


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]], *, escape: int | None = None) -> str:
    """``escape``: how many cells of a row are names; all where it is not given."""
    lines = [[_escaped(column) for column in columns], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [
        [_escaped(text) if escape is None or at < escape else text for at, text in enumerate(row)] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    for character in ("\\", "|", "*", "_", "`", "<"):
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def update_docs(summary: ExperimentSummary, docs: Path, command: str) -> list[Path]:
    """Write both files; of experiment.md what is outside the experiment's marks stays.

    Raises:
        PreconditionError: experiment.md has no marks of this experiment, so that nobody knows what may be replaced; or
            a name that no pipeline's recipe would have.
    """
    if re.fullmatch(NAME, summary.name) is None:
        raise PreconditionError(f"{summary.name!r} cannot name a file; mend the recipe's pipeline.name", field="name")
    page, data = docs / PAGE, docs / f"{summary.name}.json"
    begin, end = marks_of(summary.name)
    text = page.read_text(encoding="utf-8") if page.exists() else f"# The experiment\n\n{begin}\n{end}\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise PreconditionError(
            f"{page} must hold each of these two lines once, in this order, around the part to be replaced: "
            f"{begin} and {end}",
            field="docs",
        )
    before, after = text.partition(begin)[0], text.partition(end)[2]
    docs.mkdir(parents=True, exist_ok=True)
    write(data, results_json(summary, command))
    write(page, f"{before}{begin}\n\n{experiment_markdown(summary, command)}\n{end}{after}")
    return [page, data]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one clear message."""
    parser = argparse.ArgumentParser(prog="python -m opd_mesh.report.experiment", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a finished pipeline")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where experiment.md and the JSON go")
    parser.add_argument("--command", required=True, help="what to run to make it again, for the reader")
    given = parser.parse_args(arguments)
    try:
        for path in update_docs(summarize(given.run_dir), given.docs, given.command):
            print(path)
    except OpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
