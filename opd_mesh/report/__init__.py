"""A run's folder → one self-contained page (``report.html``) that a person can look at."""

from opd_mesh.report.build import build_report

__all__ = ["build_report"]
