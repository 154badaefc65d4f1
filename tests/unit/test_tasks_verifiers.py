"""Answers: found in a response, put into the scorer's form, and scored strictly."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from task_cases import grade_here, make_domain

from opd_mesh.config.tasks import Extract, ReasoningGymSource, VerifierConfig
from opd_mesh.errors import ConfigError
from student_trainer.tasks import Grade, Item
from student_trainer.tasks.extraction import extract, parse_number
from student_trainer.tasks.items import item_of
from student_trainer.tasks.sources import create_reasoning_gym
from student_trainer.tasks.verifiers import Verification, VerifierSpec

EXTRACT: TypeAdapter[Any] = TypeAdapter(Extract)
VERIFIER: TypeAdapter[Any] = TypeAdapter(VerifierConfig)
RIGHT, WRONG, UNPARSED = Grade(1.0, parsed=True), Grade(0.0, parsed=True), Grade(0.0, parsed=False)


def verification(config: dict[str, Any], closing: str = "", family: dict[str, Any] | None = None) -> Verification:
    source = None if family is None else ReasoningGymSource(**family)
    return Verification(VerifierSpec("d", VERIFIER.validate_python(config), closing, source))


def gold(answer: str | None) -> Item:
    return item_of([{"role": "user", "content": "q"}], answer, {"level": 2})


# --- extraction -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "text", "answer"),
    [
        ({}, " 4 \n", "4"),
        ({}, " \n", None),
        ({"name": "regex", "pattern": r"= (\d+)"}, "1 = 1, 2 = 2", "2"),
        ({"name": "regex", "pattern": r"= (\d+)"}, "none", None),
        ({"name": "regex", "pattern": r"\d+", "group": 0}, "3 4", "4"),
        ({"name": "regex", "pattern": r"(?P<x>a)|b", "group": "x"}, "ab", None),  # the last match has no such group
        ({"name": "boxed"}, r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ({"name": "boxed"}, r"\boxed{1} \boxed{2", "1"),
        ({"name": "boxed"}, r"\boxed{ }", None),
        ({"name": "boxed"}, "boxed{1} }{", None),
        ({"name": "last_number"}, "first 1, then 2.5.", "2.5"),
        ({"name": "last_number"}, "1,234,567 apples", "1234567"),
        ({"name": "last_number"}, "12,34", "34"),
        ({"name": "last_number"}, "x = -7", "-7"),
        ({"name": "last_number"}, "5-3", "3"),
        ({"name": "last_number"}, "about 1e-3", "1e-3"),
        ({"name": "last_number"}, "half: .5", ".5"),
        ({"name": "last_number"}, "H2O", None),
        ({"name": "last_number"}, "٤", None),
        ({"name": "tag"}, "<answer>1</answer> no <answer> 2 </answer>", "2"),
        ({"name": "tag"}, "<answer>1", None),
        ({"name": "tag"}, "</answer><answer>", None),
        ({"name": "tag", "tag": "solution"}, "<solution>x</solution>", "x"),
    ],
)
def test_the_last_answer_in_a_text(config: dict[str, Any], text: str, answer: str | None) -> None:
    assert extract(EXTRACT.validate_python(config), text) == answer


EXTRACTS = [
    {"name": "text"},
    {"name": "regex", "pattern": r"(\w+)\s*$"},
    {"name": "boxed"},
    {"name": "last_number"},
    {"name": "tag"},
]
PIECES = st.sampled_from(
    [
        "<answer>",
        "</answer>",
        r"\boxed{",
        "{",
        "}",
        "1",
        "-",
        ",",
        ".",
        "e",
        "nan",
        "inf",
        "_",
        "٣",
        "\x00",
        "\ud800",
        "[",
        '"',
    ]
)
TEXTS = st.text() | st.lists(PIECES).map("".join)


@given(text=TEXTS, config=st.sampled_from(EXTRACTS))
def test_extraction_never_fails(text: str, config: dict[str, Any]) -> None:
    answer = extract(EXTRACT.validate_python(config), text)
    assert answer is None or (answer == answer.strip() and answer)


def test_extraction_is_linear() -> None:
    for piece in (r"\boxed{", "<answer>", "</answer>", "1,111", "{", "1" * 10):
        for config in EXTRACTS[2:]:
            extract(EXTRACT.validate_python(config), piece * 100_000)


# --- numbers --------------------------------------------------------------------------------------------------
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_every_number_is_read(number: Decimal) -> None:
    assert parse_number(str(number)) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nan",
        "inf",
        "-Infinity",
        "1_000",
        "1,000",
        "0x10",
        "1 2",
        "four",
        "1/2",
        "٣",
        "²",
        "--1",
        ".",
        "1e",
        "1\n",
    ],
)
def test_what_is_no_number(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("answer", "tolerance", "grade"),
    [
        ("0.3", 0.0, RIGHT),
        ("+.30e0", 0.0, RIGHT),
        ("0.4", 0.1, RIGHT),  # in binary 0.4 − 0.3 is above 0.1
        ("0.41", 0.1, WRONG),
        ("1e999999999", 0.1, WRONG),
        ("-1e-999999999", 0.1, WRONG),
        ("1e99999999999999999999999", 0.1, UNPARSED),
        ("nan", 1e9, UNPARSED),
        ("inf", 1e9, UNPARSED),
        ("0.3 or 0.4", 0.1, UNPARSED),
    ],
)
def test_numeric_equality(answer: str, tolerance: float, grade: Grade) -> None:
    assert verification({"name": "number", "tolerance": tolerance}).grade(gold("0.3"), answer) == grade


# --- the verifiers --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "answer", "grade"),
    [
        ({}, " Gold\n", RIGHT),
        ({}, "gold", WRONG),
        ({"casefold": True}, "gOLD", RIGHT),
        ({}, "Gold and more", WRONG),
        ({"extract": {"name": "tag"}}, "hm <answer>Gold</answer>", RIGHT),
        ({"extract": {"name": "tag"}}, "Gold", UNPARSED),
        ({"submit": "{{ answer | capitalize }}"}, "gOLD", RIGHT),
        ({"submit": "{{ answer }}{{ metadata.level }}{{ question }}"}, "Gold", WRONG),
    ],
)
def test_exact(config: dict[str, Any], answer: str, grade: Grade) -> None:
    assert verification({"name": "exact", **config}).grade(gold("Gold"), answer) == grade


def test_reasoning_that_never_closes_is_unparsed() -> None:
    thinking = verification({"name": "exact"}, closing="</think>")
    assert thinking.grade(gold("4"), "2 and 2</think>4") == RIGHT
    assert thinking.grade(gold("4"), "4") == UNPARSED
    assert thinking.grade(gold("4"), "4</think>") == UNPARSED


@pytest.mark.parametrize("family", ["chain_sum", "spell_backward", "palindrome_generation"])
def test_reasoning_gyms_own_scorers(family: str) -> None:
    domain = make_domain({"reasoning_gym": {"task": family}, "verifier": {"name": "reasoning_gym"}})
    for prompt in domain.after(0, 5)[0]:
        answer = domain.item(prompt).answer
        assert answer is not None
        assert grade_here(domain, prompt, answer) == RIGHT
        wrong = grade_here(domain, prompt, "zz9")
        assert wrong.score is not None
        assert wrong.score < 0.5


def test_sorting_with_a_compact_answer() -> None:
    params = {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 0, "max_value": 99}
    domain = make_domain(
        {
            "reasoning_gym": {"task": "number_sorting", "params": params},
            "verifier": {"name": "reasoning_gym", "submit": "{{ answer.split() | tojson }}"},
        }
    )
    (prompt,), _ = domain.after(0, 1)
    numbers = domain.item(prompt).metadata["sorted_numbers"]
    assert grade_here(domain, prompt, " ".join(numbers)) == RIGHT
    assert grade_here(domain, prompt, " ".join(reversed(numbers))) == WRONG
    assert grade_here(domain, prompt, "nan nan nan") == UNPARSED  # the family itself finds it right


def test_partial_credit_below_a_threshold_is_none() -> None:
    family = {"task": "palindrome_generation"}
    item = gold("aba")
    item.entry["metadata"]["letters"] = ["a", "b", "a"]  # type: ignore[index]
    config = {"name": "reasoning_gym"}
    assert verification(config, family=family).grade(item, "ccc") == Grade(0.05, parsed=True)
    strict = verification({**config, "threshold": 1.0}, family=family)
    assert strict.grade(item, "ccc") == WRONG
    assert strict.grade(item, "aba") == RIGHT


def test_a_function_of_ones_own() -> None:
    verifier = verification({"name": "python", "function": "task_cases:behave"})
    item = gold("g")
    assert verifier.grade(item, "gold") == RIGHT
    assert verifier.grade(item, "true") == RIGHT
    assert verifier.grade(item, "0.25") == Grade(0.25, parsed=True)
    assert verifier.grade(item, "1.0000000001") == RIGHT  # rounding
    for answer, reason in {
        "raise": "raised ValueError: as asked",
        "exit": "raised SystemExit",
        "nothing": "returned None, not a number",
        "text": "returned 1.0, not a number",
        "nan": "returned nan, outside",
        "inf": "returned inf, outside",
        "1.5": "returned 1.5, outside",
        "-0.1": "returned -0.1, outside",
        "what": "raised ValueError: could not convert",
    }.items():
        grade = verifier.grade(item, answer)
        assert (grade.score, grade.parsed) == (None, False)
        assert reason in (grade.failure or "")


def test_a_template_renders_the_score() -> None:
    text = "{{ 1 if answer == gold else (answer | length) / 10 if answer != '?' else metadata.nothing }}"
    verifier = verification({"name": "template", "score": text})
    assert verifier.grade(gold("g"), " g ") == RIGHT
    assert verifier.grade(gold("g"), "xyz") == Grade(0.3, parsed=True)
    for answer, reason in {"?": "cannot be rendered", "x" * 11: "returned 1.1, outside"}.items():
        grade = verifier.grade(gold("g"), answer)
        assert (grade.score, grade.parsed) == (None, False)
        assert reason in (grade.failure or "")
    assert "could not convert" in (verification({"name": "template", "score": "x"}).grade(gold("g"), "g").failure or "")
    with pytest.raises(ConfigError, match=r"domains\.d\.verifier\.score: not a template"):
        verification({"name": "template", "score": "{{"})


def test_a_gold_answer_that_is_missing_or_no_number_is_a_failure() -> None:
    assert "no gold answer" in (verification({"name": "exact"}).grade(gold(None), "x").failure or "")
    assert "'x' is not a number" in (verification({"name": "number"}).grade(gold("x"), "1").failure or "")


def test_a_submit_template_that_does_not_fit_an_answer_is_a_failure() -> None:
    verifier = verification({"name": "exact", "submit": "{{ answer.split()[1] }}"})
    assert verifier.grade(gold("b"), "a b") == RIGHT
    assert "domains.d.verifier.submit: cannot be rendered" in (verifier.grade(gold("b"), "a").failure or "")


@pytest.mark.parametrize(
    ("config", "field", "message"),
    [
        ({"name": "exact", "submit": "{{ answer"}, "verifier.submit", "not a template"),
        ({"name": "python", "function": "no_such_module:f"}, "verifier.function", "cannot import no_such_module:f"),
        ({"name": "python", "function": "task_cases:absent"}, "verifier.function", "cannot import"),
        ({"name": "python", "function": "task_cases:NOT_A_FUNCTION"}, "verifier.function", "is no function"),
    ],
)
def test_a_verifier_that_cannot_be_opened(config: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        verification(config)
    assert caught.value.field == f"domains.d.{field}"


VERIFIERS = {
    "exact": verification({"name": "exact", "casefold": True}),
    "number": verification({"name": "number", "extract": {"name": "last_number"}, "tolerance": 0.5}),
    "boxed": verification({"name": "number", "extract": {"name": "boxed"}}, closing="</think>"),
}
FAMILIES = ("chain_sum", "number_sorting", "spell_backward", "palindrome_generation", "leg_counting", "word_sorting")


@given(text=TEXTS, name=st.sampled_from([*VERIFIERS]))
def test_no_answer_makes_a_verifier_fail(text: str, name: str) -> None:
    grade = VERIFIERS[name].grade(gold("1.5"), text)
    assert grade.score in (0.0, 1.0)
    assert grade.failure is None


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_makes_a_family_fail(family: str) -> None:
    verifier = verification({"name": "reasoning_gym"}, family={"task": family})
    dataset = create_reasoning_gym(ReasoningGymSource(task=family), 3, "f")
    entry = dataset[0]
    item = Item([{"role": "user", "content": entry["question"]}], entry["answer"], entry["metadata"], entry)

    @given(text=TEXTS)
    @settings(max_examples=60)
    def fuzz(text: str) -> None:
        grade = verifier.grade(item, text)
        assert grade.failure is None
        assert grade.score is not None
        assert 0 <= grade.score <= 1

    fuzz()
