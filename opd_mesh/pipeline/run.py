"""``opd run`` of a pipeline: plan, see what is there, do the rest, tell the results."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rich.console import Console

from opd_mesh.config.base import dump_config
from opd_mesh.config.paths import with_absolute_grm, with_absolute_paths
from opd_mesh.config.pipeline import PipelineRecipe
from opd_mesh.errors import ConfigError, UnavailableError
from opd_mesh.files import write_durably
from opd_mesh.pipeline.digests import FileDigests, Resolved, resolve
from opd_mesh.pipeline.jobs import Plan
from opd_mesh.pipeline.plan import plan
from opd_mesh.pipeline.results import Results, Status
from opd_mesh.pipeline.scheduler import JobFailedError, JobStoppedError, run_jobs
from opd_mesh.pipeline.store import SHORT, Store
from opd_mesh.pipeline.view import PipelineView, accuracies_line
from opd_mesh.pipeline.work import Worker, cause_of

PARTS = ("recipe", "sft", "grpo")  # of stages: parts of a run's recipe
RECIPE, RESULTS, LOCK = "pipeline.yaml", "results.json", "pipeline.lock"
# After its supervisor is dead a trainer ends at once, but may have a checkpoint to write.
WAIT_FOR_OLD_S = 60.0
# One that has just been stopped needs a moment to end.
WAIT_FOR_OTHER_S = 3.0
_ENDS: dict[int, Status] = {0: "finished", 2: "failed", 130: "stopped"}


def resolve_pipeline_paths(pipeline: PipelineRecipe) -> PipelineRecipe:
    """The recipe with absolute paths, so that it can be resumed from anywhere."""
    model = pipeline.model
    if model.path is not None:
        model = model.replace(path=model.path.resolve())
    domains = {name: with_absolute_paths(domain) for name, domain in pipeline.domains.items()}
    stages = {}
    for name, stage in pipeline.stages.items():
        parts = {key: part for key in PARTS if isinstance(part := getattr(stage, key, None), dict)}
        stages[name] = stage.replace(**{key: with_absolute_grm(part) for key, part in parts.items()})
    return pipeline.replace(model=model, domains=domains, defaults=with_absolute_grm(pipeline.defaults), stages=stages)


class PipelineRun:
    """A pipeline in its folder.

    Args:
        folder: absolute; it may hold artefacts of this or of another version of the recipe.

    Raises:
        ConfigError, ModelNotFoundError: what is wrong with the recipe, before anything runs.
    """

    def __init__(self, pipeline: PipelineRecipe, folder: Path, console: Console) -> None:
        self.pipeline = pipeline
        self.folder = folder
        self.console = console
        self.plan: Plan = plan(pipeline)
        self.store = Store(folder / "artefacts")
        self._files = FileDigests()
        self.resolved: dict[str, Resolved] = {}
        self._started = time.monotonic()
        self._earlier_s = 0.0
        self.look()

    def look(self) -> None:
        """Take notice of the choices that are made."""
        self.resolved = resolve(self.plan, self._choice_of, self._files)

    def _choice_of(self, digest: str) -> int | None:
        artefact = self.store.find(digest)
        return None if artefact is None else int(artefact.facts["option"])

    def is_kept(self, job_id: str) -> bool:
        """Whether the job's result is there."""
        resolved = self.resolved[job_id]
        if resolved.digest is None:
            return False
        digests = resolved.parts.values() if resolved.job.kind == "answers" else [resolved.digest]
        return all(self.store.find(digest) is not None for digest in digests)

    def print_plan(self) -> None:
        """A line per job: kept or to do."""
        kept = 0
        for job_id, resolved in self.resolved.items():
            is_kept = self.is_kept(job_id)
            kept += is_kept
            state = "kept" if is_kept else "to do"
            if is_kept or resolved.digest is None:
                note = "" if is_kept else "  (with what a sweep will choose)"
            else:
                there = sum(self.store.find(digest) is not None for digest in resolved.parts.values())
                note = f"  ({there} of {len(resolved.parts)} models kept)" if there else ""
            digest = (resolved.digest or "")[:SHORT]
            line = f"{state:<6} {resolved.job.kind:<9} {digest:<12} {job_id}{note}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.console.print(f"{kept} kept, {len(self.resolved) - kept} to do", highlight=False)

    async def run(self) -> int:
        """Do what is to do. Exit code: 0, 2 where a job failed, 130 where it was interrupted."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop.set)
        try:
            async with _locked(self.folder / LOCK, self.console, stop) as lock:
                self.store.root.mkdir(exist_ok=True)
                dump_config(self.pipeline, self.folder / RECIPE)
                self._started, self._earlier_s = time.monotonic(), _wall_s(self.folder / RESULTS)
                self._write_results("running")
                code = 2
                try:
                    code = await self._run_jobs(stop, lock)
                finally:
                    self._write_results(_ENDS[code])
        except JobStoppedError:
            code = 130
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)
        return code

    async def _run_jobs(self, stop: asyncio.Event, lock: int) -> int:
        jobs = self.pipeline.pipeline.jobs
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // jobs) if jobs > 1 else 0
        worker = Worker(self.store, self._files, threads=threads, stop=stop, keep_open=(lock,))
        making: dict[str, asyncio.Lock] = {}
        view = PipelineView(self.console, self.plan.jobs)

        async def work(job_id: str) -> None:
            row = view.jobs[job_id]
            resolved = self.resolved[job_id]
            assert resolved.digest is not None  # the choices that it needs are made
            async with making.setdefault(resolved.digest, asyncio.Lock()):  # two jobs may be the same
                if self.is_kept(job_id):
                    await asyncio.to_thread(worker.clear_up, resolved)
                    row.change("kept")
                    return
                if stop.is_set():
                    raise JobStoppedError
                row.change("running")
                try:
                    await worker.do(resolved, row)
                except BaseException as error:
                    row.change("stopped" if isinstance(error, JobStoppedError) else "failed")
                    raise
            artefact = self.store.find(resolved.digest)
            if resolved.job.kind == "train" and artefact is not None:
                row.metrics = accuracies_line(artefact.facts["accuracies"]["after"]) or row.metrics
            row.change("done")
            if resolved.job.kind == "choose":
                self.look()
            self._write_results("running")

        needs = {job_id: job.needs for job_id, job in self.plan.jobs.items()}
        try:
            async with view:
                whole = await run_jobs(needs, work, limit=jobs, stop=stop)
        except JobFailedError as error:
            self._tell_failure(error)
            return 2
        if not whole:
            self.console.print(f"stopped; go on with: opd run --resume {self.folder}", highlight=False, soft_wrap=True)
        return 0 if whole else 130

    def _write_results(self, status: Status) -> None:
        """What there is so far."""
        results = Results(self.pipeline, self.plan, self.resolved, self.store)
        wall_s = self._earlier_s + time.monotonic() - self._started
        write_durably(self.folder / RESULTS, results.text(status, wall_s))

    def _tell_failure(self, error: JobFailedError) -> None:
        digest = self.resolved[error.job_id].digest or ""
        logs = [
            path / "logs"
            for root in (self.store.root, self.folder / "answering")
            for path in sorted(root.glob(f"*-{digest[:SHORT]}"))
            if (path / "logs").is_dir()
        ]
        self.console.print("[bold red]error:[/] ", end="")
        text = f"{error.job_id} failed: {cause_of(error.__cause__)}"
        if logs:
            text += f"\nlogs: {', '.join(map(str, logs))}"
        text += (
            f"\nwhat is done is kept; when the cause is mended, go on with: opd run --resume {self.folder}, or with "
            f"another recipe: opd run RECIPE --run-dir {self.folder}"
        )
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@asynccontextmanager
async def _locked(path: Path, console: Console, stop: asyncio.Event) -> AsyncIterator[int]:
    """One pipeline at a time in a folder. The processes of a run inherit the lock, so that those of one that was killed
    have ended before their jobs are done again.

    Raises:
        ConfigError: another one runs.
        UnavailableError: processes of one that was killed do not end.
        JobStoppedError: ``stop`` was set while they were waited for.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        began = time.monotonic()
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(handle, 64, 0).decode(errors="replace").strip()
                waited_s = time.monotonic() - began
                if waited_s > WAIT_FOR_OTHER_S and _is_alive(holder):
                    pid = holder.split()[0]
                    raise ConfigError(f"process {pid} runs a pipeline in {path.parent}", field="run_dir") from None
                if waited_s > WAIT_FOR_OLD_S:
                    raise UnavailableError(
                        f"processes of an earlier run in {path.parent} have not ended: see who holds {path}"
                    ) from None
                if not told:
                    console.print("waiting for the processes of the run before to end", highlight=False)
                    told = True
                if stop.is_set():
                    raise JobStoppedError from None
                await asyncio.sleep(0.2)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{_identity(os.getpid())}\n".encode(), 0)
        yield handle
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)


def _identity(pid: int) -> str:
    """``PID START`` of a process, where the system tells when it began: a number is given again. Empty: it is gone."""
    try:
        # proc(5): behind the name, which may hold anything, the state is the first and the start the 20th.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc/self/stat").exists() else str(pid)
    return "" if fields[0] in ("Z", "X") else f"{pid} {fields[19]}"


def _is_alive(holder: str) -> bool:
    """Whether the process that wrote its :func:`_identity` into the lock still runs."""
    pid, _, start = holder.partition(" ")
    if not pid.isdecimal():
        return False
    if start or Path("/proc/self/stat").exists():
        now = _identity(int(pid))
        return bool(now) and now == (holder if start else now)
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _wall_s(path: Path) -> float:
    """What earlier calls have taken, as far as they have told."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["wall_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
