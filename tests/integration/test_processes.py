"""``opd run`` as a person uses it: real processes, killed and interrupted, and nothing of them left behind."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from mesh import mesh, running_valkey, tiny_recipe
from tiny_models import save_tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
OPD = Path(sys.executable).with_name("opd")
NAMES = ("valkey", "teacher", "rollout", "trainer")
WAIT_S = 100.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@dataclass
class Run:
    """An ``opd run`` process."""

    run_dir: Path
    process: subprocess.Popen[str]
    output: Path
    pids: dict[str, int] = field(default_factory=dict)

    def said(self) -> str:
        return self.output.read_text()

    def wait_for_children(self, *names: str) -> None:
        """Until it has told the pids of its children, which are these and no others; they are noted."""
        until(lambda: "processes: " in self.said() or self.process.poll() is not None, "no children")
        line = next((line for line in self.said().splitlines() if line.startswith("processes: ")), "")
        self.pids = {name: int(pid) for name, pid in re.findall(r"(\w+) \(pid (\d+)\)", line)}
        assert tuple(self.pids) == names, self.said()

    def wait_for_step(self, number: int) -> None:
        until(lambda: self.steps() >= number or self.process.poll() is not None, f"step {number} was not reached")
        assert self.process.poll() is None, self.said()

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def steps(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def leftovers(self) -> list[str]:
        return [name for name, pid in self.pids.items() if alive(pid)]

    def summary(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return value

    def checkpoints(self) -> list[str]:
        return sorted(path.parent.name for path in self.run_dir.glob("checkpoints/step-*/state.json"))


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """Starts ``opd run``; whatever a failing test leaves behind is ended."""
    runs: list[Run] = []

    def begin(run_dir: Path, *words: str | Path) -> Run:
        output = run_dir.parent / f"output-{len(runs)}.txt"
        environment = {**os.environ, "COLUMNS": "300"}
        with output.open("w") as file:
            process = subprocess.Popen(
                [str(word) for word in (OPD, "run", *words)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        runs.append(Run(run_dir, process, output))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
        for pid in filter(alive, run.pids.values()):
            os.kill(pid, signal.SIGKILL)
        run.process.wait(WAIT_S)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny_checkpoint(root / name, "llama", seed) for seed, name in enumerate(("student", "one"))}


def recipe_file(models: dict[str, Path], folder: Path, **sections: Any) -> Path:
    recipe = tiny_recipe(models["student"], {"one": models["one"]}, **sections).model_dump(mode="json")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@dataclass
class Neighbours:
    """Servers that exist already, in this process: a recipe may name them, and starting them costs seconds."""

    teachers: list[str]
    rollouts: list[str]
    redis_url: str


@pytest.fixture(scope="module")
def neighbours(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbours]:
    ready: queue.Queue[Neighbours | BaseException] = queue.Queue()
    loop, ended = asyncio.new_event_loop(), asyncio.Event()

    async def serve(url: str) -> None:
        async with mesh(tiny_recipe(models["student"], {"one": models["one"]}), url) as recipe:
            ready.put(Neighbours(recipe.teachers["one"].addresses, recipe.rollout.peers.addresses, url))
            await ended.wait()

    def run(url: str) -> None:
        try:
            loop.run_until_complete(serve(url))
        except BaseException as error:  # noqa: BLE001 - for the thread that waits
            ready.put(error)
        finally:
            loop.close()

    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        thread = threading.Thread(target=run, args=(url,))
        thread.start()
        found = ready.get(timeout=WAIT_S)
        assert isinstance(found, Neighbours), found
        yield found
        loop.call_soon_threadsafe(ended.set)
        thread.join(WAIT_S)


def test_a_teacher_that_is_killed_ends_the_run_with_a_checkpoint(
    models: dict[str, Path], neighbours: Neighbours, tmp_path: Path, start: Callable[..., Run]
) -> None:
    recipe = recipe_file(
        models,
        tmp_path,
        run={"steps": 500},
        teacher_timeout_s=1.5,
        evaluation={"prompts_per_domain": 0},
        rollout={"peers": {"addresses": neighbours.rollouts}},
        redis_url=neighbours.redis_url,
    )
    run = start(tmp_path / "one", recipe, "--run-dir", tmp_path / "one")
    run.wait_for_children("teacher", "trainer")
    run.wait_for_step(2)
    os.kill(run.pids["teacher"], signal.SIGKILL)
    assert run.wait() == 2, run.said()
    assert run.leftovers() == []
    steps = run.steps()
    assert 2 <= steps < 500
    assert run.checkpoints()[-1] == f"step-{steps:06d}"
    assert "the teacher server ended with code -9" in run.said()
    assert re.search(r"teacher 'one' at \S+ gave no answer for 1.5 s", run.said())
    assert f"opd run --resume {run.run_dir}" in run.said()
    assert "Traceback" not in run.said()
    summary = run.summary()
    assert (summary["status"], summary["steps"]) == ("failed", steps)
    assert "teacher 'one'" in summary["error"]
    assert (run.run_dir / "report.html").exists()


def test_a_rollout_server_that_is_killed_is_started_again_and_the_run_goes_on(
    models: dict[str, Path], neighbours: Neighbours, tmp_path: Path, start: Callable[..., Run]
) -> None:
    total = 12
    recipe = recipe_file(
        models,
        tmp_path,
        run={"steps": total},
        evaluation={"prompts_per_domain": 0},
        teachers={"one": {"addresses": neighbours.teachers}},
        redis_url=neighbours.redis_url,
    )
    run = start(tmp_path / "one", recipe, "--run-dir", tmp_path / "one")
    run.wait_for_children("rollout", "trainer")
    run.wait_for_step(3)
    os.kill(run.pids["rollout"], signal.SIGKILL)
    assert run.wait() == 0, run.said()
    assert "the rollout server ended with code -9" in run.said()
    assert "started again" in run.said()
    assert (run.summary()["status"], run.steps()) == ("finished", total)
    log = (run.run_dir / "logs" / "rollout.log").read_text()
    assert "epoch 2" in log  # the log's second owner
    assert run.leftovers() == []
    assert "Traceback" not in run.said() + log


def test_ctrl_c_ends_the_run_after_the_step_in_progress(
    models: dict[str, Path], neighbours: Neighbours, tmp_path: Path, start: Callable[..., Run]
) -> None:
    recipe = recipe_file(
        models,
        tmp_path,
        run={"steps": 500},
        evaluation={"prompts_per_domain": 0},
        teachers={"one": {"addresses": neighbours.teachers}},
        rollout={"peers": {"addresses": neighbours.rollouts}},
        redis_url=neighbours.redis_url,
    )
    run = start(tmp_path / "two", recipe, "--run-dir", tmp_path / "two")
    run.wait_for_children("trainer")
    run.wait_for_step(2)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130, run.said()
    assert run.leftovers() == []
    steps = run.steps()
    assert 2 <= steps < 500
    assert run.checkpoints()[-1] == f"step-{steps:06d}"
    assert (run.summary()["status"], run.summary()["steps"]) == ("interrupted", steps)
    assert "Traceback" not in run.said()


def test_a_run_whose_supervisor_is_killed_leaves_nothing_and_is_resumed_to_its_end(
    models: dict[str, Path], tmp_path: Path, start: Callable[..., Run]
) -> None:
    total = 16
    run_dir = tmp_path / "run"
    recipe = recipe_file(
        models,
        tmp_path,
        run={"steps": total},
        evaluation={"prompts_per_domain": 1},
        checkpoint={"every_steps": 2},
        redis_timeout_s=1.0,
    )
    killed = start(run_dir, recipe, "--run-dir", run_dir)
    killed.wait_for_children(*NAMES)
    assert len(set(killed.pids.values()) | {killed.process.pid}) == 5
    killed.wait_for_step(3)
    killed.process.kill()
    killed.wait()
    until(lambda: not killed.leftovers(), "children outlive their supervisor", timeout_s=45)
    steps = killed.steps()
    assert 3 <= steps < total
    assert killed.checkpoints()

    resumed = start(run_dir, "--resume", run_dir)
    resumed.wait_for_children(*NAMES)
    assert not set(resumed.pids.values()) & set(killed.pids.values())
    assert resumed.wait() == 0, resumed.said()
    assert resumed.leftovers() == []
    summary = resumed.summary()
    assert (summary["status"], summary["steps"]) == ("finished", total)
    assert summary["heldout_kl_after"]["domain_0"] < summary["heldout_kl_before"]["domain_0"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, total + 1))
    assert sorted({line["lineage"] for line in lines}) == [1, 2]
    for name in ("recipe.yaml", "metrics.jsonl", "summary.json", "report.html", "student", "checkpoints", "logs"):
        assert (run_dir / name).exists(), name
    assert {path.stem for path in (run_dir / "logs").iterdir()} == set(NAMES)
    AutoModelForCausalLM.from_pretrained(run_dir / "student")
    AutoTokenizer.from_pretrained(run_dir / "student")
    assert "Traceback" not in killed.said() + resumed.said()
    for name in NAMES:
        log = (run_dir / "logs" / f"{name}.log").read_text()
        assert "Traceback" not in log, f"{name}: {log}"
