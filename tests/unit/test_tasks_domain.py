"""Domains: shares, cursors, splits that cannot overlap, other prompts, and what SFT learns."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_cases import SPELL, domain_of, jsonl, make_domain, recipe_of
from tiny_models import EOS_ID, tiny_tokenizer

from opd_mesh.config.sections import EvaluationConfig
from opd_mesh.config.tasks import SplitsConfig
from opd_mesh.errors import ConfigError
from student_trainer.tasks import Domain, Prompt, allot, next_prompts
from student_trainer.tasks.splits import split_of

SHARES = st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 100) | st.just(0.0), min_size=1).filter(
    lambda shares: sum(shares.values()) > 0
)


# --- shares ---------------------------------------------------------------------------------------------------
@given(SHARES, st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_totals_follow_the_shares_at_every_step(shares: dict[str, float], counts: list[int]) -> None:
    drawn: dict[str, int] = {}
    total = sum(shares.values())
    for count in counts:
        given_now = allot(shares, count, drawn)
        assert given_now.keys() == shares.keys()
        assert sum(given_now.values()) == count
        assert min(given_now.values()) >= 0
        drawn = {name: drawn.get(name, 0) + given_now[name] for name in shares}
        for name, share in shares.items():
            wanted = share / total * sum(drawn.values())
            assert -len(shares) / 2 - 1e-6 < drawn[name] - wanted < 1 + 1e-6
            assert share or not drawn[name]


@given(SHARES, st.integers(0, 15), st.integers(0, 15))
def test_two_small_steps_are_one_large_step(shares: dict[str, float], first: int, second: int) -> None:
    one = allot(shares, first, {})
    two = allot(shares, second, one)
    assert {name: one[name] + two[name] for name in shares} == allot(shares, first + second, {})


def test_equal_shares_are_exact() -> None:
    assert allot({"a": 1, "b": 1}, 8, {}) == {"a": 4, "b": 4}
    assert allot({"a": 3, "b": 1}, 8, {"a": 0, "b": 0}) == {"a": 6, "b": 2}
    assert allot({"a": 3, "b": 1}, 4, {"a": 0, "b": 4}) == {"a": 4, "b": 0}  # what was missed is made up
    assert allot({"a": 0, "b": 1}, 4, {"a": 5}) == {"a": 0, "b": 4}


def test_no_share_at_all() -> None:
    assert allot({"a": 0}, 0, {}) == {"a": 0}
    with pytest.raises(ConfigError, match="share 0"):
        allot({"a": 0, "b": 0}, 1, {})


# --- prompts --------------------------------------------------------------------------------------------------
def text_of(prompt: Prompt) -> str:
    text: str = tiny_tokenizer().decode(prompt.token_ids)
    return text


def drawn(domain: Domain, count: int) -> list[Prompt]:
    return domain.after(0, count)[0]


def test_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    # The same prompts stand in both files, and some twice.
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{index % 7}"} for index in range(20)])
    heldout = jsonl(tmp_path / "h.jsonl", [{"prompt": f"q{index}"} for index in (1, 1, 4, 90, 91)])
    domain = make_domain({"jsonl": {"path": path, "heldout": heldout}})
    assert [text_of(prompt) for prompt in domain.heldout] == [f"<s>user: q{index}\nassistant: " for index in (1, 4, 90)]
    trained = set()
    cursor = 0
    for _ in range(10):
        prompts, cursor = domain.after(cursor, 5)
        trained |= {prompt.token_ids for prompt in prompts}
    assert not trained & {prompt.token_ids for prompt in domain.heldout}
    assert len(trained) == 5


@pytest.mark.parametrize("portions", [[9], [0, 4, 0, 1, 4], [1] * 9])
@pytest.mark.parametrize("splits", [None, {"validation": 0.3, "test": 0.3}])
def test_the_cursor_alone_says_where_a_run_is(portions: list[int], splits: dict[str, float] | None) -> None:
    recipe = recipe_of({**SPELL, "splits": splits})
    whole, end = domain_of(recipe).after(0, sum(portions))
    pieces, cursor = [], 0
    for portion in portions:
        prompts, cursor = domain_of(recipe).after(cursor, portion)  # a new process each time
        pieces += prompts
    assert pieces == whole
    assert cursor == end


def test_a_domain_without_the_new_keys_draws_what_it_drew() -> None:
    """Recorded runs depend on it: the words of reasoning-gym's seeds 5, 6, … and 2^40 + 5, …"""
    domain = make_domain(SPELL, seed=5, heldout=2)

    def word(seed: int) -> str:
        import reasoning_gym

        params = SPELL["reasoning_gym"]["params"]
        question = reasoning_gym.create_dataset("spell_backward", seed=seed, size=1, **params)[0]["question"]
        return f"<s>user: {question}\nassistant: "

    assert [text_of(prompt) for prompt in drawn(domain, 4)] == [word(5 + index) for index in range(4)]
    assert [text_of(prompt) for prompt in domain.heldout] == [word(2**40 + 5), word(2**40 + 6)]
    assert [(prompt.index, prompt.split, prompt.other) for prompt in domain.heldout] == [
        (0, "validation", False),
        (1, "validation", False),
    ]


def test_accuracy_without_splits_keeps_its_own_prompts_out_of_the_training(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{index}", "answer": "1"} for index in range(20)])
    recipe = recipe_of(
        {"jsonl": {"path": path}, "verifier": {"name": "exact"}},
        evaluation={"prompts_per_domain": 2, "accuracy": {"prompts_per_domain": 6}},
    )
    domain = domain_of(recipe)
    kept_out = domain.held_out("validation", 6)
    assert len(kept_out) == 6
    assert domain.heldout == kept_out[:2]
    assert not {prompt.token_ids for prompt in domain.after(0, 14)[0]} & {prompt.token_ids for prompt in kept_out}


@pytest.mark.parametrize(
    ("accuracy", "verifier", "count"),
    [({"split": "test"}, {"verifier": {"name": "exact"}}, 2), ({}, {}, 2), ({}, {"verifier": {"name": "exact"}}, 6)],
)
def test_only_accuracy_of_validation_prompts_keeps_some_out(
    tmp_path: Path, accuracy: dict[str, Any], verifier: dict[str, Any], count: int
) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{index}", "answer": "1"} for index in range(20)])
    evaluation = {"prompts_per_domain": 2, "accuracy": {"prompts_per_domain": 6, **accuracy}}
    recipe = recipe_of({"jsonl": {"path": path}, **verifier}, evaluation={"prompts_per_domain": 2})
    section = EvaluationConfig.model_validate(evaluation)
    domain = domain_of(recipe.model_copy(update={"evaluation": section}))
    assert len(domain.held_out("validation", 20)) == count


def test_a_key_that_is_no_function_of_the_prompt_is_told(tmp_path: Path) -> None:
    lines = [{"prompt": f"q{index % 5}", "metadata": {"n": index}} for index in range(100)]
    path = jsonl(tmp_path / "p.jsonl", lines)
    splits = {"validation": 0.3, "key": "{{ metadata.n }}"}
    domain = make_domain({"jsonl": {"path": path}, "splits": splits})
    with pytest.raises(ConfigError, match=r"training prompt \d+ is also held out, under another key") as caught:
        domain.after(0, 50)
    assert caught.value.field == "domains.d.splits.key"
    make_domain({"jsonl": {"path": path}, "splits": {**splits, "key": "{{ question }}"}}, heldout=1).after(0, 50)


@pytest.mark.parametrize("key", [None, "{{ metadata.n }}"])
def test_others_that_belong_to_what_is_held_out_are_passed_over(tmp_path: Path, key: str | None) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{n}", "metadata": {"n": n}} for n in range(40)])
    unlike = jsonl(tmp_path / "o.jsonl", [{"prompt": f"other {n}"} for n in range(20)])
    splits = {"validation": 0.3, "test": 0.3, "key": key}
    domain = make_domain({"jsonl": {"path": path}, "splits": splits, "others": {"jsonl": {"path": path}, "share": 0.5}})
    held = {prompt.token_ids for split in ("validation", "test") for prompt in domain.held_out(split, 40)}  # type: ignore[arg-type]
    prompts = drawn(domain, 60)
    assert held
    assert {prompt.other for prompt in prompts} == {True, False}
    assert not held & {prompt.token_ids for prompt in prompts}
    domain = make_domain({**SPELL, "splits": {"key": "{{ metadata.word }}"}, "others": {"jsonl": {"path": unlike}}})
    assert any(prompt.other for prompt in drawn(domain, 20))  # they have no such key


def test_a_source_whose_prompts_are_all_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.tasks.domain.MAX_SKIPPED", 100)
    domain = make_domain({"jsonl": {"path": jsonl(tmp_path / "p.jsonl", [{"prompt": "same"}] * 4)}}, heldout=1)
    with pytest.raises(ConfigError, match="too few different ones"):
        domain.after(0, 1)


def test_a_prompt_that_leaves_no_room(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"question {index}"} for index in range(3)])
    recipe = recipe_of({"jsonl": {"path": path}}, heldout=1)
    domain_of(recipe, max_prompt_tokens=29)
    with pytest.raises(ConfigError, match="renders to 29 tokens; between 1 and 28 fit"):
        domain_of(recipe, max_prompt_tokens=28)
    rollout = {"max_new_tokens": 99, "engine": {"max_context_tokens": 100}}
    recipe = recipe_of({"jsonl": {"path": path}, "max_new_tokens": 71}, heldout=1, rollout=rollout)
    assert Domain("d", recipe.domains["d"], recipe, tiny_tokenizer()).max_new_tokens == 71
    recipe = recipe_of({"jsonl": {"path": path}, "max_new_tokens": 72}, heldout=1, rollout=rollout)
    with pytest.raises(ConfigError, match="between 1 and 28 fit"):
        Domain("d", recipe.domains["d"], recipe, tiny_tokenizer())


def test_next_prompts_moves_every_cursor_it_draws_from(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"question {index}"} for index in range(30)])
    recipe = recipe_of({"jsonl": {"path": path}, "share": 2.0}, heldout=2)
    domains = [domain_of(recipe, name="d"), domain_of(recipe, name="e")]
    cursors: dict[str, int] = {}
    already: dict[str, int] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for _ in range(4):
        before = dict(cursors)
        prompts, cursors, already = next_prompts(domains, 5, cursors, already)
        assert len(prompts) == 5
        assert before.keys() <= cursors.keys()
        seen.update((prompt.domain, prompt.index) for prompt in prompts)
    assert already == {"d": 10, "e": 10}
    assert cursors == {"d": 10, "e": 10}
    assert seen == Counter({(name, index): 1 for name in "de" for index in range(10)})


# --- templates ------------------------------------------------------------------------------------------------
def test_a_compact_rendering() -> None:
    domain = make_domain(
        {
            "reasoning_gym": {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2}},
            "prompt": "{{ metadata.expression | replace(' ', '') }}=",
            "answer": "{{ answer }}!",
        }
    )
    for prompt in drawn(domain, 3):
        item = domain.item(prompt)
        expression = item.metadata["expression"].replace(" ", "")
        assert text_of(prompt) == f"<s>user: {expression}=\nassistant: "
        assert tiny_tokenizer().decode(domain.solution(prompt)) == f"{item.answer}!</s>"


def test_a_prompt_template_replaces_the_last_turn(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = jsonl(tmp_path / "p.jsonl", [{"messages": turns, "metadata": {"n": 1}}])
    domain = make_domain({"jsonl": {"path": path}, "prompt": "{{ question }}{{ metadata.n }}\n"}, heldout=0)
    assert text_of(drawn(domain, 1)[0]) == "<s>user: a\nassistant: b</s>\nuser: c1\n\nassistant: "


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"prompt": "{{ question"}, "prompt", "not a template"),
        ({"prompt": "{{ metadata.absent }}"}, "prompt", "cannot be rendered .* 'absent'"),
        ({"prompt": "{{ qestion }}"}, "prompt", "it knows question, metadata, answer"),
        ({"prompt": "{{ question.__class__.__mro__ }}"}, "prompt", "SecurityError"),
        ({"prompt": "{{ metadata.pop('word') }}"}, "prompt", "SecurityError"),
        ({"answer": "{% if %}"}, "answer", "not a template"),
        ({"splits": {"key": "{{ 1 / 0 }}"}}, "splits.key", "ZeroDivisionError"),
        ({"others": {**SPELL, "prompt": "{{ nothing }}"}}, "others.prompt", "nothing"),
    ],
)
def test_a_bad_template_is_named(change: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        drawn(make_domain({**SPELL, **change}), 9)
    assert caught.value.field == f"domains.d.{field}"


# --- splits ---------------------------------------------------------------------------------------------------
@given(
    key=st.text(st.characters()),
    other=st.text(),
    validation=st.floats(0.01, 0.5, exclude_max=True),
    test=st.floats(0, 0.5),
)
def test_a_key_is_in_one_split(key: str, other: str, validation: float, test: float) -> None:
    config = SplitsConfig(validation=validation, test=test)
    assert split_of(key, config) == split_of(str(key), config) in ("train", "validation", "test")
    if split_of(key, config) != split_of(other, config):
        assert key != other
    if split_of(key, config) == "test":  # a greater share keeps what it had
        assert split_of(key, SplitsConfig(validation=validation, test=min(test * 1.1, 0.499))) == "test" or test > 0.45


def test_splits_have_their_shares_and_never_change() -> None:
    config = SplitsConfig(validation=0.2, test=0.3)
    counts = Counter(split_of(f"key {index}", config) for index in range(20_000))
    shares = [counts[name] / 20_000 for name in ("train", "validation", "test")]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.015)
    # From the first bytes of `printf 'key 0' | sha256sum` and so on.
    names = {"t": "train", "v": "validation", "T": "test"}
    assert [split_of(f"key {index}", config) for index in range(12)] == [names[letter] for letter in "TTTTtvtTtTTt"]


PALINDROMES = {
    "reasoning_gym": {"task": "palindrome_generation", "params": {"min_length": 3, "max_length": 4}},
    "prompt": "{{ metadata.letters | join }}",
    "splits": {"validation": 0.25, "test": 0.25, "key": "{{ metadata.letters | sort | join }}"},
}


@given(seeds=st.tuples(*[st.integers(0, 2**40)] * 2), cursor=st.integers(0, 2**20))
@settings(max_examples=10, deadline=None)
def test_splits_never_overlap_whatever_seed_and_index(seeds: tuple[int, int], cursor: int) -> None:
    """One run's training prompts against another's test prompts, by the multiset of letters."""
    one, two = (make_domain(PALINDROMES, seed=seed) for seed in seeds)

    def letters(domain: Domain, prompts: list[Prompt]) -> list[tuple[str, ...]]:
        return [tuple(sorted(domain.item(prompt).metadata["letters"])) for prompt in prompts]

    train = set(letters(one, one.after(cursor, 60)[0]))
    validation, test = (letters(two, two.held_out(split, 15)) for split in ("validation", "test"))
    assert len(set(validation)) == len(validation) == 15
    assert len(set(test)) == len(test) == 15
    assert not train & set(validation)
    assert not train & set(test)
    assert not set(validation) & set(test)
    # Held-out prompts are the same in every run.
    assert two.held_out("test", 15) == one.held_out("test", 15)


def test_the_default_key_is_the_prompts_text_under_every_effort() -> None:
    splits = {"validation": 0.3, "test": 0.3}
    plain = make_domain({**SPELL, "splits": splits})
    thinking = make_domain({**SPELL, "splits": splits, "effort": "high", "system_prompt": "s"})
    assert [prompt.index for prompt in plain.held_out("test", 9)] == [
        prompt.index for prompt in thinking.held_out("test", 9)
    ]
    assert [prompt.index for prompt in drawn(plain, 9)] == [prompt.index for prompt in drawn(thinking, 9)]
    for prompt in plain.held_out("test", 9):
        assert split_of(plain.item(prompt).question, SplitsConfig(**splits)) == "test"


def test_a_file_in_splits_gives_every_line_to_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{index}"} for index in range(60)] * 2)
    domain = make_domain({"jsonl": {"path": path}, "splits": {"validation": 0.2, "test": 0.2}}, heldout=5)
    parts = [{text_of(prompt) for prompt in domain.held_out(split, 99)} for split in ("validation", "test")]
    parts.append({text_of(prompt) for prompt in drawn(domain, 120)})
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    assert domain.heldout == domain.held_out("validation", 5)
    assert len(domain.held_out("validation", 99)) == len(parts[0]) > 5


def test_a_family_with_few_different_items_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.tasks.domain.MAX_SKIPPED", 500)
    params = {"min_length": 2, "max_length": 2}  # 26 palindromes: aa, bb, …
    palindromes = {**PALINDROMES, "reasoning_gym": {"task": "palindrome_generation", "params": params}}
    domain = make_domain(palindromes)
    sizes = [len(domain.held_out(split, 100)) for split in ("validation", "test")]
    assert sizes == [len(domain.held_out(split, 50)) for split in ("validation", "test")]
    assert sum(sizes) + len({prompt.token_ids for prompt in drawn(domain, 400)}) == 26


def test_there_is_no_test_split_without_splits() -> None:
    domain = make_domain(SPELL, heldout=3)
    assert domain.held_out("validation", 2) == domain.heldout[:2]
    assert domain.held_out("validation", 9) == domain.heldout  # no others are kept out of the training
    for without in (domain, make_domain({**SPELL, "splits": {"test": 0}})):
        with pytest.raises(ConfigError, match=r"no test prompts; give it a share") as caught:
            without.held_out("test", 1)
        assert caught.value.field == "domains.d.splits.test"


def test_an_item_is_made_again_from_its_prompt(tmp_path: Path) -> None:
    lines = [{"prompt": f"q{index}", "answer": f"a{index}"} for index in range(40)]
    path = jsonl(tmp_path / "p.jsonl", lines)
    others = {"jsonl": {"path": jsonl(tmp_path / "o.jsonl", [{"prompt": "o"}])}, "share": 0.3}
    config = {"jsonl": {"path": path}, "splits": {"validation": 0.2, "test": 0.2}, "others": others}
    domain, again = make_domain(config), make_domain(config)
    prompts = [*drawn(domain, 90), *domain.held_out("validation", 5), *domain.held_out("test", 5)]
    random.Random(0).shuffle(prompts)
    for prompt in prompts:
        item = again.item(prompt)
        assert text_of(prompt) == f"<s>user: {item.question}\nassistant: "
        assert item.answer == (None if prompt.other else item.question.replace("q", "a"))
    assert len(set(prompts)) == len(prompts)  # a training prompt is told from a test prompt of the same index


# --- other prompts --------------------------------------------------------------------------------------------
@given(share=st.floats(0.01, 0.99), start=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_others_are_a_share_of_the_indices(tmp_path_factory: pytest.TempPathFactory, share: float, start: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    main = jsonl(folder / "main.jsonl", [{"prompt": f"q{index}"} for index in range(7)])
    others = jsonl(folder / "others.jsonl", [{"prompt": f"o{index}"} for index in range(5)])
    domain = make_domain({"jsonl": {"path": main}, "others": {"share": share, "jsonl": {"path": others}}}, heldout=0)
    prompts, _ = domain.after(start, 60)
    assert [prompt.index for prompt in prompts] == list(range(start, start + 60))
    for prompt in prompts:
        assert prompt.other == (int((prompt.index + 1) * share) > int(prompt.index * share))
        assert ("o" in text_of(prompt).split("user: ")[1][:2]) == prompt.other
    assert abs(sum(prompt.other for prompt in prompts) - 60 * share) <= 1
    # Both are drawn without gaps: every epoch of the domain's own file is whole.
    own = [text_of(prompt) for prompt in drawn(domain, 100) if not prompt.other]
    assert all(len(set(own[start : start + 7])) == 7 for start in range(0, len(own) - 6, 7))


# --- solutions ------------------------------------------------------------------------------------------------
def test_a_solution_is_the_gold_answer_and_eos(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "p", "answer": "42"}])
    domain = make_domain({"jsonl": {"path": path}}, heldout=0)
    ids = domain.solution(drawn(domain, 1)[0])
    assert ids == (*tiny_tokenizer()("42")["input_ids"], EOS_ID)


@pytest.mark.parametrize("template", [None, "{{ answer }}"])
def test_no_gold_answer(tmp_path: Path, template: str | None) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "p"}])
    domain = make_domain({"jsonl": {"path": path}, "answer": template}, heldout=0)
    with pytest.raises(ConfigError, match=r"no gold answer|'answer' is undefined") as caught:
        domain.solution(drawn(domain, 1)[0])
    assert caught.value.field == "domains.d.answer"


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    source = {"jsonl": {"path": jsonl(tmp_path / "p.jsonl", [{"prompt": "p", "answer": "4"}])}}
    domain = make_domain(source, heldout=0, tokenizer=tokenizer, rollout={"stop_token_ids": [4]})
    assert domain.solution(drawn(domain, 1)[0])[-1] == 4
    domain = make_domain(source, heldout=0, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="has no EOS"):
        domain.solution(drawn(domain, 1)[0])
