"""``opd run`` of a pipeline: plan, see what is there, do the rest, tell the results."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rich.console import Console

from opd_mesh.config.base import dump_config
from opd_mesh.config.pipeline import PipelineRecipe
from opd_mesh.errors import ConfigError, UnavailableError
from opd_mesh.pipeline.digests import FileDigests, Resolved, resolve
from opd_mesh.pipeline.jobs import Plan
from opd_mesh.pipeline.plan import plan
from opd_mesh.pipeline.results import Results
from opd_mesh.pipeline.scheduler import JobFailedError, JobStoppedError, run_jobs
from opd_mesh.pipeline.store import Store, write_durably
from opd_mesh.pipeline.view import PipelineView, accuracies_line
from opd_mesh.pipeline.work import Worker, cause_of
from opd_mesh.supervisor import with_absolute_paths

RECIPE, RESULTS, LOCK = "pipeline.yaml", "results.json", "pipeline.lock"
# After its supervisor is dead a trainer ends at once, but may have a checkpoint to write.
WAIT_FOR_OLD_S = 60.0


def resolve_pipeline_paths(pipeline: PipelineRecipe) -> PipelineRecipe:
    """The recipe with absolute paths, so that it can be resumed from anywhere."""
    model = pipeline.model
    if model.path is not None:
        model = model.replace(path=model.path.resolve())
    domains = {name: with_absolute_paths(domain) for name, domain in pipeline.domains.items()}
    return pipeline.replace(model=model, domains=domains)


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
            digest = (resolved.digest or "")[:12]
            line = f"{state:<6} {resolved.job.kind:<9} {digest:<12} {job_id}{note}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.console.print(f"{kept} kept, {len(self.resolved) - kept} to do", highlight=False)

    async def run(self) -> int:
        """Do what is to do. Exit code: 0, 2 where a job failed, 130 where it was interrupted."""
        self._started = time.monotonic()
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop.set)
        try:
            async with _locked(self.folder / LOCK, self.console, stop) as lock:
                self.store.root.mkdir(exist_ok=True)
                dump_config(self.pipeline, self.folder / RECIPE)
                code = await self._run_jobs(stop, lock)
                if code == 0:
                    self._write_results()
        except JobStoppedError:
            code = 130
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)
        return code

    async def _run_jobs(self, stop: asyncio.Event, lock: int) -> int:
        jobs = self.pipeline.pipeline.jobs
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        worker = Worker(self.store, threads=max(1, cores // jobs) if jobs > 1 else 0, stop=stop, keep_open=(lock,))
        making: dict[str, asyncio.Lock] = {}
        view = PipelineView(self.console, self.plan.jobs)

        async def work(job_id: str) -> None:
            row = view.jobs[job_id]
            resolved = self.resolved[job_id]
            assert resolved.digest is not None  # the choices that it needs are made
            async with making.setdefault(resolved.digest, asyncio.Lock()):  # two jobs may be the same
                if self.is_kept(job_id):
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
            if resolved.job.kind in ("train", "evaluate"):
                self._write_results()

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

    def _write_results(self) -> None:
        """What there is so far."""
        results = Results(self.pipeline, self.plan, self.resolved, self.store)
        write_durably(self.folder / RESULTS, results.text(time.monotonic() - self._started))

    def _tell_failure(self, error: JobFailedError) -> None:
        digest = self.resolved[error.job_id].digest or ""
        logs = [
            path / "logs"
            for root in (self.store.root, self.folder / "answering")
            for path in sorted(root.glob(f"*-{digest[:12]}"))
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
        deadline = time.monotonic() + WAIT_FOR_OLD_S
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pid = os.pread(handle, 32, 0).decode(errors="replace").strip()
                if pid.isdecimal() and _is_alive(int(pid)):
                    raise ConfigError(f"process {pid} runs a pipeline in {path.parent}", field="run_dir") from None
                if time.monotonic() > deadline:
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
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield handle
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
