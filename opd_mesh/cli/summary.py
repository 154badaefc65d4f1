"""The last lines of `opd run`."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def print_summary(console: Console, run_dir: Path) -> None:
    """Held-out KL by domain, and where to look."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    after = summary["heldout_kl_after"]
    if after:
        table = Table(title="held-out reverse KL to the domain's teacher (nats per token)")
        for column in ("domain", "before", "after", "change"):
            table.add_column(column, justify="left" if column == "domain" else "right")
        for domain, before in summary["heldout_kl_before"].items():
            if domain in after:
                change = after[domain] / before - 1 if before else 0.0
                table.add_row(domain, f"{before:.3f}", f"{after[domain]:.3f}", f"{change:+.0%}")
        console.print(table)
    console.print(f"{summary['status']} after {summary['steps']} steps, {summary['wall_s']:.0f} s", highlight=False)
    for name in ("student", "report.html"):
        if (run_dir / name).exists():
            console.print(f"{name}: {run_dir / name}", highlight=False)
