"""``opd run``: of one run, or of a pipeline."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from opd_mesh.config.base import dump_config, load_config
from opd_mesh.config.paths import resolve_paths
from opd_mesh.config.pipeline import PipelineRecipe, load_recipe
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError, OpdError
from opd_mesh.pipeline.run import RECIPE as PIPELINE_RECIPE
from opd_mesh.pipeline.run import PipelineRun, resolve_pipeline_paths
from opd_mesh.progress import ProgressView
from opd_mesh.supervisor import run_local


def start_run(recipe: Path, run_dir: Path | None, *, plan: bool) -> int:
    """Run a recipe; returns the exit code. Raises :class:`ConfigError` before anything runs."""
    given = load_recipe(recipe)
    if isinstance(given, PipelineRecipe):
        pipeline = resolve_pipeline_paths(given)
        return _run_pipeline(pipeline, run_dir or _new_folder(pipeline.pipeline.name), plan=plan)
    _refuse_plan(plan)
    loaded = resolve_paths(given)
    folder = run_dir or _new_folder(loaded.run.name)
    _refuse_other(folder, PIPELINE_RECIPE, "a pipeline")
    if (folder / "recipe.yaml").exists():
        raise ConfigError(f"{folder} holds a run already: continue it with --resume {folder}", field="run_dir")
    folder.mkdir(parents=True, exist_ok=True)
    dump_config(loaded, folder / "recipe.yaml")
    return _run(loaded, folder, resume=False)


def resume_run(folder: Path, *, plan: bool) -> int:
    """Go on with what a folder holds; returns the exit code."""
    if (folder / PIPELINE_RECIPE).exists():
        return _run_pipeline(load_config(PipelineRecipe, folder / PIPELINE_RECIPE), folder, plan=plan)
    _refuse_plan(plan)
    return _run(load_config(Recipe, folder / "recipe.yaml"), folder, resume=True)


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _refuse_plan(plan: bool) -> None:
    if plan:
        raise ConfigError("--plan is for pipelines: recipes with `stages`", field="plan")


def _refuse_other(folder: Path, name: str, what: str) -> None:
    if (folder / name).exists():
        raise ConfigError(f"{folder} holds {what}: choose another --run-dir", field="run_dir")


def _run(recipe: Recipe, folder: Path, *, resume: bool) -> int:
    console = Console()
    learns = f"{recipe.student.path.name} learns" + (f" from {', '.join(recipe.teachers)}" if recipe.teachers else "")
    console.print(f"[bold]{recipe.run.name}[/]: {learns}")
    console.print(f"run directory: {folder}", highlight=False)
    with ProgressView(console, recipe.run.steps) as progress:
        code = asyncio.run(run_local(recipe, folder.resolve(), resume=resume, progress=progress))
    if (folder / "summary.json").exists():
        from opd_mesh.cli.summary import print_summary

        print_summary(console, folder)
    if code not in (0, 130):
        console.print(f"the run did not finish; continue it with: opd run --resume {folder}", highlight=False)
    return code


def _run_pipeline(pipeline: PipelineRecipe, folder: Path, *, plan: bool) -> int:
    _refuse_other(folder, "recipe.yaml", "a single run")
    console = Console()
    run = PipelineRun(pipeline, folder.resolve(), console)
    console.print(f"[bold]{pipeline.pipeline.name}[/]: {len(pipeline.stages)} stages, {len(run.plan.jobs)} jobs")
    run.print_plan()
    if plan:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"run directory: {folder}", highlight=False)
    code = asyncio.run(run.run())
    if code == 0:
        _report(console, folder)
    return code


def _report(console: Console, folder: Path) -> None:
    """Page and table; what is in their way does not undo what was done."""
    from opd_mesh.cli.summary import print_pipeline_summary
    from opd_mesh.report import build_report

    for show in (build_report, partial(print_pipeline_summary, console)):
        try:
            show(folder)
        except OpdError as error:
            console.print(f"no report: {error}", highlight=False, markup=False)
