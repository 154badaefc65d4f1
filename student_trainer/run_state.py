"""What the run tells the world: its state, its metrics.jsonl, and those who watch."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from enum import StrEnum
from pathlib import Path

from opd_mesh.policy import PolicyId


class Phase(StrEnum):
    """State of a run; the names of ``opd.v1.RunState`` without their prefix."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    FAILED = "failed"


class MetricsLog:
    """``metrics.jsonl``: a line per optimizer step, and lines of evaluations. Numbers only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, float]] = []

    def resume(self, step: int) -> None:
        """Keep the lines up to ``step``: later ones tell of steps that no checkpoint holds, which are done again."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                break  # cut off in the middle of a write
            if value.get("step", 0) <= step:
                self.lines.append(value)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        partial.replace(self.path)

    def write(self, line: dict[str, float]) -> None:
        """Append one line and hand it to the operating system."""
        finite = {key: value for key, value in line.items() if math.isfinite(value)}  # JSON has no others
        self.lines.append(finite)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


class RunState:
    """Observable state of a run. For the event loop's thread only."""

    def __init__(self, run_id: str, total_steps: int, metrics: MetricsLog) -> None:
        self.run_id = run_id
        self.total_steps = total_steps
        self.metrics = metrics
        self.phase = Phase.STARTING
        self.activity = "starting"
        self.step = 0
        self.policy: PolicyId | None = None
        self.error = ""
        self.warnings: tuple[str, ...] = ()
        self.started_at = time.time()
        self.not_paused = asyncio.Event()
        self.not_paused.set()
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Wake every watcher."""
        self._changed.set()
        self._changed = asyncio.Event()

    def set(self, phase: Phase | None = None, activity: str | None = None, error: str | None = None) -> None:
        """Change what is told."""
        self.phase = phase or self.phase
        self.activity = activity or self.activity
        self.error = error if error is not None else self.error
        self.notify()

    def pause(self) -> None:
        """Stop before the next step."""
        self.not_paused.clear()
        if self.phase is Phase.RUNNING:
            self.set(Phase.PAUSED)

    def resume(self) -> None:
        """Go on."""
        self.not_paused.set()
        if self.phase is Phase.PAUSED:
            self.set(Phase.RUNNING)

    @property
    def ended(self) -> bool:
        """Nothing more will happen."""
        return self.phase in (Phase.FINISHED, Phase.FAILED)

    async def watch(self) -> AsyncIterator[None]:
        """Yields at once, then at every change, until the run has ended."""
        while True:
            changed, ended = self._changed, self.ended
            yield
            if ended:  # as of before the yield: what changed while the watcher was busy, it has not seen
                return
            await changed.wait()
