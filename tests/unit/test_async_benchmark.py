"""What the benchmark of asynchronous runs says of two runs."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.async_run import compare, figures, reduction


def run(step_s: float, wait_s: float, after: float) -> dict[str, Any]:
    line = {"seconds/step": step_s, "seconds/wait_rollout": wait_s, "tokens": 10, "staleness": 1}
    summary = {"heldout_kl_before": {"a": 1.0, "b": 3.0}, "heldout_kl_after": {"a": after, "b": after}}
    return figures([{**line, "seconds/step": 99.0}] * 2 + [line] * 3, summary)


def test_an_asynchronous_run_is_compared_with_the_synchronous_one() -> None:
    sync, ahead = run(4.0, 2.0, 1.5), run(2.5, 0.5, 1.6)
    assert reduction(sync) == 0.5
    assert compare(sync, ahead) == {
        "step_rate_vs_sync": 1.6,
        "step_rate_vs_ideal": 0.8,
        "ideal_vs_sync": 2.0,
        "heldout_kl_vs_sync": pytest.approx(1.6 / 1.5, abs=1e-4),
        "heldout_kl_reduction_vs_sync": pytest.approx(0.8),
        "max_staleness_seen": 1,
    }
