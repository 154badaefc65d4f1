"""Judging domains: what a recipe may say, balanced right and wrong answers, splits, gold files, and the verifier."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from opd.v1 import rollout_service_pb2
from task_cases import SPELL, jsonl
from tiny_models import tiny_tokenizer

from opd_mesh.config.base import parse_config
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.rubrics import load_rubric
from opd_mesh.config.services import ChannelConfig
from opd_mesh.config.tasks import SplitsConfig
from opd_mesh.errors import ConfigError, PreconditionError
from opd_mesh.judging.probes import probes_of
from opd_mesh.judging.verdict import parse_verdict, verdict_grammar
from student_trainer.answers import drawn_at
from student_trainer.rollouts import Rollouts
from student_trainer.tasks import Domain, Grader, Item, Prompt, open_domains
from student_trainer.tasks.judging import read_gold, verdict_grammars
from student_trainer.tasks.splits import split_of
from student_trainer.tasks.verifiers import Grade, Verification

RUBRIC = """
name: spelling
reasons: none
form: score
template: "{{ prompt }}{{ answer }}?{{ reference }}"
criteria: [{name: correct, scale: {min: 0, max: 1}}]
"""
CRITERIA = """
name: essay
criteria:
  - {name: clear, scale: {min: 1, max: 3}}
  - {name: short, scale: {min: 1, max: 3}, weight: 3}
"""
REVERSE = {
    **SPELL,
    "prompt": "r{{ metadata.word | lower }}:",
    "answer": "{{ answer | lower }}",
    "verifier": {"name": "reasoning_gym", "threshold": 1.0},
}
SPLITS = {"validation": 0.2, "test": 0.2}


@pytest.fixture
def rubric(tmp_path: Path) -> str:
    path = tmp_path / "spelling.yaml"
    path.write_text(RUBRIC)
    return str(path)


def recipe_of(domains: dict[str, Any], *, seed: int = 0, heldout: int = 6, **sections: Any) -> Recipe:
    value = {
        "run": {"steps": 1, "seed": seed},
        "student": {"path": "s"},
        "domains": domains,
        "objective": {"name": "grpo"},
        "batch": {"responses_per_prompt": 2},
        "evaluation": {"prompts_per_domain": heldout},
        **sections,
    }
    return parse_config(Recipe, value, source="test")


def refused(domains: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        recipe_of(domains, **sections)
    return error.value.message


def opened(domains: dict[str, Any], **options: Any) -> dict[str, Domain]:
    found = open_domains(recipe_of(domains, **options), tiny_tokenizer())
    assert [domain.name for domain in found] == list(domains)
    return {domain.name: domain for domain in found}


def judged_and_judging(
    rubric: str, *, splits: Any = SPLITS, judging: Any = None, **options: Any
) -> tuple[Domain, Domain]:
    """The domain that judges comes first in the recipe, so that the order there does not matter."""
    domains = opened(
        {
            "judge": {"judging": {"rubric": rubric, "domain": "reverse", **(judging or {})}},
            "reverse": {**REVERSE, "splits": splits},
        },
        **options,
    )
    return domains["reverse"], domains["judge"]


def drawn(domain: Domain, count: int) -> list[Item]:
    return [domain.item(prompt) for prompt in domain.after(0, count)[0]]


def held_out(domain: Domain, split: Any, count: int) -> list[Item]:
    return [domain.item(prompt) for prompt in domain.held_out(split, count)]


# --- what a recipe may say -------------------------------------------------------------------------------------
def test_a_judging_domain_is_verified_by_its_gold_and_split_as_what_it_judges() -> None:
    recipe = recipe_of(
        {"judge": {"judging": {"rubric": "r.yaml", "domain": "reverse"}}, "reverse": {**REVERSE, "splits": SPLITS}}
    )
    judge = recipe.domains["judge"]
    assert judge.verifier is not None
    assert judge.verifier.name == "verdict"
    assert judge.splits == recipe.domains["reverse"].splits
    assert judge.has_test_prompts
    again = parse_config(Recipe, recipe.model_dump(mode="json"), source="again")
    assert again == recipe


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"judging": {"rubric": "r.yaml"}}, "name one of path (answers with gold verdicts) and domain"),
        ({"judging": {"rubric": "r.yaml", "path": "p", "domain": "reverse"}}, "name one of path"),
        ({"judging": {"rubric": "r.yaml", "path": "p", "reference": "answer"}}, "reference: belongs to domain"),
        ({"judging": {"rubric": "r.yaml", "domain": "reverse", "corruptions": ["swap", "swap"]}}, "stands there twice"),
        (
            {"judging": {"rubric": "r.yaml", "domain": "nobody"}},
            "'nobody' is none of the domains judge, reverse, plain",
        ),
        ({"judging": {"rubric": "r.yaml", "domain": "judge"}}, "judge holds no questions with answers"),
        ({"judging": {"rubric": "r.yaml", "domain": "plain"}}, "for the verifier of plain to say; give it one"),
        (
            {"judging": {"rubric": "r.yaml", "domain": "reverse"}, "splits": {"test": 0.4}},
            "leave it out, and set reverse",
        ),
        (
            {"judging": {"rubric": "r.yaml", "domain": "reverse"}, "prompt": "x"},
            "prompt: the rubric says what is asked",
        ),
        (
            {"judging": {"rubric": "r.yaml", "path": "p"}, "verifier": {"name": "exact"}},
            "verdict and judging go together",
        ),
        ({"judging": {"rubric": "r.yaml", "path": "p", "pairwise": True}}, "pairwise: belongs to domain"),
        (
            {"judging": {"rubric": "r.yaml", "domain": "reverse", "pairwise": True, "probe": "length"}},
            "leave out pairwise, or probe",
        ),
        ({**SPELL, "verifier": {"name": "verdict"}}, "verdict and judging go together"),
        ({"judging": {"rubric": "r.yaml", "path": "p"}, "jsonl": {"path": "p"}}, "name exactly one source"),
        (
            {"judging": {"rubric": "r.yaml", "path": "p"}, "effort": "high"},
            "a constrained verdict has no room for that",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(judge: dict[str, Any], message: str) -> None:
    domains = {"judge": judge, "reverse": {**REVERSE, "splits": SPLITS}, "plain": {**SPELL, "share": 0.0}}
    assert message in refused(domains)


def test_a_grammar_does_not_go_with_ratios_over_the_whole_vocabulary() -> None:
    teachers = {"base": {"path": "b"}}
    domains = {"judge": {"judging": {"rubric": "r.yaml", "path": "p"}}}
    kl = {"name": "grpo", "kl": {"reference": "base"}}
    assert "objective.kl: domain judge writes under a grammar" in refused(domains, objective=kl, teachers=teachers)
    free = {"judge": {"judging": {"rubric": "r.yaml", "path": "p", "constrained": False}}}
    assert recipe_of(free, objective=kl, teachers=teachers).domains["judge"].judging is not None
    distilled = {"judge": {**domains["judge"], "teachers": {"base": 1.0}}}
    weighed = {"name": "reverse_kl", "importance": {}}
    text = refused(distilled, objective=weighed, teachers=teachers, batch={})
    assert "objective.importance: domain judge writes under a grammar" in text


def test_a_domain_may_be_rewarded_by_a_grm_alone() -> None:
    reward = {"name": "grm", "rubric": "r.yaml"}
    recipe = recipe_of({"reverse": {**SPELL, "reward": reward}})
    assert list(recipe.judged_domains) == ["reverse"]
    assert recipe.domains["reverse"].reward is not None
    assert recipe.domains["reverse"].reward.rubric == Path("r.yaml")
    sft = recipe_of({"reverse": {**SPELL, "reward": reward}}, objective={"name": "sft"}, batch={})
    assert sft.judged_domains == {}  # nothing is rewarded there
    assert "needs rewards; name a verifier, or a reward by a GRM" in refused({"reverse": SPELL})


def test_the_documented_reward_is_one() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "stage-one.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(domains:.*?)```", text, flags=re.DOTALL)
    value = yaml.safe_load(block)
    recipe = recipe_of(value["domains"], grm=value["grm"])
    assert list(recipe.judged_domains) == ["essay"]


@pytest.mark.parametrize(
    ("reward", "grm", "message"),
    [
        ({"rubric": "two words"}, {}, "'two words' is neither a file (….yaml) nor a name"),
        ({"rubric": "writing"}, {}, "'writing' is a name, but there is no grm.rubrics"),
        (
            {"rubric": "r.yaml", "samples": 4},
            {},
            "reward.samples: at grm.sampling.temperature 0 all 4 votes are the same",
        ),
        (
            {"rubric": "r.yaml"},
            {"max_verdict_tokens": 4096},
            "leave no room for a prompt in the max_context_tokens (4096)",
        ),
        (
            {"rubric": "r.yaml"},
            {"judge": {"model": "j", "engine": {"max_context_tokens": 300}}},
            "512 tokens of a verdict leave no room for a prompt in the max_context_tokens (300)",
        ),
        ({"rubric": "r.yaml"}, {"peers": {"addresses": ["h:1"]}, "constrained": False}, "judge by their own settings"),
    ],
)
def test_rewards_that_a_grm_cannot_give_are_refused(reward: Any, grm: Any, message: str) -> None:
    assert message in refused({"reverse": {**SPELL, "reward": {"name": "grm", **reward}}}, grm=grm)


async def test_verdicts_are_drawn_under_the_rubrics_grammar_where_they_are_constrained(rubric: str) -> None:
    def sampling(constrained: bool) -> tuple[str, str]:
        judge = {"judging": {"rubric": rubric, "domain": "reverse", "constrained": constrained}}
        recipe = recipe_of(
            {"judge": judge, "reverse": REVERSE},
            rollout={"peers": {"addresses": ["127.0.0.1:1"]}},
            redis_url="redis://127.0.0.1:1/0",
        )
        rollouts = Rollouts(
            recipe, run_id="r", tokenizer_fingerprint="f", eos_token_id=2, vocab_size=64, for_training=False
        )
        return rollouts.sampling("judge", "train", 0).grammar, rollouts.sampling("reverse", "train", 0).grammar

    assert sampling(True) == (verdict_grammar(load_rubric(rubric)), "")
    assert sampling(False) == ("", "")


async def test_a_server_that_takes_no_grammars_is_refused_where_verdicts_are_constrained(rubric: str) -> None:
    class Server:
        address, config = "h:1", ChannelConfig()

        async def wait_ready(self) -> None: ...

        async def get_policy(self) -> rollout_service_pb2.GetPolicyResponse:
            return rollout_service_pb2.GetPolicyResponse(tokenizer_fingerprint="f")

    async def connect(constrained: bool) -> None:
        judge = {"judging": {"rubric": rubric, "domain": "reverse", "constrained": constrained}}
        recipe = recipe_of(
            {"judge": judge, "reverse": REVERSE}, rollout={"peers": {"addresses": ["h:1"]}}, redis_url="redis://h:1/0"
        )
        rollouts = Rollouts(
            recipe, run_id="r", tokenizer_fingerprint="f", eos_token_id=2, vocab_size=64, for_training=False
        )
        rollouts._clients = [Server()]  # type: ignore[list-item]
        await rollouts.connect()

    with pytest.raises(PreconditionError, match="h:1 takes no grammars") as error:
        await connect(True)
    assert error.value.field == "domains.judge.judging.constrained"
    await connect(False)


async def test_a_server_that_tells_no_masks_is_refused_where_a_policy_gradient_needs_them() -> None:
    class Server:
        address, config = "h:1", ChannelConfig()

        def __init__(self, max_kept_ids: int) -> None:
            self.limits = rollout_service_pb2.RolloutLimits(max_kept_ids=max_kept_ids)

        async def wait_ready(self) -> None: ...

        async def get_policy(self) -> rollout_service_pb2.GetPolicyResponse:
            return rollout_service_pb2.GetPolicyResponse(tokenizer_fingerprint="f", limits=self.limits)

    async def connect(max_kept_ids: int, *, for_training: bool = True, **rollout: Any) -> Rollouts:
        recipe = recipe_of(
            {"reverse": REVERSE},
            rollout={"peers": {"addresses": ["h:1"]}, **rollout},
            redis_url="redis://127.0.0.1:1/0",
        )
        rollouts = Rollouts(
            recipe, run_id="r", tokenizer_fingerprint="f", eos_token_id=2, vocab_size=64, for_training=for_training
        )
        rollouts._clients = [Server(max_kept_ids)]  # type: ignore[list-item]
        rollouts._stream = None
        await rollouts.connect()
        return rollouts

    cut = {"top_k": 5, "top_p": 0.9}
    for told, words in ((0, "h:1 tells none of the ids"), (4, "h:1 tells at most 4 of the ids")):
        with pytest.raises(PreconditionError, match=words) as error:
            await connect(told, **cut)
        assert error.value.field == "rollout.top_k"
    drawn = (await connect(5, **cut)).sampling("reverse", "train", 0)
    assert (drawn.keep_mask, drawn.top_k, drawn.top_p) == (True, 5, 0.9)
    assert not drawn_at(drawn, 0.0).keep_mask  # what is only evaluated is not cut
    assert not (await connect(0)).sampling("reverse", "train", 0).keep_mask
    await connect(0, for_training=False, **cut)


def test_vllm_takes_no_grammars(rubric: str) -> None:
    rollout = {"engine": {"engine": "vllm"}}
    judge = {"judging": {"rubric": rubric, "domain": "reverse"}}
    text = refused({"judge": judge, "reverse": REVERSE}, rollout=rollout)
    assert "verdicts of domain judge are constrained; choose transformers, or set judging.constrained" in text
    free = {"judging": {**judge["judging"], "constrained": False}}
    recipe_of({"judge": free, "reverse": REVERSE}, rollout=rollout)
    rewarded = {"reverse": {**SPELL, "reward": {"name": "grm", "rubric": "r.yaml"}}}
    assert "set grm.constrained to false, or name another grm.judge" in refused(rewarded, rollout=rollout)
    for grm in ({"constrained": False}, {"judge": {"model": "j"}}):
        recipe_of(rewarded, rollout=rollout, grm=grm)


# --- right and wrong answers -----------------------------------------------------------------------------------
def test_right_and_wrong_answers_come_by_turns_and_are_verified(rubric: str) -> None:
    reverse, judge = judged_and_judging(rubric)
    truth = Verification(reverse.verifier_spec)
    items = drawn(judge, 60)
    assert [item.metadata["gold"] for item in items] == [1.0, 0.0] * 30
    corruptions: Counter[str] = Counter()
    for right, wrong in zip(items[::2], items[1::2], strict=True):
        question = right.metadata["prompt"]
        assert wrong.metadata["prompt"] == question
        entry = {"question": "", "answer": question[1:-1][::-1], "metadata": {"word": question[1:-1]}}
        spelt = Item([], entry["answer"], entry["metadata"], entry)
        assert truth.grade(spelt, right.metadata["answer"]).score == 1.0
        assert truth.grade(spelt, wrong.metadata["answer"]).score == 0.0
        assert (right.answer, wrong.answer) == ("1", "0")
        assert right.messages == [{"role": "user", "content": f"{question}{question[1:-1][::-1]}?"}]
        corruptions[wrong.metadata["corruption"]] += 1
        if wrong.metadata["corruption"] == "swap":
            assert sorted(wrong.metadata["answer"]) == sorted(right.metadata["answer"])
        if wrong.metadata["corruption"] == "change":
            pairs = zip(wrong.metadata["answer"], right.metadata["answer"], strict=True)
            assert sum(a != b for a, b in pairs) == 1
    assert set(corruptions) == {"swap", "change", "other"}
    assert min(corruptions.values()) >= 4


def test_two_characters_anywhere_change_places(rubric: str) -> None:
    _, judge = judged_and_judging(rubric, judging={"corruptions": ["exchange"]})
    apart = set()
    for right, wrong in zip(*[iter(item.metadata["answer"] for item in drawn(judge, 80))] * 2, strict=True):
        places = [place for place in range(len(right)) if right[place] != wrong[place]]
        assert len(places) == 2
        assert sorted(right) == sorted(wrong)
        apart.add(places[1] - places[0])
    assert len(apart) > 2


PAIRS = """
name: pairs
reasons: none
form: score
pairwise_template: "{{ prompt }}{{ answers | join('/') }}?"
criteria: [{name: better, scale: {min: 0, max: 1}}]
"""


def test_of_a_pair_the_right_answer_stands_first_and_second_by_turns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.yaml"
    path.write_text(PAIRS)
    _, judge = judged_and_judging(str(path), judging={"pairwise": True})
    _, alone = judged_and_judging(str(path), judging={})
    items, singles = drawn(judge, 20), drawn(alone, 20)
    assert [(item.metadata["gold"], item.answer) for item in items] == [(1.0, "A"), (0.0, "B")] * 10
    for place in range(0, 20, 2):
        right, wrong = (single.metadata["answer"] for single in singles[place : place + 2])
        assert items[place].metadata["answers"] == [right, wrong]
        assert items[place + 1].metadata["answers"] == [wrong, right]
        question = items[place].metadata["prompt"]
        assert items[place + 1].question == f"{question}{wrong}/{right}?"
    verification = Verification(judge.verifier_spec)
    for text, said in (("A", 1.0), ("tie", 0.5), ("B", 0.0)):
        assert verification.grade(items[1], text) == Grade(1.0 - said, parsed=True, said=said, gold=0.0)
    assert verification.grade(items[1], "1") == Grade(0.0, parsed=False, gold=0.0)
    assert judge.item(judge.held_out("test", 2)[1]).metadata["gold"] == 0.0


def test_pairs_are_drawn_under_the_grammar_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.yaml"
    path.write_text(PAIRS)
    judging = {"rubric": str(path), "domain": "reverse"}
    domains = {"one": {"judging": judging}, "two": {"judging": {**judging, "pairwise": True}}, "reverse": REVERSE}
    grammars = verdict_grammars(recipe_of(domains))
    assert grammars == {name: verdict_grammar(load_rubric(path), pairwise=name == "two") for name in ("one", "two")}
    assert grammars["one"] != grammars["two"]


@pytest.mark.parametrize("probe", ["length", "verdict", "instruction"])
def test_a_probe_is_done_to_the_very_answers_that_are_judged_without_it(rubric: str, probe: str) -> None:
    _, plain = judged_and_judging(rubric)
    _, probed = judged_and_judging(rubric, judging={"probe": probe})
    for ours, theirs in zip(drawn(probed, 12), drawn(plain, 12), strict=True):
        answer = theirs.metadata["answer"]
        assert ours.metadata["answer"] == probes_of(load_rubric(Path(rubric)), answer)[probe] != answer
        assert (ours.metadata["gold"], ours.answer) == (theirs.metadata["gold"], theirs.answer)
    for split in ("validation", "test"):
        indices = [[prompt.index for prompt in one.held_out(split, 10)] for one in (plain, probed)]  # type: ignore[arg-type]
        assert indices[0] == indices[1]


def test_items_are_a_function_of_seed_and_index_and_held_out_ones_of_the_index(rubric: str) -> None:
    _, one = judged_and_judging(rubric, seed=3)
    _, again = judged_and_judging(rubric, seed=3)
    _, other = judged_and_judging(rubric, seed=4)
    assert one.after(0, 20) == again.after(0, 20)
    backwards = [again.item(prompt) for prompt in reversed(one.after(0, 20)[0])]
    assert drawn(one, 20) == backwards[::-1]
    assert drawn(one, 20) != drawn(other, 20)
    assert held_out(one, "test", 20) == held_out(other, "test", 20)
    golds = Counter(item.metadata["gold"] for item in held_out(one, "test", 20))
    assert golds == {1.0: 10, 0.0: 10}


def test_no_question_is_in_two_splits_of_either_domain(rubric: str) -> None:
    """Nor is the answer to one, which tells the question: another's answer comes from the same split."""
    reverse, judge = judged_and_judging(rubric, judging={"corruptions": ["other"]})
    splits = SplitsConfig(**SPLITS)
    tested = {f"r{str(item.metadata['word']).lower()}:" for item in held_out(reverse, "test", 60)}
    assert len(tested) == 60
    seen: dict[str, set[str]] = {}
    for split, items in (
        ("train", drawn(judge, 200)),
        ("validation", held_out(judge, "validation", 60)),
        ("test", held_out(judge, "test", 120)),
    ):
        shown = {item.metadata["prompt"] for item in items}
        shown |= {f"r{item.metadata['answer'][::-1]}:" for item in items}
        assert {split_of(question, splits) for question in shown} == {split}
        seen[split] = shown
    assert not seen["train"] & tested
    assert seen["test"] >= tested


def test_without_splits_what_either_domain_holds_out_is_not_trained_on(tmp_path: Path, rubric: str) -> None:
    """The questions stand in the file twice, so that the last lines alone would not keep them apart."""
    lines = [{"prompt": f"q{n % 8}", "answer": f"a{n % 8}"} for n in range(16)]
    answering = {"jsonl": {"path": str(jsonl(tmp_path / "p.jsonl", lines))}, "verifier": {"name": "exact"}}
    judging = {"judging": {"rubric": rubric, "domain": "d", "corruptions": ["swap", "other"]}}
    domains = opened({"judge": judging, "d": answering}, heldout=4)
    kept = {domains["d"].item(prompt).question for prompt in domains["d"].heldout}
    assert kept == {"q4", "q5", "q6", "q7"}
    assert {item.metadata["prompt"] for item in held_out(domains["judge"], "validation", 4)} <= kept
    items = drawn(domains["judge"], 40)
    assert {item.metadata["prompt"] for item in items} == {"q0", "q1", "q2", "q3"}
    assert not {item.metadata["answer"] for item in items} & {"a4", "a5", "a6", "a7"}
    assert Counter(item.metadata["gold"] for item in items) == {1.0: 20, 0.0: 20}


def test_pairs_that_cannot_be_made_are_passed_over_together(tmp_path: Path, rubric: str) -> None:
    """Of "aa" no swap is wrong, and of a gold answer that the verifier refuses nothing is known."""
    lines = [{"prompt": "same", "answer": "aa"}, {"prompt": "good", "answer": "ab"}, {"prompt": "h", "answer": "xy"}]
    path = jsonl(tmp_path / "p.jsonl", lines)
    domains = opened(
        {
            "d": {"jsonl": {"path": str(path)}, "verifier": {"name": "exact"}},
            "judge": {"judging": {"rubric": rubric, "domain": "d", "corruptions": ["swap"]}},
        },
        heldout=1,
    )
    items = drawn(domains["judge"], 6)
    assert [(item.metadata["prompt"], item.metadata["answer"]) for item in items] == [
        ("good", "ab"),
        ("good", "ba"),
    ] * 3
    none = {"jsonl": {"path": str(path)}, "verifier": {"name": "template", "score": "0"}}
    judging = {"judging": {"rubric": rubric, "domain": "d"}}
    with pytest.raises(ConfigError, match="cannot be trained on: 10000 passed over, as the verifier of d "):
        opened({"d": none, "judge": judging}, heldout=0)["judge"].after(0, 1)


def test_a_verifier_that_fails_on_a_gold_answer_is_told(tmp_path: Path, rubric: str) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "p", "answer": "aa"}])
    fails = {"jsonl": {"path": str(path)}, "verifier": {"name": "number"}}
    judging = {"judging": {"rubric": rubric, "domain": "d"}}
    with pytest.raises(ConfigError, match=r"gold answer 'aa'.*raised ValueError: .*is not a number") as error:
        opened({"d": fails, "judge": judging}, heldout=0)["judge"].after(0, 1)
    assert error.value.field == "domains.d.verifier"


# --- prompts that look the same ----------------------------------------------------------------------------------
def answers_alone(tmp_path: Path, key: str | None) -> tuple[Domain, Domain]:
    """240 questions with 24 answers, of which the judge is shown nothing else."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    answers = [alphabet[n : n + 3] for n in range(24)]
    lines = [{"prompt": f"q{n}", "answer": answers[n % 24], "metadata": {"n": n}} for n in range(240)]
    (tmp_path / "alone.yaml").write_text(RUBRIC.replace("{{ prompt }}{{ answer }}?{{ reference }}", "{{ answer }}?"))
    answering = {
        "jsonl": {"path": str(jsonl(tmp_path / "p.jsonl", lines))},
        "verifier": {"name": "exact"},
        "splits": {**SPLITS, "key": key},
    }
    judging = {"rubric": str(tmp_path / "alone.yaml"), "domain": "d", "corruptions": ["swap"]}
    domains = opened({"judge": {"judging": judging}, "d": answering}, heldout=0)
    return domains["d"], domains["judge"]


def test_a_rubric_that_hides_the_question_needs_a_key_of_what_it_shows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not show the judge the whole question") as error:
        answers_alone(tmp_path, None)
    assert error.value.field == "domains.d.splits.key"
    _, judge = answers_alone(tmp_path, "{{ answer }}")
    trained = {prompt.token_ids for prompt in judge.after(0, 480)[0]}
    kept = {prompt.token_ids for split in ("validation", "test") for prompt in judge.held_out(split, 200)}
    assert trained
    assert kept
    assert not trained & kept


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_training_prompt_under_another_key_than_a_held_out_one_is_refused(tmp_path: Path, split: Any) -> None:
    _, judge = answers_alone(tmp_path, "{{ metadata.n }}")
    judge.held_out(split, 1)
    with pytest.raises(ConfigError, match="a function of what the judge is shown") as error:
        judge.after(0, 200)
    assert error.value.field == "domains.d.splits.key"


def test_what_accuracy_asks_for_is_held_out_before_anything_is_trained_on(rubric: str) -> None:
    evaluation = {"prompts_per_domain": 0, "accuracy": {"prompts_per_domain": 8, "split": "test"}}
    _, judge = judged_and_judging(rubric, evaluation=evaluation)
    assert len(judge._held_out["test"].prompts) == 8


def test_the_judge_sees_the_whole_conversation(tmp_path: Path, rubric: str) -> None:
    turns = [("user", "hello"), ("assistant", "hi"), ("user", "spell b")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = jsonl(tmp_path / "p.jsonl", [{"messages": messages, "answer": "ab"}])
    answering = {"jsonl": {"path": str(path)}, "verifier": {"name": "exact"}}
    judging = {"judging": {"rubric": rubric, "domain": "d", "corruptions": ["swap"]}}
    right, _ = drawn(opened({"d": answering, "judge": judging}, heldout=0)["judge"], 2)
    assert right.metadata["prompt"] == "user: hello\n\nassistant: hi\n\nuser: spell b"


def test_the_judge_is_shown_an_answer_without_its_reasoning(tmp_path: Path, rubric: str) -> None:
    lines = [{"prompt": f"q{n}", "answer": f"a{n}", "metadata": {"reasoning": "hm"}} for n in range(6)]
    thinking = {
        "jsonl": {"path": str(jsonl(tmp_path / "p.jsonl", lines))},
        "verifier": {"name": "exact"},
        "effort": "high",
    }
    judging = {"judging": {"rubric": rubric, "domain": "d", "reference": "answer"}}
    for answer in (None, "hm</think>{{ answer }}"):
        domains = opened({"d": {**thinking, "answer": answer}, "judge": judging}, heldout=1)
        right, wrong = drawn(domains["judge"], 2)
        question = right.metadata["prompt"]
        gold = f"a{question[1:]}"
        assert right.question == f"{question}{gold}?{gold}"
        assert wrong.question == f"{question}{wrong.metadata['answer']}?{gold}"


def test_sft_learns_the_verdict(rubric: str) -> None:
    _, judge = judged_and_judging(rubric)
    tokenizer = tiny_tokenizer()
    prompts, _ = judge.after(0, 2)
    texts = [tokenizer.decode(judge.solution(prompt)) for prompt in prompts]
    assert texts == [f"1{tokenizer.eos_token}", f"0{tokenizer.eos_token}"]


def test_a_verdict_with_reasons_is_learned_too(tmp_path: Path) -> None:
    path = tmp_path / "essay.yaml"
    path.write_text(CRITERIA)
    _, judge = judged_and_judging(str(path))
    right, wrong = drawn(judge, 2)
    rubric = load_rubric(path)
    assert parse_verdict(rubric, right.answer or "").overall == 1.0
    assert parse_verdict(rubric, wrong.answer or "").overall == 0.0
    path.write_text(CRITERIA + "max_reason_chars: 3\n")
    _, judge = judged_and_judging(str(path))
    assert [item.answer for item in drawn(judge, 2)] == [
        "clear: rig | 3\nshort: rig | 3",
        "clear: wro | 1\nshort: wro | 1",
    ]


# --- from a file -----------------------------------------------------------------------------------------------
def from_file(tmp_path: Path, lines: list[Any], rubric: str = CRITERIA, **more: Any) -> Domain:
    path = tmp_path / "rubric.yaml"
    path.write_text(rubric)
    source = {"rubric": str(path), "path": str(jsonl(tmp_path / "gold.jsonl", lines))}
    return opened({"judge": {"judging": source, **more}}, heldout=0)["judge"]


def test_gold_comes_as_a_score_or_by_criterion(tmp_path: Path) -> None:
    line = {"prompt": "p", "answer": "a", "reference": "the reference"}
    reasons = {"clear": "it is", "short": "it is not"}
    domain = from_file(
        tmp_path,
        [
            {**line, "gold": 0.25},
            {**line, "gold": {"clear": 3, "short": 2}},
            {**line, "gold": {"clear": 3, "short": 2}, "reasons": reasons},
        ],
    )
    items = sorted(drawn(domain, 3), key=lambda item: item.part)
    assert [item.metadata["gold"] for item in items] == [0.25, 0.625, 0.625]
    assert [item.answer for item in items] == [None, None, "clear: it is | 3\nshort: it is not | 2"]
    assert "the reference" in items[0].question
    (lone,) = drawn(from_file(tmp_path, [{"prompt": "p", "answer": "a", "gold": 1}], RUBRIC), 1)
    assert (lone.answer, lone.metadata["gold"]) == ("1", 1.0)


def test_gold_is_asked_as_the_reward_model_asks_and_its_texts_end_no_turn(tmp_path: Path, rubric: str) -> None:
    texts = {"prompt": "p</s>", "answer": "a<|User|>", "reference": "r§"}
    path = jsonl(tmp_path / "gold.jsonl", [{**texts, "gold": 1}])
    special = ("<|User|>", "</s>", "§")
    (item,) = read_gold(path, load_rubric(rubric), "f", special)
    assert item.question == "p< /s>a< |User|>?r\ufffd"
    assert (item.metadata["prompt"], item.metadata["answer"], item.key) == ("p</s>", "a<|User|>", "p</s>")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "p", "gold": 1}, 'line 1: needs "prompt" and "answer"'),
        ({"prompt": "p", "answer": "a"}, '"gold" must be the overall score'),
        ({"prompt": "p", "answer": "a", "gold": 1.5}, '"gold" must be the overall score'),
        ({"prompt": "p", "answer": "a", "gold": True}, '"gold" must be the overall score'),
        ({"prompt": "p", "answer": "a", "gold": {"clear": 1}}, "a number for each of clear, short"),
        ({"prompt": "p", "answer": "a", "gold": {"clear": 1, "short": 7}}, "7 is no point of the scale of short"),
        ({"prompt": "p", "answer": "a", "gold": 1, "reference": 3}, '"reference" must be text'),
        ({"prompt": "p", "answer": "a", "gold": 1, "reasons": ["x"]}, '"reasons" must be a mapping'),
        (
            {"prompt": "p", "answer": "a", "gold": {"clear": 1, "short": 1}, "reasons": {"clear": "a|b", "short": "c"}},
            "expected one | between reason and score",
        ),
    ],
)
def test_bad_gold_is_refused_with_its_line(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_file(tmp_path, [line])
    assert message in error.value.message
    assert error.value.field == "domains.judge.judging.path"


def test_answers_to_one_prompt_are_in_one_split(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{n % 40}", "answer": f"a{n}", "gold": n % 2} for n in range(120)]
    domain = from_file(tmp_path, lines, RUBRIC, splits={"validation": 0.3, "test": 0.3})
    parts = {split: held_out(domain, split, 200) for split in ("validation", "test")}
    parts["train"] = drawn(domain, 200)
    asked = {split: {item.metadata["prompt"] for item in items} for split, items in parts.items()}
    assert sum(map(len, asked.values())) == len(set().union(*asked.values())) == 40
    for split in ("validation", "test"):
        assert len(parts[split]) == 3 * len(asked[split])  # each of the answers, not one for each prompt


def test_answers_that_look_the_same_to_the_judge_are_in_one_split(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{n}", "answer": f"a{n % 20}", "gold": 1} for n in range(120)]
    alone = RUBRIC.replace("{{ prompt }}{{ answer }}?{{ reference }}", "{{ answer }}?")
    domain = from_file(tmp_path, lines, alone, splits={"validation": 0.3, "test": 0.3})
    parts = {split: held_out(domain, split, 200) for split in ("validation", "test")}
    parts["train"] = drawn(domain, 200)
    shown = {split: {item.question for item in items} for split, items in parts.items()}
    assert all(shown.values())
    assert sum(map(len, shown.values())) == len(set().union(*shown.values())) == 20


def test_a_rubric_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "gold.jsonl", [{"prompt": "p", "answer": "a", "gold": 1}]))
    with pytest.raises(ConfigError, match=r"absent\.yaml") as error:
        opened({"judge": {"judging": {"rubric": str(tmp_path / "absent.yaml"), "path": path}}})
    assert error.value.field == "domains.judge.judging.rubric"


# --- the verifier ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("gold", "text", "wanted"),
    [
        (0.625, "clear: yes | 3\nshort: no | 2", Grade(1.0, parsed=True, said=0.625, gold=0.625, judged_chars=1)),
        (
            0.625,
            "clear: yes | 3\r\n\r\n short:  no | 2.0 \n",
            Grade(1.0, parsed=True, said=0.625, gold=0.625, judged_chars=1),
        ),
        (0.0, "clear: yes | 3\nshort: yes | 3", Grade(0.0, parsed=True, said=1.0, gold=0.0, judged_chars=1)),
        (1.0, "clear: yes | 3\nshort: no | 2", Grade(0.625, parsed=True, said=0.625, gold=1.0, judged_chars=1)),
        (0.0, "clear: yes | 3\nshort: no | 4", Grade(0.0, parsed=False, gold=0.0, judged_chars=1)),  # off the scale
        (0.0, "clear: yes | 3", Grade(0.0, parsed=False, gold=0.0, judged_chars=1)),
        (0.0, "I give clear: yes | 1\nshort: no | 1", Grade(0.0, parsed=False, gold=0.0, judged_chars=1)),
        (0.0, "", Grade(0.0, parsed=False, gold=0.0, judged_chars=1)),
        (0.0, "\ud800\x00|||:" * 50, Grade(0.0, parsed=False, gold=0.0, judged_chars=1)),
    ],
)
def test_a_verdict_earns_what_it_is_near_to_gold_and_rubbish_earns_nothing(
    tmp_path: Path, gold: float, text: str, wanted: Grade
) -> None:
    domain = from_file(tmp_path, [{"prompt": "p", "answer": "a", "gold": gold}])
    (prompt,) = domain.after(0, 1)[0]
    assert Verification(domain.verifier_spec).grade(domain.item(prompt), text) == wanted


async def test_what_a_verdict_says_comes_back_from_the_graders_process(rubric: str) -> None:
    _, judge = judged_and_judging(rubric)
    prompts: list[Prompt] = judge.after(0, 2)[0]
    chars = [len(judge.item(prompt).metadata["answer"]) for prompt in prompts]
    grader = Grader([judge])
    await grader.start()
    try:
        grades = await grader.grade("judge", [(prompts[0], "1"), (prompts[1], "1"), (prompts[1], "one")])
    finally:
        await grader.close()
    assert grades == [
        Grade(1.0, parsed=True, said=1.0, gold=1.0, judged_chars=chars[0]),
        Grade(0.0, parsed=True, said=1.0, gold=0.0, judged_chars=chars[1]),
        Grade(0.0, parsed=False, gold=0.0, judged_chars=chars[1]),
    ]
