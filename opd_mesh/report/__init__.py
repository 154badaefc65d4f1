"""The folder of a run, or of a pipeline → one self-contained page (``report.html``) that a person can look at."""

from __future__ import annotations

from pathlib import Path

__all__ = ["build_report"]


def build_report(run_dir: Path) -> Path:
    """Write ``RUN_DIR/report.html`` (replacing it atomically) from what is there so far; returns its path.

    Raises:
        NotFoundError: no such folder, or nothing in it to show.
        PreconditionError: matplotlib or Jinja is not installed.
    """
    from opd_mesh.report.build import build_run_report
    from opd_mesh.report.pipeline import build_pipeline_report, is_pipeline

    return build_pipeline_report(run_dir) if is_pipeline(run_dir) else build_run_report(run_dir)
