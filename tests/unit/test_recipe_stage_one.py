"""What recipes of SFT and policy gradients may say, and what each refusal tells: the field and the remedy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_mesh.config.answers import AnswersConfig
from opd_mesh.config.base import parse_config
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.training import DapoConfig, DrGrpoConfig, GrpoConfig, PolicyGradientConfig, SftConfig
from opd_mesh.errors import ConfigError
from opd_mesh.supervisor import LocalMesh

SUMS = {"reasoning_gym": {"task": "chain_sum"}, "verifier": {"name": "reasoning_gym"}}


def recipe_value(objective: Any, **sections: Any) -> dict[str, Any]:
    """A small valid recipe of a policy gradient, or of SFT; ``sections`` replace whole sections."""
    writes = not isinstance(objective, dict) or objective.get("name") != "sft"
    return {
        "run": {"steps": 3},
        "student": {"path": "models/student"},
        "domains": {"sums": SUMS},
        "batch": {"responses_per_prompt": 4} if writes else {},
        "objective": objective,
        **sections,
    }


def parsed(objective: Any, **sections: Any) -> Recipe:
    return parse_config(Recipe, recipe_value(objective, **sections), source="r.yaml")


def refused(objective: Any, **sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parsed(objective, **sections)
    return error.value.message


# --- what is taken ---------------------------------------------------------------------------------------------
def test_variants_are_what_their_papers_say() -> None:
    def choices(config: Any) -> tuple[Any, ...]:
        assert isinstance(config, PolicyGradientConfig)
        rounds = config.dynamic_sampling.max_rounds if config.dynamic_sampling else 0
        return config.advantage_scale, config.clip_low, config.clip_high, config.aggregation, config.kl, rounds

    assert choices(parsed({"name": "grpo"}).objective) == ("group_std", 0.2, 0.2, "sequence_mean", None, 0)
    assert choices(parsed({"name": "dapo"}).objective) == ("group_std", 0.2, 0.28, "token_mean", None, 3)
    assert choices(parsed({"name": "dr_grpo"}).objective) == ("none", 0.2, 0.2, "constant_length", None, 0)
    assert type(parsed({"name": "dr_grpo"}).objective) is DrGrpoConfig
    mixed = parsed({"name": "dapo", "dynamic_sampling": None, "advantage_scale": "none"}).objective
    assert isinstance(mixed, DapoConfig)
    assert mixed.dynamic_sampling is None


def test_who_writes_and_who_needs_servers() -> None:
    sft = parsed({"name": "sft"})
    assert isinstance(sft.objective, SftConfig)
    assert (sft.distils, sft.writes, sft.needs_rollouts, sft.policy_gradient) == (False, False, False, None)
    evaluated = parsed({"name": "sft"}, evaluation={"accuracy": {}})
    assert (evaluated.writes, evaluated.needs_rollouts) == (False, True)
    grpo = parsed({"name": "grpo"})
    assert isinstance(grpo.policy_gradient, GrpoConfig)
    assert (grpo.distils, grpo.writes, grpo.needs_rollouts, grpo.reference_id) == (False, True, True, None)
    distils = parsed({}, teachers={"t": {"path": "t"}}, domains={"sums": {**SUMS, "teachers": {"t": 1.0}}})
    assert (distils.distils, distils.writes, distils.policy_gradient) == (True, True, None)


def test_sft_without_accuracy_starts_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(LocalMesh, "_start", lambda self, name, *_, **__: started.append(name))
    mesh = LocalMesh(parsed({"name": "sft"}), tmp_path / "plain")
    mesh.start(resume=False)
    assert (started, mesh.valkey) == ([], None)
    evaluated = LocalMesh(parsed({"name": "sft"}, evaluation={"accuracy": {}}), tmp_path / "evaluated")
    evaluated.start(resume=False)  # one who writes, but nothing that is trained on, so no stream
    assert (started, evaluated.valkey) == (["rollout"], None)


def test_a_reference_is_a_teacher_that_marks_no_domain() -> None:
    recipe = parsed({"name": "grpo", "kl": {"reference": "base"}}, teachers={"base": {"path": "b"}})
    assert recipe.reference_id == "base"
    assert recipe.policy_gradient is not None
    assert recipe.policy_gradient.kl is not None
    assert (recipe.policy_gradient.kl.estimator, recipe.policy_gradient.kl.coefficient) == ("unbiased", 0.001)


def test_the_longest_response_of_a_domain_is_its_own_or_its_efforts_or_that_of_all() -> None:
    efforts = {"short": {"max_new_tokens": 20}, "plain": {}}
    domains = {
        "own": {**SUMS, "effort": "short", "max_new_tokens": 7},
        "effort": {**SUMS, "effort": "short"},
        "all": {**SUMS, "effort": "plain"},
        "none": SUMS,
    }
    recipe = parsed({"name": "grpo"}, domains=domains, efforts=efforts, rollout={"max_new_tokens": 99})
    assert [recipe.max_new_tokens(domain) for domain in recipe.domains.values()] == [7, 20, 99, 99]
    assert set(recipe.efforts) == {"non_think", "high", "max", "short", "plain"}


def test_an_effort_of_ones_own_takes_the_place_of_one_that_is_built_in() -> None:
    recipe = parsed({"name": "sft"}, efforts={"high": {"opening": "<r>", "closing": "</r>"}})
    assert recipe.efforts["high"].opening == "<r>"
    assert recipe.efforts["non_think"].opening == "</think>"


def test_a_domain_of_share_0_is_only_evaluated() -> None:
    domains = {"sums": SUMS, "seen": {"reasoning_gym": {"task": "chain_sum"}, "share": 0.0}}
    recipe = parsed({"name": "grpo"}, domains=domains)  # and needs no verifier
    assert list(recipe.trained_domains) == ["sums"]
    distilled = {**domains, "sums": {**SUMS, "teachers": {"t": 1.0}}}
    assert list(parsed({}, domains=distilled, teachers={"t": {"path": "t"}}).trained_domains) == ["sums"]


@pytest.mark.parametrize(
    ("objective", "rollout", "keeps"),
    [
        ({"name": "grpo"}, {"top_k": 5, "top_p": 0.9}, True),
        ({"name": "dapo"}, {"top_k": 1024}, True),
        ({"name": "dr_grpo"}, {}, False),
        ({"name": "sft"}, {"top_k": 2000, "top_p": 0.9}, False),
        ({}, {"top_p": 0.9}, False),
    ],
)
def test_truncated_rollouts_keep_their_masks_for_policy_gradients_alone(
    objective: Any, rollout: Any, keeps: bool
) -> None:
    teachers: Any = {} if objective else {"t": {"path": "t"}}
    domains = {"sums": {**SUMS, "teachers": dict.fromkeys(teachers, 1.0)}}
    assert parsed(objective, rollout=rollout, teachers=teachers, domains=domains).keeps_masks == keeps


def test_a_changed_recipe_is_checked_again() -> None:
    recipe = parsed({"name": "grpo"})
    assert recipe.replace(run=recipe.run.replace(steps=5)).efforts == recipe.efforts
    with pytest.raises(ValueError, match=r"batch\.responses_per_prompt"):
        recipe.replace(batch=recipe.batch.replace(responses_per_prompt=1))


# --- what is refused -------------------------------------------------------------------------------------------
KL = {"name": "grpo", "kl": {"reference": "base"}}
BASE = {"base": {"path": "b"}}
SOFT = {"name": "soft_overlong", "buffer_tokens": 9}


@pytest.mark.parametrize(
    ("objective", "sections", "message"),
    [
        ({"name": "grpo"}, {"batch": {}}, "batch.responses_per_prompt: grpo compares the responses to one prompt with "
         "each other, so there must be several, not 1; 8 is usual"),
        ({"name": "dapo"}, {"domains": {"sums": {"reasoning_gym": {"task": "chain_sum"}}}},
         "domains.sums.verifier: dapo needs rewards; name a verifier"),
        ({"name": "grpo"}, {"domains": {"sums": {**SUMS, "others": {"jsonl": {"path": "p"}}}}},
         "domains.sums.others: grpo needs rewards, and other prompts are never verified; leave them out"),
        ({"name": "dr_grpo"}, {"rollout": {"top_p": 0.9}}, "rollout.top_k: dr_grpo compares p_now with p_then of every "
         "token over the ids that top_p and top_k leave, and these travel with the token, so top_k has to bound them: "
         "set it from 1 to 1024, not 0, or set top_p to 1 and top_k to 0"),
        ({"name": "grpo"}, {"rollout": {"top_k": 1025}}, "set it from 1 to 1024, not 1025"),
        ({"name": "grpo"}, {"rollout": {"top_k": 5, "engine": {"engine": "vllm"}}}, "rollout.engine.engine: vllm does "
         "not tell the ids that top_p and top_k leave, which grpo needs; choose transformers"),
        (KL, {"teachers": BASE, "rollout": {"top_k": 5}}, "objective.kl: the reference's log-probabilities are over "
         "all ids, and rollout.top_p or rollout.top_k leaves some; set kl to null, or top_p to 1 and top_k to 0"),
        (KL, {"teachers": BASE, "rollout": {"temperature": 0.7}}, "rollout.temperature: the reference's log-"
         "probabilities are of temperature 1, so objective.kl needs that, not 0.7"),
        ({"name": "dapo"}, {"max_staleness": 1}, "objective.dynamic_sampling: what replaces a dropped group cannot be "
         "written ahead; set max_staleness to 0, or dynamic_sampling to null"),
        (KL, {}, "objective.kl.reference names 'base', but the teachers are none"),
        (KL, {"teachers": {"other": {"path": "o"}}}, "objective.kl.reference names 'base', but the teachers are other"),
        ({"name": "grpo"}, {"teachers": BASE}, "teachers base mark no domain; route one to them or take them out"),
        ({"name": "sft"}, {"teachers": BASE, "domains": {"sums": {**SUMS, "teachers": {"base": 1.0}}}},
         "domains.sums.teachers: under sft teachers mark nothing; take them out"),
        ({"name": "grpo"}, {"teachers": BASE, "domains": {"sums": {**SUMS, "teachers": {"base": 1.0}}}},
         "domains.sums.teachers: under grpo teachers mark nothing; take them out"),
        ({}, {}, "domains.sums.teachers: name at least one, or set share to 0 for a domain that is only evaluated"),
        ({"name": "sft"}, {"domains": {"sums": {**SUMS, "share": 0.0}}},
         "domains: share is 0 in all of them, so there is nothing to train on"),
        ({"name": "sft"}, {"domains": {"sums": {**SUMS, "effort": "hihg"}}},
         "domains.sums.effort: 'hihg' is none of non_think, high, max"),
        ({"name": "sft"}, {"batch": {"responses_per_prompt": 2}}, "batch.responses_per_prompt: sft learns the one "
         "answer that the domain holds, not 2; leave it out, and set batch.prompts_per_step"),
        ({"name": "grpo"}, {"evaluation": {"accuracy": {"split": "test"}}},
         "evaluation.accuracy.split: domain sums has no test prompts; give it a share of them "
         "(domains.sums.splits.test), or set split to validation"),
        ({"name": "sft"}, {"evaluation": {"accuracy": {"split": "test"}},
                           "domains": {"sums": {**SUMS, "splits": {"test": 0.0}}}}, "domain sums has no test prompts"),
        ({"name": "grpo"}, {"rollout": {"max_new_tokens": 40, "engine": {"max_context_tokens": 40}}},
         "domains.sums: responses of up to 40 tokens (max_new_tokens) leave no room for a prompt in "
         "rollout.engine.max_context_tokens (40); lower the one or raise the other"),
        ({"name": "grpo"}, {"domains": {"sums": {**SUMS, "max_new_tokens": 8, "length_penalty": SOFT}}},
         "domains.sums.length_penalty.buffer_tokens: a buffer of 9 tokens is longer than the longest response (8 "
         "tokens); lower it or raise max_new_tokens"),
        ({"name": "grpo"}, {"domains": {"sums": {**SUMS, "max_new_tokens": 8, "effort": "e"}},
                            "efforts": {"e": {"length_penalty": SOFT}}}, "domains.sums.length_penalty.buffer_tokens"),
        ({"name": "grpo", "length": 9}, {}, "length: sequence_mean does not use it; leave it out, or choose "
         "constant_length"),
        ({"name": "grpo", "clip_low": 1.0}, {}, "objective.clip_low: Input should be less than 1"),
        ({"name": "grpo", "clip_high": 0}, {}, "objective.clip_high: Input should be greater than 0"),
        ({"name": "grpo", "mask_above": 0}, {}, "objective.mask_above: Input should be greater than 0"),
        ({"name": "grpo", "kl": {}}, {}, "objective.kl.reference: Field required"),
        ({"name": "grpo", "kl": {"reference": "b", "estimator": "k2"}}, {}, "'unbiased' or 'k3'"),
        ({"name": "dapo", "dynamic_sampling": {"max_rounds": 0}}, {}, "max_rounds: Input should be greater than or"),
        ({"name": "grpo", "temperature": 0.5}, {}, "objective.temperature: unknown key 'temperature'"),
        ({"name": "sft", "kl": None}, {}, "objective.kl: unknown key 'kl'"),
        ({"name": "gpro"}, {}, "one of reverse_kl, forward_kl, jsd, exopd, top_k, sampled_token, sft, grpo, dapo"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_and_the_remedy(objective: Any, sections: dict[str, Any], message: str) -> None:
    assert message in refused(objective, **sections)


# --- answers ---------------------------------------------------------------------------------------------------
def test_who_answers_what() -> None:
    sums = {**SUMS, "splits": {}}
    value = {"recipe": recipe_value({"name": "sft"}, domains={"a": sums, "b": sums}), "models": {"x": "x", "y": "y"}}
    config = parse_config(AnswersConfig, {**value, "domains": {"x": ["b"]}}, source="answers.yaml")
    assert (config.domains_of("x"), config.domains_of("y")) == (["b"], ["a", "b"])
    assert (config.split, config.temperature, config.responses_per_prompt) == ("test", 0.0, 1)
    for domains, message in (
        ({"z": ["a"]}, "domains: 'z' is none of the models x, y"),
        ({"x": ["c"]}, "domains.x: 'c' is none of the domains a, b"),
    ):
        with pytest.raises(ConfigError) as error:
            parse_config(AnswersConfig, {**value, "domains": domains}, source="answers.yaml")
        assert message in error.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"x/y": "x"}}, "models: 'x/y' names a folder of answers"),
        ({"models": {"..": "x"}}, "models: '..' names a folder"),
        ({"models": {"": "x"}}, "models: '' names a folder"),
        (
            {"split": "test"},
            "split: domain a has no test prompts; give it a share of them (recipe.domains.a.",
        ),
        ({"responses_per_prompt": 2}, "responses_per_prompt: at temperature 0 the 2 responses to a prompt are all the"),
    ],
)
def test_answers_that_cannot_be(change: dict[str, Any], message: str) -> None:
    domains = {"a": SUMS, "b": {**SUMS, "splits": {}}}
    value = {"recipe": recipe_value({"name": "sft"}, domains=domains), "models": {"x": "x"}, "split": "validation"}
    parse_config(AnswersConfig, {**value, "responses_per_prompt": 2, "temperature": 1.0}, source="answers.yaml")
    parse_config(AnswersConfig, {**value, "split": "test", "domains": {"x": ["b"]}}, source="answers.yaml")
    with pytest.raises(ConfigError) as error:
        parse_config(AnswersConfig, {**value, **change}, source="answers.yaml")
    assert message in error.value.message


# --- the reward model that a run starts ------------------------------------------------------------------------
REWARDED = {"sums": {**SUMS, "reward": {"name": "grm", "rubric": "style", "samples": 2}}}
GRM = {"rubrics": "rubrics", "sampling": {"temperature": 0.7}, "constrained": False, "system_prompt": "Judge."}


async def started(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """(name, configuration) of every process, in order; each has its name as its address."""
    found: list[tuple[str, Any]] = []

    def start(self: LocalMesh, name: str, config: Any, *_: str, **__: str) -> Any:
        found.append((name, config))
        child: Any = SimpleNamespace(name=name, address="")

        async def ready() -> str:
            child.address = f"{name}:1"
            return str(child.address)

        child.ready = ready
        self.children.append(child)
        return child

    monkeypatch.setattr(LocalMesh, "_start", start)
    mesh = LocalMesh(recipe.replace(redis_url="redis://h:1/0"), folder)
    mesh.start(resume=False)
    await mesh.start_trainer()
    return found


async def test_the_actor_judges_where_nothing_else_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parsed({"name": "grpo"}, domains=REWARDED, grm=GRM, run={"steps": 3, "seed": 5})
    (_, rollout), (name, grm), (_, trainer) = await started(recipe, tmp_path, monkeypatch)
    assert name == "grm"
    assert (grm.model, grm.judge.addresses, rollout.frozen) == (Path("models/student"), ["rollout:1"], False)
    assert (grm.rubrics, grm.sampling.temperature, grm.constrained) == (Path("rubrics"), 0.7, False)
    assert (grm.seed, grm.system_prompt, grm.item_timeout_s) == (5, "Judge.", recipe.rollout.timeout_s)
    assert trainer.grm.peers.addresses == ["grm:1"]


async def test_a_frozen_judge_has_a_rollout_server_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = {"model": "models/judge", "engine": {"max_slots": 3}}
    rollout = {"peers": {"addresses": ["far:1"], "channel": {"tls": {"ca_file": "ca.pem"}, "timeout_s": 99}}}
    far = parsed({"name": "grpo"}, domains=REWARDED, grm={**GRM, "judge": judge}, rollout=rollout)
    found = await started(far, tmp_path, monkeypatch)
    assert [name for name, _ in found] == ["judge", "grm", "trainer"]
    channel = dict(found)["grm"].judge.channel
    assert channel == far.rollout.peers.channel.replace(tls=None)  # the judge is here, without TLS
    recipe = parsed({"name": "grpo"}, domains=REWARDED, grm={**GRM, "judge": judge})
    found = await started(recipe, tmp_path, monkeypatch)
    assert [name for name, _ in found] == ["rollout", "judge", "grm", "trainer"]
    configs = dict(found)
    assert (configs["judge"].model, configs["judge"].frozen) == (Path("models/judge"), True)
    assert (configs["judge"].engine.max_slots, configs["judge"].log) == (3, None)
    assert (configs["grm"].model, configs["grm"].judge.addresses) == (Path("models/judge"), ["judge:1"])
    assert configs["trainer"].rollout.peers.addresses == ["rollout:1"]


@pytest.mark.parametrize(
    ("objective", "grm"), [({"name": "sft"}, GRM), ({"name": "grpo"}, {"peers": {"addresses": ["h:9"]}})]
)
async def test_no_reward_model_is_started_without_need(
    objective: Any, grm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(objective, domains=REWARDED, grm=grm)
    found = dict(await started(recipe, tmp_path, monkeypatch))
    assert {"grm", "judge"}.isdisjoint(found)
    assert found["trainer"].grm.peers.addresses == recipe.grm.peers.addresses


def test_who_judges_is_started_again_and_a_teacher_is_not(tmp_path: Path) -> None:
    mesh = LocalMesh(parsed({"name": "grpo"}, domains=REWARDED, grm=GRM), tmp_path)
    children: Any = {name: SimpleNamespace(name=name) for name in ("rollout", "judge", "grm", "teacher")}
    assert [name for name, child in children.items() if mesh.may_restart(child)] == ["rollout", "judge", "grm"]
