"""What a user can get wrong and what can break in mid-run: a clear message, a bounded wait, and nothing lost."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
import yaml
from mesh import QUICK, new_trainer, running_valkey, serving_rollouts, serving_teachers, teacher_config, tiny_recipe
from opd.v1 import rollout_service_pb2_grpc
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_checkpoint

from opd_mesh.cli.main import main
from opd_mesh.clients.rollout import RolloutClient
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.services import RolloutServerConfig, TeacherServerConfig
from opd_mesh.errors import (
    ConfigError,
    CorruptWeightsError,
    DivergedError,
    HeadMismatchError,
    ModelNotFoundError,
    OpdError,
    PreconditionError,
    RolloutUnavailableError,
    StreamUnavailableError,
    TeacherUnavailableError,
    TokenizerMismatchError,
    UnknownTeacherError,
)
from opd_mesh.rpc.server import MeshServer
from opd_mesh.trajectory import Trajectory
from opd_mesh.valkey import EmbeddedValkey
from rollout_server.engines import build_engine
from rollout_server.service import RolloutServicer
from student_trainer.run_state import Phase
from student_trainer.server import check_run_dir
from student_trainer.trainer import Trainer
from teacher_server.server import load_engines

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROOT = Path(__file__).resolve().parents[2]
EXACT = ("step", "loss", "grad_norm", "tokens", "kl/one", "response_length")


def edit_tokenizer(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    paths = {
        name: save_tiny_checkpoint(root / name, "llama", seed)
        for seed, name in enumerate(("student", "one", "other weights", "swapped", "roles"))
    }
    paths["more"] = save_tiny_checkpoint(root / "more", "llama", 9, vocab_size=132)
    vocabulary = json.loads((paths["swapped"] / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    tokens["a"], tokens["7"] = tokens["7"], tokens["a"]
    (paths["swapped"] / "tokenizer.json").write_text(json.dumps(vocabulary))
    edit_tokenizer(paths["roles"], "tokenizer_config.json", eos_token="<unk>")
    return paths


@dataclass
class Ground:
    """Servers that the tests of this file share, and a recipe for them."""

    teacher_address: str
    rollout_address: str
    redis_url: str
    models: dict[str, Path]

    def recipe(self, teacher: str = "one", *, address: str | None = None, **sections: Any) -> Recipe:
        base = tiny_recipe(self.models["student"], {teacher: self.models["one"]})
        value = base.model_dump(mode="json")
        value["teachers"] = {teacher: {"addresses": [address or self.teacher_address]}}
        value["rollout"]["peers"]["addresses"] = [self.rollout_address]
        value["redis_url"] = self.redis_url
        value["run"]["deterministic"] = True
        value["evaluation"]["prompts_per_domain"] = 0
        for name, section in sections.items():
            value[name] = value[name] | section if isinstance(section, dict) else section
        return Recipe.model_validate(value)

    def one_teacher(self, name: str = "one") -> TeacherServerConfig:
        return teacher_config({"one": self.models[name]}, deterministic=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ground(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    names = ("one", "swapped", "more", "roles")
    config = teacher_config({name: models[name] for name in names}, deterministic=True)
    short = config.teachers["one"].replace(max_tokens_per_item=300)
    config = config.replace(teachers={**config.teachers, "short": short})
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        rollouts = RolloutServerConfig(
            model=models["student"], engine={"max_context_tokens": 480}, redis_url=url, deterministic=True
        )
        async with serving_teachers(config) as teachers, serving_rollouts(rollouts) as rollout:
            yield Ground(teachers, rollout, url, models)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def exact(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT} for line in lines_of(run_dir)]


# --- before the first step -----------------------------------------------------------------------------------------
async def refused(recipe: Recipe, run_dir: Path, error: type[OpdError], message: str) -> OpdError:
    """The run does not begin: not one step, no checkpoint, and watchers are told why."""
    trainer = await new_trainer(recipe, run_dir)
    with pytest.raises(error, match=message) as caught:
        await asyncio.wait_for(trainer.run(), 60)
    assert lines_of(run_dir) == []
    assert not list(run_dir.glob("checkpoints/*"))
    assert trainer.state.phase == "failed"
    assert str(caught.value) == trainer.state.error
    return caught.value


async def test_another_tokenizer_is_refused_with_the_first_token_that_differs(ground: Ground, tmp_path: Path) -> None:
    error = await refused(
        ground.recipe("swapped"), tmp_path, TokenizerMismatchError,
        r"token id 13 is '7' in the student \(.*student\) but 'a' in teacher 'swapped' \(131 against 131 tokens\)",
    )  # fmt: skip
    assert error.field == "teachers.swapped"
    assert error.metadata["student"] != error.metadata["teacher"]


async def test_a_larger_tokenizer_is_refused(ground: Ground, tmp_path: Path) -> None:
    message = r"token id 131 is absent in the student .* but '<extra_\d+>' in teacher 'more' \(131 against 132"
    await refused(ground.recipe("more"), tmp_path, TokenizerMismatchError, message)


async def test_other_roles_are_refused_unless_the_recipe_says_whose_hold(ground: Ground, tmp_path: Path) -> None:
    message = "same tokens in other roles: EOS token id: 2 against 3"
    error = await refused(ground.recipe("roles"), tmp_path / "same", PreconditionError, message)
    assert error.field == "tokenizer_roles"
    trainer = await new_trainer(ground.recipe("roles", tokenizer_roles="student", run={"steps": 1}), tmp_path / "run")
    await trainer.run()
    assert len(lines_of(tmp_path / "run")) == 1
    warnings = json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"]
    assert warnings == ["teacher roles: EOS token id: 2 against 3 (the student's is used)"]


async def test_a_teacher_that_is_not_at_its_address(ground: Ground, tmp_path: Path) -> None:
    message = "no teacher 'nobody' here; served are: more, one, roles, short, swapped"
    await refused(ground.recipe("nobody"), tmp_path, UnknownTeacherError, message)


async def test_a_teacher_that_takes_too_little(ground: Ground, tmp_path: Path) -> None:
    error = await refused(
        ground.recipe("short"), tmp_path, PreconditionError, "takes 300 tokens, but the student may write up to 480"
    )
    assert error.field == "teachers.short.max_tokens_per_item"


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_servers_that_do_not_answer_are_named(ground: Ground, tmp_path: Path) -> None:
    impatient = {"channel": {"connect_timeout_s": 0.4}}
    port = _closed_port()
    await refused(
        ground.recipe(address=f"127.0.0.1:{port}", teacher_channel=impatient), tmp_path / "teacher",
        TeacherUnavailableError, f"teacher 'one': .*127.0.0.1:{port} was not ready within 0.4 s",
    )  # fmt: skip
    peers = {"peers": {"addresses": [f"127.0.0.1:{port}"], **impatient}}
    await refused(
        ground.recipe(rollout=peers), tmp_path / "rollout", OpdError, f"127.0.0.1:{port} was not ready within 0.4 s"
    )
    redis = {"redis_url": f"redis://127.0.0.1:{port}/0", "redis_timeout_s": 0.4}
    await refused(
        ground.recipe(**redis), tmp_path / "redis", StreamUnavailableError, f"127.0.0.1:{port}/0 did not answer"
    )


async def test_a_rollout_server_of_another_student(ground: Ground, tmp_path: Path) -> None:
    config = RolloutServerConfig(model=ground.models["swapped"], redis_url=ground.redis_url)
    async with serving_rollouts(config) as address:
        recipe = ground.recipe(rollout={"peers": {"addresses": [address]}})
        await refused(recipe, tmp_path, TokenizerMismatchError, f"rollout server {address} has tokenizer")


async def test_a_domain_without_a_teacher_is_an_error(ground: Ground, tmp_path: Path) -> None:
    trainer = await new_trainer(ground.recipe(), tmp_path)
    with pytest.raises(ConfigError, match="no teacher is routed to domain 'nowhere'; the recipe knows domain_0"):
        await trainer.teachers.mark(Trajectory("t", "nowhere", (1, 5, 6), ((1, 3),)))
    await trainer.rollouts.close()


async def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"holds a run already: continue it with --resume, or choose another"):
        check_run_dir(tmp_path, resume=False)
    check_run_dir(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


# --- weights -------------------------------------------------------------------------------------------------------
def _broken(models: dict[str, Path], folder: Path, how: str) -> TeacherServerConfig:
    path = save_tiny_checkpoint(folder / how, "llama", 1)
    config = teacher_config({"good": models["one"], "broken": path})
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    match how:
        case "nan":
            tensors[name][3, 4] = float("nan")
        case "infinity":
            tensors[name][3, 4] = float("inf")
        case "missing":
            del tensors[name]
        case "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        case "hash":
            tensors[name][3, 4] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    if how == "gone":
        config = teacher_config({"broken": folder / "not there"})
    if how == "hash":
        good = load_engines(teacher_config({"one": models["one"]}))["one"].facts.teacher_digest
        broken = config.teachers["broken"].replace(expected_digest=good)
        config = config.replace(teachers={"broken": broken})
    return config


WEIGHTS: dict[str, tuple[type[OpdError], str]] = {
    "nan": (CorruptWeightsError, r"teacher 'broken': .*nan.*: model.layers.1.mlp.up_proj.weight holds NaN"),
    "infinity": (CorruptWeightsError, r"teacher 'broken': .*up_proj.weight holds NaN or infinity"),
    "missing": (CorruptWeightsError, r"teacher 'broken': .*up_proj.weight is missing"),
    "shape": (CorruptWeightsError, r"teacher 'broken': .*up_proj.weight has shape \[55, 48\].*\[56, 48\]"),
    "truncated": (CorruptWeightsError, r"teacher 'broken': .*truncated/model.safetensors .*is truncated"),
    "hash": (CorruptWeightsError, r"teacher 'broken': .*weights have digest [0-9a-f]{64}, expected [0-9a-f]{64}"),
    "gone": (ModelNotFoundError, r"teacher 'broken': model folder .*not there does not exist"),
}


@pytest.mark.parametrize("how", WEIGHTS)
async def test_weights_that_are_not_what_they_should_be(models: dict[str, Path], tmp_path: Path, how: str) -> None:
    error, message = WEIGHTS[how]
    config = await asyncio.to_thread(_broken, models, tmp_path, how)
    with pytest.raises(error, match=message):
        await asyncio.to_thread(load_engines, config)


# --- in mid-run ----------------------------------------------------------------------------------------------------
def after_step(trainer: Trainer, number: int, action: Any) -> None:
    """Do something between step ``number`` and the next."""
    step = trainer.step

    async def step_and_act() -> None:
        await step()
        if trainer.progress.step == number:
            await action()

    trainer.step = step_and_act  # type: ignore[method-assign]


async def broken_off(trainer: Trainer, error: type[OpdError], message: str, *, steps: int = 1) -> OpdError:
    """The run ends with this error; what was done is in a checkpoint, and the summary says what happened."""
    with pytest.raises(error, match=message) as caught:
        await asyncio.wait_for(trainer.run(), 60)
    assert len(lines_of(trainer.run_dir)) == steps
    assert [path.name for path in sorted(trainer.run_dir.glob("checkpoints/*"))] == [f"step-{steps:06d}"]
    summary = json.loads((trainer.run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", steps)
    assert summary["error"] == trainer.state.error == str(caught.value)
    return caught.value


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The exact metrics of three steps that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    await (await new_trainer(ground.recipe(), run_dir)).run()
    lines = exact(run_dir)
    assert len(lines) == 3
    return lines


async def test_a_teacher_that_goes_is_waited_for_a_while(
    ground: Ground, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(serving_teachers(ground.one_teacher()))
        trainer = await new_trainer(ground.recipe(address=address, teacher_timeout_s=1.0), tmp_path)
        after_step(trainer, 1, stack.aclose)
        error = await broken_off(trainer, TeacherUnavailableError, f"'one' at {address} gave no answer for 1 s")
        assert error.metadata["teacher_id"] == "one"
    resumed = await new_trainer(ground.recipe(), tmp_path, resume=True)  # the same teacher at another address
    await resumed.run()
    assert exact(tmp_path) == undisturbed
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


async def test_a_teacher_that_comes_back_in_time_is_not_noticed(
    ground: Ground, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack, AsyncExitStack() as later:
        address = await stack.enter_async_context(serving_teachers(ground.one_teacher()))
        trainer = await new_trainer(ground.recipe(address=address, teacher_timeout_s=60), tmp_path)

        async def restart() -> None:
            await stack.aclose()
            await later.enter_async_context(serving_teachers(ground.one_teacher(), listen=address))

        after_step(trainer, 1, restart)
        await trainer.run()
    assert exact(tmp_path) == undisturbed


async def test_a_teacher_that_comes_back_with_other_weights_ends_the_run(
    ground: Ground, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack, AsyncExitStack() as later:
        address = await stack.enter_async_context(serving_teachers(ground.one_teacher()))
        trainer = await new_trainer(ground.recipe(address=address), tmp_path)

        async def exchange() -> None:
            await stack.aclose()
            await later.enter_async_context(serving_teachers(ground.one_teacher("other weights"), listen=address))

        after_step(trainer, 1, exchange)
        error = await broken_off(trainer, HeadMismatchError, r"teacher digest .*is served, .*was expected")
        assert error.field == "expected_teacher_digest"
    resumed = await new_trainer(ground.recipe(), tmp_path, resume=True)
    await resumed.run()
    assert exact(tmp_path) == undisturbed


async def test_a_teacher_that_is_another_one_on_resume_is_refused(ground: Ground, tmp_path: Path) -> None:
    """Between two processes of one run, too: what it was taught before must not change unseen."""
    trainer = await new_trainer(ground.recipe(), tmp_path)

    async def stop() -> None:
        trainer.stopping = True

    after_step(trainer, 1, stop)
    await trainer.run()
    async with serving_teachers(ground.one_teacher("other weights")) as address:
        resumed = await new_trainer(ground.recipe(address=address), tmp_path, resume=True)
        with pytest.raises(PreconditionError, match=r"(head|teacher)/one is .*, but the run began with"):
            await resumed.run()
    assert len(lines_of(tmp_path)) == 1


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "valkey" / "data", tmp_path / "valkey" / "log") as server:
        yield server


async def test_redis_that_goes_ends_the_run_and_a_resume_goes_on(
    ground: Ground, undisturbed: list[dict[str, Any]], own_valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    rollouts = RolloutServerConfig(
        model=ground.models["student"],
        engine={"max_context_tokens": 480},
        redis_url=own_valkey.url,
        deterministic=True,
        stream_timeout_s=0.5,
    )
    async with serving_rollouts(rollouts) as address:
        own = {"redis_url": own_valkey.url, "redis_timeout_s": 0.5, "rollout": {"peers": {"addresses": [address]}}}
        trainer = await new_trainer(ground.recipe(**own), tmp_path / "run")

        async def stop_redis() -> None:
            await asyncio.to_thread(own_valkey.stop)

        after_step(trainer, 1, stop_redis)
        await broken_off(trainer, StreamUnavailableError, r"Redis at redis://127.0.0.1:\d+/0 did not answer")
        await asyncio.to_thread(own_valkey.start)
        resumed = await new_trainer(ground.recipe(**own), tmp_path / "run", resume=True)
        await resumed.run()
    assert exact(tmp_path / "run") == undisturbed


async def test_a_rollout_server_that_is_still_loading_is_waited_for(ground: Ground, tmp_path: Path) -> None:
    rollouts = RolloutServerConfig(model=ground.models["student"], redis_url=ground.redis_url)
    server = MeshServer(QUICK, services=["opd.v1.RolloutService"])
    servicer = RolloutServicer(rollouts, redis_url=rollouts.redis_url, on_serving=server.set_serving)
    rollout_service_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server.grpc)
    address = await server.start("127.0.0.1:0")
    trainer = await new_trainer(ground.recipe(rollout={"peers": {"addresses": [address]}}), tmp_path)
    try:
        connecting = asyncio.create_task(trainer.rollouts.connect())
        await asyncio.sleep(1.5)  # longer than gRPC's own attempts, which would give up
        assert not connecting.done()
        loaded = await asyncio.to_thread(build_engine, rollouts)
        servicer.install(loaded)
        await asyncio.wait_for(connecting, 30)
    finally:
        await trainer.rollouts.close()
        await server.drain(servicer.close)


async def test_a_rollout_server_that_goes_ends_the_run(
    ground: Ground, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    rollouts = RolloutServerConfig(
        model=ground.models["student"],
        engine={"max_context_tokens": 480},
        redis_url=ground.redis_url,
        deterministic=True,
    )
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(serving_rollouts(rollouts))
        peers = {"addresses": [address], "channel": {"connect_timeout_s": 1.0}}
        trainer = await new_trainer(ground.recipe(rollout={"peers": peers}), tmp_path)
        after_step(trainer, 1, stack.aclose)
        await broken_off(trainer, RolloutUnavailableError, f"rollout server {address} was not to be reached for 1 s")
    resumed = await new_trainer(ground.recipe(), tmp_path, resume=True)
    await resumed.run()
    assert exact(tmp_path) == undisturbed


async def test_a_step_that_cannot_end_is_given_up_when_the_run_stops(
    ground: Ground, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    async with RolloutClient(ground.rollout_address) as rollouts:
        trainer = await new_trainer(ground.recipe(), tmp_path)

        async def pause() -> None:
            await rollouts.pause()
            asyncio.get_running_loop().call_later(0.3, trainer.give_up_step)

        after_step(trainer, 1, pause)
        try:
            await asyncio.wait_for(trainer.run(), 60)
        finally:
            await rollouts.resume()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("interrupted", 1)
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["step-000001"]
    resumed = await new_trainer(ground.recipe(), tmp_path, resume=True)
    await resumed.run()
    assert exact(tmp_path) == undisturbed


async def test_a_run_that_is_stopped_while_it_waits_for_its_teachers_ends(ground: Ground, tmp_path: Path) -> None:
    with socket.socket() as silent:  # listens, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        recipe = ground.recipe()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        teachers = {name: teacher.replace(addresses=[address]) for name, teacher in recipe.teachers.items()}
        trainer = await new_trainer(recipe.replace(teachers=teachers), tmp_path)
        asyncio.get_running_loop().call_later(0.3, trainer.stop)
        await asyncio.wait_for(trainer.run(), 30)
    assert (trainer.state.phase, trainer.state.activity) == (Phase.FINISHED, "stopped before step 1")
    assert not list(tmp_path.glob("checkpoints/*"))


async def test_a_loss_that_is_not_finite_is_not_applied(
    ground: Ground, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    trainer = await new_trainer(ground.recipe(), tmp_path)
    tensors_of = trainer.teachers.tensors
    before: dict[str, torch.Tensor] = {}

    async def poisoned(*asked: Any) -> dict[str, np.ndarray]:
        said = {name: np.array(array) for name, array in (await tensors_of(*asked)).items()}
        said["hidden_states"][0, 0] = np.nan
        return said

    async def poison() -> None:
        before.update({name: tensor.detach().clone() for name, tensor in trainer.student.trainable()})
        trainer.teachers.tensors = poisoned  # type: ignore[method-assign]

    after_step(trainer, 1, poison)
    await broken_off(trainer, DivergedError, "loss nan, gradient norm .*: nothing was applied")
    for name, tensor in trainer.student.trainable():
        assert torch.equal(tensor, before[name]), name
    saved = load_file(tmp_path / "checkpoints" / "step-000001" / "student.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    resumed = await new_trainer(ground.recipe(), tmp_path, resume=True)
    await resumed.run()
    assert exact(tmp_path) == undisturbed


# --- from the shell ------------------------------------------------------------------------------------------------
OPD = Path(sys.executable).with_name("opd")


def shell(*command: str | Path) -> tuple[int, str]:
    """(exit code, what it said)."""
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[Any, str]:
    """As :func:`shell`, in this process: seconds are saved where nothing is started."""
    monkeypatch.setattr(sys, "argv", ["opd", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out + captured.err


def recipe_file(models: dict[str, Path], folder: Path, **changes: Any) -> Path:
    recipe = tiny_recipe(models["student"], {"one": models["one"]}).model_dump(mode="json") | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


BAD_RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "student": ({"student": {"path": "no/such"}}, "error: student.path: no/such does not exist"),
    "teacher": ({"teachers": {"one": {"path": "gone"}}}, "error: teachers.one.path: gone does not exist"),
    "adapter": (
        {"teachers": {"one": {"path": ".", "adapter": "gone"}}}, "error: teachers.one.adapter: gone does not exist",
    ),
    "section": ({"evaluatoin": {}}, "unknown key 'evaluatoin'; did you mean 'evaluation'?"),
    "key": (
        {"optimizer": {"wieght_decay": 1}},
        "optimizer.wieght_decay: unknown key 'wieght_decay'; did you mean 'weight_decay'?",
    ),
    "value": ({"run": {"name": "x", "steps": 0}}, "run.steps: Input should be greater than or equal to 1"),
    "routing": (
        {"domains": {"d": {"reasoning_gym": {"task": "chain_sum"}, "teachers": {"two": 1.0}}}},
        "domains.d.teachers names 'two', but the teachers are one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RECIPES)
async def test_a_recipe_that_cannot_run(
    models: dict[str, Path],
    tmp_path: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes, message = BAD_RECIPES[case]
    file = recipe_file(models, tmp_path, **changes)
    command = ("run", file, "--run-dir", tmp_path / "run")
    if case in ("teacher", "section"):
        code, said = await asyncio.to_thread(shell, OPD, *command)
    else:
        code, said = inside(monkeypatch, capsys, *command)
    assert code == 2, said
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


async def test_a_run_is_not_begun_where_there_is_one(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(models, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("of another run")
    code, said = inside(monkeypatch, capsys, "run", file, "--run-dir", tmp_path / "run")
    assert code == 2
    assert f"{tmp_path / 'run'} holds a run already: continue it with --resume" in said
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "of another run"
    code, said = inside(monkeypatch, capsys, "run", "--resume", tmp_path / "nothing here")
    assert code == 2
    assert "cannot read" in said
    assert "nothing here" in said


async def test_a_server_process_says_what_is_wrong_and_ends(models: dict[str, Path], tmp_path: Path) -> None:
    """A port that is taken costs no loading: the weights, which are broken, are not even looked at."""
    broken = await asyncio.to_thread(_broken, models, tmp_path, "nan")
    config = tmp_path / "teachers.yaml"
    config.write_text(yaml.safe_dump(broken.model_dump(mode="json")))
    command = (sys.executable, "-m", "teacher_server", "--config", config, "--listen")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (code, said), (other_code, other_said) = await asyncio.gather(
            asyncio.to_thread(shell, *command, address), asyncio.to_thread(shell, *command, "127.0.0.1:0")
        )
    assert code == 2
    assert f"error: listen: cannot listen on {address}" in said
    assert "loading teacher" not in said
    assert other_code == 2
    assert "error: teacher 'broken': " in other_said
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in other_said
    for text in (said, other_said):
        assert "Traceback" not in text
        assert "listening on" not in text.replace("opd_mesh.rpc: listening on", "")  # to a supervisor, that is
