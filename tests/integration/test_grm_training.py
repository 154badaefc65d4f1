"""Training to judge, and by judgements: whole runs over real servers, with tiny models that know nothing yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mesh import QUICK, new_trainer, running_valkey
from opd.v1 import generative_reward_service_pb2_grpc
from task_cases import jsonl
from test_stage_one import assert_same_run, lines_of, recipe_of, save_character_model, serving, stopped_and_resumed

from grm_server.server import SERVICE, judging_service
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.services import GrmServerConfig
from opd_mesh.errors import VerifierError
from opd_mesh.rpc.server import MeshServer

RUBRIC = """
name: copied
reasons: none
form: score
template: "{{ prompt }} {{ answer }} "
criteria: [{name: correct, scale: {min: 0, max: 1}}]
"""
LINES = [{"prompt": f"{digit}{letter}", "answer": f"{digit}" * 3} for letter in "abcdefgh" for digit in range(10)]
STEPS = 3
WHOLE = {"name": "stage-one", "steps": STEPS, "seed": 1, "deterministic": True}


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_model(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def copying(tmp_path: Path) -> dict[str, Any]:
    """The answer is the prompt's digit, thrice."""
    return {
        "jsonl": {"path": str(jsonl(tmp_path / "copying.jsonl", LINES))},
        "verifier": {"name": "exact"},
        "splits": {"validation": 0.2, "test": 0.2},
    }


@pytest.fixture
def rubric(tmp_path: Path) -> str:
    path = tmp_path / "copied.yaml"
    path.write_text(RUBRIC)
    return str(path)


def grpo(student: Path, domains: dict[str, Any], **sections: Any) -> Recipe:
    return recipe_of(
        student,
        domains,
        {"name": "grpo"},
        **{
            "run": WHOLE,
            "batch": {"prompts_per_step": 4, "responses_per_prompt": 4},
            "optimizer": {"lr": 1e-2, "betas": [0.9, 0.95]},
        }
        | sections,
    )


@asynccontextmanager
async def serving_grm(recipe: Recipe, **settings: Any) -> AsyncIterator[Recipe]:
    """A reward model whose judge is the policy on the recipe's rollout servers."""
    values = {"max_verdict_tokens": 4, "inline_templates": True} | settings  # the recipe's rubrics have templates
    config = GrmServerConfig(model=recipe.student.path, judge=recipe.rollout.peers, server=QUICK, **values)
    server = MeshServer(config.server, services=[SERVICE])
    async with judging_service(config, server.set_serving) as servicer:
        generative_reward_service_pb2_grpc.add_GenerativeRewardServiceServicer_to_server(servicer, server.grpc)
        address = await server.start("127.0.0.1:0")
        servicer.start()
        try:  # the server has the settings now
            yield recipe.replace(grm={"peers": {"addresses": [address], "channel": {"connect_timeout_s": 2.0}}})
        finally:
            await server.drain(servicer.drain)


async def test_one_run_learns_to_answer_and_to_judge(
    student: Path, copying: dict[str, Any], rubric: str, tmp_path: Path, redis_url: str
) -> None:
    """Every verdict parses, for it is constrained; and the trainer's probabilities are the engine's under the mask."""
    recipe = grpo(
        student,
        {"copying": copying, "judge": {"judging": {"rubric": rubric, "domain": "copying"}, "share": 3.0}},
        evaluation={"prompts_per_domain": 0, "accuracy": {"prompts_per_domain": 8}, "every_steps": 2},
    )
    async with serving(recipe, redis_url) as resolved:
        whole = await new_trainer(resolved, tmp_path / "whole")
        await whole.run()
        resumed = await stopped_and_resumed(resolved, tmp_path / "stopped", 2)
    assert_same_run(whole, resumed)
    lines = lines_of(tmp_path / "whole")
    for line in lines:
        assert line["unparsed/judge"] == 0
        assert line["ungraded"] == 0
        assert line["response_length/judge"] == 2  # the score and EOS
        assert 0 <= line["score/judge"] <= 1
        assert {"score/copying", "reward/copying", "entropy_domain/copying", "entropy_domain/judge"} <= line.keys()
        assert abs(line["kl_behaviour"]) < 1e-4
        assert line["clip_fraction"] == 0
    assert any(0 < line["score/judge"] < 1 for line in lines)
    evaluations = lines_of(tmp_path / "whole", "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    for line in evaluations:
        assert (line["graded/judge"], line["unparsed/judge"]) == (8, 0)
        assert line["accuracy/judge"] == line["score/judge"]  # on two points a verdict is right or wrong
        assert line["kappa/judge"] == pytest.approx(2 * line["accuracy/judge"] - 1)  # classes are balanced
        assert {"accuracy/copying"} <= line.keys()
        assert "kappa/copying" not in line


async def test_what_a_judge_says_is_the_reward_and_the_verifier_only_watches(
    student: Path, copying: dict[str, Any], rubric: str, tmp_path: Path, redis_url: str
) -> None:
    reward = {"name": "grm", "rubric": rubric, "samples": 3}
    judged = grpo(
        student,
        {"copying": {**copying, "reward": reward}, "plain": copying},
        evaluation={"prompts_per_domain": 0, "accuracy": {"prompts_per_domain": 4}},
        grm={"sampling": {"temperature": 1.0}, "max_verdict_tokens": 4},
    )
    async with (
        serving(judged, redis_url) as answering,
        serving_grm(answering, sampling={"temperature": 1.0}) as resolved,
    ):
        whole = await new_trainer(resolved, tmp_path / "whole")
        await whole.run()
        resumed = await stopped_and_resumed(resolved, tmp_path / "stopped", 2)
    assert_same_run(whole, resumed)
    lines = lines_of(tmp_path / "whole")
    for number, line in enumerate(lines):
        assert line["judge_version/copying"] == number  # the policy that wrote is the one that judges
        assert (line["judge_unparsed/copying"], line["ungraded/copying"]) == (0, 0)
        assert 0 < line["score/copying"] < 1  # votes of a model that knows nothing, of 8 answers or so
        assert line["score/plain"] == 0  # the truth, which it does not hit by chance
        assert "judge_version/plain" not in line
    assert lines[0]["judge_variance/copying"] > 0
    evaluated = lines_of(tmp_path / "whole", "evaluations.jsonl")
    assert [line["score/copying"] for line in evaluated] == [0.0, 0.0]  # by the verifier


async def test_a_reward_model_that_is_gone_ends_the_run_with_a_checkpoint_and_it_goes_on_later(
    student: Path, copying: dict[str, Any], rubric: str, tmp_path: Path, redis_url: str
) -> None:
    rewarded = {"copying": {**copying, "reward": {"name": "grm", "rubric": rubric}}}
    recipe = grpo(student, rewarded, grm={"max_verdict_tokens": 4})
    async with serving(recipe, redis_url) as answering:
        async with serving_grm(answering) as resolved:
            trainer = await new_trainer(resolved, tmp_path / "run")
            first = asyncio.Event()
            step = trainer.step

            async def then_wait() -> None:
                await step()
                first.set()
                await gone.wait()

            gone = asyncio.Event()
            trainer.step = then_wait  # type: ignore[method-assign]
            running = asyncio.create_task(trainer.run())
            await asyncio.wait_for(first.wait(), 120)
        gone.set()
        with pytest.raises(VerifierError, match="Without the reward model there are no rewards"):
            await asyncio.wait_for(running, 120)
        assert (tmp_path / "run" / "checkpoints" / "step-000001" / "state.json").exists()
        async with serving_grm(answering) as again:
            resumed = await new_trainer(again, tmp_path / "run", resume=True)
            await resumed.run()
    assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(1, STEPS + 1))
