"""Verdicts: the parser takes what means one thing only, and the grammar lets nothing else be written."""

from __future__ import annotations

import random

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_mesh.config.rubrics import Rubric
from opd_mesh.judging.verdict import VerdictError, parse_verdict, verdict_grammar, write_verdict

TWO = Rubric.model_validate(
    {
        "name": "two",
        "criteria": [{"name": "clear"}, {"name": "true", "scale": {"min": 0, "max": 1, "step": 0.5}, "weight": 3}],
        "max_reason_chars": 40,
    }
)
BARE = TWO.replace(reasons="none")
LONE = Rubric.model_validate(
    {"name": "lone", "criteria": [{"name": "ok", "scale": {"min": 0, "max": 1}}], "reasons": "none", "form": "score"}
)
GOOD = "clear: plain words | 4\ntrue: half of it | 0.5"


def test_the_canonical_text_is_read_as_it_is() -> None:
    found = parse_verdict(TWO, GOOD)
    assert found.scores == {"clear": 4.0, "true": 0.5}
    assert found.reasons == {"clear": "plain words", "true": "half of it"}
    assert found.overall == pytest.approx((0.75 + 3 * 0.5) / 4)
    assert not found.repaired
    assert parse_verdict(LONE, "1").overall == 1.0
    assert parse_verdict(BARE, "clear: 1\ntrue: 1").reasons == {}
    assert write_verdict(TWO, found.scores, found.reasons) == GOOD


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "\n",
        "\r\n" + GOOD.replace("\n", "\r\n"),
        GOOD.replace(" | ", "|"),
        GOOD.replace(": ", " :   "),
        GOOD.replace("| 4", "| 4.0"),
        GOOD.replace("\n", "\n\n"),
        f"```text\n{GOOD}\n```",
    ],
)
def test_what_changes_no_meaning_is_repaired_and_told(text: str) -> None:
    found = parse_verdict(TWO, text)
    assert found.repaired
    assert (found.scores, found.reasons) == (parse_verdict(TWO, GOOD).scores, parse_verdict(TWO, GOOD).reasons)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 lines for 2"),
        ("clear: plain | 4", "1 lines for 2"),
        (GOOD + "\nbrief: yes | 1", "3 lines for 2"),
        ("The verdict:\n" + GOOD, "3 lines for 2"),
        ("true: x | 1\nclear: y | 4", "expected a line of clear"),
        (GOOD.replace("| 4", "| 6"), "no point of the scale"),
        (GOOD.replace("| 4", "| 4.5"), "no point of the scale"),
        (GOOD.replace("| 4", "| four"), "expected a score"),
        (GOOD.replace("| 4", "| 4/5"), "expected a score"),
        (GOOD.replace("| 4", "| nan"), "expected a score"),
        (GOOD.replace("| 4", "| ٤"), "expected a score"),
        (GOOD.replace("| 4", "| 4e0"), "expected a score"),
        (GOOD.replace("| 4", "| 1 | 4"), "expected one |"),
        (GOOD.replace("plain words", ""), "no reason"),
        (GOOD.replace("plain words", "x" * 41), "41 characters"),
        (GOOD.replace("clear", "Clear"), "expected a line of clear"),
        ("x" * 100_001, "too many"),
    ],
)
def test_what_is_not_certain_is_refused(text: str, said: str) -> None:
    with pytest.raises(VerdictError, match=said):
        parse_verdict(TWO, text)


def test_of_a_pair_scores_are_choices() -> None:
    found = parse_verdict(BARE, "clear: A\ntrue: tie", pairwise=True)
    assert found.scores == {"clear": 1.0, "true": 0.5}
    assert found.overall == pytest.approx((1 + 3 * 0.5) / 4)
    hard = BARE.replace(criteria=[{"name": "clear", "hard_requirement": True}, {"name": "true", "weight": 9}])
    assert parse_verdict(hard, "clear: B\ntrue: A", pairwise=True).overall == 0.0
    assert parse_verdict(hard, "clear: tie\ntrue: A", pairwise=True).overall == pytest.approx(0.95)
    with pytest.raises(VerdictError, match="expected one of A, B, tie"):
        parse_verdict(BARE, "clear: 4\ntrue: 1", pairwise=True)


# --- rubbish ---------------------------------------------------------------------------------------------------
def test_ten_thousand_texts_of_rubbish_neither_crash_nor_score() -> None:
    """Good verdicts, cut, doubled, shuffled and overwritten: what is read means what its text says, to the letter."""
    generator = random.Random(7)
    pieces = ["clear", "true", ":", "|", " ", "\n", "4", "1", "0.5", "-1", "9", "A", "```", "\r", "é", "\x00", "x" * 50]
    read = 0
    for _ in range(10_000):
        text = generator.choice([GOOD, "clear: 4\ntrue: 1", ""])
        for _ in range(generator.randint(1, 6)):
            at = generator.randint(0, len(text))
            match generator.randint(0, 3):
                case 0:
                    text = text[:at] + generator.choice(pieces) + text[at:]
                case 1:
                    text = text[:at] + text[at + generator.randint(1, 8) :]
                case 2:
                    text = text[:at] + text
                case 3:
                    text = "".join(generator.sample(text, len(text)))
        try:
            found = parse_verdict(TWO, text)
        except VerdictError:
            continue
        read += 1
        lines = (line.strip() for line in text.replace("\r\n", "\n").split("\n"))
        said = [line for line in lines if line and not line.startswith("```")]
        assert [line.split(":")[0].strip() for line in said] == ["clear", "true"]
        assert [float(line.split("|")[1]) for line in said] == list(found.scores.values())
        assert found.scores["clear"] in (1, 2, 3, 4, 5)
        assert found.scores["true"] in (0, 0.5, 1)
        assert 0 <= found.overall <= 1
    assert read < 3_000  # most of it is rubbish, or this test tests nothing


@settings(max_examples=300)
@given(st.text(max_size=120))
def test_no_text_at_all_crashes_the_parser(text: str) -> None:
    for rubric in (TWO, BARE, LONE):
        for pairwise in (False, True):
            try:
                found = parse_verdict(rubric, text, pairwise=pairwise)
            except VerdictError:
                continue
            assert 0 <= found.overall <= 1


# --- the grammar -----------------------------------------------------------------------------------------------
def decoded(grammar: str, seed: int) -> str:
    """A text drawn byte by byte among those that the grammar allows."""

    class Bytes:
        eos_token_id, bos_token_id = 256, None
        tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")
        special_token_ids = (256,)

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.get_error()
    generator = random.Random(seed)
    written = bytearray()
    while True:
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(257) if mask[token // 8] >> (token % 8) & 1]
        token = generator.choice(allowed)
        if token == 256:
            return written.decode()
        written.append(token)
        assert matcher.consume_token(token)


@pytest.mark.parametrize("rubric", [TWO, BARE, LONE, TWO.replace(max_reason_chars=1)], ids=["two", "bare", "lone", "1"])
@pytest.mark.parametrize("pairwise", [False, True])
def test_whatever_decodes_under_the_grammar_is_a_canonical_verdict(rubric: Rubric, pairwise: bool) -> None:
    grammar = verdict_grammar(rubric, pairwise=pairwise)
    for seed in range(40):
        found = parse_verdict(rubric, decoded(grammar, seed), pairwise=pairwise)
        assert not found.repaired
