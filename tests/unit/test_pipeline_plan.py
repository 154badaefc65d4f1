"""From a pipeline's recipe to jobs, without a process: what runs on what, and which mistakes are found before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_cases import changed, pipeline

from opd_mesh.config.base import dump_config, load_config, parse_config
from opd_mesh.config.pipeline import PipelineRecipe, load_recipe
from opd_mesh.errors import ConfigError
from opd_mesh.pipeline.jobs import Answers, Choose, Job, Plan, Soup, Train
from opd_mesh.pipeline.partial import combinations, merged, with_value
from opd_mesh.pipeline.plan import plan


def planned(changes: dict[str, Any] | None = None) -> Plan:
    return plan(pipeline(changes))


def train_of(job: Job) -> Train:
    assert isinstance(job.payload, Train)
    return job.payload


def test_every_stage_becomes_jobs_behind_those_it_needs() -> None:
    jobs = planned().jobs
    assert [(job.id, job.kind) for job in jobs.values()] == [
        ("seed0/model", "init"),
        ("seed0/base", "train"),
        ("seed0/add/sft", "train"),
        ("seed0/reverse/grpo", "train"),
        ("seed0/cold/answers", "answers"),
        ("seed0/cold", "train"),
        ("seed0/opd", "train"),
        ("seed0/soup", "soup"),
        ("seed0/evaluate/answers", "answers"),
        ("seed0/evaluate", "evaluate"),
    ]
    before: set[str] = set()
    for job in jobs.values():
        assert before.issuperset(job.needs), job.id
        before.add(job.id)
    assert jobs["seed0/opd"].inputs == {
        "student": "seed0/cold",
        "teacher/add": "seed0/add/sft",
        "teacher/reverse": "seed0/reverse/grpo",
    }
    assert jobs["seed0/cold"].inputs == {
        "student": "seed0/base",
        "answers/add-by-add": "seed0/cold/answers#add",
        "answers/reverse-by-reverse": "seed0/cold/answers#reverse",
    }


def test_the_order_of_stages_in_the_file_may_be_any() -> None:
    value = changed()
    value["stages"] = dict(reversed(value["stages"].items()))
    jobs = plan(parse_config(PipelineRecipe, value, source="test")).jobs
    before: set[str] = set()
    for job in jobs.values():
        assert before.issuperset(job.needs), job.id
        before.add(job.id)
    assert jobs.keys() == planned().jobs.keys()


def test_a_run_is_trained_on_its_own_domains_and_looked_at_on_all() -> None:
    jobs = planned().jobs
    (sft,) = train_of(jobs["seed0/add/sft"]).options
    assert sft.objective.name == "sft"
    assert {name: domain.share for name, domain in sft.domains.items()} == {"add": 1.0, "reverse": 0.0}
    (base,) = train_of(jobs["seed0/base"]).options
    assert {name: domain.share for name, domain in base.domains.items()} == {"add": 0.5, "reverse": 1.0}
    (cold,) = train_of(jobs["seed0/cold"]).options
    assert {name: domain.share for name, domain in cold.domains.items()} == {
        "add-by-add": 1.0,
        "reverse-by-reverse": 1.0,
        "add": 0.0,
        "reverse": 0.0,
    }
    assert train_of(jobs["seed0/cold"]).domains == ("add", "reverse")
    (opd,) = train_of(jobs["seed0/opd"]).options
    assert opd.objective.name == "reverse_kl"
    assert opd.domains["add"].teachers == {"add": 1.0}
    assert set(opd.teachers) == {"add", "reverse"}


def test_a_stage_may_teach_other_answers_than_the_domain_has() -> None:
    jobs = planned({"stages.base.domains.add.answer": "{{ answer }}!"}).jobs
    (base,) = train_of(jobs["seed0/base"]).options
    (sft,) = train_of(jobs["seed0/add/sft"]).options
    assert (base.domains["add"].answer, base.domains["reverse"].answer, sft.domains["add"].answer) == (
        "{{ answer }}!",
        None,
        None,
    )


def test_a_recipe_with_stages_is_a_pipelines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed()))
    assert load_recipe(path) == pipeline()
    path.write_text(yaml.safe_dump({"run": {"steps": 1}}))
    with pytest.raises(ConfigError, match="student: Field required"):
        load_recipe(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_recipe(tmp_path / "absent.yaml")


def test_without_accuracy_a_run_knows_its_own_domains_only() -> None:
    jobs = planned({"defaults.evaluation": {"prompts_per_domain": 0}}).jobs
    (sft,) = train_of(jobs["seed0/add/sft"]).options
    assert list(sft.domains) == ["add"]


def test_sft_comes_before_grpo_and_seeds_have_jobs_of_their_own() -> None:
    changes = {
        "pipeline.seeds": [3, 5],
        "stages.add.grpo": {"run": {"steps": 7}, "batch": {"responses_per_prompt": 2}, "objective": {"name": "dapo"}},
    }
    jobs = planned(changes).jobs
    for seed in (3, 5):
        assert jobs[f"seed{seed}/add/grpo"].inputs == {"student": f"seed{seed}/add/sft"}
        (grpo,) = train_of(jobs[f"seed{seed}/add/grpo"]).options
        assert (grpo.objective.name, grpo.run.steps, grpo.run.seed, grpo.run.name) == ("dapo", 7, seed, "add-grpo")
        assert jobs[f"seed{seed}/soup"].inputs["model/0"] == f"seed{seed}/add/grpo"


def test_a_reference_is_a_stage_whose_model_becomes_a_teacher() -> None:
    kl = {"kl": {"reference": "base", "coefficient": 0.01}}
    changes = {
        "stages.reverse.grpo.objective": kl,
        "stages.opd.recipe.objective": {"name": "exopd", "reference": "model"},
    }
    jobs = planned(changes).jobs
    assert jobs["seed0/reverse/grpo"].inputs == {"student": "seed0/base", "teacher/base": "seed0/base"}
    (recipe,) = train_of(jobs["seed0/reverse/grpo"]).options
    assert recipe.reference_id == "base"
    assert jobs["seed0/opd"].inputs["teacher/model"] == "seed0/model"


def test_a_model_from_outside_needs_no_job(tmp_path: Path) -> None:
    jobs = planned({"model": {"path": str(tmp_path)}, "stages.soup.of": ["model", "add"]}).jobs
    assert "seed0/model" not in jobs
    assert jobs["seed0/base"].inputs == {"student": tmp_path}
    assert jobs["seed0/soup"].inputs == {"model/0": tmp_path, "model/1": "seed0/add/sft"}


def test_weights_of_a_soup_sum_to_one() -> None:
    assert planned().jobs["seed0/soup"].payload == Soup((0.5, 0.5))
    assert planned({"stages.soup.weights": [3, 1]}).jobs["seed0/soup"].payload == Soup((0.75, 0.25))


def test_teachers_of_the_cold_start_answer_their_own_domains() -> None:
    answers = planned({"stages.cold.teachers.reverse": "add"}).jobs["seed0/cold/answers"].payload
    assert isinstance(answers, Answers)
    assert answers.domains == {"add": ("add", "reverse")}
    assert (answers.split, answers.prompts_per_domain, answers.temperature) == ("train", 6, 1.0)


# --- sweeps ----------------------------------------------------------------------------------------------------
SWEEP = {"pipeline.seeds": [0, 1], "stages.add.sweep": {"optimizer.lr": [1e-3, 2e-3], "run.steps": [2, 3]}}


def test_a_sweep_is_done_on_the_first_seed_and_chosen_for_all() -> None:
    result = planned(SWEEP)
    jobs = result.jobs
    options = [f"seed0/add/sft[optimizer.lr={lr},run.steps={steps}]" for lr in (0.001, 0.002) for steps in (2, 3)]
    assert [job_id for job_id in jobs if job_id.startswith("seed0/add/")] == [*options, "seed0/add/choose"]
    choose = jobs["seed0/add/choose"].payload
    assert isinstance(choose, Choose)
    assert choose.last == tuple(options)
    assert choose.options[1] == {"optimizer.lr": 1e-3, "run.steps": 3}
    assert choose.domains == ("add",)
    for job_id, values in zip(options, choose.options, strict=True):
        (recipe,) = train_of(jobs[job_id]).options
        assert (recipe.optimizer.lr, recipe.run.steps) == tuple(values.values())
    assert jobs["seed0/soup"].inputs["model/0"] == "seed0/add/choose"
    # The other seed is trained once, as was chosen.
    later = train_of(jobs["seed1/add/sft"])
    assert [(recipe.optimizer.lr, recipe.run.steps, recipe.run.seed) for recipe in later.options] == [
        (1e-3, 2, 1),
        (1e-3, 3, 1),
        (2e-3, 2, 1),
        (2e-3, 3, 1),
    ]
    assert later.chosen_by == "seed0/add/choose"
    assert jobs["seed1/add/sft"].inputs == {"student": "seed1/base", "choice": "seed0/add/choose"}
    assert jobs["seed1/soup"].inputs["model/0"] == "seed1/add/sft"


def test_a_sweep_of_the_second_phase_shares_the_first() -> None:
    grpo = {"run": {"steps": 2}, "batch": {"responses_per_prompt": 2}}
    jobs = planned({"stages.add.grpo": grpo, "stages.add.sweep": {"grpo.optimizer.lr": [1e-3, 2e-3]}}).jobs
    assert [job_id for job_id in jobs if job_id.startswith("seed0/add/")] == [
        "seed0/add/sft",
        "seed0/add/grpo[optimizer.lr=0.001]",
        "seed0/add/grpo[optimizer.lr=0.002]",
        "seed0/add/choose",
    ]


def test_combinations_of_nothing_are_one() -> None:
    assert combinations({}) == [{}]


# --- mistakes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"stages.opd.from": "cald"}, "stages.opd.from", "'cald' is no stage"),
        ({"stages.soup.of": ["add", "evaluate"]}, "stages.soup.of", "only evaluates"),
        ({"stages.opd.teachers.add": {"ad": 1.0}}, "stages.opd.teachers.add", "'ad' is no stage"),
        ({"stages.evaluate.models": ["base", "x"]}, "stages.evaluate.models", "'x' is no stage"),
        ({"stages.add.from": "opd"}, "stages.add", "add → opd → cold → add"),
        ({"stages.add.domains": ["ad"]}, "stages.add.domains", "'ad' is none of add, reverse"),
        ({"stages.opd.teachers.sums": "add"}, "stages.opd.teachers", "'sums' is none of"),
        ({"stages.evaluate.domains": ["sums"]}, "stages.evaluate.domains", "'sums' is none of"),
        ({"domains.reverse.verifier": None}, "domains.reverse.verifier", "trains by rewards"),
        ({"domains.add.splits": None}, "domains.add.splits", "asks for test prompts"),
        ({"stages.add.sft": None}, "stages.add", "`sft`, `grpo` or both"),
        (
            {"stages.reverse.grpo.objective": {"name": "sft"}, "stages.reverse.grpo.batch": {}},
            "stages.reverse.grpo.objective.name",
            "grpo or dapo",
        ),
        (
            {"stages.opd.recipe.objective": {"name": "grpo"}},
            "stages.opd.recipe.objective.name",
            "must be reverse_kl or",
        ),
        ({"stages.add.sft.optimizer": {"lrr": 1}}, "stages.add.sft.optimizer.lrr", "did you mean 'lr'"),
        ({"defaults.batch.prompts": 1}, "defaults.batch.prompts", "unknown key 'prompts'"),
        ({"stages.opd.recipe.run": {}}, "stages.opd.recipe.run.steps", "Field required"),
        ({"stages.add.sft.run.seed": 3}, "stages.add.sft.run.seed", "pipeline.seeds"),
        ({"defaults.teachers": {}}, "defaults.teachers", "names stages"),
        ({"defaults.run": 3}, "defaults.run", "write a mapping"),
        ({"stages.soup.weights": [1.0]}, "stages.soup.weights", "2 models need as many"),
        ({"stages.soup.weights": [0, 0]}, "stages.soup.weights", "all are 0"),
        ({"stages.add.sweep": {"optimizer.lr": ["x"]}}, "stages.add.sft.optimizer.lr", "valid number"),
        ({"stages.add.sweep": {"run.seed": [1, 2]}}, "stages.add.sweep.run.seed", "pipeline.seeds"),
        (
            {"stages.add.sweep": {"optimizer.lr": [1, 2]}, "defaults.evaluation": {}},
            "stages.add.sweep",
            "set evaluation.accuracy",
        ),
        (
            {
                "stages.add.sweep": {"optimizer.lr": [1, 2]},
                "stages.add.grpo": {"run": {"steps": 1}, "batch": {"responses_per_prompt": 2}},
            },
            "stages.add.sweep.optimizer.lr",
            "write sft.optimizer.lr or grpo.optimizer.lr",
        ),
    ],
)
def test_a_mistake_is_found_by_planning_and_names_its_field(changes: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        planned(changes)
    assert said in str(error.value)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"stages.add.kind": "specalist"}, "stages.add", "one of base, specialist"),
        ({"stages.add.form": "base"}, "stages.add.form", "did you mean 'from"),
        ({"stages.add.from": None}, "stages.add.from", "Field required"),
        ({"stages.model": {"kind": "soup", "of": ["a", "b"]}}, "stages", "choose another name"),
        ({"stages.a/b": {"kind": "soup", "of": ["a", "b"]}}, "stages", "a name has up to 48 letters"),
        ({"model": {}}, "model", "exactly one of path"),
        ({"model.init.vocab_size": 5}, "model.init", "44 tokens, 5 are fewer"),
        ({"model.init.characters": "abca"}, "model.init.characters", "'a' occur more than once"),
        ({"model.init.config": {"hidden_size": 8}}, "model.init.config", "model_type: llama"),
        ({"domains.add.teachers": {"add": 1.0}}, "domains", "a stage names its teachers"),
        ({"pipeline.seeds": [1, 1]}, "pipeline.seeds", "stands there twice"),
        ({"stages.add.sweep": {"optimizer.lr": []}}, "stages.add.sweep", "at least one value"),
    ],
)
def test_a_mistake_in_the_form_is_found_by_loading(changes: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        pipeline(changes)
    assert said in str(error.value)
    assert error.value.field is not None
    assert error.value.field.startswith(field)


def test_a_recipe_written_down_is_read_back(tmp_path: Path) -> None:
    whole = pipeline(SWEEP)
    dump_config(whole, tmp_path / "pipeline.yaml")
    assert load_config(PipelineRecipe, tmp_path / "pipeline.yaml") == whole


# --- parts of recipes ------------------------------------------------------------------------------------------
def test_later_parts_go_over_earlier_ones() -> None:
    below = {"optimizer": {"lr": 1.0, "schedule": "cosine"}, "run": {"name": "a", "steps": 1}}
    assert merged(below, {"optimizer": {"lr": 2.0}, "run": {"name": "b"}}) == {
        "optimizer": {"lr": 2.0, "schedule": "cosine"},
        "run": {"name": "b", "steps": 1},
    }
    assert below["optimizer"]["lr"] == 1.0
    assert merged(below, {"optimizer": {"name": "muon"}})["optimizer"] == {"name": "muon"}  # below it was AdamW


def test_another_objective_takes_over_nothing_of_the_one_below() -> None:
    below = {"objective": {"name": "dapo", "clip_high": 0.3}}
    assert merged(below, {"objective": {"name": "grpo"}}) == {"objective": {"name": "grpo"}}
    assert merged(below, {"objective": {"name": "dapo"}}) == below


def test_one_dotted_key_is_set() -> None:
    assert with_value({"a": {"b": 1, "c": 2}}, "a.b", 3) == {"a": {"b": 3, "c": 2}}
    assert with_value({}, "a.b.c", [1]) == {"a": {"b": {"c": [1]}}}


def test_the_recipe_in_the_documentation_is_planned() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "pipelines.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    result = plan(parse_config(PipelineRecipe, yaml.safe_load(block), source="docs/pipelines.md"))
    assert {job.stage for job in result.jobs.values()} == {"model", *yaml.safe_load(block)["stages"]}


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"defaults.rollout.log": {"path": "log"}}, "defaults.rollout.log.path", "in its own folder"),
        (
            {"stages.add.sft.rollout": {"peers": {"addresses": ["a:1"]}}},
            "stages.add.sft.rollout.peers.addresses",
            "pipeline.jobs: 1",
        ),
        (
            {"defaults.rollout.peers": {"addresses": ["a:1"]}, "defaults.rollout.log": {}, "pipeline.jobs": 1},
            "defaults.rollout.log",
            "leave it out",
        ),
        ({"stages.add.sft.rollout": {"max_new_tokens": 5}}, "stages.add.sft.rollout.max_new_tokens", "in defaults"),
        (
            {"stages.opd.sweep": {"rollout.engine.max_context_tokens": [64, 96]}},
            "stages.opd.recipe.rollout.engine.max_context_tokens",
            "max_context_tokens: 64",
        ),
    ],
)
def test_rollout_settings_that_a_pipeline_cannot_keep_are_refused(
    changes: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        planned(changes)
    assert said in str(error.value)
    assert error.value.field == field


def test_answers_may_differ_where_nobody_else_asks_for_them() -> None:
    same = {"stages.add.sft.rollout": {"max_new_tokens": 6}}  # as in defaults
    assert planned(same).jobs.keys() == planned().jobs.keys()
    alone = {"stages.alone": {"kind": "specialist", "from": "base", "domains": ["add"], "sft": {"run": {"steps": 1}}}}
    alone |= {"stages.alone.sft.rollout": {"max_new_tokens": 5}}
    (recipe,) = train_of(planned(alone).jobs["seed0/alone/sft"]).options
    assert recipe.rollout.max_new_tokens == 5


def test_the_other_settings_of_the_token_log_are_taken() -> None:
    (recipe,) = train_of(planned({"defaults.rollout.log": {"durability": "os"}}).jobs["seed0/opd"]).options
    assert recipe.rollout.log is not None
    assert recipe.rollout.log.durability == "os"


def test_a_part_without_a_name_is_of_the_default() -> None:
    muon = {"name": "muon", "lr": 0.02}
    assert merged({"optimizer": {"lr": 1.0, "betas": [0.9, 0.99]}}, {"optimizer": muon}) == {"optimizer": muon}
    assert merged({"optimizer": muon}, {"optimizer": {"lr": 1.0}}) == {"optimizer": muon | {"lr": 1.0}}
    adamw = {"name": "adamw", "eps": 1e-6}
    assert merged({"optimizer": {"lr": 1.0}}, {"optimizer": adamw}) == {"optimizer": adamw | {"lr": 1.0}}


def test_jobs_of_a_sweep_are_told_apart() -> None:
    """By values as YAML has them: the text "64" is not the number."""
    jobs = planned({"stages.opd.sweep": {"objective.name": ["jsd", "forward_kl"]}}).jobs
    assert {'seed0/opd[objective.name="jsd"]', 'seed0/opd[objective.name="forward_kl"]'} <= jobs.keys()
    twice = planned({"stages.opd.sweep": {"optimizer.lr": ["1e-3", 1e-3]}}).jobs
    assert {'seed0/opd[optimizer.lr="1e-3"]', "seed0/opd[optimizer.lr=0.001]"} <= twice.keys()


@pytest.mark.parametrize("name", ["ä", "a/b", "-a", "a" * 49, ""])
def test_a_stage_is_named_as_a_folder_may_be(name: str) -> None:
    value = changed()
    value["stages"] = {name: value["stages"]["base"]}
    with pytest.raises(ConfigError, match="a name has up to 48 letters"):
        parse_config(PipelineRecipe, value, source="test")


# --- judging ---------------------------------------------------------------------------------------------------
JUDGE = {
    "domains.judge": {"judging": {"rubric": "r.yaml", "domain": "reverse"}},
    "defaults.rollout": {"max_new_tokens": 6, "engine": {"max_context_tokens": 1024}},
}


def test_a_stage_that_judges_knows_the_domain_that_is_judged_and_does_not_train_on_it() -> None:
    jobs = planned(
        JUDGE
        | {
            "defaults.evaluation": {"prompts_per_domain": 0},  # no accuracy, for which every domain would be there
            "stages.judge": {"kind": "base", "domains": ["judge"], "recipe": {"run": {"steps": 2}}},
            "stages.evaluate.domains": ["judge"],
            "stages.evaluate.models": ["judge"],
        }
    ).jobs
    (recipe,) = train_of(jobs["seed0/judge"]).options
    assert {name: domain.share for name, domain in recipe.domains.items()} == {"judge": 1.0, "reverse": 0.0}
    assert recipe.domains["judge"].splits == recipe.domains["reverse"].splits is not None
    answers = jobs["seed0/evaluate/answers"].payload
    assert isinstance(answers, Answers)
    assert (set(answers.recipe.domains), dict(answers.domains)) == ({"judge", "reverse"}, {"judge": ("judge",)})


def test_a_run_looks_at_every_domain_with_a_verifier_but_at_no_probe() -> None:
    probe = {"judging": {"rubric": "r.yaml", "domain": "reverse", "probe": "length"}}
    accuracy = {"accuracy": {"prompts_per_domain": 8}, "prompts_per_domain": 0}
    changes = JUDGE | {"domains.tried": probe, "defaults.evaluation": accuracy}
    (recipe,) = train_of(planned(changes).jobs["seed0/reverse/grpo"]).options
    assert set(recipe.domains) == {"add", "reverse", "judge"}
    learned = changes | {"stages.tried": {"kind": "base", "domains": ["tried"], "recipe": {"run": {"steps": 2}}}}
    (recipe,) = train_of(planned(learned).jobs["seed0/tried"]).options
    assert recipe.domains["tried"].share == 1.0


def test_a_judge_of_nobody_is_found_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="'nobody' is none of the domains"):
        pipeline(JUDGE | {"domains.judge": {"judging": {"rubric": "r.yaml", "domain": "nobody"}}})


def test_a_specialist_may_be_rewarded_by_a_grm_alone() -> None:
    alone = {"domains.reverse.verifier": None, "stages.evaluate.domains": ["add"]}
    with pytest.raises(ConfigError, match="name a verifier, or a reward by a GRM"):
        planned(alone)
    rewarded = alone | {
        "domains.reverse.reward": {"name": "grm", "rubric": "r.yaml"},
        "defaults.grm": {"max_verdict_tokens": 8},
    }
    (recipe,) = train_of(planned(rewarded).jobs["seed0/reverse/grpo"]).options
    assert list(recipe.judged_domains) == ["reverse"]
    assert recipe.grm.max_verdict_tokens == 8
