"""A pipeline's jobs without processes: what is left behind where one fails at any of its steps, and what is told."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipeline_cases import files_below, pipeline
from rich.console import Console

from opd_mesh.children import Child
from opd_mesh.errors import UnavailableError
from opd_mesh.files import write_durably
from opd_mesh.pipeline import run as run_module
from opd_mesh.pipeline import store as store_module
from opd_mesh.pipeline import work as work_module
from opd_mesh.pipeline.plan import plan
from opd_mesh.pipeline.run import PipelineRun
from opd_mesh.pipeline.store import FILE
from opd_mesh.pipeline.view import JobView
from opd_mesh.pipeline.work import Worker
from opd_mesh.supervisor import LocalMesh, run_mesh

STAGES = {
    "base": {"kind": "base", "domains": ["add"], "recipe": {"run": {"steps": 2}}},
    "evaluate": {"kind": "evaluate", "models": ["base"], "prompts_per_domain": 4},
}
SCORES = {"accuracy": 0.5, "score": 0.5, "graded": 4, "unparsed": 0, "ungraded": 0, "mean_length": 2.0}


class Crash(BaseException):
    """The process is gone."""


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In the place of the processes: what they would leave behind. Lists those that were begun."""
    begun: list[str] = []

    async def making(self: Worker, folder: Path, job: Any, out: Path) -> None:
        begun.append(str(job["make"]))
        out.mkdir(exist_ok=True)
        (out / "model.safetensors").write_bytes(b"made")

    async def training(mesh: LocalMesh, **_: Any) -> int:
        begun.append(mesh.recipe.run.name)
        folder = mesh.run_dir
        for name in ("student", "checkpoints", "rollout-log"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "file").write_text("1")
        (folder / "evaluations.jsonl").write_text(json.dumps({"step": 2, "accuracy/add": 0.5}) + "\n")
        summary = {"status": "finished", "wall_s": 5.0, "tokens_trained": 7, "steps": 2}
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0

    async def answering(mesh: LocalMesh, *_: Any, **__: Any) -> int:
        begun.append("answers")
        assert not (mesh.run_dir / "rollout-log").exists()
        (mesh.run_dir / "rollout-log").mkdir()
        # The names of models are those of their artefacts.
        for name in begun_models:
            out = mesh.run_dir / "out" / name
            out.mkdir(parents=True, exist_ok=True)
            (out / "add.jsonl").write_text("{}\n")
            (out / "scores.json").write_text(json.dumps({"add": SCORES, "reverse": SCORES}))
        return 0

    begun_models: list[str] = []
    make_config = work_module.AnswersConfig

    def config(**fields: Any) -> Any:
        begun_models[:] = fields["models"]
        return make_config(**fields)

    monkeypatch.setattr(Worker, "_making", making)
    monkeypatch.setattr(work_module, "run_training", training)
    monkeypatch.setattr(work_module, "run_mesh", answering)
    monkeypatch.setattr(work_module, "AnswersConfig", config)
    return begun


def pipeline_in(folder: Path, changes: dict[str, Any] | None = None) -> PipelineRun:
    folder.mkdir(exist_ok=True)
    return PipelineRun(pipeline({"stages": STAGES} | (changes or {})), folder, Console(file=io.StringIO()))


async def run_in(folder: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run to the end; the results."""
    assert await pipeline_in(folder, changes).run() == 0
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def kept(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "artefacts").glob(f"*/{FILE}")}


async def test_from_nothing_to_the_results(tmp_path: Path, trainers: list[str]) -> None:
    results = await run_in(tmp_path)
    assert trainers == ["random", "base", "answers"]
    assert results["status"] == "finished"
    assert results["systems"]["base"]["domains"]["add"][0]["accuracy"] == 0.5
    assert results["job_seconds"] >= 5.0
    for path in (tmp_path / "artefacts").glob(f"*/{FILE}"):
        assert json.loads(path.read_text())["facts"]["seconds"] >= 0
    assert not list(tmp_path.glob("artefacts/*/checkpoints"))
    again = await run_in(tmp_path)
    assert trainers == ["random", "base", "answers"]
    assert again["job_seconds"] == results["job_seconds"]
    assert again["wall_s"] > results["wall_s"]  # of both calls


def after(call: Callable[..., Any], count: int) -> Callable[..., Any]:
    """``call``, until it has been called so often: then the process is gone."""
    left = [count]

    def crashing(*args: Any, **fields: Any) -> Any:
        if not left[0]:
            raise Crash
        left[0] -= 1
        return call(*args, **fields)

    return crashing


@pytest.mark.parametrize(
    ("step", "count"),
    [("sync", count) for count in range(2, 18, 3)] + [("write", count) for count in range(8)] + [("remove", 2)],
)
async def test_killed_at_any_step_it_ends_with_the_same_artefacts(
    tmp_path: Path, trainers: list[str], monkeypatch: pytest.MonkeyPatch, step: str, count: int
) -> None:
    with monkeypatch.context() as patch:
        match step:
            case "sync":
                patch.setattr(os, "fsync", after(os.fsync, count))
            case "write":
                crashing = after(write_durably, count)
                for module in (store_module, work_module, run_module):
                    patch.setattr(module, "write_durably", crashing)
            case "remove":
                patch.setattr(shutil, "rmtree", after(shutil.rmtree, count))
        with contextlib.suppress(Crash):
            await pipeline_in(tmp_path).run()
    results = await run_in(tmp_path)
    assert results["status"] == "finished"
    resolved = pipeline_in(tmp_path).resolved.values()
    digests = {digest for one in resolved for digest in one.parts.values() or [one.digest]}
    assert {name.rpartition("-")[2] for name in kept(tmp_path)} == {str(digest)[:12] for digest in digests}
    assert {path.parent.name for path in tmp_path.glob("artefacts/*/*")} == kept(tmp_path)
    left = {
        name for name in files_below(tmp_path) if {"checkpoints", "rollout-log", "answering"} & set(Path(name).parts)
    }
    assert not left


async def test_a_failure_is_told_and_what_was_done_is_kept(
    tmp_path: Path, trainers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: Any, **__: Any) -> int:
        raise UnavailableError("no server")

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "run_mesh", failing)
        made = pipeline_in(tmp_path)
        assert await made.run() == 2
    assert "seed0/evaluate/answers failed: no server" in made.console.file.getvalue()  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "failed"
    assert len(kept(tmp_path)) == 2
    assert (await run_in(tmp_path))["status"] == "finished"
    assert trainers == ["random", "base", "answers"]


async def test_a_file_that_changes_while_it_is_learned_is_refused_by_name(
    tmp_path: Path, trainers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1=", "answer": "1"}\n' * 8)
    stage = {"kind": "base", "domains": ["bare"], "recipe": {"run": {"steps": 2}}}
    changes = {"domains.bare": {"jsonl": {"path": str(prompts)}}, "stages": {"bare": stage}}
    training = work_module.run_training

    async def changing(mesh: LocalMesh, **fields: Any) -> int:
        prompts.write_text('{"prompt": "2=", "answer": "2"}\n' * 8)
        return await training(mesh, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "run_training", changing)
        made = pipeline_in(tmp_path / "run", changes)
        assert await made.run() == 2
    assert "prompts.jsonl has changed while a job was reading it" in made.console.file.getvalue()  # type: ignore[attr-defined]
    await run_in(tmp_path / "run", changes)
    assert trainers == ["random", "bare", "bare"]  # of the new contents


async def test_a_token_log_is_in_the_folder_of_its_job(
    tmp_path: Path, trainers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: list[Path] = []
    training = work_module.run_training

    async def noting(mesh: LocalMesh, **fields: Any) -> int:
        assert mesh.recipe.rollout.log is not None
        logs.append(mesh.recipe.rollout.log.path.relative_to(mesh.run_dir))
        return await training(mesh, **fields)

    monkeypatch.setattr(work_module, "run_training", noting)
    await run_in(tmp_path, {"defaults.rollout.log": {"durability": "os"}})
    assert logs == [Path("rollout-log")]


async def test_the_lock_of_a_process_that_is_gone_or_another_is_free() -> None:
    ours = run_module._identity(os.getpid())
    assert run_module._is_alive(ours)
    assert run_module._is_alive(str(os.getpid()))  # of an earlier version
    if " " in ours:
        assert not run_module._is_alive(f"{os.getpid()} 1")  # its number was given again
    child = await asyncio.create_subprocess_exec("true")
    identity = f"{child.pid}"
    await child.wait()
    assert not run_module._is_alive(identity)
    for nothing in ("", "x", "-1"):
        assert not run_module._is_alive(nothing)


def test_a_zombie_is_not_alive() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert not run_module._is_alive(str(pid))
    finally:
        os.waitpid(pid, 0)


async def test_a_server_that_dies_while_models_answer_ends_the_job_with_its_log(tmp_path: Path) -> None:
    mesh = LocalMesh(pipeline_recipe(), tmp_path)
    log_path = tmp_path / "log"
    log_path.write_text("error: the device is lost\n")

    def child(name: str, code: str) -> Child:
        process = subprocess.Popen([sys.executable, "-c", code])
        made = Child(name, process, log_path, tmp_path / "ready", mesh.recipe)
        mesh.children.append(made)
        return made

    async def begin() -> Child:
        child("rollout", "raise SystemExit(3)")
        return child("answers", "import time; time.sleep(600)")

    async def follow(_: Child) -> None:
        await asyncio.Event().wait()

    view = JobView("job", Console(file=io.StringIO()))
    with pytest.raises(UnavailableError, match="the rollout server ended with code 3: the device is lost"):
        await run_mesh(mesh, begin, follow, view=view, stop=asyncio.Event(), restarts=False)
    assert all(one.process.poll() is not None for one in mesh.children)


def pipeline_recipe() -> Any:
    payload: Any = plan(pipeline()).jobs["seed0/base"].payload
    return payload.options[0]
