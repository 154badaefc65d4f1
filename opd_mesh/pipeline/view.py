"""What a person sees of a pipeline: a table with a row per job in a terminal, else lines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from opd.v1 import trainer_service_pb2
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from opd_mesh.errors import OpdError
from opd_mesh.progress import told

if TYPE_CHECKING:
    from opd_mesh.children import Child
    from opd_mesh.clients.trainer import TrainerClient
    from opd_mesh.supervisor import LocalMesh

LINE_EVERY_S = 5.0
_COLOURS = {"done": "green", "kept": "green", "running": "bold", "failed": "red", "stopped": "yellow"}


class JobView:
    """One job, as a :class:`~opd_mesh.progress.MeshView`.

    Attributes:
        state: waiting, running, kept, done, stopped or failed.
        step, total: of its run; 0 where it counts nothing.
        error: what its run has told of its end.
    """

    def __init__(self, job_id: str, console: Console) -> None:
        self.job_id = job_id
        self.state = "waiting"
        self.step = self.total = 0
        self.error = ""
        self.metrics = ""
        self._console = console
        self._activity = ""
        self._warned = 0
        self._began: float | None = None
        self._ended: float | None = None

    @property
    def elapsed_s(self) -> float | None:
        """Since it began; None where it did not."""
        return None if self._began is None else (self._ended or time.monotonic()) - self._began

    @property
    def what(self) -> str:
        """Its numbers, or what it does."""
        return " · ".join(filter(None, (self.metrics, self._activity if self.state == "running" else "")))

    def line(self) -> str:
        """All of it in one line."""
        steps = f" {self.step}/{self.total}" if self.total else ""
        seconds = "" if self.elapsed_s is None else f" {self.elapsed_s:.0f} s"
        return f"{self.job_id}: {self.state}{steps}{seconds}" + (f"  {self.what}" if self.what else "")

    def change(self, state: str) -> None:
        """It begins or ends; without a terminal that is a line."""
        self.state = state
        if state == "running":
            self._began = time.monotonic()
        else:
            self._ended = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(self.line(), highlight=False, markup=False)

    # --- as MeshView -------------------------------------------------------------------------------------------
    def activity(self, text: str) -> None:
        """What is being done now."""
        self._activity = text

    def started(self, mesh: LocalMesh) -> None:
        """All processes run: nothing to tell."""

    def lost(self, child: Child, *, again: bool) -> None:
        """A server is gone while the run goes on."""
        what = "it is started again" if again else "the run waits for it as long as its recipe allows"
        self._console.print(
            f"{self.job_id}: the {child.name} server ended with code {child.process.returncode}; {what}. Its log: "
            f"{child.log_path}",
            highlight=False,
            markup=False,
        )

    def failed(self, message: str) -> None:
        """The run could not go on; whoever asked for the job tells it."""
        self.error = message

    async def follow(self, client: TrainerClient) -> None:
        """Take over what the run tells, until it ends."""
        try:
            await client.wait_ready()
            async for event in client.watch_run():
                if event.WhichOneof("event") == "run":
                    run = event.run
                    self.step, self.total = run.step, run.total_steps
                    self._activity = run.phase
                    for text in run.warnings[self._warned :]:
                        self._console.print(f"{self.job_id}: warning: {text}", highlight=False, markup=False)
                    self._warned = len(run.warnings)
                    if run.state == trainer_service_pb2.RUN_STATE_FAILED:
                        self.failed(run.error)
                else:
                    self.step = event.step.step
                    self.metrics = told(event.step.metrics)
        except OpdError as error:
            self._activity = f"the trainer is not to be seen: {error.message}"


class PipelineView:
    """All jobs. Use as an asynchronous context."""

    def __init__(self, console: Console, jobs: Iterable[str]) -> None:
        self.console = console
        self.jobs = {job_id: JobView(job_id, console) for job_id in jobs}
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=4, transient=True)
        self._lines: asyncio.Task[None] | None = None

    async def __aenter__(self) -> PipelineView:
        if self.console.is_terminal:
            self._live.start()
        else:
            self._lines = asyncio.create_task(self._tell())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._lines is None:
            self._live.stop()
        else:
            self._lines.cancel()
            (ended,) = await asyncio.gather(self._lines, return_exceptions=True)
            if isinstance(ended, Exception):
                self.console.print(f"progress was no longer told: {ended!r}", highlight=False, markup=False)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(LINE_EVERY_S)
            for job in self.jobs.values():
                if job.state == "running":
                    self.console.print(job.line(), highlight=False, markup=False)

    def _shown(self, room: int) -> list[JobView]:
        """What fits: what runs, what comes next, and what has ended last."""
        jobs = list(self.jobs.values())
        if len(jobs) <= room:
            return jobs
        running = [job for job in jobs if job.state == "running"]
        ended = [job for job in jobs if job.state not in ("running", "waiting")]
        waiting = [job for job in jobs if job.state == "waiting"]
        left = max(0, room - len(running))
        after = min(len(waiting), max(left // 2, left - len(ended)))
        chosen = {id(job) for job in [*running, *waiting[:after], *ended[len(ended) - (left - after) :]]}
        return [job for job in jobs if id(job) in chosen]

    def _table(self) -> Table:
        counts: dict[str, int] = {}
        for job in self.jobs.values():
            counts[job.state] = counts.get(job.state, 0) + 1
        title = ", ".join(f"{count} {state}" for state, count in counts.items())
        table = Table(title=title, expand=True, box=None, pad_edge=False, title_justify="left")
        table.add_column("job", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
        for job in self._shown(max(4, self.console.height - 5)):
            colour = _COLOURS.get(job.state, "dim")
            table.add_row(
                escape(job.job_id),
                f"[{colour}]{job.state}[/]",
                f"{job.step}/{job.total}" if job.total else "",
                "" if job.elapsed_s is None else f"{job.elapsed_s:.0f} s",
                escape(job.what),
            )
        return table


def accuracies_line(accuracies: Mapping[str, float]) -> str:
    """``accuracy add 81%  sort 40%``."""
    return (
        "accuracy " + "  ".join(f"{domain} {value:.0%}" for domain, value in accuracies.items()) if accuracies else ""
    )
