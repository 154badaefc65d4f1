"""The signs of a failing run, on made-up metrics."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.config.sections import DiagnosticsConfig
from student_trainer.diagnostics import Diagnostics

CONFIG = DiagnosticsConfig(window_steps=3)


def told(config: DiagnosticsConfig = CONFIG, **series: list[float]) -> list[str]:
    """Warnings of a run with these metrics; `a__b` stands for a/b."""
    steps = max(map(len, series.values()))
    diagnostics = Diagnostics(config)
    return diagnostics.take_all(
        {"step": step + 1} | {key.replace("__", "/"): values[step] for key, values in series.items()}
        for step in range(steps)
    )


def test_low_and_flat_overlap_with_a_high_kl_is_told_once_with_the_remedy():
    warnings = told(overlap__math=[0.4] * 20, kl__math=[2.0] * 20)
    assert len(warnings) == 1
    assert warnings[0].startswith("step 6: teacher math: only 40%")
    assert "cold_start" in warnings[0]


@pytest.mark.parametrize(
    ("overlap", "kl"),
    [
        ([0.9] * 20, [2.0] * 20),  # high
        ([0.02 * step for step in range(20)], [2.0] * 20),  # rising
        ([0.4] * 20, [0.1] * 20),  # what is likely is agreed on
        ([0.4] * 20, [3.0 * 0.9**step for step in range(20)]),  # the KL falls
    ],
)
def test_what_is_no_sign_of_a_failing_teacher(overlap: list[float], kl: list[float]):
    assert told(overlap__math=overlap, kl__math=kl) == []


def test_collapsed_entropy_names_the_domain():
    (warning,) = told(entropy_domain__code=[1.0] * 6 + [0.05] * 6, entropy_domain__law=[1.0] * 12)
    assert "domain code" in warning
    assert "domains.code.others" in warning
    assert warning.startswith("step 9:")


def test_exploding_length():
    (warning,) = told(response_length__code=[10.0] * 3 + [30.0] * 5)
    assert "from 10.0 to 30.0 tokens" in warning
    assert "length_penalty" in warning


def test_nothing_is_told_before_two_windows_are_full():
    assert told(overlap__math=[0.1] * 5, kl__math=[9.0] * 5, response_length__code=[1.0, 1, 1, 50, 50]) == []


def test_a_resumed_run_tells_the_same():
    lines = [{"step": step + 1, "overlap/math": 0.3, "kl/math": 1.0} for step in range(12)]
    assert Diagnostics(CONFIG).take_all(lines) == [
        text for diagnostics in [Diagnostics(CONFIG)] for line in lines for text in diagnostics.take(line)
    ]


def test_metrics_that_are_absent_in_some_steps_are_no_trouble():
    diagnostics = Diagnostics(CONFIG)
    lines = [{"step": step} | ({"overlap/a": 0.1, "kl/a": 3.0} if step % 2 else {}) for step in range(40)]
    assert len(diagnostics.take_all(lines)) == 1


def test_what_is_kept_does_not_grow_with_the_run():
    diagnostics = Diagnostics(CONFIG)
    diagnostics.take_all(
        {"step": step, "loss": 1.0, "kl/a": 1.0, "response_length/code": 10.0} for step in range(1, 500)
    )
    assert {key: len(series._newest) for key, series in diagnostics._series.items()} == {
        "kl/a": 6,
        "response_length/code": 6,
    }
    # The first window is still that of the first steps.
    found = [diagnostics.take({"step": 500 + step, "response_length/code": 30.0}) for step in range(3)]
    assert "from 10.0 to 23.3 tokens" in " ".join(text for texts in found for text in texts)


@given(st.lists(st.floats(0, 1), max_size=30), st.lists(st.floats(0, 50), max_size=30))
def test_any_metrics_are_read(overlap: list[float], kl: list[float]):
    steps = min(len(overlap), len(kl))
    assert len(told(overlap__a=overlap[:steps] or [0.0], kl__a=kl[:steps] or [0.0])) <= 1
