"""SFT and policy gradients in whole runs, and answers of finished models: real servers, tiny models."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mesh import mesh, new_trainer, running_valkey, serving_rollouts
from task_cases import jsonl
from tiny_models import tiny_model, tiny_tokenizer

from opd_mesh.config.answers import AnswersConfig
from opd_mesh.config.base import dump_config, parse_config
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.services import RolloutServerConfig, TokenLogConfig
from opd_mesh.errors import ConfigError, VerifierError
from opd_mesh.policy import PolicyId
from opd_mesh.stream import TrajectoryStream
from student_trainer.answering import Answering
from student_trainer.trainer import Trainer

VOCAB_SIZE = 24  # four special tokens, newline, space, ten digits, a to h
ENGINE = {"max_context_tokens": 48, "max_slots": 32}


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


def save_character_model(folder: Path, seed: int = 0) -> Path:
    """Its first answers are all but uniform over the vocabulary, and no chat template is around them."""
    tiny_model("llama", seed, vocab_size=VOCAB_SIZE, logit_std=0.5).save_pretrained(folder)
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_model(tmp_path_factory.mktemp("models") / "student")


def recipe_of(student: Path, domains: dict[str, Any], objective: dict[str, Any], **sections: Any) -> Recipe:
    value: dict[str, Any] = {
        "run": {"name": "stage-one", "steps": 3, "seed": 1, "deterministic": True},
        "student": {"path": str(student)},
        "domains": domains,
        "objective": objective,
        "optimizer": {"lr": 3e-3, "betas": [0.9, 0.95]},
        "batch": {"prompts_per_step": 4},
        "rollout": {"max_new_tokens": 6, "engine": ENGINE},
        "evaluation": {"prompts_per_domain": 0},
        "redis_timeout_s": 5.0,
    }
    return parse_config(Recipe, value | sections, source="test")


def copying(folder: Path) -> dict[str, Any]:
    """Twenty prompts; the answer is the prompt's digit, thrice."""
    lines = [{"prompt": f"{digit}{letter}", "answer": f"{digit}" * 3} for letter in "ab" for digit in range(10)]
    return {"jsonl": {"path": str(jsonl(folder / "copying.jsonl", lines))}, "verifier": {"name": "exact"}}


def letters(folder: Path, function: str = "share_of_a") -> dict[str, Any]:
    """A verifier of one's own marks the answers."""
    lines = [{"prompt": f"{n}b", "metadata": {"marker": str(folder / "broken")}} for n in range(40)]
    verifier = {"name": "python", "function": f"stage_one_verifiers:{function}"}
    return {"jsonl": {"path": str(jsonl(folder / "letters.jsonl", lines))}, "verifier": verifier}


def lines_of(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.student.trainable()}


@asynccontextmanager
async def serving(recipe: Recipe, redis_url: str, log_folder: Path | None = None) -> AsyncIterator[Recipe]:
    """A rollout server, with a log where a folder is given, and a teacher server where the recipe has teachers."""
    if recipe.teachers:
        async with mesh(recipe, redis_url) as resolved:
            yield resolved
        return
    config = RolloutServerConfig(
        model=recipe.student.path,
        engine=recipe.rollout.engine,
        redis_url=redis_url,
        deterministic=recipe.run.deterministic,
        log=None if log_folder is None else TokenLogConfig(path=log_folder),
    )
    async with serving_rollouts(config) as address:
        rollout = recipe.rollout.replace(peers=recipe.rollout.peers.replace(addresses=[address]))
        yield recipe.replace(rollout=rollout, redis_url=redis_url)


def stopping_after(trainer: Trainer, step: int) -> None:
    """As SIGKILL would, but for the checkpoint of that step."""
    whole = trainer.step

    async def then_die() -> None:
        await whole()
        if trainer.progress.step == step:
            raise asyncio.CancelledError

    trainer.step = then_die  # type: ignore[method-assign]


async def stopped_and_resumed(recipe: Recipe, run_dir: Path, step: int) -> Trainer:
    trainer = await new_trainer(recipe, run_dir)
    stopping_after(trainer, step)
    with pytest.raises(asyncio.CancelledError):
        await trainer.run()
    resumed = await new_trainer(recipe, run_dir, resume=True)
    await resumed.run()
    assert resumed.progress.lineage == 2
    return resumed


def assert_same_run(one: Trainer, other: Trainer) -> None:
    """All that is not time, name or lineage; and the weights, to the bit."""
    lines = []
    for trainer in (one, other):
        timeless = [
            {
                key: value
                for key, value in line.items()
                if key.split("/")[0] not in ("seconds", "tokens_per_s", "lineage", "wire_bytes", "rollout_idle_s")
                and not key.startswith("marks_")
            }
            for line in trainer.metrics.lines
        ]
        lines.append(timeless)
    assert lines[0] == lines[1]
    assert len(lines[0]) == one.recipe.run.steps
    wanted, found = weights_of(one), weights_of(other)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


# --- SFT -------------------------------------------------------------------------------------------------------
async def test_sft_learns_without_servers_and_resumes_to_the_bit(student: Path, tmp_path: Path) -> None:
    """Neither rollout server nor Redis: none is there, none is asked for, and no policy is made for one."""

    def refuse() -> None:
        raise AssertionError("a policy was made")

    recipe = recipe_of(
        student, {"copying": copying(tmp_path)}, {"name": "sft"}, run={"steps": 6, "deterministic": True}
    )
    whole = await new_trainer(recipe, tmp_path / "whole")
    whole.student.policy_weights = refuse  # type: ignore[method-assign,assignment]
    await whole.run()
    lines = lines_of(tmp_path / "whole")
    assert [line["samples"] for line in lines] == [4] * 6
    assert all(line["tokens"] == 16 for line in lines)  # three digits and EOS
    assert lines[0]["loss"] == pytest.approx(lines[0]["nll_domain/copying"])
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["status"] == "finished"
    resumed = await stopped_and_resumed(recipe, tmp_path / "stopped", 4)
    assert_same_run(whole, resumed)


async def test_sft_learns_what_is_asked_and_its_accuracy_is_measured(
    student: Path, tmp_path: Path, redis_url: str
) -> None:
    domains = {"copying": copying(tmp_path), "seen": {**copying(tmp_path), "share": 0.0}}
    recipe = recipe_of(
        student,
        domains,
        {"name": "sft"},
        run={"steps": 30},
        batch={"prompts_per_step": 10},
        optimizer={"lr": 1e-2},
        evaluation={"prompts_per_domain": 2, "accuracy": {"prompts_per_domain": 10}, "every_steps": 20},
        max_staleness=1,  # of no account: nothing is written to be trained on
    )
    pushed: list[int] = []
    async with serving(recipe, redis_url) as resolved:
        trainer = await new_trainer(resolved.replace(redis_url=None), tmp_path / "run")
        push = trainer.rollouts.push_policy

        async def counted(policy: PolicyId, *args: Any, **options: Any) -> float:
            pushed.append(policy.version)
            return await push(policy, *args, **options)

        trainer.rollouts.push_policy = counted  # type: ignore[method-assign]
        await trainer.run()
    assert pushed == [0, 20, 30]  # what is evaluated, once each
    losses = [line["loss"] for line in lines_of(tmp_path / "run")]
    assert losses[0] > 2.0
    assert losses[-1] < 0.3 * losses[0]
    assert lines_of(tmp_path / "run")[0].keys().isdisjoint({"copying/seen", "nll_domain/seen"})
    evaluations = lines_of(tmp_path / "run", "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, 20, 30]
    for line in evaluations:
        for domain in domains:
            assert (line[f"graded/{domain}"], line[f"ungraded/{domain}"]) == (10, 0)
            assert 0 <= line[f"accuracy/{domain}"] <= line[f"score/{domain}"] <= 1
            assert 0 <= line[f"unparsed/{domain}"] <= 1
            assert 1 <= line[f"answer_length/{domain}"] <= 6


# --- policy gradients ------------------------------------------------------------------------------------------
async def test_grpo_raises_the_reward(student: Path, tmp_path: Path, redis_url: str) -> None:
    recipe = recipe_of(
        student,
        {"letters": letters(tmp_path)},
        {"name": "grpo"},
        run={"steps": 15, "seed": 1, "deterministic": True},
        batch={"prompts_per_step": 4, "responses_per_prompt": 6},
        optimizer={"lr": 1e-2, "betas": [0.9, 0.95]},
    )
    async with serving(recipe, redis_url) as resolved:
        await (await new_trainer(resolved, tmp_path / "run")).run()
    lines = lines_of(tmp_path / "run")
    rewards = [line["reward/letters"] for line in lines]
    assert sum(rewards[:2]) / 2 < 0.2
    assert sum(rewards[-2:]) / 2 > 0.6
    for line in lines:
        assert line["groups_taught"] + line["groups_equal"] + line["groups_single"] == 4
        assert line["samples"] == 24
        assert line["ungraded"] == 0
        assert line["unparsed"] < 12  # an empty answer
    # One update per batch: the policy that learns is the one that wrote.
    assert all(abs(line["kl_behaviour"]) < 1e-4 and line["clip_fraction"] == 0 for line in lines)


async def test_grpo_of_truncated_responses_applies_their_masks_and_resumes_to_the_bit(
    student: Path, tmp_path: Path, redis_url: str
) -> None:
    """The ids that were left come through the stream to the loss, so that ρ is 1 where the policy has not moved."""
    recipe = recipe_of(
        student,
        {"letters": letters(tmp_path)},
        {"name": "grpo"},
        batch={"prompts_per_step": 4, "responses_per_prompt": 4},
        optimizer={"lr": 1e-2},
        rollout={"max_new_tokens": 6, "top_k": 5, "top_p": 0.9, "engine": ENGINE},
        evaluation={"prompts_per_domain": 0, "accuracy": {"prompts_per_domain": 4}},  # drawn without either
    )
    async with serving(recipe, redis_url, tmp_path / "log") as resolved:
        whole = await new_trainer(resolved, tmp_path / "whole")
        await whole.run()
        resumed = await stopped_and_resumed(resolved, tmp_path / "stopped", 2)
    assert_same_run(whole, resumed)
    lines = lines_of(tmp_path / "whole")
    assert len(lines) == 3
    for line in lines:
        assert line["staleness"] == 0
        assert abs(line["kl_behaviour"]) < 1e-5
        assert line["clip_fraction"] == 0
        # Of five ids at most; over the vocabulary of 24, whose logits are all but equal, it would be about 3.
        assert 0 < line["entropy/student"] < 1.61


async def test_dapo_with_a_reference_resumes_to_the_bit(student: Path, tmp_path: Path, redis_url: str) -> None:
    """The reference is the student itself, so at first there is nothing between them."""
    recipe = recipe_of(
        student,
        {"letters": letters(tmp_path)},
        {"name": "dapo", "kl": {"reference": "base", "coefficient": 0.1}, "dynamic_sampling": {"max_rounds": 1}},
        run={"steps": 3, "seed": 1, "deterministic": True},
        teachers={"base": {"path": str(student)}},
        batch={"prompts_per_step": 4, "responses_per_prompt": 2},
        optimizer={"lr": 1e-2},
        rollout={"max_new_tokens": 3, "engine": ENGINE},
    )
    async with serving(recipe, redis_url) as resolved:
        whole = await new_trainer(resolved, tmp_path / "whole")
        await whole.run()
        resumed = await stopped_and_resumed(resolved, tmp_path / "stopped", 2)
    assert_same_run(whole, resumed)
    lines = lines_of(tmp_path / "whole")
    assert abs(lines[0]["kl_reference"]) < 1e-6
    assert lines[-1]["kl_reference"] > 1e-5
    assert any(line["samples_dropped"] for line in lines)  # or this test says nothing of the place in the data
    assert all(line["heads_needed"] == 0 for line in lines)


async def test_a_verifier_that_fails_is_counted_and_one_that_always_fails_ends_the_run(
    student: Path, tmp_path: Path, redis_url: str
) -> None:
    recipe = recipe_of(
        student,
        {"letters": letters(tmp_path, "share_of_a_or_raise")},
        {"name": "dr_grpo"},
        run={"steps": 8},
        batch={"prompts_per_step": 4, "responses_per_prompt": 3},
        rollout={"max_new_tokens": 3, "engine": ENGINE},
    )
    async with serving(recipe, redis_url) as resolved:
        trainer = await new_trainer(resolved, tmp_path / "run")
        whole = trainer.step

        async def then_break() -> None:
            await whole()
            if trainer.progress.step == 2:
                (tmp_path / "broken").touch()

        trainer.step = then_break  # type: ignore[method-assign]
        with pytest.raises(VerifierError, match=r"not one response of step \d could be graded") as error:
            await trainer.run()
        assert "the verifier's own data are gone" in error.value.message
        assert error.value.field == "domains"
        # An empty answer is not asked of the verifier, so a step of which one is left may still be taken.
        last = trainer.progress.step
        assert 2 <= last < 8
        lines = lines_of(tmp_path / "run")
        assert [line["step"] for line in lines] == list(range(1, last + 1))
        for line in lines:
            assert 0 < line["ungraded"] < 12
            assert line["samples"] == 12 - line["ungraded"]
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert (summary["status"], summary["steps"]) == ("failed", last)
        assert "opd run --resume" in summary["error"]
        assert (tmp_path / "run" / "checkpoints" / f"step-{last:06d}" / "state.json").exists()
        # Mended, it goes on, and what was written for nobody is let go of.
        (tmp_path / "broken").unlink()
        resumed = await new_trainer(resolved, tmp_path / "run", resume=True)
        await resumed.run()
        assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(1, 9))
        stream = TrajectoryStream(redis_url, resumed.run_id, consumer="afterwards")
        assert (await stream.pending(), await stream.length()) == (0, 0)
        await stream.close()


# --- answers ---------------------------------------------------------------------------------------------------
async def answered_by_a_process(config: AnswersConfig, path: Path, out: Path) -> None:
    """As a supervisor starts it."""
    dump_config(config, path)
    words = [sys.executable, "-m", "student_trainer.answering", "--config", str(path), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # a domain's verifier is one of the tests'
    process = await asyncio.create_subprocess_exec(*words, env=environment, stderr=asyncio.subprocess.PIPE)
    _, said = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, said.decode()


async def test_finished_models_answer_and_others_learn_from_it(student: Path, tmp_path: Path, redis_url: str) -> None:
    other = save_character_model(tmp_path / "other", seed=5)
    domains = {"copying": copying(tmp_path), "letters": letters(tmp_path)}
    recipe = recipe_of(student, domains, {"name": "sft"}, evaluation={"prompts_per_domain": 2})
    async with serving(recipe, redis_url) as resolved:
        value = {
            "recipe": resolved.replace(redis_url=None).model_dump(mode="json"),
            "models": {"student": str(student), "other": str(other)},
            "domains": {"other": ["letters"]},
            "split": "train",
            "prompts_per_domain": 4,
            "responses_per_prompt": 2,
            "temperature": 1.0,
        }
        config = parse_config(AnswersConfig, value, source="test")
        out = tmp_path / "answers"
        out.mkdir()
        await Answering(config, out).run()
        found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        assert found == [
            "other/letters.jsonl", "other/scores.json", "progress.json", "student/copying.jsonl",
            "student/letters.jsonl", "student/scores.json",
        ]  # fmt: skip
        scores = json.loads((out / "student" / "scores.json").read_text())
        answers = lines_of(out / "student", "letters.jsonl")
        assert len(answers) == scores["letters"]["answers"] == scores["letters"]["graded"] == 8
        assert len({answer["trajectory_id"] for answer in answers}) == 8
        assert len({answer["prompt_index"] for answer in answers}) == 4
        assert scores["letters"]["score"] == pytest.approx(sum(answer["score"] for answer in answers) / 8)
        assert scores["letters"]["accuracy"] == sum(answer["score"] == 1 for answer in answers) / 8
        for answer in answers:
            ((_, end),) = answer["scored_spans"]
            assert end == len(answer["token_ids"])
            assert answer["score"] == answer["text"].strip().count("a") / max(1, len(answer["text"].strip()))
            assert (answer["split"], answer["parsed"], answer["failure"]) == ("train", True, None)
        # Two models answer in two ways; one that has answered is left alone, one that has not is asked.
        assert [answer["text"] for answer in answers] != [a["text"] for a in lines_of(out / "other", "letters.jsonl")]
        (out / "other" / "scores.json").unlink()
        written = (out / "student" / "letters.jsonl").stat().st_mtime_ns
        before = (out / "other" / "letters.jsonl").read_text()
        await answered_by_a_process(config, tmp_path / "answers.yaml", out)
        assert (out / "student" / "letters.jsonl").stat().st_mtime_ns == written
        assert (out / "other" / "scores.json").exists()
        # Drawn by the run's seed: the same answers.
        ids = [
            [json.loads(line)["token_ids"] for line in text.splitlines()]
            for text in (before, (out / "other" / "letters.jsonl").read_text())
        ]
        assert ids[0] == ids[1]

    learned = {"cold": {"trajectories": {"path": str(out / "student" / "letters.jsonl")}}}
    sft = recipe_of(student, learned, {"name": "sft"}, run={"steps": 1}, batch={"prompts_per_step": 8})
    trainer = await new_trainer(sft, tmp_path / "sft")
    await trainer.run()
    (line,) = lines_of(tmp_path / "sft")
    assert line["samples"] == 8
    assert line["tokens"] == sum(len(answer["token_ids"]) - answer["scored_spans"][0][0] for answer in answers)


def test_answering_needs_a_rollout_server_and_no_redis(student: Path, tmp_path: Path) -> None:
    recipe = recipe_of(student, {"letters": letters(tmp_path)}, {"name": "grpo"}, batch={"responses_per_prompt": 2})
    value = {"recipe": recipe.model_dump(mode="json"), "models": {"student": str(student)}, "split": "validation"}
    with pytest.raises(ConfigError) as error:
        Answering(parse_config(AnswersConfig, value, source="test"), tmp_path)
    assert error.value.field == "rollout.peers.addresses"
