"""What a person sees in the terminal while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from opd.v1 import trainer_service_pb2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from opd_mesh.errors import OpdError

if TYPE_CHECKING:
    from opd_mesh.children import Child
    from opd_mesh.clients.trainer import TrainerClient
    from opd_mesh.supervisor import LocalMesh


_GROUPS = {"kl/": "KL", "reward/": "reward", "score/": "score"}


def told(metrics: Mapping[str, float]) -> str:
    """A step's loss, and by teacher or domain its KL, reward and score: ``loss 0.1234  KL math 0.123``."""
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    for prefix, title in _GROUPS.items():
        values = [
            f"{name.removeprefix(prefix)} {value:.3f}"
            for name, value in sorted(metrics.items())
            if name.startswith(prefix)
        ]
        if values:
            parts.append(f"{title} " + "  ".join(values))
    return "  ".join(parts)


class MeshView(Protocol):
    """Whom a mesh tells what it does."""

    def activity(self, text: str) -> None:
        """What is being done now."""

    def started(self, mesh: LocalMesh) -> None:
        """All processes run."""

    def lost(self, child: Child, *, again: bool) -> None:
        """A server is gone while the run goes on."""

    def failed(self, message: str) -> None:
        """The run could not go on."""

    async def follow(self, client: TrainerClient) -> None:
        """Show events until the run ends."""


class ProgressView:
    """A bar with the run's activity, and a line per optimizer step. Without a terminal: lines alone."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=total_steps)
        self._activity = ""
        self._warned = 0

    def __enter__(self) -> ProgressView:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def activity(self, text: str) -> None:
        """What is being done now."""
        if text == self._activity:
            return
        self._activity = text
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(f"  … {text}", highlight=False)

    def started(self, mesh: LocalMesh) -> None:
        """All processes run."""
        parts = [f"{child.name} (pid {child.process.pid})" for child in mesh.children]
        if mesh.valkey is not None:
            parts.insert(0, f"valkey (pid {mesh.valkey.pid})")
        self._console.print("processes: " + " · ".join(parts), highlight=False)
        self._console.print(f"logs: {mesh.run_dir / 'logs'}", highlight=False)

    def lost(self, child: Child, *, again: bool) -> None:
        """A server is gone while the run goes on."""
        what = (
            "it is started again and goes on from its token log"
            if again
            else "the run waits for it as long as the recipe allows, then ends with a checkpoint"
        )
        self._console.print(
            f"[bold red]the {child.name} server ended with code {child.process.returncode}[/]; {what}. "
            f"Its log: {child.log_path}"
        )

    def failed(self, message: str) -> None:
        """The run could not go on."""
        self._console.print("[bold red]error:[/] ", end="")
        self._console.print(message, markup=False, highlight=False)

    async def follow(self, client: TrainerClient) -> None:
        """Show events until the run ends."""
        try:
            await client.wait_ready()
            async for event in client.watch_run():
                if event.WhichOneof("event") == "run":
                    self._show_run(event.run)
                else:
                    self._show_step(event.step)
        except OpdError as error:
            self.activity(f"the trainer is not to be seen: {error.message}")

    def _show_run(self, run: trainer_service_pb2.Run) -> None:
        self._bar.update(self._task, completed=run.step, total=run.total_steps)
        for text in run.warnings[self._warned :]:
            self._console.print("[bold yellow]warning:[/] ", end="")
            self._console.print(text, markup=False, highlight=False)
        self._warned = len(run.warnings)
        if run.state == trainer_service_pb2.RUN_STATE_FAILED:
            self.failed(run.error)
        elif not self._console.is_terminal and run.state == trainer_service_pb2.RUN_STATE_RUNNING:
            pass  # a line per step says enough where nobody looks on
        else:
            paused = run.state == trainer_service_pb2.RUN_STATE_PAUSED
            self.activity("paused" if paused else run.phase)

    def _show_step(self, step: trainer_service_pb2.StepMetrics) -> None:
        metrics = step.metrics
        self._bar.update(self._task, completed=step.step)
        self._console.print(
            f"step {step.step:>4}  {told(metrics)}  {int(metrics['tokens'])} tokens  {metrics['seconds/step']:.1f} s",
            highlight=False,
        )
