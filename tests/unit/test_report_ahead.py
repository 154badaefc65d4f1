"""The report shows which side of an asynchronous run waits for the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_report import write_run

from opd_mesh.report import build_report


@pytest.mark.parametrize("backlog", [0.0, 3.0], ids=["synchronous", "ahead"])
def test_responses_ahead_and_idle_servers_are_drawn(tmp_path: Path, backlog: float) -> None:
    lines = [{"step": step, "loss": 1.0, "backlog": backlog, "rollout_idle_s": 0.1 * step} for step in (1, 2, 3)]
    page = build_report(write_run(tmp_path, lines)).read_text()
    assert "Generation and training side by side" in page
    assert "responses ahead" in page
    assert "idle seconds, all servers" in page


def test_a_run_that_does_not_tell_has_no_such_figure(tmp_path: Path) -> None:
    page = build_report(write_run(tmp_path, [{"step": 1, "loss": 1.0}])).read_text()
    assert "side by side" not in page
