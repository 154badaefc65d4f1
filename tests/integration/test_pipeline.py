"""``opd run`` of a pipeline as a person uses it: real processes and tiny random models, killed, resumed and changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_cases import changed, files_below
from safetensors.torch import load_file

OPD = Path(sys.executable).with_name("opd")
WAIT_S = 300.0
# Enough of them to be killed in the midst of.
STEPS = {"stages.base.recipe.run.steps": 6, "stages.opd.recipe.run.steps": 6}

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(900)]


def processes_of(run_dir: Path) -> list[int]:
    """Those that were started for a pipeline in this folder, but for the supervisor itself."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"{run_dir}/".encode() in words and state not in ("Z", "X"):
            found.append(int(entry.name))
    return found


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Opd:
    """One call of ``opd run``."""

    def __init__(self, output: Path, *words: str | Path) -> None:
        self._output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [str(word) for word in (OPD, "run", *words)],
                cwd=output.parent,
                env={**os.environ, "COLUMNS": "200"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self._output.read_text()

    def wait(self) -> int:
        return self.process.wait(WAIT_S)


@pytest.fixture
def opd(tmp_path: Path) -> Iterator[Callable[..., Opd]]:
    calls: list[Opd] = []

    def begin(*words: str | Path) -> Opd:
        calls.append(Opd(tmp_path / f"output-{len(calls)}.txt", *words))
        return calls[-1]

    yield begin
    for call in calls:
        if call.process.poll() is None:
            call.process.kill()
            call.process.wait(WAIT_S)


# What every `make test` runs: every kind of stage but the cold start, without evaluations in between.
SMALL = {"defaults.evaluation.accuracy": None, "stages.cold": None, "stages.opd.from": "base"}


def recipe_file(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    path = folder / "pipeline-recipe.yaml"
    path.write_text(yaml.safe_dump(changed(STEPS | (changes or {})), sort_keys=False))
    return path


def artefacts(run_dir: Path) -> dict[str, dict[str, Any]]:
    """artefact.json by folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in (run_dir / "artefacts").glob("*/artefact.json")}


def states(said: str) -> dict[str, str]:
    """Job → kept or to do, as it was told before anything ran."""
    words = [line.split() for line in said.splitlines() if line.startswith(("kept ", "to do "))]
    return {line[-1] if "/" in line[-1] else line[4]: " ".join(line[: 1 + (line[0] == "to")]) for line in words}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    call = Opd(folder / "output.txt", recipe_file(folder), "--run-dir", folder / "run")
    assert call.wait() == 0, call.said()
    assert processes_of(folder / "run") == []
    assert "Traceback" not in call.said()
    return folder / "run"


def test_a_small_pipeline_goes_from_nothing_to_its_table_once(tmp_path: Path, opd: Callable[..., Opd]) -> None:
    run_dir = tmp_path / "run"
    call = opd(recipe_file(tmp_path, SMALL), "--run-dir", run_dir)
    assert call.wait() == 0, call.said()
    assert processes_of(run_dir) == []
    assert "Traceback" not in call.said()
    assert "right answers to held-out prompts" in call.said()
    results = json.loads((run_dir / "results.json").read_text())
    assert results["status"] == "finished"
    for system in ("base", "add", "reverse", "opd", "soup"):
        for domain in ("add", "reverse"):
            (line,) = results["systems"][system]["domains"][domain]
            answers = [json.loads(answer) for answer in (run_dir / line["answers"]).read_text().splitlines()]
            assert sum(answer["score"] == 1 for answer in answers) == line["correct"]
            assert len(answers) == line["graded"] == 4
    before = files_below(run_dir / "artefacts")
    again = opd("--resume", run_dir)
    assert again.wait() == 0, again.said()
    assert set(states(again.said()).values()) == {"kept"}
    assert files_below(run_dir / "artefacts") == before


@pytest.mark.slow
def test_a_pipeline_goes_from_nothing_to_its_table(whole: Path) -> None:
    names = {name.rpartition("-")[0] for name in artefacts(whole)}
    assert names == {
        "model", "base", "add-sft", "reverse-grpo", "cold", "opd", "soup", "evaluate", "answers-add",
        "answers-reverse", "answers-base", "answers-opd", "answers-soup",
    }  # fmt: skip
    results = json.loads((whole / "results.json").read_text())
    assert results["seeds"] == [0]
    for system in ("base", "add", "reverse", "opd", "soup"):
        for domain in ("add", "reverse"):
            (line,) = results["systems"][system]["domains"][domain]
            assert line["graded"] == 4
            assert line["accuracy"] == line["correct"] / 4
            answers = [json.loads(answer) for answer in (whole / line["answers"]).read_text().splitlines()]
            assert [answer["split"] for answer in answers] == ["test"] * 4
            assert sum(answer["score"] == 1 for answer in answers) == line["correct"]
    assert results["systems"]["opd"]["cost"]["steps"] == 6
    assert results["systems"]["soup"]["cost"] is None
    assert set(results["phases"]["add"]) == {"before", "sft"}
    assert set(results["phases"]["reverse"]["grpo"]) == {"add", "reverse"}
    said = (whole.parent / "output.txt").read_text()
    assert "seed0/opd: done 6/6" in said
    assert "right answers to held-out prompts" in said


@pytest.mark.slow
def test_every_run_began_with_the_model_of_the_stage_before(whole: Path) -> None:
    models = {name.rpartition("-")[0]: whole / "artefacts" / name for name in artefacts(whole)}
    for name, before in (("base", "model/model"), ("add-sft", "base/student"), ("opd", "cold/student")):
        recipe = yaml.safe_load((models[name] / "recipe.yaml").read_text())
        artefact, _, part = before.partition("/")
        assert Path(recipe["student"]["path"]) == models[artefact] / part
    first, last = (load_file(models[name] / "student" / "model.safetensors") for name in ("cold", "opd"))
    assert any((first[name] != last[name]).any() for name in first)
    one, other = (load_file(models[name] / "student" / "model.safetensors") for name in ("add-sft", "reverse-grpo"))
    soup = load_file(models["soup"] / "model" / "model.safetensors")
    for name, found in soup.items():
        assert (found == ((one[name].double() + other[name].double()) / 2).float()).all(), name


@pytest.mark.slow
def test_what_is_done_is_kept(whole: Path, opd: Callable[..., Opd]) -> None:
    before = files_below(whole / "artefacts")
    again = opd("--resume", whole)
    assert again.wait() == 0, again.said()
    assert set(states(again.said()).values()) == {"kept"}
    assert files_below(whole / "artefacts") == before


@pytest.mark.slow
def test_another_specialist_makes_its_dependents_again_and_nothing_else(
    whole: Path, tmp_path: Path, opd: Callable[..., Opd]
) -> None:
    recipe = recipe_file(tmp_path, {"stages.add.sft.run.steps": 3})
    before = files_below(whole / "artefacts")
    told = opd(recipe, "--run-dir", whole, "--plan")
    assert told.wait() == 0, told.said()
    assert {job for job, state in states(told.said()).items() if state == "kept"} == {
        "seed0/model",
        "seed0/base",
        "seed0/reverse/grpo",
    }
    assert files_below(whole / "artefacts") == before

    old = set(artefacts(whole))
    call = opd(recipe, "--run-dir", whole)
    assert call.wait() == 0, call.said()
    new = {name.rpartition("-")[0] for name in set(artefacts(whole)) - old}
    assert new == {"add-sft", "cold", "opd", "soup", "evaluate", "answers-add", "answers-opd", "answers-soup"}
    after = files_below(whole / "artefacts")
    assert {name: after[name] for name in before} == before

    back = opd(recipe_file(tmp_path), "--run-dir", whole, "--plan")  # what was there before still is
    assert back.wait() == 0
    assert set(states(back.said()).values()) == {"kept"}


def begun(run_dir: Path, name: str) -> bool:
    """Whether a training run has done a step, but has not ended."""
    folders = list((run_dir / "artefacts").glob(f"{name}-*"))
    return any((path / "metrics.jsonl").exists() and not (path / "artefact.json").exists() for path in folders)


@pytest.mark.slow
def test_killed_in_many_stages_it_ends_with_the_same_artefacts(
    whole: Path, tmp_path: Path, opd: Callable[..., Opd]
) -> None:
    run_dir = tmp_path / "run"
    words: tuple[str | Path, ...] = (recipe_file(tmp_path), "--run-dir", run_dir)
    moments: dict[str, Callable[[], bool]] = {
        "the base": lambda: begun(run_dir, "base"),
        "a specialist": lambda: begun(run_dir, "reverse-grpo"),
        "distillation": lambda: begun(run_dir, "opd"),
        "the evaluation": lambda: any((run_dir / "answering").glob("evaluate-*/out/*/add.jsonl")),
    }
    for stage, moment in moments.items():
        call = opd(*words)
        until(lambda: moment() or call.process.poll() is not None, f"{stage} did not begin: {call.said()}")  # noqa: B023
        assert call.process.poll() is None, f"{stage}: {call.said()}"
        call.process.send_signal(signal.SIGKILL)
        call.wait()
        words = ("--resume", run_dir)
    last = opd(*words)
    assert last.wait() == 0, last.said()
    assert processes_of(run_dir) == []
    # The folder of the whole one may meanwhile hold those of another recipe, too.
    expected, found = artefacts(whole), artefacts(run_dir)
    assert found.keys() <= expected.keys()
    assert {name.rpartition("-")[0] for name in found} == {name.rpartition("-")[0] for name in expected}
    for name in found:
        for part in ("student", "model"):
            weights = Path("artefacts") / name / part / "model.safetensors"
            if (run_dir / weights).exists():
                ours, theirs = load_file(run_dir / weights), load_file(whole / weights)
                assert all((ours[key] == theirs[key]).all() for key in theirs), name
    for name in ("answers-opd", "answers-soup"):
        (folder,) = (run_dir / "artefacts").glob(f"{name}-*")
        texts = []
        for root in (run_dir, whole):
            answers = root / "artefacts" / folder.name / "answers" / "add.jsonl"
            texts.append([json.loads(line)["text"] for line in answers.read_text().splitlines()])
        assert texts[0] == texts[1], name


@pytest.mark.slow
def test_a_stop_and_a_failure_leave_nothing_running(tmp_path: Path, opd: Callable[..., Opd]) -> None:
    """Two jobs at once: one has nothing to learn from and fails, which ends the other with a checkpoint."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{number}="}) + "\n" for number in range(40)))
    run_dir = tmp_path / "run"
    changes = {
        "domains.bare": {"jsonl": {"path": str(prompts)}},
        "stages": {
            "long": {"kind": "base", "domains": ["add"], "recipe": {"run": {"steps": 100_000}}},
            "bare": {"kind": "base", "domains": ["bare"], "recipe": {"run": {"steps": 2}}},
        },
    }
    recipe, value = tmp_path / "pipeline-recipe.yaml", changed(changes)
    recipe.write_text(yaml.safe_dump(value, sort_keys=False))
    failing = opd(recipe, "--run-dir", run_dir)
    assert failing.wait() == 2, failing.said()
    assert "seed0/bare failed" in failing.said()
    assert "no gold answer" in failing.said()
    assert f"opd run --resume {run_dir}" in failing.said()
    assert "Traceback" not in failing.said()
    assert processes_of(run_dir) == []

    del value["stages"]["bare"]
    recipe.write_text(yaml.safe_dump(value, sort_keys=False))
    (folder,) = (run_dir / "artefacts").glob("long-*")
    steps = folder / "metrics.jsonl"
    before = steps.stat().st_mtime_ns if steps.exists() else 0
    stopped = opd(recipe, "--run-dir", run_dir)
    until(
        lambda: (steps.exists() and steps.stat().st_mtime_ns > before) or stopped.process.poll() is not None, "no step"
    )
    second = opd("--resume", run_dir)
    assert second.wait() == 2
    assert "runs a pipeline" in second.said()
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.wait() == 130, stopped.said()
    assert processes_of(run_dir) == []
    assert list(folder.glob("checkpoints/step-*/state.json"))
    assert not (folder / "artefact.json").exists()


@pytest.mark.slow
def test_seeds_and_a_sweep(tmp_path: Path, opd: Callable[..., Opd]) -> None:
    """Two seeds, and two learning rates of which the first seed chooses for both."""
    run_dir = tmp_path / "run"
    value = changed({"pipeline.seeds": [0, 1], "stages.add.sweep": {"optimizer.lr": [1.0e-3, 2.0e-3]}})
    value["stages"] = {name: value["stages"][name] for name in ("base", "add", "soup", "evaluate")}
    value["stages"]["soup"]["of"], value["stages"]["evaluate"]["models"] = ["base", "add"], ["base", "add", "soup"]
    recipe = tmp_path / "pipeline-recipe.yaml"
    recipe.write_text(yaml.safe_dump(value, sort_keys=False))
    call = opd(recipe, "--run-dir", run_dir)
    assert call.wait() == 0, call.said()
    assert processes_of(run_dir) == []
    found = artefacts(run_dir)
    trained = {}
    for name, artefact in found.items():
        if artefact["name"] == "add-sft":
            settings = yaml.safe_load((run_dir / "artefacts" / name / "recipe.yaml").read_text())
            trained[settings["run"]["seed"], settings["optimizer"]["lr"]] = name
    (choice,) = [artefact["facts"] for artefact in found.values() if artefact["kind"] == "choose"]
    chosen = choice["values"]["optimizer.lr"]
    assert set(trained) == {(0, 1e-3), (0, 2e-3), (1, chosen)}
    results = json.loads((run_dir / "results.json").read_text())
    assert results["status"] == "finished"
    assert results["systems"]["add"]["chosen"]["values"] == {"optimizer.lr": chosen}
    for system in ("base", "add", "soup"):
        assert [line["seed"] for line in results["systems"][system]["domains"]["add"]] == [0, 1]
    total = sum(artefact["facts"]["seconds"] for artefact in found.values())
    assert results["job_seconds"] == pytest.approx(total)
    assert results["job_seconds"] > sum(
        system["cost"]["seconds"] * 2 for system in results["systems"].values() if system["cost"]
    )
    again = opd("--resume", run_dir)
    assert again.wait() == 0
    assert set(states(again.said()).values()) == {"kept"}
