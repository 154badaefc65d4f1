"""The page of runs of stage one: accuracy, rewards, groups, clipping; and pages and summaries without held-out KL."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import EVALUATIONS, RECIPE, SUMMARY, metrics, text_of, write_run
from test_report import undrawn as undrawn

from opd_mesh.cli.summary import print_summary
from opd_mesh.report import build_report, figures
from opd_mesh.report.data import Series
from opd_mesh.report.plots import Panel

DOMAINS = {"add": {"share": 1.0}, "sort": {"share": 0.0}, "logic": {"share": 0.0}}
SFT = {"run": {"name": "s", "steps": 4}, "student": {"path": "base"}, "objective": {"name": "sft"}, "domains": DOMAINS}
GRPO = SFT | {"objective": {"name": "grpo"}}
BARE = {"status": "finished", "steps": 4, "wall_s": 9.6, "heldout_kl_before": {}, "heldout_kl_after": {}}
SFT_LINES = [
    {"step": step, "loss": 1 / step, "tokens": 10, "entropy/student": 0.5, "nll_domain/add": 1 / step}
    for step in (1, 2, 3, 4)
]
GRPO_LINES = [
    {
        "step": step,
        "loss": 0.1,
        "reward/add": 0.1 * step,
        "score/add": 0.2 * step,
        "groups_taught": 5,
        "groups_equal": 3,
        "groups_single": 0,
        "samples_dropped": 0,
        "ungraded": 0,
        "unparsed": step,
        "clip_fraction": 0.01,
        "mask_fraction": 0.0,
        "kl_behaviour": -1e-4,
        "kl_reference": 0.01 * step,
        "entropy_domain/add": 0.5,
        "response_length": 4.0,
        "response_length/add": 4.0,
        "truncated/add": 0.1,
    }
    for step in (1, 2, 3, 4)
]


def accuracies(step: int, add: float, sort: float = 0.4, logic: float = 0.5) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step}
    for name, value in (("add", add), ("sort", sort), ("logic", logic)):
        line |= {f"accuracy/{name}": value, f"score/{name}": value, f"unparsed/{name}": 0.02, f"graded/{name}": 200}
    return line


AFTER = [accuracies(0, 0.26), accuracies(4, 0.67, 0.35, 0.5)]


def labels(panels: list[Panel]) -> list[list[str]]:
    return [[line.label for line in panel.lines] for panel in panels]


def test_an_sft_run_tells_of_accuracy(tmp_path: Path, undrawn: list[tuple[str, list[Panel]]]) -> None:
    text = text_of(build_report(write_run(tmp_path, SFT_LINES, SFT, BARE, AFTER)).read_text())
    assert "fine-tuning report" in text
    assert "Right answers to held-out prompts: add 26 → 67 %; where it is not trained −5 to ±0 points." in text
    assert re.search(r"add trained on 26\.0 → 67\.0 \+41 points 200 2\.0 %", text)
    assert re.search(r"sort only looked at 40\.0 → 35\.0 −5 points", text)
    for absent in ("Reverse KL", "not measured", "Distance to the teachers", "Teacher marks"):
        assert absent not in text
    drawn = dict(undrawn)
    assert {line.label: line.series for line in drawn["accuracy"][0].lines}["add"] == Series([0, 4], [26.0, 67.0])
    assert len({line.colour for line in drawn["accuracy"][0].lines}) == 3  # without teachers domains have their own
    assert labels(drawn["nll"]) == [["add"]]
    assert {"kl", "overlap", "entropy", "rewards", "groups", "clipping"}.isdisjoint(drawn)


def test_a_grpo_run_tells_of_rewards_and_groups(tmp_path: Path, undrawn: list[tuple[str, list[Panel]]]) -> None:
    text = text_of(build_report(write_run(tmp_path, GRPO_LINES, GRPO, BARE, AFTER)).read_text())
    assert "reinforcement learning report" in text
    drawn = dict(undrawn)
    assert [panel.unit for panel in drawn["rewards"]] == ["mean reward", "mean score of the verifier"]
    assert labels(drawn["groups"]) == [["taught", "all alike", "one response"], ["not parsed"]]
    assert labels(drawn["clipping"]) == [["clipped", "masked"], ["from the writing policy", "from the reference"]]
    assert [panel.unit for panel in drawn["length"]] == ["tokens", "share cut off at the longest allowed"]
    colours = [line.colour for panel in drawn["groups"] for line in panel.lines]
    assert len(set(colours)) == len(colours)


def test_rewards_without_penalties_are_shown_once(tmp_path: Path, undrawn: list[tuple[str, list[Panel]]]) -> None:
    lines = [{"step": step, "reward/add": 0.1 * step, "score/add": 0.1 * step} for step in (1, 2)]
    build_report(write_run(tmp_path, lines, GRPO))
    assert [panel.unit for panel in dict(undrawn)["rewards"]] == ["mean score of the verifier"]


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_any_evaluation(tmp_path: Path) -> None:
    text = text_of(build_report(write_run(tmp_path, SFT_LINES, SFT, BARE)).read_text())
    assert "The loss went from 1.000 to 0.250; nothing has been measured on held-out prompts." in text
    assert "Before and after" not in text
    text = text_of(build_report(write_run(tmp_path, GRPO_LINES, GRPO, BARE)).read_text())
    assert "Nothing has been measured on held-out prompts." in text


@pytest.mark.usefixtures("undrawn")
def test_accuracy_of_a_run_in_progress(tmp_path: Path) -> None:
    text = text_of(build_report(write_run(tmp_path, SFT_LINES[:2], SFT, None, AFTER[:1])).read_text())
    assert "26.0 → — —" in text
    assert "First and latest measurement" in text


def test_distillation_tells_both(tmp_path: Path, undrawn: list[tuple[str, list[Panel]]]) -> None:
    found = [line | {"accuracy/sums": 0.2, "accuracy/talk": 0.5} for line in EVALUATIONS]
    found[-1] |= {"accuracy/sums": 0.9, "accuracy/talk": 0.4}
    of_domains = {"overlap_domain/sums": 0.6, "overlap_domain/talk": 0.2, "overlap_mass_domain/talk": 0.5}
    of_domains |= {"entropy_gap/math": 0.1, "entropy_gap_domain/sums": 0.1, "response_length/sums": 3.0}
    of_domains |= {"response_length/talk": 9.0, "entropy_domain/sums": 0.1, "entropy_domain/talk": 0.4}
    lines = [metrics(step) | of_domains for step in range(1, 21)]
    text = text_of(build_report(write_run(tmp_path, lines, RECIPE, SUMMARY, found)).read_text())
    assert "Right answers to held-out prompts: sums 20 → 90 %, talk 50 → 40 %. Closer to the teachers" in text
    assert "Distance to the teachers" in text
    drawn = dict(undrawn)
    assert labels(drawn["overlap_domain"]) == [["sums", "talk"], ["talk"], ["sums"]]
    assert labels(drawn["entropy"]) == [["math"], ["math"]]
    assert labels(drawn["entropies"]) == [["student", "math"], ["sums", "talk"]]
    assert labels(drawn["length"]) == [["sums", "talk"]]


def test_warnings_stand_on_the_page_with_their_remedy(tmp_path: Path, undrawn: list[Any]) -> None:
    summary = SUMMARY | {"warnings": ["step 40: overlap is low. Begin with a cold start"]}
    text = text_of(build_report(write_run(tmp_path, summary=summary)).read_text())
    assert "1 warning step 40: overlap is low. Begin with a cold start" in text
    assert undrawn


def test_colours_of_domains_are_their_teachers_where_there_are_any() -> None:
    own = figures.Cast([], {"a": {}, "b": {}})
    assert [own.domain_colour(name) for name in ("a", "b", "c")] == [0, 1, None]
    taught = figures.Cast(["t"], {"a": {}, "b": {"t": 1.0}})
    assert [taught.domain_colour(name) for name in ("a", "b")] == [None, 0]


# --- the terminal ------------------------------------------------------------------------------------------------
def printed(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_summary(console, folder)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_terminal_tells_of_accuracy(tmp_path: Path) -> None:
    told = printed(write_run(tmp_path, SFT_LINES, SFT, BARE, AFTER))
    assert re.search(r"│ add +│ +26\.0 │ +67\.0 │ +\+41\.0 │", told)
    assert "KL" not in told
    assert "finished after 4 steps, 10 s" in told


def test_the_terminal_tells_of_divergence(tmp_path: Path) -> None:
    told = printed(write_run(tmp_path, summary=SUMMARY, evaluations=EVALUATIONS))
    assert re.search(r"│ sums +│ +0\.800 │ +0\.200 │ +-75% │", told)
    assert "right answers" not in told


@pytest.mark.parametrize("evaluations", [None, AFTER[:1]])
def test_the_terminal_of_a_run_without_before_and_after(tmp_path: Path, evaluations: list[Any] | None) -> None:
    summary = {key: value for key, value in BARE.items() if not key.startswith("heldout")}
    told = printed(write_run(tmp_path, SFT_LINES, SFT, summary, evaluations))
    assert "finished after 4 steps" in told
    assert ("26.0" in told) == (evaluations is not None)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


# --- judging -----------------------------------------------------------------------------------------------------
def test_answering_and_judging_stand_together_and_kappa_beside(
    tmp_path: Path, undrawn: list[tuple[str, list[Panel]]]
) -> None:
    found = [accuracies(0, 0.2) | {"kappa/logic": 0.0}, accuracies(4, 0.6, logic=0.9) | {"kappa/logic": 0.8}]
    of_judge = {"judge_version/add": 3.0, "judge_variance/add": 0.1, "judge_unparsed/add": 0.0}
    lines = [line | of_judge for line in GRPO_LINES]
    text = text_of(build_report(write_run(tmp_path, lines, GRPO, BARE, found)).read_text())
    assert "Of a domain that judges, right is the verdict that is known to be (gold)" in text
    drawn = dict(undrawn)
    accuracy, kappa = drawn["accuracy"]
    assert labels([accuracy, kappa]) == [["add", "sort", "logic"], ["logic"]]
    assert kappa.lines[0].series == Series([0, 4], [0.0, 0.8])
    assert kappa.lines[0].colour == accuracy.lines[2].colour
    assert [panel.unit for panel in drawn["judge"]] == ["policy version that judges", "variance of the votes"]
    assert drawn["rewards"][1].unit == "mean score of the verifier, or of the judge"
    assert "the truth is in the accuracies above" in text
    elsewhere = [{key.replace("/add", "/other"): value for key, value in line.items()} for line in found]
    text = text_of(build_report(write_run(tmp_path, lines, GRPO, BARE, elsewhere)).read_text())
    assert "the truth is in the accuracies above" not in text


def test_a_run_without_verdicts_shows_no_kappa(tmp_path: Path, undrawn: list[tuple[str, list[Panel]]]) -> None:
    text = text_of(build_report(write_run(tmp_path, GRPO_LINES, GRPO, BARE, AFTER)).read_text())
    assert "κ" not in text
    assert "judge" not in dict(undrawn)
    assert len(dict(undrawn)["accuracy"]) == 1
