"""Prompts: sources that are functions of (seed, index), held-out prompts, rendering, and shares."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import BOS_ID, tiny_tokenizer

from opd_mesh.config.base import parse_config
from opd_mesh.config.domains import JsonlSource, ReasoningGymSource
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError
from student_trainer.data import Domain, Jsonl, ReasoningGym, allot, next_prompts, read_conversations, render

SHARES = st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 100), min_size=1)


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


@given(SHARES, st.integers(0, 15), st.integers(0, 15))
def test_two_small_steps_are_one_large_step(shares: dict[str, float], first: int, second: int) -> None:
    one = allot(shares, first, {})
    two = allot(shares, second, one)
    assert {name: one[name] + two[name] for name in shares} == allot(shares, first + second, {})


def test_equal_shares_are_exact() -> None:
    assert allot({"a": 1, "b": 1}, 8, {}) == {"a": 4, "b": 4}
    assert allot({"a": 3, "b": 1}, 8, {"a": 0, "b": 0}) == {"a": 6, "b": 2}
    assert allot({"a": 3, "b": 1}, 4, {"a": 0, "b": 4}) == {"a": 4, "b": 0}  # what was missed is made up


# --- JSONL ----------------------------------------------------------------------------------------------------
def prompts_file(folder: Path, count: int, name: str = "p.jsonl", start: int = 0) -> Path:
    path = folder / name
    lines = (json.dumps({"prompt": f"question {index}"}) for index in range(start, start + count))
    path.write_text("\n".join(lines) + "\n")
    return path


def text_of(messages: Any) -> str:
    return messages[-1]["content"]


@given(count=st.integers(2, 9), heldout=st.integers(0, 4), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=30)
def test_every_epoch_is_a_permutation_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, count: int, heldout: int, seed: int
) -> None:
    path = prompts_file(tmp_path_factory.getbasetemp(), count + heldout)
    source = Jsonl(JsonlSource(path=path), seed, "f", heldout)
    lines = {f"question {index}" for index in range(count)}
    drawn = [text_of(source.train(index)) for index in range(5 * count)]
    epochs = [drawn[start : start + count] for start in range(0, 5 * count, count)]
    assert all(set(epoch) == lines for epoch in epochs)
    assert [text_of(source.heldout(i)) for i in range(heldout)] == [f"question {count + i}" for i in range(heldout)]
    assert source.heldout(heldout) is None
    # A function of (seed, index): backwards, and in another process, it says the same.
    again = Jsonl(JsonlSource(path=path), seed, "f", heldout)
    assert [text_of(again.train(index)) for index in reversed(range(5 * count))] == drawn[::-1]


def test_orders_differ_between_epochs_and_seeds(tmp_path: Path) -> None:
    path = prompts_file(tmp_path, 12)
    orders = set()
    for seed in range(3):
        source = Jsonl(JsonlSource(path=path), seed, "f", 0)
        orders |= {tuple(text_of(source.train(epoch * 12 + index)) for index in range(12)) for epoch in range(3)}
    assert len(orders) == 9


def test_a_heldout_file_is_used_and_leaves_all_lines_for_training(tmp_path: Path) -> None:
    source = JsonlSource(path=prompts_file(tmp_path, 3), heldout=prompts_file(tmp_path, 2, "h.jsonl", start=50))
    jsonl = Jsonl(source, 0, "f", 99)
    assert {text_of(jsonl.train(index)) for index in range(3)} == {"question 0", "question 1", "question 2"}
    assert [text_of(jsonl.heldout(0)), text_of(jsonl.heldout(1)), jsonl.heldout(2)] == [
        "question 50",
        "question 51",
        None,
    ]


def test_too_few_lines_to_hold_any_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 3 prompts, and 3 are held out"):
        Jsonl(JsonlSource(path=prompts_file(tmp_path, 3)), 0, "domains.d.jsonl", 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("[1]", 'exactly one of "prompt" (text) and "messages"'),
        ('"text"', "exactly one of"),
        ('{"question": "x"}', "exactly one of"),
        ('{"prompt": "x", "messages": []}', "exactly one of"),
        ('{"prompt": " "}', "text that is not empty"),
        ('{"prompt": 3}', "text that is not empty"),
        ('{"messages": []}', "must be a list of turns"),
        ('{"messages": "hi"}', "must be a list of turns"),
        ('{"messages": [{"role": "user"}]}', 'every turn needs "role" and "content"'),
        ('{"messages": ["hi"]}', "every turn needs"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "every turn needs"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "the last turn is the assistant's",
        ),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "good"}\n\n' + line + "\n")
    with pytest.raises(ConfigError) as caught:
        read_conversations(path, "domains.d.jsonl.path")
    assert f"{path}, line 3: " in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.field == "domains.d.jsonl.path"


def test_files_without_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, message in (("empty", "holds no prompt"), ("binary", "cannot read"), ("absent", "cannot read")):
        with pytest.raises(ConfigError, match=message):
            read_conversations(tmp_path / name, "f")


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    # U+2028, U+0085 and the like may stand in JSON text as they are; str.splitlines would cut there.
    text = "a\u2028b\u2029c\u0085d"
    path = tmp_path / "p.jsonl"
    for end in ("\n", "\r\n"):
        path.write_bytes((json.dumps({"prompt": text}, ensure_ascii=False) + end).encode() * 2)
        assert [text_of(messages) for messages in read_conversations(path, "f")] == [text, text]


def test_only_role_and_content_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "n"}]
    path.write_text(json.dumps({"messages": turns, "source": "x"}))
    assert read_conversations(path, "f") == [[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]]


# --- reasoning-gym --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 2**62])
def test_reasoning_gym_is_a_function_of_seed_and_index(seed: int) -> None:
    source = ReasoningGymSource(task="chain_sum", params={"min_terms": 3, "max_terms": 4})
    one, two = ReasoningGym(source, seed, "f"), ReasoningGym(source, seed, "f")
    forward = [text_of(one.train(index)) for index in range(8)]
    assert [text_of(two.train(index)) for index in reversed(range(8))] == forward[::-1]
    assert len(set(forward)) == 8
    heldout = [text_of(one.heldout(index)) for index in range(8)]
    assert heldout == [text_of(two.heldout(index)) for index in range(8)]
    assert not set(heldout) & set(forward)
    other = [text_of(ReasoningGym(source, seed + 100, "f").train(index)) for index in range(8)]
    assert not set(other) & set(forward)


@pytest.mark.parametrize(
    ("task", "params"), [("no_such_task", {}), ("chain_sum", {"no_such": 1}), ("chain_sum", {"min_terms": -1})]
)
def test_what_reasoning_gym_refuses_is_a_config_error(task: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="reasoning-gym refuses this") as caught:
        ReasoningGym(ReasoningGymSource(task=task, params=params), 0, "domains.d.reasoning_gym")
    assert caught.value.field == "domains.d.reasoning_gym"


# --- rendering ------------------------------------------------------------------------------------------------
def test_a_chat_template_renders_the_turns_and_opens_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "1+1?"}]
    ids = render(tokenizer, messages, None)
    assert tokenizer.decode(ids) == "<s>user: 1+1?\nassistant: "
    assert ids.count(BOS_ID) == 1  # the template's own, and no second one
    assert ids[0] == BOS_ID
    system = render(tokenizer, messages, "be brief")
    assert tokenizer.decode(system) == "<s>system: be brief\nuser: 1+1?\nassistant: "
    assert messages == [{"role": "user", "content": "1+1?"}]


def test_a_system_turn_of_its_own_wins() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "u"}]
    assert tokenizer.decode(render(tokenizer, messages, "recipe's")) == "<s>system: own\nuser: u\nassistant: "


def test_without_a_template_the_text_stands_alone() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    ids = render(tokenizer, [{"role": "user", "content": "1+1="}], "sum up:")
    assert tokenizer.decode(ids) == "sum up:\n1+1="
    assert ids == tuple(tokenizer("sum up:\n1+1=")["input_ids"])


# --- domains --------------------------------------------------------------------------------------------------
def recipe_of(domain: dict[str, Any], *, heldout: int = 3, seed: int = 0) -> Recipe:
    value = {
        "run": {"steps": 1, "seed": seed},
        "student": {"path": "s"},
        "teachers": {"t": {"path": "t"}},
        "domains": {"d": {"teachers": {"t": 1.0}, **domain}},
        "evaluation": {"prompts_per_domain": heldout},
    }
    return parse_config(Recipe, value, source="test")


def domain_of(recipe: Recipe, *, max_prompt_tokens: int = 400, name: str = "d") -> Domain:
    return Domain(name, recipe.domains["d"], recipe, tiny_tokenizer(), max_prompt_tokens=max_prompt_tokens)


def test_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    # The same prompts stand in both files, and some twice.
    path, heldout = tmp_path / "p.jsonl", tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{index % 7}"}) + "\n" for index in range(20)))
    heldout.write_text("".join(json.dumps({"prompt": f"q{index}"}) + "\n" for index in (1, 1, 4, 90, 91)))
    domain = domain_of(recipe_of({"jsonl": {"path": path, "heldout": heldout}}))
    tokenizer = tiny_tokenizer()
    assert [tokenizer.decode(prompt.token_ids) for prompt in domain.heldout] == [
        f"<s>user: q{index}\nassistant: " for index in (1, 4, 90)
    ]
    trained = set()
    cursor = 0
    for _ in range(10):
        prompts, cursor = domain.after(cursor, 5)
        trained |= {prompt.token_ids for prompt in prompts}
    assert not trained & {prompt.token_ids for prompt in domain.heldout}
    assert len(trained) == 5


@pytest.mark.parametrize("portions", [[9], [0, 4, 0, 1, 4], [1] * 9])
def test_the_cursor_alone_says_where_a_run_is(portions: list[int]) -> None:
    recipe = recipe_of({"reasoning_gym": {"task": "spell_backward", "params": {"min_word_len": 3, "max_word_len": 3}}})
    domain = domain_of(recipe)
    whole, end = domain.after(0, sum(portions))
    pieces, cursor = [], 0
    for portion in portions:
        prompts, cursor = domain_of(recipe).after(cursor, portion)  # a new process each time
        pieces += prompts
    assert pieces == whole
    assert cursor == end


def test_a_source_whose_prompts_are_all_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.data.MAX_SKIPPED", 100)
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "same"}\n' * 4)
    domain = domain_of(recipe_of({"jsonl": {"path": path}}, heldout=1))
    with pytest.raises(ConfigError, match="too few different ones"):
        domain.after(0, 1)


def test_a_prompt_that_leaves_no_room(tmp_path: Path) -> None:
    path = prompts_file(tmp_path, 3)
    domain_of(recipe_of({"jsonl": {"path": path}}, heldout=1), max_prompt_tokens=29)
    with pytest.raises(ConfigError, match="renders to 29 tokens; between 1 and 28 fit"):
        domain_of(recipe_of({"jsonl": {"path": path}}, heldout=1), max_prompt_tokens=28)


def test_next_prompts_moves_every_cursor_it_draws_from(tmp_path: Path) -> None:
    recipe = recipe_of({"jsonl": {"path": prompts_file(tmp_path, 30)}, "share": 2.0}, heldout=2)
    domains = [domain_of(recipe, name="d"), domain_of(recipe, name="e")]
    cursors: dict[str, int] = {}
    drawn: dict[str, int] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for _ in range(4):
        before = dict(cursors)
        prompts, cursors, drawn = next_prompts(domains, 5, cursors, drawn)
        assert len(prompts) == 5
        assert before.keys() <= cursors.keys()
        seen.update((prompt.domain, prompt.index) for prompt in prompts)
    assert drawn == {"d": 10, "e": 10}
    assert cursors == {"d": 10, "e": 10}
    assert seen == Counter({(name, index): 1 for name in "de" for index in range(10)})
