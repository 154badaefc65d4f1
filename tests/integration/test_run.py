"""Whole runs of three steps through real servers and a real Valkey, with tiny random models."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mesh import mesh, new_trainer, running_valkey, tiny_family, tiny_recipe
from opd.v1 import trainer_service_pb2, trainer_service_pb2_grpc
from tiny_models import save_tiny_checkpoint
from transformers import AutoModelForCausalLM

from opd_mesh.clients.trainer import TrainerClient
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.services import ServerConfig
from opd_mesh.errors import PreconditionError
from opd_mesh.rpc.server import MeshServer
from opd_mesh.stream import TrajectoryStream
from opd_mesh.trajectory import Trajectory
from student_trainer.service import TrainerServicer
from student_trainer.trainer import Trainer


def lines_of(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


async def whole_run(recipe: Recipe, folder: Path, name: str = "run") -> Trainer:
    """One run with servers of its own."""
    with running_valkey(folder / f"{name}-valkey") as url:
        async with mesh(recipe, url) as resolved:
            trainer = await new_trainer(resolved, folder / name)
            await trainer.run()
    return trainer


async def test_a_run_leaves_what_the_design_says(tmp_path: Path) -> None:
    student, teachers = tiny_family(tmp_path)
    trainer = await whole_run(tiny_recipe(student, teachers, optimizer={"lr": 3e-3}, run={"steps": 6}), tmp_path)
    run_dir = tmp_path / "run"

    lines = lines_of(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for key in (
        "loss", "tokens", "tokens_per_s", "policy_version", "staleness", "kl/one", "kl/two", "response_length",
        "entropy/student", "entropy/one", "overlap/one", "heads_loaded", "wire_bytes", "seconds/rollout",
        "seconds/score", "seconds/update", "seconds/policy",
    ):  # fmt: skip
        assert key in lines[0], key
    assert all(line["staleness"] == 0 for line in lines)
    assert all(line["heads_loaded"] == 2 for line in lines)
    assert lines[-1]["policy_version"] == 6
    full = [line for line in lines if line["tokens"] == 32]  # no response of theirs ended early: 16 tokens a teacher
    assert full
    for line in full:
        assert line["loss"] == pytest.approx((line["kl/one"] + line["kl/two"]) / 2, rel=1e-5)

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    for domain in ("domain_0", "domain_1"):
        assert summary["heldout_kl_after"][domain] < summary["heldout_kl_before"][domain]
        assert set(summary["heldout"][domain]) == {"student_responses", "teacher_responses"}
    saved = AutoModelForCausalLM.from_pretrained(run_dir / "student")
    for (name, ours), (_, theirs) in zip(trainer.student.trainable(), saved.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert len(list((run_dir / "checkpoints").glob("step-*"))) >= 1


async def test_entries_stay_in_the_stream_until_a_checkpoint_holds_them(tmp_path: Path) -> None:
    student, teachers = tiny_family(tmp_path)
    recipe = tiny_recipe(student, teachers, run={"steps": 3}, checkpoint={"every_steps": 2})
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe, url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")
            pending: list[tuple[int, int]] = []
            original = trainer.between_steps

            async def look() -> None:
                await original()
                pending.append((trainer.progress.step, await trainer.rollouts.stream.pending()))

            trainer.between_steps = look  # type: ignore[method-assign]
            await trainer.run()
            # Step 1 has no checkpoint; that of step 2 lets go of both.
            assert pending == [(0, 0), (1, 4), (2, 0)]
            stream = TrajectoryStream(url, trainer.run_id, consumer="afterwards")
            assert (await stream.pending(), await stream.length()) == (0, 0)
            await stream.close()


async def test_student_equal_to_teacher_has_no_loss(tmp_path: Path) -> None:
    student = save_tiny_checkpoint(tmp_path / "student", "llama", 0)
    recipe = tiny_recipe(student, {"self": student}, run={"steps": 1}, evaluation={"prompts_per_domain": 1})
    await whole_run(recipe, tmp_path)
    (line,) = lines_of(tmp_path / "run")
    assert abs(line["loss"]) < 1e-5


async def test_muon_towards_beyond_two_teachers_of_every_token(tmp_path: Path) -> None:
    """Another optimizer, another objective, heads side by side: a whole run, stopped and resumed."""
    student, teachers = tiny_family(tmp_path)
    teachers["base"] = save_tiny_checkpoint(tmp_path / "base", "llama", 3)
    domain = {"reasoning_gym": {"task": "chain_sum"}, "teachers": {"one": 1.0, "two": 0.5}}
    recipe = tiny_recipe(
        student,
        teachers,
        run={"steps": 2},
        domains={"sums": domain},
        objective={"name": "exopd", "reference": "base"},
        optimizer={"name": "muon", "weight_decay": 0.01},
        batch={"heads_resident": 2},
        evaluation={"prompts_per_domain": 1},
    )
    await whole_run(recipe, tmp_path)
    first = lines_of(tmp_path / "run")
    assert {"kl/one", "kl/two", "overlap/two"} <= first[0].keys()
    assert "kl/base" not in first[0]
    assert [line["heads_loaded"] for line in first] == [line["heads_needed"] for line in first] == [3, 3]

    longer = recipe.replace(run=recipe.run.replace(steps=3))
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(longer, url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run", resume=True)
            await trainer.run()
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3]
    assert any(name.startswith("momentum_buffer.") for name in trainer.optimizer.state_tensors())


async def test_a_run_resumed_with_another_teacher_is_refused(tmp_path: Path) -> None:
    student, teachers = tiny_family(tmp_path)
    recipe = tiny_recipe(student, teachers, run={"steps": 1})
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe, url) as resolved:
            await (await new_trainer(resolved, tmp_path / "run")).run()
        save_tiny_checkpoint(teachers["two"], "llama", 7)  # re-exported meanwhile
        longer = recipe.replace(run=recipe.run.replace(steps=2))
        async with mesh(longer, url) as resolved:
            resumed = await new_trainer(resolved, tmp_path / "run", resume=True)
            with pytest.raises(PreconditionError, match="the run began with") as error:
                await resumed.run()
    assert error.value.field == "teachers.two"
    assert resumed.identity.lineage == 2


async def test_deepseek_v4_student_and_teachers(tmp_path: Path) -> None:
    student, teachers = tiny_family(tmp_path, "deepseek_v4")
    await whole_run(tiny_recipe(student, teachers, evaluation={"prompts_per_domain": 1}), tmp_path)
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 3
    assert all(line["loss"] > 0.5 for line in lines)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


async def test_lora_student_trains_the_adapter_alone(tmp_path: Path) -> None:
    student, teachers = tiny_family(tmp_path)
    recipe = tiny_recipe(student, teachers, student={"lora": {"rank": 8}}, optimizer={"lr": 1e-2}, run={"steps": 6})
    trainer = await whole_run(recipe, tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(summary["heldout_kl_after"].values()) < sum(summary["heldout_kl_before"].values())
    assert (tmp_path / "run" / "student" / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")  # base and adapter
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = trainer.student.model(input_ids=ids).logits
        assert torch.allclose(merged(input_ids=ids).logits, wanted, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(student)
        assert not torch.allclose(base(input_ids=ids).logits, wanted, atol=1e-2)


DETERMINISTIC = {"run": {"deterministic": True, "steps": 4}, "checkpoint": {"every_steps": 2}}


async def test_same_seed_same_bits(tmp_path: Path) -> None:
    student, teachers = tiny_family(tmp_path)
    recipe = tiny_recipe(student, teachers, **DETERMINISTIC)
    for name in ("a", "b"):
        await whole_run(recipe, tmp_path, name)
    other = recipe.replace(run=recipe.run.replace(seed=2))
    await whole_run(other, tmp_path, "c")
    losses = {name: [line["loss"] for line in lines_of(tmp_path / name)] for name in ("a", "b", "c")}
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
async def test_a_resumed_run_equals_one_never_stopped(tmp_path: Path, stop_after: int) -> None:
    """Stopped after a checkpoint, or between two: what the checkpoint does not hold is done again, to the same bits."""
    student, teachers = tiny_family(tmp_path)
    recipe = tiny_recipe(student, teachers, **DETERMINISTIC)
    await whole_run(recipe, tmp_path, "whole")
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe, url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")
            original = trainer.step

            async def step_then_die() -> None:
                await original()
                if trainer.progress.step == stop_after:
                    raise asyncio.CancelledError  # as SIGKILL would, but for the checkpoint taken below

            trainer.step = step_then_die  # type: ignore[method-assign]
            if stop_after == 3:  # a real kill: no checkpoint of step 3
                trainer.end_early = _nothing  # type: ignore[method-assign]
            with pytest.raises(asyncio.CancelledError):
                await trainer.run()
            resumed = await new_trainer(resolved, tmp_path / "run", resume=True)
            await resumed.run()
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "kl/one", "kl/two", "response_length")
    whole = [{key: line[key] for key in keys} for line in lines_of(tmp_path / "whole")]
    again = [{key: line[key] for key in keys} for line in lines_of(tmp_path / "run")]
    assert again == whole
    assert resumed.progress.lineage == 2
    evaluations = ("whole", "run")
    assert lines_of(tmp_path / evaluations[0], "evaluations.jsonl") == lines_of(
        tmp_path / evaluations[1], "evaluations.jsonl"
    )


async def _nothing(error: BaseException) -> None:
    return None


async def test_passes_do_not_change_the_step(tmp_path: Path) -> None:
    """Gradient accumulation by token budget gives the step of one pass: a mean of all tokens, not a mean of means."""
    student, teachers = tiny_family(tmp_path)
    losses, norms = [], []
    for name, budget in (("one", 4096), ("many", 1)):
        recipe = tiny_recipe(student, teachers, batch={"tokens_per_pass": budget}, evaluation={"prompts_per_domain": 0})
        short = recipe.domains["domain_0"].replace(max_new_tokens=2)  # passes of 2 tokens and of 8
        recipe = recipe.replace(domains={**recipe.domains, "domain_0": short})
        await whole_run(recipe, tmp_path, f"run-{name}")
        lines = lines_of(tmp_path / f"run-{name}")
        losses.append([line["loss"] for line in lines])
        norms.append(lines[0]["grad_norm"])  # Adam would hide a wrong scale
        assert lines[0]["passes"] == (1 if budget > 1 else 4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


async def test_the_run_is_seen_and_steered_from_outside(tmp_path: Path) -> None:
    student, teachers = tiny_family(tmp_path)
    recipe = tiny_recipe(student, teachers, run={"steps": 5}, max_staleness=1)
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe, url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")

            async def submit(trajectory: Trajectory) -> bool:
                return await trainer.rollouts.submit(trajectory)

            server = MeshServer(
                ServerConfig(drain_propagation_s=0, drain_grace_s=2), services=["opd.v1.TrainerService"]
            )
            servicer = TrainerServicer(trainer.state, submit=submit, save=trainer.request_save, idle_timeout_s=5)
            trainer_service_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, server.grpc)
            address = await server.start("127.0.0.1:0")
            await server.set_serving(True)
            async with TrainerClient(address) as client:
                assert (await client.pause_run("look")).state == trainer_service_pb2.RUN_STATE_STARTING
                running = asyncio.create_task(trainer.run())
                while (await client.get_run()).state != trainer_service_pb2.RUN_STATE_PAUSED:
                    await asyncio.sleep(0.05)
                assert (await client.get_run()).step == 0
                saved = await client.save_checkpoint()
                assert Path(saved.path).exists()
                assert saved.step == 0

                good = Trajectory("outside-1", "domain_0", (1, 5, 6, 7), ((2, 4),), policy_versions=(0, 0), lineage=1)
                stale = Trajectory("outside-2", "domain_0", (1, 5, 6, 7), ((2, 4),), policy_versions=(0, 0), lineage=0)
                bad = Trajectory("outside-3", "nowhere", (1, 5, 6, 7), ((2, 4),), policy_versions=(0, 0), lineage=1)
                empty = Trajectory("outside-4", "domain_0", (1, 5, 6, 7), (), policy_versions=(), lineage=1)
                answer = await client.submit_trajectories([good, stale, bad, good, empty])
                assert (answer.accepted, answer.duplicates) == (2, 1)
                assert [(item.index, item.trajectory_id) for item in answer.refused] == [
                    (2, "outside-3"),
                    (4, "outside-4"),
                ]
                assert "nowhere" in answer.refused[0].status.message

                await client.resume_run()
                seen = [event async for event in client.watch_run()]
                await running
                steps = [event.step.step for event in seen if event.WhichOneof("event") == "step"]
                assert steps == [1, 2, 3, 4, 5]
                assert seen[-1].WhichOneof("event") in ("run", "step")
            await server.drain()
    lines = lines_of(tmp_path / "run")
    assert sum(line["external"] for line in lines) == 1
    assert lines[-1]["external_dropped"] == 1
    assert trainer.progress.consumed_external == ["outside-1"]
