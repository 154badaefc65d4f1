"""Answers that the domains hold, as samples: which, in what order, and where a resumed run goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from task_cases import jsonl
from tiny_models import EOS_ID, tiny_tokenizer

from opd_mesh.config.base import parse_config
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError
from student_trainer.checkpoint import TrainerState
from student_trainer.supply import AnswerSupply
from student_trainer.tasks import Grader, open_domains


def recipe_of(folder: Path, **line: Any) -> Recipe:
    """SFT of two domains of five lines, one of them asked three times as often."""
    domains = {}
    for name, share in (("add", 3.0), ("sort", 1.0)):
        lines = [{"prompt": f"{name}{n}=", "answer": f"{name[0]}{n}", **line} for n in range(5)]
        domains[name] = {"jsonl": {"path": str(jsonl(folder / f"{name}.jsonl", lines))}, "share": share}
    value = {
        "run": {"steps": 9}, "student": {"path": "s"}, "domains": domains, "objective": {"name": "sft"},
        "batch": {"prompts_per_step": 4}, "evaluation": {"prompts_per_domain": 0},
    }  # fmt: skip
    return parse_config(Recipe, value, source="test")


def new_supply(recipe: Recipe, progress: TrainerState) -> AnswerSupply:
    supply = AnswerSupply(recipe)
    supply.start(open_domains(recipe, tiny_tokenizer()), progress, Grader([]))
    return supply


async def test_a_sample_is_a_prompt_with_its_answer_and_an_end(tmp_path: Path) -> None:
    supply = new_supply(recipe_of(tmp_path), TrainerState(lineage=2))
    assert supply.size_of(1) == 4
    gathered = await supply.take(1)
    assert (gathered.number, gathered.arrivals, gathered.counted) == (1, [], {})
    tokenizer = tiny_tokenizer()
    for sample in gathered.samples:
        trajectory = sample.trajectory
        trajectory.validate()
        (span,) = trajectory.scored_spans
        prompt = tokenizer.decode(trajectory.token_ids[: span[0]])
        asked = re.fullmatch(r"<s>user: (add|sort)([0-4])=\nassistant: ", prompt)
        assert asked is not None
        assert asked[1] == trajectory.domain
        *answer, end = trajectory.scored_token_ids
        assert tokenizer.decode(answer) == f"{asked[1][0]}{asked[2]}"
        assert (end, span[1]) == (EOS_ID, len(trajectory.token_ids))
        assert (sample.marks, sample.reference, sample.advantage) == ((), None, None)
    assert [sample.trajectory.domain for sample in gathered.samples] == ["add"] * 3 + ["sort"]
    assert [sample.trajectory.trajectory_id for sample in gathered.samples] == [
        f"l0002-s000001-p000{place}" for place in range(4)
    ]


async def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)

    def ids(gathered: Any) -> list[tuple[int, ...]]:
        return [sample.trajectory.token_ids for sample in gathered.samples]

    whole = new_supply(recipe, TrainerState())
    steps = [await whole.take(number) for number in (1, 2, 3)]
    assert steps[0].cursors == {"add": 3, "sort": 1}
    assert steps[2].drawn == {"add": 9, "sort": 3}
    assert len({tokens for step in steps[:1] for tokens in ids(step)}) == 4
    await whole.take(4)  # read ahead of the checkpoint, and lost
    resumed = new_supply(recipe, TrainerState(step=2, lineage=2, cursors=steps[1].cursors, drawn=steps[1].drawn))
    again = await resumed.take(3)
    assert ids(again) == ids(steps[2])
    assert (again.cursors, again.drawn) == (steps[2].cursors, steps[2].drawn)


async def test_the_place_in_the_data_moves_only_with_the_step(tmp_path: Path) -> None:
    """A checkpoint in the midst of a step holds the place before it."""
    progress = TrainerState()
    supply = new_supply(recipe_of(tmp_path), progress)
    await supply.take(1)
    assert (progress.cursors, progress.drawn) == ({}, {})


async def test_an_item_that_is_too_long_is_told(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    whole = max(len(one.trajectory.token_ids) for one in (await new_supply(recipe, TrainerState()).take(1)).samples)

    def within(tokens: int) -> AnswerSupply:
        engine = recipe.rollout.engine.replace(max_context_tokens=tokens)
        rollout = recipe.rollout.replace(engine=engine, max_new_tokens=1)
        return new_supply(recipe.replace(rollout=rollout), TrainerState())

    assert len((await within(whole).take(1)).samples) == 4
    with pytest.raises(ConfigError, match=rf"domain sort: item \d is {whole} tokens long.*allows {whole - 1}") as error:
        await within(whole - 1).take(1)
    assert error.value.field == "domains.sort"


async def test_an_item_without_an_answer_is_told(tmp_path: Path) -> None:
    supply = new_supply(recipe_of(tmp_path, answer=None), TrainerState())
    with pytest.raises(ConfigError, match="has no gold answer to learn") as error:
        await supply.take(1)
    assert error.value.field == "domains.add.answer"
