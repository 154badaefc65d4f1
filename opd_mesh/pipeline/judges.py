"""What the pipeline's models are worth as judges: figures over the verdicts that they wrote in an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd_mesh.config.domains import DomainConfig
from opd_mesh.judging.probes import probe_figures
from opd_mesh.judging.statistics import agreement, as_values, calibration, length_bias, position_bias

Rows = Sequence[Mapping[str, Any]]  # of an answers file, see student_trainer.answering


def judge_figures(domains: Mapping[str, DomainConfig], answers: Mapping[str, Rows]) -> dict[str, dict[str, Any]]:
    """By judging domain: how many were ``asked`` for and came as ``verdicts``; of these ``agreement`` with gold,
    ``calibration``, ``length_bias``, of pairs ``position_bias``, and of a probe what it did, all as
    :mod:`opd_mesh.judging` has them.

    What cannot be told is None: a probe where the same answers were not judged as they are, too.

    Args:
        domains: of the pipeline.
        answers: by domain, of one model.
    """
    found = {}
    for name, rows in answers.items():
        judging = domains[name].judging if name in domains else None
        if judging is None:
            continue
        verdicts = [row for row in rows if row.get("said") is not None and row.get("gold") is not None]
        said, gold = [row["said"] for row in verdicts], [row["gold"] for row in verdicts]
        chars = [row["judged_chars"] for row in verdicts if row.get("judged_chars") is not None]
        found[name] = {
            "asked": len(rows),
            "verdicts": len(verdicts),
            "agreement": as_values(agreement(said, gold)),
            "calibration": as_values(calibration(said, gold)),
            "length_bias": None,
            "position_bias": as_values(position_bias(_by_order(verdicts))) if judging.pairwise else None,
            "probe": judging.probe,
            "probed": None,
        }
        if judging.probe is not None:
            untouched = _untouched(domains, name, answers)
            probe: str = judging.probe
            known = [row for row in verdicts if row["prompt_index"] in untouched]
            pairs = [(untouched[row["prompt_index"]], {probe: row["said"]}) for row in known]
            found[name]["probed"] = as_values(probe_figures(pairs).get(probe))
        elif len(chars) == len(verdicts):  # not of pairs
            found[name]["length_bias"] = as_values(length_bias(said, chars, gold))
    return found


def _untouched(domains: Mapping[str, DomainConfig], name: str, answers: Mapping[str, Rows]) -> dict[int, float]:
    """What was said of the answers of a probing domain as they are, by prompt; of none, where nobody was asked."""
    judging = domains[name].judging
    assert judging is not None
    wanted = _asked(domains[name].replace(judging=judging.replace(probe=None)))
    for other, rows in answers.items():
        if other in domains and _asked(domains[other]) == wanted:
            return {row["prompt_index"]: row["said"] for row in rows if row.get("said") is not None}
    return {}


def _asked(config: DomainConfig) -> DomainConfig:
    """What an evaluation depends on."""
    return config.replace(share=1.0, teachers={})


def _by_order(rows: Rows) -> list[tuple[list[float], list[float]]]:
    """Of each pair what was said for the right answer, where it stood first and where it stood second."""
    pairs: dict[int, tuple[list[float], list[float]]] = {}
    for row in rows:
        given, swapped = pairs.setdefault(row["prompt_index"] // 2, ([], []))
        if row["prompt_index"] % 2:
            swapped.append(1 - row["said"])
        else:
            given.append(row["said"])
    # With one order alone, whom the judge is for would be whoever deserves it.
    return [orders for orders in pairs.values() if all(orders)]
