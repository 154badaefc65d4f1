"""Reasoning efforts: the form of prompts and responses, and what length costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_cases import SPELL, jsonl, make_domain, think_tokenizer
from tiny_models import BOS_ID, EOS_ID, tiny_tokenizer

from opd_mesh.config.tasks import DEFAULT_EFFORTS, EffortConfig, LinearLengthPenalty, SoftOverlongPenalty
from opd_mesh.errors import ConfigError
from opd_mesh.rendering import Response, ResponseDecoder, render, split_reasoning
from student_trainer.tasks.length_penalty import penalty

MESSAGES = [{"role": "user", "content": "1+1?"}]


# --- rendering ------------------------------------------------------------------------------------------------
def test_a_chat_template_renders_the_turns_and_opens_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    ids = render(tokenizer, MESSAGES, None)
    assert tokenizer.decode(ids) == "<s>user: 1+1?\nassistant: "
    assert ids.count(BOS_ID) == 1  # the template's own, and no second one
    assert ids[0] == BOS_ID
    system = render(tokenizer, MESSAGES, "be brief")
    assert tokenizer.decode(system) == "<s>system: be brief\nuser: 1+1?\nassistant: "
    assert MESSAGES == [{"role": "user", "content": "1+1?"}]


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


@pytest.mark.parametrize(
    ("effort", "text"),
    [
        ("non_think", "<s>system: s\nuser: 1+1?\nassistant: </think>"),
        ("high", "<s>system: s\nuser: 1+1?\nassistant: <think>"),
        ("max", f"<s>{DEFAULT_EFFORTS['max'].prefix}system: s\nuser: 1+1?\nassistant: <think>"),
    ],
)
@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), think_tokenizer()], ids=["characters", "special"])
def test_deepseek_v4s_three_efforts(effort: str, text: str, tokenizer: Any) -> None:
    ids = render(tokenizer, MESSAGES, "s", DEFAULT_EFFORTS[effort])
    assert tokenizer.decode(ids) == text
    assert ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])  # one piece of text, once
    assert ids.count(BOS_ID) == 1


def test_a_base_model_has_efforts_too() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(render(tokenizer, MESSAGES, None, EffortConfig(prefix="p ", opening="o"))) == "p 1+1?o"


def test_a_template_that_opens_the_reasoning_itself() -> None:
    tokenizer = think_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}<think>\n{% endif %}"
    assert tokenizer.decode(render(tokenizer, MESSAGES, None, DEFAULT_EFFORTS["high"])) == "1+1?<think>\n"
    assert tokenizer.decode(render(tokenizer, MESSAGES, None, DEFAULT_EFFORTS["non_think"])) == "1+1?<think>\n</think>"
    # Without a BOS in the text the prefix is at its beginning.
    assert tokenizer.decode(render(tokenizer, MESSAGES, None, EffortConfig(prefix="p "))) == "p 1+1?<think>\n"


def test_an_effort_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"domains\.d\.effort: 'hihg' is none of non_think, high, max"):
        make_domain({**SPELL, "effort": "hihg"})
    assert make_domain({**SPELL, "effort": "low"}, efforts={"low": {"opening": "o"}}).effort.opening == "o"


# --- responses ------------------------------------------------------------------------------------------------
def test_a_response_keeps_the_efforts_marks_and_no_other_special_tokens() -> None:
    tokenizer = think_tokenizer()
    ids = tokenizer("a<think>b</think>4 </s><pad>", add_special_tokens=False)["input_ids"]
    assert ids[-2:] == [EOS_ID, 0]
    assert ResponseDecoder(tokenizer, DEFAULT_EFFORTS["high"]).text(ids) == "a<think>b</think>4 "
    assert ResponseDecoder(tokenizer, EffortConfig()).text(ids) == "ab4 "
    assert ResponseDecoder(tokenizer, EffortConfig(closing="</think>")).text(ids) == "ab</think>4 "
    # Marks of several ordinary tokens are text like any other.
    plain = tiny_tokenizer()
    ids = plain("b</think>4</s>", add_special_tokens=False)["input_ids"]
    assert ResponseDecoder(plain, EffortConfig()).text(ids) == "b</think>4"


@given(reasoning=st.text(), answer=st.text())
def test_reasoning_ends_at_the_first_closing(reasoning: str, answer: str) -> None:
    text = reasoning + "</think>" + answer
    response = split_reasoning(text, "</think>")
    assert response.reasoning + "</think>" + (response.answer or "") == text
    assert "</think>" not in response.reasoning
    assert split_reasoning(text, "") == Response("", text)


def test_reasoning_that_never_ends_has_no_answer() -> None:
    assert split_reasoning("so it is 4", "</think>") == Response("so it is 4", None)
    assert split_reasoning("</think>", "</think>") == Response("", "")


# --- what SFT learns ------------------------------------------------------------------------------------------
LINE = {"prompt": "p", "answer": "4"}
THOUGHT = {**LINE, "metadata": {"reasoning": "2 and 2"}}


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), think_tokenizer()], ids=["characters", "special"])
@pytest.mark.parametrize(
    ("effort", "template", "line", "text"),
    [
        ("non_think", None, THOUGHT, "4</s>"),
        ("high", None, THOUGHT, "2 and 2</think>4</s>"),
        ("max", "{{ answer }}.", THOUGHT, "2 and 2</think>4.</s>"),
        ("high", "well</think>{{ answer }}", LINE, "well</think>4</s>"),
    ],
)
def test_a_solution_is_in_the_efforts_form(
    tmp_path: Path, tokenizer: Any, effort: str, template: str | None, line: dict[str, Any], text: str
) -> None:
    source = {"jsonl": {"path": jsonl(tmp_path / "p.jsonl", [line])}, "effort": effort, "answer": template}
    domain = make_domain(source, heldout=0, tokenizer=tokenizer)
    ids = domain.solution(domain.after(0, 1)[0][0])
    assert tokenizer.decode(ids) == text
    assert domain.text(ids) == text.removesuffix("</s>")


def test_a_thinking_effort_without_reasoning(tmp_path: Path) -> None:
    domain = make_domain({"jsonl": {"path": jsonl(tmp_path / "p.jsonl", [LINE])}, "effort": "high"}, heldout=0)
    with pytest.raises(ConfigError, match=r"domain d: effort high .* metadata\.reasoning, or write it") as caught:
        domain.solution(domain.after(0, 1)[0][0])
    assert caught.value.field == "domains.d.answer"


# --- lengths --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "cost"),
    # DAPO's own setting: at most 20,480 tokens, of which the last 4,096 are the buffer.
    [(0, 0.0), (16_384, 0.0), (16_385, -1 / 4096), (17_408, -0.25), (18_432, -0.5), (20_480, -1.0), (30_000, -1.0)],
)
def test_dapos_soft_overlong_punishment(tokens: int, cost: float) -> None:
    assert penalty(SoftOverlongPenalty(buffer_tokens=4096), tokens, 20_480) == cost


@pytest.mark.parametrize(("tokens", "cost"), [(0, 0.0), (10, 0.0), (11, -0.25), (13, -0.75), (14, -0.8), (99, -0.8)])
def test_a_linear_penalty(tokens: int, cost: float) -> None:
    assert penalty(LinearLengthPenalty(free_tokens=10, per_token=0.25, limit=0.8), tokens, 100) == cost


@given(
    tokens=st.integers(0, 10_000),
    config=st.builds(SoftOverlongPenalty, buffer_tokens=st.integers(1, 500))
    | st.builds(
        LinearLengthPenalty,
        free_tokens=st.integers(0, 999),
        per_token=st.floats(1e-9, 10),
        limit=st.floats(1e-9, 10),
    ),
)
def test_longer_never_costs_less(tokens: int, config: Any) -> None:
    assert penalty(config, tokens + 1, 500) <= penalty(config, tokens, 500) <= 0
    assert str(penalty(config, 0, 500)) == "0.0"


def test_a_domains_own_length_wins_over_the_efforts() -> None:
    efforts = {
        "high": {
            "opening": "<think>",
            "closing": "</think>",
            "max_new_tokens": 40,
            "length_penalty": {"name": "soft_overlong", "buffer_tokens": 10},
        }
    }
    linear = {"name": "linear", "per_token": 0.5}
    domain = make_domain({**SPELL, "effort": "high"}, efforts=efforts)
    assert (domain.max_new_tokens, domain.length_penalty(35)) == (40, -0.5)
    domain = make_domain({**SPELL, "effort": "high", "max_new_tokens": 50}, efforts=efforts)
    assert (domain.max_new_tokens, domain.length_penalty(45)) == (50, -0.5)
    domain = make_domain({**SPELL, "effort": "high", "length_penalty": linear}, efforts=efforts)
    assert domain.length_penalty(1) == -0.5
    assert make_domain(SPELL).length_penalty(10_000) == 0
    assert make_domain(SPELL, rollout={"max_new_tokens": 9}).max_new_tokens == 9
    with pytest.raises(ConfigError, match="a buffer of 10 tokens is longer than the longest response"):
        make_domain({**SPELL, "effort": "high", "max_new_tokens": 9}, efforts=efforts)
