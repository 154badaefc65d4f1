"""The benchmarks' arithmetic: what is divided by what."""

from __future__ import annotations

import pytest

from benchmarks.divergence import (
    GEMMS,
    OURS,
    Case,
    Refusal,
    check_agreement,
    median_ratio,
    memory_ratios,
    peak_of,
    time_ratios,
)


def test_peak_is_the_largest_running_sum() -> None:
    assert peak_of([5, 3, -8, 6]) == 8
    assert peak_of([-4, 3]) == 0
    assert peak_of([]) == 0


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine was twice as slow in the second round, for both.
    assert median_ratio([1.0, 2.0, 1.0], [2.0, 4.0, 2.0]) == 0.5


def test_time_is_ours_over_the_fastest_peer() -> None:
    ratios = time_ratios({OURS: [3.0], "slow": [6.0], "fast": [4.0], GEMMS: [1.5]})
    assert ratios["fastest_peer"] == "fast"
    assert ratios["time_vs_fastest_peer"] == 0.75
    assert ratios["time_vs_each_peer"] == {"slow": 0.5, "fast": 0.75}
    assert ratios["sgemm_fraction"] == 0.5


def test_memory_is_ours_over_the_leanest_peer() -> None:
    assert memory_ratios({OURS: 10, "fat": 80, "lean": 40}) == {"leanest_peer": "lean", "memory_vs_leanest_peer": 0.25}
    assert memory_ratios({OURS: 10, "lean": None})["memory_vs_leanest_peer"] is None


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_result_that_differs_is_refused(wrong: float) -> None:
    case, right = Case(2, 3, 4), {"loss": [0.5, 1.0]}
    check_agreement(case, [(OURS, right), ("peer", {"loss": [0.5, 1.00001]})])
    with pytest.raises(Refusal, match="peer: the loss differs from that of ours"):
        check_agreement(case, [(OURS, right), ("peer", {"loss": [0.5, wrong]})])
