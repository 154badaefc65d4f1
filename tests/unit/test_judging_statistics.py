"""A judge's figures against examples that were computed by hand."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.judging.statistics import (
    agreement,
    calibration,
    cohens_kappa,
    length_bias,
    partial_spearman,
    position_bias,
    spearman,
)


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: differences squared 1 + 1 + 1 + 1 + 0, so 1 − 6 · 4 / (5 · 24).
    assert spearman([10, 20, 30, 40, 50], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1.0)
    # Ties share ranks: 1.5 1.5 3 against 1 2 3; deviations −.5 −.5 1 and −1 0 1 give 1.5 / √(1.5 · 2).
    assert spearman([1, 1, 2], [5, 6, 7]) == pytest.approx(1.5 / math.sqrt(3))
    # What differs by rounding alone is a tie.
    assert spearman([0.3, 0.1 + 0.2, 1.0], [5, 6, 7]) == pytest.approx(1.5 / math.sqrt(3))


def test_spearman_says_nothing_of_too_little() -> None:
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="3 values against 2"):
        spearman([1, 2, 3], [1, 2])


def test_partial_spearman_by_hand() -> None:
    first, second, gold = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5], [1, 4, 2, 3, 5]
    ab, ag, bg = spearman(first, second), spearman(first, gold), spearman(second, gold)
    assert (ab, ag) == (pytest.approx(0.8), pytest.approx(0.7))
    assert bg == pytest.approx(1 - 6 * (1 + 9 + 4 + 0 + 0) / 120)
    expected = (0.8 - 0.7 * 0.3) / math.sqrt((1 - 0.49) * (1 - 0.09))
    assert partial_spearman(first, second, gold) == pytest.approx(expected)
    # Gold explains the length as well as the score: nothing is left to tell.
    assert partial_spearman([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]) is None
    # Gold that does not vary explains nothing.
    assert partial_spearman(first, second, [1, 1, 1, 1, 1]) == pytest.approx(0.8)
    assert partial_spearman([1, 2, 3], [1, 3, 2], [2, 1, 3]) is None


def test_length_that_only_follows_quality_is_no_bias() -> None:
    chance = random.Random(0)
    gold = [chance.random() for _ in range(400)]
    scores = [value + 0.3 * chance.random() for value in gold]
    lengths = [value + 0.3 * chance.random() for value in gold]
    bias = length_bias(scores, lengths, gold)
    assert bias is not None
    assert bias.spearman is not None
    assert bias.partial is not None
    assert bias.spearman > 0.8
    assert abs(bias.partial) < 0.15
    alone = length_bias(scores, lengths)
    assert alone is not None
    assert alone.partial is None
    assert length_bias([], []) is None


def test_cohens_kappa_by_hand() -> None:
    # The textbook's table: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no. Observed 0.7, chance 0.5.
    given_ = ["yes"] * 25 + ["no"] * 25
    gold = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohens_kappa(given_, gold) == pytest.approx(0.4)
    assert cohens_kappa([1, 2, 3], [1, 2, 3]) == 1.0
    assert cohens_kappa([0, 1], [1, 0]) == -1.0
    # Always the same answer has no merit, however common that answer is.
    assert cohens_kappa([1] * 10, [1] * 9 + [0]) == 0.0
    assert cohens_kappa([1, 1], [1, 1]) is None
    assert cohens_kappa([], []) is None
    with pytest.raises(ValueError, match="1 labels against 2"):
        cohens_kappa([1], [1, 2])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_kappa_is_symmetric_and_at_most_one(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    kappa = cohens_kappa(first, second)
    assert kappa == cohens_kappa(second, first)
    assert kappa is None or -1 - 1e-12 <= kappa <= 1 + 1e-12


def test_agreement_by_hand() -> None:
    found = agreement([0.0, 1.0, 0.1 + 0.2, 0.5], [0.0, 0.0, 0.3, 1.0])
    assert found is not None
    assert (found.count, found.exact) == (4, 0.5)
    assert found.distance == pytest.approx((0 + 1 + 0 + 0.5) / 4)
    # Chance: 0 is a quarter of the given and half of the gold, 1 and 0.3 a quarter of both: 1/8 + 1/16 + 1/16.
    assert found.kappa == pytest.approx((0.5 - 0.25) / 0.75)
    assert agreement([], []) is None


def test_calibration_by_hand() -> None:
    found = calibration([0.0, 0.1, 0.6, 0.6, 1.0], [0.0, 1.0, 0.5, 0.5, 1.0])
    assert found is not None
    assert [(f.low, f.high, f.count) for f in found.fifths] == [(0.0, 0.2, 2), (0.6, 0.8, 2), (0.8, 1.0, 1)]
    assert [f.mean_gold for f in found.fifths] == pytest.approx([0.5, 0.5, 1.0])
    assert found.error == pytest.approx((2 * 0.45 + 2 * 0.1 + 0) / 5)
    assert calibration([], []) is None


@given(st.lists(st.floats(0, 1), min_size=1))
def test_a_judge_that_says_gold_is_calibrated(golds: list[float]) -> None:
    found = calibration(golds, golds)
    assert found is not None
    assert found.error == pytest.approx(0, abs=1e-12)
    assert sum(fifth.count for fifth in found.fifths) == len(golds)


def test_position_bias_by_hand() -> None:
    # Always for whoever stands first: given order prefers the first (1), swapped prefers the other (0).
    always = position_bias([([1.0], [0.0])] * 3)
    assert always is not None
    assert (always.votes, always.first, always.changes) == (6, 0.5, 1.0)
    fair = position_bias([([1.0], [1.0]), ([0.0], [0.0])])
    assert fair is not None
    assert (fair.first, fair.changes) == (0.0, 0.0)
    # A tie in one order and a choice in the other is a change; a tie counts half.
    mixed = position_bias([([1.0, 0.5], [1.0, 1.0])])
    assert mixed is not None
    assert mixed.first == pytest.approx((1 + 0.5 + 0 + 0) / 4 - 0.5)
    assert mixed.changes == 0.5
    lone = position_bias([([1.0], [])])
    assert lone is not None
    assert lone.changes is None
    assert position_bias([]) is None
