"""What ``opd judge`` says at the end: how many, how well, and how far it can be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from opd_mesh.cli.judge_lines import Line, failures_of
from opd_mesh.judging.probes import probe_figures
from opd_mesh.judging.statistics import agreement, as_values, calibration, length_bias, position_bias


def summary_of(lines: Sequence[Line], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures over the lines that are done; what was done to answers counts among the probes alone.

    Args:
        rows: by the lines' keys, as the output has them.
    """
    probes, lines = [line for line in lines if line.probe], [line for line in lines if not line.probe]
    done = [(line, rows[line.key]) for line in lines if line.key in rows]
    judged = [(line, row) for line, row in done if row["score"] is not None]
    votes = [vote for _, row in done for vote in row["votes"]]
    with_gold = [(row["score"], line.gold) for line, row in judged if line.gold is not None]
    scores, golds = [score for score, _ in with_gold], [gold for _, gold in with_gold if gold is not None]
    lone = [(line, row) for line, row in judged if not line.pairwise]
    pairs = [row for line, row in judged if line.pairwise]
    return {
        "lines": len(lines),
        "judged": len(judged),
        "failed": len(done) - len(judged),
        "failed_probes": sum(rows[line.key]["score"] is None for line in probes if line.key in rows),
        "failures": failures_of([row for _, row in done]),
        "votes": len(votes),
        "parsed_share": sum(vote["score"] is not None for vote in votes) / len(votes) if votes else None,
        "mean_score": statistics.fmean(row["score"] for _, row in lone) if lone else None,
        "judges": sorted({_judge(row["judge"]) for _, row in judged}),
        "length_bias": as_values(_length_bias(lone)),
        "probes": _probes([line.key for line, _ in lone], probes, rows),
        "position_bias": as_values(position_bias([_by_order(row) for row in pairs])),
        "agreement": as_values(agreement(scores, golds)),
        "calibration": as_values(calibration(scores, golds)),
    }


def _probes(
    keys: Sequence[str], probes: Sequence[Line], rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]] | None:
    """By name; None where there are none."""
    scores: dict[str, dict[str, float]] = {key: {} for key in keys}
    for line in probes:
        score = rows.get(line.key, {}).get("score")
        if score is not None and line.probed in scores:
            scores[line.probed][line.probe] = score
    found = probe_figures([(rows[key]["score"], probed) for key, probed in scores.items()])
    return {name: asdict(figures) for name, figures in found.items()} or None


def _judge(judge: Mapping[str, Any]) -> str:
    return f"{judge['run_id']}/{judge['lineage']}/{judge['version']} {judge['digest']}"


def _length_bias(judged: Sequence[tuple[Line, Mapping[str, Any]]]) -> Any:
    """Over those with gold where there are some, so that both figures are of the same answers."""
    some_gold = any(line.gold is not None for line, _ in judged)
    used = [(line, row) for line, row in judged if line.gold is not None or not some_gold]
    golds = [line.gold for line, _ in used if line.gold is not None]
    return length_bias(
        [row["score"] for _, row in used], [len(line.answers[0]) for line, _ in used], golds if some_gold else None
    )


def _by_order(row: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    parsed = [vote for vote in row["votes"] if vote["score"] is not None]
    return [vote["score"] for vote in parsed if not vote["swapped"]], [
        vote["score"] for vote in parsed if vote["swapped"]
    ]


def told(summary: Mapping[str, Any]) -> str:
    """For a person, a figure a line."""
    lines = [f"{summary['judged']} of {summary['lines']} judged, {summary['failed']} failed"]
    if summary["failed_probes"]:
        lines[0] += f", and {summary['failed_probes']} probes"
    lines += [f"  {count} × {reason}" for reason, count in list(summary["failures"].items())[:5]]
    if len(judges := summary["judges"]) > 1:
        lines.append(f"judged by {len(judges)} policies, whose scores may differ: {'; '.join(judges)}")
    if summary["parsed_share"] is not None:
        lines.append(f"votes: {summary['votes']}, of which {summary['parsed_share']:.1%} parsed")
    if summary["mean_score"] is not None:
        lines.append(f"mean score: {summary['mean_score']:.3f}")
    if (bias := summary["length_bias"]) is not None:
        text = f"length bias: {_figure(bias['spearman'])} (rank correlation of score and length)"
        lines.append(text + (f", beyond gold {_figure(bias['partial'])}" if bias["partial"] is not None else ""))
    for name, probe in (summary["probes"] or {}).items():
        raised = "—" if probe["raised"] is None else f"{probe['raised']:.1%}"
        lines.append(f"probe {name}: score {probe['shift']:+.3f}, raised {raised} of those below the best")
    if (place := summary["position_bias"]) is not None:
        lines.append(
            f"position bias: {place['first']:+.3f} for whoever stands first; the choice changes with the order in "
            + ("—" if place["changes"] is None else f"{place['changes']:.1%}")
        )
    if (gold := summary["agreement"]) is not None:
        lines.append(
            f"agreement with gold ({gold['count']}): exact {gold['exact']:.1%}, kappa {_figure(gold['kappa'])}, "
            f"mean distance {gold['distance']:.3f}"
        )
    if (calibrated := summary["calibration"]) is not None:
        lines.append(f"calibration error: {calibrated['error']:.3f}")
        lines += [
            f"  score {one['low']:.1f} to {one['high']:.1f}: {one['count']} answers, mean gold {one['mean_gold']:.3f}"
            for one in calibrated["fifths"]
        ]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "—" if value is None else f"{value:+.3f}"
