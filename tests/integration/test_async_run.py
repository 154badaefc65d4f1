"""Generation that runs ahead of the training: real servers, a real Valkey, tiny models."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from mesh import mesh, new_trainer, running_valkey, serving_rollouts, tiny_family, tiny_recipe
from test_run import lines_of, whole_run

from opd_mesh.clients.rollout import RolloutClient, Written
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.services import RolloutServerConfig
from opd_mesh.errors import ConfigError, RequestConflictError
from opd_mesh.stream import TrajectoryStream
from opd_mesh.trajectory import Trajectory
from student_trainer.tasks import Prompt
from student_trainer.trainer import Trainer
from student_trainer.update import compute_gradients

STEPS = 6


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    student, teachers = tiny_family(folder / "models")
    fields: dict[str, Any] = {"run": {"steps": STEPS}, "max_staleness": 1, "evaluation": {"prompts_per_domain": 1}}
    return tiny_recipe(student, teachers, **(fields | sections))


def record(trainer: Trainer) -> dict[int, list[Trajectory]]:
    """Fills with the trajectories of every step that is trained."""
    trained: dict[int, list[Trajectory]] = {}
    advance = trainer.advance

    def advance_and_note(gathered: Any, *rest: Any) -> None:
        trained[gathered.number] = [arrival.trajectory for arrival in gathered.arrivals]
        advance(gathered, *rest)

    trainer.advance = advance_and_note  # type: ignore[method-assign]
    return trained


def check_staleness(trained: dict[int, list[Trajectory]], bound: int) -> list[int]:
    """Of every trajectory, from the versions of its tokens."""
    ages = []
    for number, trajectories in trained.items():
        for trajectory in trajectories:
            assert len(trajectory.policy_versions) == trajectory.num_scored
            assert max(trajectory.policy_versions) <= number - 1
            ages.append(number - 1 - min(trajectory.policy_versions))
    assert max(ages) <= bound
    return ages


def prompts(trained: dict[int, list[Trajectory]]) -> dict[int, list[tuple[str, tuple[int, ...], int]]]:
    """By step: place in the step, the prompt's ids, seed."""
    return {
        number: sorted(
            (one.trajectory_id.split("-", 1)[1], one.token_ids[: one.scored_spans[0][0]], one.sampling.seed)
            for one in trajectories
        )
        for number, trajectories in trained.items()
    }


async def recorded_run(recipe: Recipe, folder: Path, name: str) -> dict[int, list[Trajectory]]:
    with running_valkey(folder / f"{name}-valkey") as url:
        async with mesh(recipe, url) as resolved:
            trainer = await new_trainer(resolved, folder / name)
            trained = record(trainer)
            await trainer.run()
            stream = TrajectoryStream(url, trainer.run_id, consumer="afterwards")
            assert (await stream.pending(), await stream.length()) == (0, 0)
            await stream.close()
    return trained


async def test_responses_are_written_ahead_and_never_older_than_the_bound(tmp_path: Path) -> None:
    evaluation = {"prompts_per_domain": 1, "every_steps": 2}
    recipe = recipe_of(tmp_path, evaluation=evaluation, max_staleness=0)
    sync = await recorded_run(recipe, tmp_path, "sync")
    assert set(check_staleness(sync, 0)) == {0}
    assert all(line["backlog"] == 0 for line in lines_of(tmp_path / "sync"))
    for bound in (1, 3):
        name = f"ahead-{bound}"
        trained = await recorded_run(recipe.replace(max_staleness=bound), tmp_path, name)
        ages = check_staleness(trained, bound)
        assert any(age > 0 for age in ages)
        assert prompts(trained) == prompts(sync)  # in the same steps
        lines = lines_of(tmp_path / name)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        for line in lines:
            of_step = [line["step"] - 1 - min(one.policy_versions) for one in trained[line["step"]]]
            assert line["staleness"] == max(of_step)
            assert line["staleness_mean"] == pytest.approx(sum(of_step) / len(of_step))
            assert line["samples"] == 4
            assert 0 <= line["backlog"] <= 4 * bound
            assert line["rollout_idle_s"] >= 0
            assert line["seconds/wait_rollout"] <= line["seconds/rollout"]
        assert json.loads((tmp_path / name / "summary.json").read_text())["status"] == "finished"
        assert [line["step"] for line in lines_of(tmp_path / name, "evaluations.jsonl")] == [0, 2, 4, 6]


async def test_a_slow_trainer_finds_responses_waiting_and_leaves_the_servers_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Trainer] = []

    def slow(*arguments: Any) -> Any:  # in the updating thread: until both later steps are here, and a while longer
        (trainer,) = trainers
        deadline = time.monotonic() + 30
        if trainer.progress.step + 1 <= STEPS - 2:
            while trainer.supply.backlog < 8:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.2)
        return compute_gradients(*arguments)

    monkeypatch.setattr("student_trainer.trainer.compute_gradients", slow)
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe_of(tmp_path, max_staleness=2), url) as resolved:
            trainers.append(await new_trainer(resolved, tmp_path / "run"))
            trained = record(trainers[0])
            await trainers[0].run()
    assert set(check_staleness(trained, 2)) == {0, 1, 2}
    lines = lines_of(tmp_path / "run")
    # What is written when the next step begins: at least all of the step behind it, and nothing behind the last.
    assert all(line["backlog"] >= 4 for line in lines[1 : STEPS - 1])
    assert lines[-1]["backlog"] == 0
    assert sum(line["rollout_idle_s"] for line in lines) > 0.2


async def test_a_slow_server_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RolloutClient.write

    async def slow(self: RolloutClient, *arguments: Any, **named: Any) -> Written:
        await asyncio.sleep(0.2)
        return await write(self, *arguments, **named)

    monkeypatch.setattr(RolloutClient, "write", slow)
    for bound in (0, 1):
        recipe = recipe_of(tmp_path, max_staleness=bound, run={"steps": 3})
        await whole_run(recipe, tmp_path, f"run-{bound}")
        lines = lines_of(tmp_path / f"run-{bound}")
        first = lines if bound == 0 else lines[:1]  # what is asked for ahead may be there in time
        assert all(line["seconds/wait_rollout"] > 0.1 for line in first)


@pytest.mark.parametrize("spill", [False, True], ids=["wait", "spill"])
async def test_marks_of_later_steps_leave_the_room_to_those_that_are_waited_for(tmp_path: Path, spill: bool) -> None:
    # Room for one answer of some twelve.
    batch = {"prompts_per_step": 6, "tokens_per_pass": 300, "marks_memory_bytes": 8 * 48 * 4, "marks_spill": spill}
    recipe = recipe_of(tmp_path, batch=batch, max_staleness=3)
    asked: list[int] = []
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe, url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")
            ask = trainer.teachers.ask

            def ask_and_check(trajectory: Trajectory, buffer: Any) -> Any:
                number = int(trajectory.trajectory_id.split("-s")[1][:6])
                asked.append(number)
                if number > trainer.progress.step + 1:
                    assert not trainer.marks.is_full
                return ask(trajectory, buffer)

            trainer.teachers.ask = ask_and_check  # type: ignore[method-assign]
            await asyncio.wait_for(trainer.run(), 120)
    assert asked == sorted(asked)  # step by step
    assert len(asked) == 6 * STEPS
    assert [line["samples"] for line in lines_of(tmp_path / "run")] == [6] * STEPS
    assert not list((tmp_path / "run").glob("spill/*"))


def after_step(trainer: Trainer, number: int, action: Any) -> None:
    step = trainer.step

    async def step_and_act() -> None:
        await step()
        if trainer.progress.step == number:
            await action()

    trainer.step = step_and_act  # type: ignore[method-assign]


async def test_a_run_that_is_stopped_cancels_what_is_ahead_and_is_resumed_at_its_step(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, max_staleness=3, rollout={"max_new_tokens": 64})
    sync = await recorded_run(recipe.replace(max_staleness=0, run=recipe.run.replace(steps=4)), tmp_path, "sync")
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe, url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")

            async def stop() -> None:
                trainer.stop()

            after_step(trainer, 2, stop)
            first = record(trainer)
            await trainer.run()
            assert sorted(first) == [1, 2]
            async with RolloutClient(resolved.rollout.peers.addresses[0]) as client:
                async with asyncio.timeout(30):
                    while True:
                        load = (await client.get_policy()).load
                        if not load.running and not load.waiting:
                            break
                        await asyncio.sleep(0.05)
            shorter = resolved.replace(run=resolved.run.replace(steps=4))
            resumed = await new_trainer(shorter, tmp_path / "run", resume=True)
            second = record(resumed)
            await resumed.run()
            stream = TrajectoryStream(url, trainer.run_id, consumer="afterwards")
            assert await stream.pending() == 0
            await stream.close()
    assert sorted(second) == [3, 4]
    check_staleness(first, 3)
    check_staleness(second, 3)
    assert {one.lineage for trajectories in second.values() for one in trajectories} == {2}
    assert prompts(first | second) == prompts(sync)
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3, 4]


async def test_while_the_run_is_paused_no_further_step_is_begun(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe, url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")

            async def pause() -> None:
                trainer.state.pause()

            after_step(trainer, 2, pause)
            running = asyncio.create_task(trainer.run())
            async with asyncio.timeout(60):
                while trainer.state.phase != "paused":
                    await asyncio.sleep(0.02)
                await trainer.feed.given()
            written = trainer.supply.written
            assert written == 3  # by the policy of step 1; that of step 2 was given in the pause
            await asyncio.sleep(0.3)
            assert trainer.supply.written == written
            assert (await trainer.request_save())[1] == 2
            trainer.state.resume()
            await running
    assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(1, STEPS + 1))


async def test_a_later_step_that_cannot_be_written_ends_the_run_when_its_turn_comes(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, redis_timeout_s=1.0)
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe, url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")
            prepare = trainer.prepare

            async def prepare_and_take_an_id() -> None:
                await prepare()
                sampling = trainer.rollouts.sampling("domain_0", "somebody", "else")
                prompt = Prompt("domain_0", 0, (1, 2, 3))
                spec = trainer.rollouts.spec("l0001-s000003-p0001", prompt, sampling, publish=False)
                async with RolloutClient(resolved.rollout.peers.addresses[0]) as client:
                    await client.generate(spec)

            trainer.prepare = prepare_and_take_an_id  # type: ignore[method-assign]
            with pytest.raises(RequestConflictError):
                await asyncio.wait_for(trainer.run(), 60)
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", 2)


@pytest.mark.parametrize("bound", [0, 2])
async def test_a_rollout_server_that_is_restarted_gets_the_policy_again(tmp_path: Path, bound: int) -> None:
    recipe = recipe_of(tmp_path, max_staleness=bound)
    with running_valkey(tmp_path / "valkey") as url:
        config = RolloutServerConfig(model=recipe.student.path, engine=recipe.rollout.engine, redis_url=url)
        async with mesh(recipe, url) as resolved, AsyncExitStack() as servers:
            address = await servers.enter_async_context(serving_rollouts(config))
            peers = resolved.rollout.peers.replace(addresses=[address])
            resolved = resolved.replace(rollout=resolved.rollout.replace(peers=peers))
            trainer = await new_trainer(resolved, tmp_path / "run")
            trained = record(trainer)
            gather = trainer.gather_samples

            async def restart_while_requests_wait(number: int, clock: Any) -> Any:
                if number == 3:
                    await servers.aclose()
                    waiting = asyncio.ensure_future(gather(number, clock))
                    await asyncio.sleep(0.2)
                    await servers.enter_async_context(serving_rollouts(config, address))
                    return await waiting
                return await gather(number, clock)

            trainer.gather_samples = restart_while_requests_wait  # type: ignore[method-assign]
            await asyncio.wait_for(trainer.run(), 120)
    check_staleness(trained, bound)
    assert sorted(trained) == list(range(1, STEPS + 1))
    assert [line["samples"] for line in lines_of(tmp_path / "run")] == [4] * STEPS


async def test_importance_weights_are_1_where_the_present_policy_wrote_every_token(tmp_path: Path) -> None:
    importance = {"importance": {"truncate_at": 2.0}}
    recipe = recipe_of(tmp_path, objective=importance, rollout={"temperature": 0.7}, max_staleness=0)
    await whole_run(recipe, tmp_path, "sync")
    for line in lines_of(tmp_path / "sync"):
        assert line["importance/mean"] == pytest.approx(1.0, abs=1e-4)
        assert line["importance/truncated"] == 0
    trained = await recorded_run(recipe.replace(max_staleness=2, optimizer={"lr": 1e-2}), tmp_path, "ahead")
    assert any(age for age in check_staleness(trained, 2))
    lines = lines_of(tmp_path / "ahead")
    assert any(abs(line["importance/mean"] - 1) > 1e-3 for line in lines if line["staleness"])
    assert all(0 < line["importance/mean"] <= 2 for line in lines)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"run": {"steps": 1, "deterministic": True}}, "run.deterministic: with max_staleness above 0"),
        (
            {"objective": {"importance": {}}, "rollout": {"top_p": 0.9}},
            "objective.importance: with rollout.top_p below",
        ),
        ({"objective": {"importance": {}}, "rollout": {"top_k": 5}}, "objective.importance: with rollout.top_p below"),
        ({"max_staleness": 65}, "max_staleness: Input should be less than or equal to 64"),
    ],
    ids=["deterministic", "top_p", "top_k", "far ahead"],
)
def test_settings_that_cannot_go_together_are_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_recipe(tmp_path, {"one": tmp_path}, **{"max_staleness": 1, **sections})
