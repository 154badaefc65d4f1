"""The training runs in a pipeline's folder, finished or not, as far as each tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opd_mesh.pipeline.store import DAMAGED
from opd_mesh.report.data import mapping, number, read_run

ARTEFACTS, ARTEFACT = "artefacts", "artefact.json"


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One of them.

    Attributes:
        link: of its own report, relative to the pipeline's folder; empty where there is none.
        accuracies: domain → on validation prompts, at the last evaluation.
        judges: whether verdicts are among the answers.
        status: "done", "in progress, or interrupted", or what the run said at its end.
    """

    name: str
    seed: int | None
    folder: str
    link: str
    status: str
    steps: int
    planned: int | None
    tokens: float | None
    seconds: float | None
    accuracies: Mapping[str, float]
    trained: frozenset[str]
    warnings: tuple[str, ...]
    judges: bool = False


def training_runs(pipeline_dir: Path) -> list[TrainingRun]:
    """In the order in which they were begun."""
    folders = [path.parent for path in (pipeline_dir / ARTEFACTS).glob("*/recipe.yaml")]
    folders = [folder for folder in folders if folder.suffix != DAMAGED]
    return [_run(pipeline_dir, folder) for folder in sorted(folders, key=_begun)]


def _begun(folder: Path) -> tuple[float, str]:
    first = folder / "run.json"
    return (first if first.exists() else folder / "recipe.yaml").stat().st_mtime, folder.name


def _run(pipeline_dir: Path, folder: Path) -> TrainingRun:
    run = read_run(folder)
    section = mapping(run.recipe.get("run"))
    planned, seed = number(section.get("steps")), number(section.get("seed"))
    status = str(run.summary.get("status") or "in progress, or interrupted")
    relative = folder.relative_to(pipeline_dir)
    has_report = (folder / "report.html").is_file()
    accuracies = {}
    for domain in run.evaluations.keys_under("accuracy/"):
        if series := run.evaluations.series(f"accuracy/{domain}"):
            accuracies[domain] = series.values[-1]
    shares = {name: number(mapping(domain).get("share")) for name, domain in mapping(run.recipe.get("domains")).items()}
    return TrainingRun(
        name=str(section.get("name") or folder.name.rpartition("-")[0] or folder.name),
        seed=None if seed is None else int(seed),
        folder=str(relative),
        link=quote(str(relative / "report.html")) if has_report else "",
        status="done" if (folder / ARTEFACT).exists() else status,
        steps=run.last_step,
        planned=None if planned is None else int(planned),
        tokens=number(run.summary.get("tokens_trained")) or sum(run.metrics.series("tokens").values) or None,
        seconds=number(run.summary.get("wall_s")),
        accuracies=accuracies,
        trained=frozenset(name for name, share in shares.items() if share != 0),
        warnings=tuple(_texts(run.summary.get("warnings"))),
        judges=bool(run.evaluations.keys_under("kappa/")),
    )


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
