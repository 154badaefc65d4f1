"""Mini-batches of many teachers: every head once, answers in bounded memory, and the same result to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mesh import mesh, new_trainer, running_valkey, tiny_family, tiny_recipe
from test_run import lines_of

from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError
from student_trainer.trainer import Trainer

DOMAINS = {
    "both": {"reasoning_gym": {"task": "chain_sum"}, "teachers": {"one": 1.0, "two": 0.5}},
    "three": {"reasoning_gym": {"task": "spell_backward"}, "teachers": {"one": 0.2, "three": 1.0, "four": 0.3}},
    "lone": {"reasoning_gym": {"task": "number_sorting"}, "teachers": {"two": 1.0}},
}
# Several passes a step, whichever way the samples fall.
BATCH = {"prompts_per_step": 6, "tokens_per_pass": 300}


async def runs(folder: Path, variants: dict[str, Recipe]) -> dict[str, Trainer]:
    """Runs on the same servers, one after the other: a policy of another run is another lineage's."""
    trainers = {}
    for name, recipe in variants.items():
        with running_valkey(folder / f"{name}-valkey") as url:
            async with mesh(recipe, url) as resolved:
                trainers[name] = await new_trainer(resolved, folder / name)
                await trainers[name].run()
    return trainers


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in trainer.student.trainable()}


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    student, teachers = tiny_family(folder / "models", teachers=4)
    sections = {"domains": DOMAINS, "evaluation": {"prompts_per_domain": 0}, "run": {"steps": 2}} | sections
    return tiny_recipe(student, teachers, **sections)


async def test_every_head_comes_once_and_the_bits_are_those_of_all_heads_at_once(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, run={"steps": 2, "deterministic": True}, batch=BATCH)
    every = recipe.replace(batch=recipe.batch.replace(heads_resident=4))
    trainers = await runs(tmp_path, {"one-by-one": recipe, "all": every})
    one_by_one, together = lines_of(tmp_path / "one-by-one"), lines_of(tmp_path / "all")
    for line in one_by_one:
        assert line["passes"] >= 4
        assert line["heads_loaded"] == line["heads_needed"] == 4
        assert line["heads_resident"] == 1
    assert [line["heads_resident"] for line in together] == [4, 4]
    for name, tensor in weights(trainers["one-by-one"]).items():
        assert torch.equal(tensor, weights(trainers["all"])[name]), name
    for first, second in zip(one_by_one, together, strict=True):
        for key in first:
            if key not in ("heads_resident", "tokens_per_s", "wire_bytes", "rollout_idle_s") and not key.startswith(
                "seconds"
            ):
                assert first[key] == second[key], key


@pytest.mark.parametrize("spill", [False, True], ids=["wait", "spill"])
async def test_a_bound_on_answers_in_memory_changes_nothing_but_their_place(tmp_path: Path, spill: bool) -> None:
    recipe = recipe_of(tmp_path, run={"steps": 2, "deterministic": True}, batch=BATCH)
    # Rows of eight tokens of 48 float32 numbers each: room for two answers of some twelve.
    bound = 2 * 8 * 48 * 4
    narrow = recipe.replace(batch=recipe.batch.replace(marks_memory_bytes=bound, marks_spill=spill))
    trainers = await runs(tmp_path, {"wide": recipe, "narrow": narrow})
    for name, tensor in weights(trainers["wide"]).items():
        assert torch.equal(tensor, weights(trainers["narrow"])[name]), name
    for wide, line in zip(lines_of(tmp_path / "wide"), lines_of(tmp_path / "narrow"), strict=True):
        assert wide["marks_peak_bytes"] > 2 * bound
        assert wide["marks_spilled_bytes"] == 0
        # One share of a pass may go beyond it.
        assert line["marks_peak_bytes"] < wide["marks_peak_bytes"]
        # Whether any had to go to the disk depends on who is faster; without a folder none does.
        assert spill or not line["marks_spilled_bytes"]
        assert line["loss"] == wide["loss"]
    assert not list((tmp_path / "narrow").glob("spill/*"))


async def test_a_reference_that_marks_too_is_kept_until_its_pass_is_closed(tmp_path: Path) -> None:
    objective = {"name": "exopd", "reference": "one"}
    recipe = recipe_of(tmp_path, objective=objective, run={"steps": 2, "deterministic": True}, batch=BATCH)
    narrow = recipe.replace(batch=recipe.batch.replace(marks_memory_bytes=3000, marks_spill=True))
    trainers = await runs(tmp_path, {"wide": recipe, "narrow": narrow})
    assert [line["heads_loaded"] for line in lines_of(tmp_path / "narrow")] == [4, 4]
    for name, tensor in weights(trainers["wide"]).items():
        assert torch.equal(tensor, weights(trainers["narrow"])[name]), name
    assert not list((tmp_path / "narrow").glob("spill/*"))


@pytest.mark.parametrize(
    ("objective", "signal"),
    [({"name": "top_k", "k": 2}, "top_k_logprobs"), ({"name": "sampled_token"}, "token_logprobs")],
    ids=["top_k", "sampled_token"],
)
async def test_a_lower_signal_trains_its_objective_as_the_whole_distribution_does(
    tmp_path: Path, objective: dict[str, Any], signal: str
) -> None:
    recipe = recipe_of(tmp_path, objective=objective, run={"steps": 1})
    lower = recipe.replace(objective=recipe.objective.replace(signal=signal))
    await runs(tmp_path, {"whole": recipe, "lower": lower})
    for whole, line in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "lower"), strict=True):
        assert line["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
        assert (line["heads_loaded"], whole["heads_loaded"]) == (0, 4)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"signal": "top_k_logprobs"}, "top_k_logprobs serves the objective top_k alone, not reverse_kl"),
        ({"name": "top_k", "signal": "token_logprobs"}, "token_logprobs serves the objective sampled_token alone"),
        ({"name": "top_k", "signal": "top_k_logprobs", "temperature": 2.0}, "are of temperature 1"),
    ],
)
def test_a_signal_that_tells_too_little_is_refused(tmp_path: Path, objective: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_recipe(tmp_path, {"one": tmp_path}, objective=objective)
