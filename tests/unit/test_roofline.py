"""The tables of docs/kernels.md that can be computed are the ones that are computed now."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("table", ["by_phase", "by_chunk", "by_design"])
def test_the_page_shows_what_the_command_prints(table: str) -> None:
    roofline = runpy.run_path(str(ROOT / "benchmarks" / "roofline.py"))
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert roofline[table]() in page, "paste what `python benchmarks/roofline.py` prints into docs/kernels.md"
