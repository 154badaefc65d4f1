"""What a person sees of a pipeline: rows in a terminal, lines elsewhere."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator

import pytest
from opd.v1 import trainer_service_pb2
from rich.console import Console

from opd_mesh.pipeline import view as view_module
from opd_mesh.pipeline.view import JobView, PipelineView, accuracies_line
from opd_mesh.progress import told


def console_of(*, terminal: bool, height: int = 30) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, height=height, color_system=None)
    return console, text


def rendered(view: PipelineView) -> str:
    text = io.StringIO()
    Console(file=text, width=100, color_system=None).print(view._table())
    return text.getvalue()


class Events:
    """What a trainer tells."""

    def __init__(self, *events: trainer_service_pb2.WatchRunResponse) -> None:
        self._events = events

    async def wait_ready(self) -> None: ...

    async def watch_run(self) -> AsyncIterator[trainer_service_pb2.WatchRunResponse]:
        for event in self._events:
            yield event


def run_event(**fields: object) -> trainer_service_pb2.WatchRunResponse:
    return trainer_service_pb2.WatchRunResponse(run=trainer_service_pb2.Run(**fields))  # type: ignore[arg-type]


def test_a_step_is_told_with_what_it_measures() -> None:
    assert told({"loss": 0.5, "kl/math": 0.25, "kl/code": 0.125}) == "loss 0.5000  KL code 0.125  math 0.250"
    assert told({"loss": 0.5, "reward/add": 0.5, "score/add": 0.75}) == "loss 0.5000  reward add 0.500  score add 0.750"
    assert told({}) == ""
    assert accuracies_line({"add": 0.815, "sort": 0.4}) == "accuracy add 82%  sort 40%"
    assert accuracies_line({}) == ""


async def test_a_job_follows_its_run_to_the_end() -> None:
    console, text = console_of(terminal=False)
    job = JobView("seed0/add/sft", console)
    job.change("running")
    metrics = {"loss": 0.5, "reward/add": 0.5}
    step = trainer_service_pb2.WatchRunResponse(step=trainer_service_pb2.StepMetrics(step=3, metrics=metrics))
    failed = run_event(step=3, total_steps=9, state=trainer_service_pb2.RUN_STATE_FAILED, error="no more teachers")
    await job.follow(Events(run_event(step=0, total_steps=9, phase="reading prompts"), step, failed))  # type: ignore[arg-type]
    assert (job.step, job.total, job.error) == (3, 9, "no more teachers")
    job.change("failed")
    first, last = text.getvalue().splitlines()
    assert first.startswith("seed0/add/sft: running 0 s")
    assert last.startswith("seed0/add/sft: failed 3/9 0 s  loss 0.5000  reward add 0.500")


def test_a_terminal_gets_no_lines_but_a_row_for_every_job() -> None:
    console, text = console_of(terminal=True)
    view = PipelineView(console, ["seed0/base", "seed0/add/sft[optimizer.lr=0.1]", "seed0/opd"])
    view.jobs["seed0/base"].change("kept")
    running = view.jobs["seed0/add/sft[optimizer.lr=0.1]"]
    running.change("running")
    running.step, running.total, running.metrics = 4, 9, "loss 1.0"
    running.activity("writing 8 responses")
    assert text.getvalue() == ""
    title, _, *rows = rendered(view).splitlines()
    assert title.split(", ") == ["1 kept", "1 running", "1 waiting"] or "1 kept" in title
    assert [row.split()[:2] for row in rows if row.strip()] == [
        ["seed0/base", "kept"],
        ["seed0/add/sft[optimizer.lr=0.1]", "running"],
        ["seed0/opd", "waiting"],
    ]
    assert "4/9" in rows[1]
    assert "loss 1.0 · writing 8 responses" in rows[1]


def test_of_too_many_jobs_those_are_shown_that_run_and_their_neighbours() -> None:
    console, _ = console_of(terminal=True, height=12)
    view = PipelineView(console, [f"job{number:02d}" for number in range(60)])
    for number in range(30):
        view.jobs[f"job{number:02d}"].change("done")
    for number in (30, 31):
        view.jobs[f"job{number:02d}"].change("running")
    shown = [job.job_id for job in view._shown(8)]
    assert shown == [f"job{number}" for number in (27, 28, 29, 30, 31, 32, 33, 34)]
    for job in view.jobs.values():
        job.change("done")
    assert [job.job_id for job in view._shown(8)] == [f"job{number}" for number in range(52, 60)]


async def test_that_progress_is_no_longer_told_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "LINE_EVERY_S", 0.0)
    console, text = console_of(terminal=False)
    view = PipelineView(console, ["job"])
    view.jobs["job"].state = "running"

    def broken() -> str:
        raise RuntimeError("a defect")

    monkeypatch.setattr(view.jobs["job"], "line", broken)
    async with view:
        await asyncio.sleep(0.01)
    assert "progress was no longer told: RuntimeError('a defect')" in text.getvalue()
