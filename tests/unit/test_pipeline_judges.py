"""What a pipeline's models are worth as judges, from the verdicts that they wrote."""

from __future__ import annotations

from typing import Any

import pytest

from opd_mesh.config.base import parse_config
from opd_mesh.config.domains import DomainConfig
from opd_mesh.pipeline.judges import judge_figures


def judging(**values: Any) -> DomainConfig:
    value = {"judging": {"rubric": "r.yaml", "domain": "letters", **values}}
    return parse_config(DomainConfig, value, source="test")


DOMAINS = {
    "verdicts": judging(),
    "repeated": judging(probe="length"),
    "pairs": judging(pairwise=True),
    "elsewhere": judging(corruptions=["swap"], probe="length"),
}


def row(index: int, said: float | None, gold: float, chars: int | None = None) -> dict[str, Any]:
    return {"prompt_index": index, "said": said, "gold": gold, "judged_chars": chars}


PLAIN = [row(0, 1.0, 1.0, 4), row(1, 0.0, 0.0, 9), row(2, 1.0, 1.0, 5), row(3, 1.0, 0.0, 8), row(4, None, 1.0, 5)]


def test_agreement_calibration_and_length_of_those_that_parsed() -> None:
    found = judge_figures(DOMAINS, {"verdicts": PLAIN, "letters": [row(0, None, 1.0)]})
    assert list(found) == ["verdicts"]
    figures = found["verdicts"]
    assert figures["verdicts"] == 4
    assert figures["agreement"] == {"count": 4, "exact": 0.75, "kappa": 0.5, "distance": 0.25}
    assert figures["calibration"]["error"] == pytest.approx(0.25)  # of three that got 1, two deserved it
    # Ranks 3 1 3 3 of the scores, 1 4 2 3 of the lengths: the longest got nothing.
    assert figures["length_bias"]["spearman"] == pytest.approx(-0.7746, abs=1e-4)
    assert figures["length_bias"]["partial"] is not None
    assert (figures["position_bias"], figures["probe"], figures["probed"]) == (None, None, None)


def test_a_probe_is_held_against_the_same_answers_as_they_are() -> None:
    probed = [row(0, 1.0, 1.0, 12), row(1, 1.0, 0.0, 27), row(2, 0.0, 1.0, 15), row(9, 1.0, 0.0, 3)]
    figures = judge_figures(DOMAINS, {"verdicts": PLAIN, "repeated": probed})["repeated"]
    # One of the one below the best was raised; the mean of 0, +1 and −1; nobody knows what 9 was without it.
    assert figures["probed"] == {"count": 3, "shift": 0.0, "raised": 1.0}
    assert (figures["probe"], figures["length_bias"]) == ("length", None)


def test_a_probe_of_what_nobody_judged_as_it_is_tells_nothing() -> None:
    for answers in ({"repeated": PLAIN}, {"verdicts": PLAIN, "elsewhere": PLAIN}):
        name = list(answers)[-1]
        assert judge_figures(DOMAINS, answers)[name]["probed"] is None


def test_a_judge_with_eyes_for_the_place_is_told() -> None:
    first = [row(index, 1.0, float(index % 2 == 0)) for index in range(6)]
    figures = judge_figures(DOMAINS, {"pairs": first})["pairs"]
    assert figures["position_bias"] == {"votes": 6, "first": 0.5, "changes": 1.0}
    assert figures["length_bias"] is None
    right = [row(index, float(index % 2 == 0), float(index % 2 == 0)) for index in range(6)]
    assert judge_figures(DOMAINS, {"pairs": right})["pairs"]["position_bias"]["first"] == 0.0


def test_a_pair_that_was_judged_in_one_order_says_nothing_of_places() -> None:
    right = [row(index, float(index % 2 == 0), float(index % 2 == 0)) for index in range(5)]
    right[1] = row(1, None, 0.0)
    figures = judge_figures(DOMAINS, {"pairs": right})["pairs"]
    assert figures["position_bias"] == {"votes": 2, "first": 0.0, "changes": 0.0}
    assert (figures["asked"], figures["verdicts"]) == (5, 4)


def test_a_probe_is_held_against_what_was_asked_in_the_same_way() -> None:
    long = {"max_new_tokens": 99}
    rubric = {"rubric": "r.yaml", "domain": "letters"}
    domains = {
        "short": parse_config(DomainConfig, {"judging": rubric, "max_new_tokens": 9}, source="test"),
        "plain": parse_config(DomainConfig, {"judging": rubric, **long, "share": 0.3}, source="test"),
        "probed": parse_config(DomainConfig, {"judging": {**rubric, "probe": "length"}, **long}, source="test"),
    }
    answers = {"short": [row(0, 0.0, 0.0)], "plain": [row(0, 1.0, 0.0)], "probed": [row(0, 1.0, 0.0)]}
    assert judge_figures(domains, answers)["probed"]["probed"]["shift"] == 0.0


def test_without_verdicts_there_are_no_figures() -> None:
    figures = judge_figures(DOMAINS, {"verdicts": [row(0, None, 1.0, 3)], "repeated": [], "pairs": []})
    assert {one["agreement"] is None and one["verdicts"] == 0 for one in figures.values()} == {True}
