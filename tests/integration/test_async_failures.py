"""Generation that runs ahead, and what goes wrong: stops that cannot wait, kills, servers that are restarted."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from mesh import mesh, new_trainer, running_valkey, serving_rollouts
from test_async_run import STEPS, after_step, check_staleness, prompts, recipe_of, record, recorded_run
from test_run import lines_of

from opd_mesh.clients.rollout import RolloutClient
from opd_mesh.config.services import RolloutServerConfig
from opd_mesh.errors import StreamUnavailableError
from opd_mesh.policy import PolicyId
from opd_mesh.stream import TrajectoryStream
from student_trainer.run_state import Phase
from student_trainer.trainer import Trainer


def hang_at(trainer: Trainer, version: int) -> asyncio.Event:
    """From this version on no policy arrives; set when the run waits for the first of these."""
    waits, push, given = asyncio.Event(), trainer.rollouts.push_policy, trainer.feed.given

    async def push_or_hang(policy: PolicyId, *rest: Any, **named: Any) -> float:
        if policy.version >= version:
            if not trainer.recipe.max_staleness:
                waits.set()
            await asyncio.Event().wait()
        return await push(policy, *rest, **named)

    async def noted() -> None:
        if trainer.progress.step >= version:
            waits.set()
        await given()

    trainer.rollouts.push_policy = push_or_hang  # type: ignore[method-assign]
    trainer.feed.given = noted  # type: ignore[method-assign]
    return waits


@pytest.mark.parametrize(
    ("bound", "every", "version", "steps"),
    # An evaluation waits for the policy; the update of the next step does, which is nearly done; the end of the run.
    [(1, 2, 2, 2), (1, 0, 2, 3), (1, 0, STEPS, STEPS), (0, 0, 2, 2), (0, 0, STEPS, STEPS)],
    ids=["evaluation", "update", "end", "sync", "sync, end"],
)
async def test_a_stop_that_cannot_wait_for_a_policy_on_its_way_ends_the_run_in_order(
    tmp_path: Path, bound: int, every: int, version: int, steps: int
) -> None:
    recipe = recipe_of(tmp_path, max_staleness=bound, evaluation={"prompts_per_domain": 1, "every_steps": every})
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe, url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")
            waits = hang_at(trainer, version)
            running = asyncio.create_task(trainer.run())
            async with asyncio.timeout(60):
                await waits.wait()
                trainer.stop()
                trainer.give_up_step()
                await running
            summary = json.loads((tmp_path / "run" / "summary.json").read_text())
            assert (summary["status"], summary["steps"]) == ("interrupted", steps)
            assert trainer.state.phase is Phase.FINISHED
            assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").exists()
            resumed = await new_trainer(resolved, tmp_path / "run", resume=True)
            await asyncio.wait_for(resumed.run(), 60)
            stream = TrajectoryStream(url, trainer.run_id, consumer="afterwards")
            assert await stream.pending() == 0
            await stream.close()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert lines_of(tmp_path / "run", "evaluations.jsonl")[-1]["step"] == STEPS


async def test_a_step_that_is_given_up_when_redis_has_gone_fails_with_its_checkpoint(tmp_path: Path) -> None:
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe_of(tmp_path), url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")

            async def gone(*_: Any) -> None:
                raise StreamUnavailableError("Redis is gone")

            async def pause_and_give_up() -> None:
                async with RolloutClient(resolved.rollout.peers.addresses[0]) as client:
                    await client.pause()
                trainer.rollouts.acknowledge = gone  # type: ignore[method-assign]
                asyncio.get_running_loop().call_later(0.3, trainer.give_up_step)

            after_step(trainer, 2, pause_and_give_up)
            with pytest.raises(StreamUnavailableError):
                await asyncio.wait_for(trainer.run(), 60)
    steps = trainer.progress.step
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", steps)
    assert trainer.state.phase is Phase.FAILED
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").exists()


@pytest.mark.parametrize("bound", [0, 1])
async def test_a_defect_beside_the_main_sequence_ends_the_run_with_its_cause(tmp_path: Path, bound: int) -> None:
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe_of(tmp_path, max_staleness=bound), url) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")

            async def defect(*_: Any) -> list[RolloutClient]:
                raise RuntimeError("a defect")

            async def pause() -> None:
                async with RolloutClient(resolved.rollout.peers.addresses[0]) as client:
                    await client.pause()
                trainer.rollouts.watch.lacking = defect  # type: ignore[method-assign]

            after_step(trainer, 1, pause)
            with pytest.raises(RuntimeError, match="a defect"):
                await asyncio.wait_for(trainer.run(), 60)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "a defect")


async def test_of_two_servers_only_the_restarted_one_is_given_the_policy_again(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    given: list[list[str] | None] = []
    with running_valkey(tmp_path / "valkey") as url:
        config = RolloutServerConfig(model=recipe.student.path, engine=recipe.rollout.engine, redis_url=url)
        async with mesh(recipe, url) as resolved, AsyncExitStack() as servers:
            address = await servers.enter_async_context(serving_rollouts(config))
            peers = resolved.rollout.peers.replace(addresses=[*resolved.rollout.peers.addresses, address])
            resolved = resolved.replace(rollout=resolved.rollout.replace(peers=peers))
            trainer = await new_trainer(resolved, tmp_path / "run")
            trained, gather, push = record(trainer), trainer.gather_samples, trainer.rollouts.push_policy

            async def noted(*arguments: Any, clients: Any = None, **named: Any) -> float:
                given.append(clients and [client.address for client in clients])
                return await push(*arguments, clients=clients, **named)

            async def restart_while_requests_wait(number: int, clock: Any) -> Any:
                waiting = asyncio.ensure_future(gather(number, clock))
                if number == 3:
                    await trainer.feed.given()  # the requests of step 4 are out, too
                    await servers.aclose()
                    await servers.enter_async_context(serving_rollouts(config, address))
                return await waiting

            trainer.rollouts.push_policy = noted  # type: ignore[method-assign]
            trainer.gather_samples = restart_while_requests_wait  # type: ignore[method-assign]
            await asyncio.wait_for(trainer.run(), 120)
            stream = TrajectoryStream(url, trainer.run_id, consumer="afterwards")
            assert (await stream.pending(), await stream.length()) == (0, 0)
            await stream.close()
    check_staleness(trained, 1)
    assert sorted(trained) == list(range(1, STEPS + 1))
    assert [line["samples"] for line in lines_of(tmp_path / "run")] == [4] * STEPS
    assert given.count(None) == STEPS + 1
    assert all(clients in (None, [address]) for clients in given)


async def test_what_had_come_for_later_steps_of_a_killed_run_is_let_go_of(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, max_staleness=2, checkpoint={"every_steps": 1})
    sync = await recorded_run(recipe.replace(max_staleness=0), tmp_path, "sync")
    with running_valkey(tmp_path / "valkey") as url:
        async with mesh(recipe, url) as resolved:
            killed = await new_trainer(resolved, tmp_path / "run")
            first = record(killed)

            async def die() -> None:
                async with asyncio.timeout(30):
                    while not killed.supply.backlog:
                        await asyncio.sleep(0.01)
                raise asyncio.CancelledError

            async def nothing(error: BaseException) -> None: ...

            after_step(killed, 2, die)
            killed.end_early = nothing  # type: ignore[method-assign]
            with pytest.raises(asyncio.CancelledError):
                await killed.run()
            stream = TrajectoryStream(url, killed.run_id, consumer="afterwards")
            assert await stream.pending() > 4  # those of step 2, and what came for later ones
            resumed = await new_trainer(resolved, tmp_path / "run", resume=True)
            second = record(resumed)
            await asyncio.wait_for(resumed.run(), 60)
            assert (await stream.pending(), await stream.length()) == (0, 0)
            await stream.close()
    assert (sorted(first), sorted(second)) == ([1, 2], [2, 3, 4, 5, 6])
    assert {one.lineage for trajectories in second.values() for one in trajectories} == {2}
    check_staleness(second, 2)
    assert prompts(second) == {number: found for number, found in prompts(sync).items() if number > 1}
