"""The report of a pipeline: its tables and plot, its way through a pipeline in progress, and the terminal's table."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Console
from test_report import _Checker, text_of
from test_statistics import RECIPE, RIGHT, write_pipeline

from opd_mesh.cli.summary import print_pipeline_summary
from opd_mesh.errors import NotFoundError
from opd_mesh.pipeline.statistics import summarize
from opd_mesh.report import build_report, dots, tables
from opd_mesh.report.bootstrap import Estimate
from opd_mesh.report.dots import Dot, draw_dots
from opd_mesh.report.runs import training_runs


def write_training(folder: Path, name: str, *, seed: int = 0, ended: bool = True, **summary: Any) -> Path:
    """A training run among a pipeline's artefacts."""
    run = folder / "artefacts" / f"{name}-{seed:012d}"
    run.mkdir(parents=True, exist_ok=True)
    domains = {"add": {"share": 1.0}, "sort": {"share": 0.0}}
    recipe = {"run": {"name": name, "seed": seed, "steps": 20}, "domains": domains}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    lines = [{"step": step, "loss": 1.0, "tokens": 100} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [{"step": step, "accuracy/add": 0.2 + step / 4, "accuracy/sort": 0.5} for step in (0, 2)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    if ended:
        told = {"status": "finished", "steps": 20, "wall_s": 61.4, "tokens_trained": 300, **summary}
        (run / "summary.json").write_text(json.dumps(told))
        (run / "report.html").write_text("its own page")
        (run / "artefact.json").write_text("{}")
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished pipeline, drawn in full once."""
    folder = write_pipeline(tmp_path_factory.mktemp("a pipeline"))
    write_training(folder, "adder-sft", warnings=["step 3: <b>overlap</b> low: begin with a cold start"])
    write_training(folder, "adder-grpo", ended=False)
    return build_report(folder)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Dot]]:
    """What would be drawn, by the name of the figure: drawing is most of the time."""
    drawn: dict[str, list[Dot]] = {}

    def note(name: str, rows: list[Dot], description: str, **_: Any) -> str:
        drawn[name] = rows
        return "<svg></svg>"

    monkeypatch.setattr(dots, "draw_dots", note)
    return drawn


def test_a_finished_pipeline_is_told_in_full(finished: Path) -> None:
    text = text_of(finished.read_text())
    assert "tiny" in text
    assert "✓" not in text.partition("Accuracy")[0]
    assert "finished" in text
    assert "opd has 82 % (" in text  # of (75 − 30) / (90 − 30) and (75 − 30) / (80 − 30)
    assert "in its weakest domain, add; it is 30.0 points of accuracy ahead of soup" in text
    assert re.search(r"base 30\.0 \d\S+–\S+ 30\.0", text)
    assert re.search(r"adder expert of add 90\.0", text)
    assert re.search(r"each expert on its own 90\.0 \S+ 80\.0 \S+ 85\.0", text)
    assert re.search(r"opd − soup \+35\.0", text)
    assert re.search(r"Specialist before after SFT after GRPO adder add 25\.0 45\.0 85\.0", text)
    assert "✓ optimizer.lr = 0.002 75.0 %" in text
    assert "adder-sft, seed 0 : step 3" in text
    assert "opd run --resume " in text
    for title in ("Recovered gain", "Paired differences", "What the sweeps chose", "Cost", "How to repeat it"):
        assert title in text


def test_the_page_stands_alone_but_for_links_to_runs(finished: Path) -> None:
    page = finished.read_text()
    checker = _Checker()
    checker.feed(page)
    assert checker.loads == ["a href=artefacts/adder-sft-000000000000/report.html"]
    assert (finished.parent / "artefacts/adder-sft-000000000000/report.html").is_file()
    assert checker.tags.isdisjoint({"script", "link", "iframe", "img", "object"})
    assert len(checker.ids) == len(set(checker.ids))
    assert not re.findall(r"#0[ac]0[bcd][0-9a-f]{2}", page)
    assert "<b>overlap</b>" not in page


def test_best_students_and_experts_are_marked(tmp_path: Path) -> None:
    rows = {row.name: row for row in tables.accuracy_rows(summarize(write_pipeline(tmp_path), resamples=100))}
    assert [cell.best for cell in rows["opd"].cells] == [True, True, True]
    assert [cell.own for cell in rows["sorter"].cells] == [False, True, False]
    assert [name for name, row in rows.items() if any(cell.best for cell in row.cells)] == ["opd"]
    assert rows["opd"].cells[0].seeds == "seed 0: 80.0, seed 1: 70.0"
    assert [rows[name].kind for name in RIGHT] == ["", "expert of add", "expert of sort", "", "OPD", "", ""]


def test_equals_are_all_marked_and_called_so(tmp_path: Path) -> None:
    right = RIGHT | {"soup": RIGHT["opd"]}
    summary = summarize(write_pipeline(tmp_path, right), resamples=100)
    assert [row.name for row in tables.accuracy_rows(summary) if row.cells[-1].best] == ["opd", "soup"]
    assert "it is as accurate as soup, the average" in tables.verdict(summary)[0]


def test_the_plot_has_a_panel_for_the_mean_and_each_domain(tmp_path: Path, undrawn: dict[str, list[Dot]]) -> None:
    build_report(write_pipeline(tmp_path))
    assert list(undrawn) == ["dots0", "dots1", "dots2"]
    assert [dot.label for dot in undrawn["dots1"]] == list(RIGHT)
    hollow = {name: [dot.label for dot in rows if dot.hollow] for name, rows in undrawn.items()}
    assert hollow == {"dots0": ["adder", "sorter"], "dots1": ["sorter"], "dots2": ["adder"]}
    assert [dot.value for dot in undrawn["dots2"]] == pytest.approx([30, 20, 80, 60, 50, 75, 50])


def test_dots_draw_as_well_formed_svg() -> None:
    rows = [Dot("$x$ & <b>", 50.0, 40.0, 60.0, 9, hollow=True), Dot("a" * 60, 100.0)]
    svg = draw_dots("x", rows, 'a "quoted" <name>', marks=[30.0])
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == 'a "quoted" <name>'
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "$x$ & <b>" in texts
    assert f"{'a' * 25}…" in texts


@pytest.mark.usefixtures("undrawn")
def test_a_pipeline_in_progress_is_told_as_far_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    text = text_of(build_report(tmp_path).read_text())
    assert "in progress, or interrupted" in text
    assert "Nothing has been trained yet." in text
    write_training(tmp_path, "adder-sft")
    write_training(tmp_path, "adder-grpo", ended=False)
    text = text_of(build_report(tmp_path).read_text())
    assert "1 of the 2 training runs that were begun are finished; no model has been evaluated yet." in text
    assert "3 of 20" in text
    assert "add 70 %" in text  # on what it is trained for, not on what it is only looked at
    assert "sort 50 %" not in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("running", "in progress, or interrupted"),
        ("failed", "failed"),
        ("stopped", "stopped"),
        ("finished", "finished"),
    ],
)
def test_the_status_is_that_of_the_results(tmp_path: Path, status: str, said: str) -> None:
    folder = write_pipeline(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"status": status}))
    page = build_report(folder).read_text()
    assert re.findall(r'<span class="pill \w+">([^<]+)</span>', page)[0] == said


@pytest.mark.usefixtures("undrawn")
def test_before_anything_is_evaluated_the_page_tells_how_far_it_is(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    systems = {name: system | {"domains": {}} for name, system in results["systems"].items()}
    (folder / "results.json").write_text(json.dumps(results | {"systems": systems, "status": "running"}))
    assert "Nothing has been trained yet." in text_of(build_report(folder).read_text())


@pytest.mark.usefixtures("undrawn")
def test_a_domain_without_answers_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path)
    for path in folder.glob("artefacts/*/answers/sort.jsonl"):
        path.write_text("")
    text = text_of(build_report(folder).read_text())
    assert "opd, sort, seed 1: there are no answers" in text
    assert re.search(r"adder expert of add 90\.0", text)


def test_a_verdict_is_good_where_the_weakest_domain_is(tmp_path: Path) -> None:
    right = RIGHT | {"opd": {"add": (10, 10), "sort": (7, 7)}}  # 7/6 and 4/5 of what the experts gained
    summary = summarize(write_pipeline(tmp_path, right), resamples=100)
    mean = summary.systems["opd"].mean_recovered
    assert mean is not None
    assert mean.mean > 0.85
    assert tables.verdict(summary)[1] == "mixed"
    right = RIGHT | {"opd": {"add": (9, 9), "sort": (8, 8)}}
    assert tables.verdict(summarize(write_pipeline(tmp_path, right), resamples=100))[1] == "good"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("broken", ["{", "[]", '{"systems": {"a": {"kind": "opd", "domains": {"d": [{}]}}}}'])
def test_broken_results_are_noted(tmp_path: Path, broken: str) -> None:
    folder = write_pipeline(tmp_path)
    (folder / "results.json").write_text(broken)
    text = text_of(build_report(folder).read_text())
    assert "results.json cannot be read and was left out" in text


@pytest.mark.usefixtures("undrawn")
def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">'
    folder = write_pipeline(tmp_path)
    text = json.dumps(json.loads((folder / "results.json").read_text()))
    for name in ("soup", "sort"):
        text = text.replace(f'"{name}": ', f"{json.dumps(evil)}: ")
    (folder / "results.json").write_text(text)
    recipe = yaml.safe_load((folder / "pipeline.yaml").read_text())
    recipe["pipeline"]["name"] = recipe["stages"]["opd"]["from"] = evil
    recipe["model"] = {"api_key": "hunter2"}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(recipe))
    write_training(folder, "run", warnings=[evil])
    page = build_report(folder).read_text()
    checker = _Checker()
    checker.feed(page)
    assert checker.tags.isdisjoint({"img", "script"})
    assert evil not in page
    assert "&lt;img" in page
    assert "hunter2" not in page


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text("")
    with pytest.raises(NotFoundError, match="no training run and no results"):
        build_report(tmp_path)


def test_runs_tell_of_themselves(tmp_path: Path) -> None:
    write_training(tmp_path, "ended", seed=3, warnings=["w"])
    (tmp_path / "artefacts" / "soup-1").mkdir()
    begun = write_training(tmp_path, "begun", ended=False)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (begun / name).unlink()
    ended, young = sorted(training_runs(tmp_path), key=lambda run: run.steps, reverse=True)
    assert (ended.name, ended.seed, ended.status, ended.warnings) == ("ended", 3, "done", ("w",))
    assert (ended.tokens, ended.seconds, ended.planned) == (300, 61.4, 20)
    assert (ended.accuracies, ended.trained) == ({"add": 0.7, "sort": 0.5}, {"add"})
    assert (young.name, young.steps, young.link, young.status) == ("begun", 0, "", "in progress, or interrupted")


def test_estimates_in_words() -> None:
    assert tables.percent(None) == ("—", "")
    assert tables.percent(Estimate(0.8431)) == ("84.3", "")
    assert tables.percent(Estimate(0.8431, 0.8, 0.9)) == ("84.3", "80.0–90.0")
    assert tables.percent(Estimate(-0.05, -0.1, 0.02)) == ("−5.0", "−10.0 to 2.0")
    assert tables.percent(Estimate(-0.0001, -0.05)) == ("0.0", "")
    assert tables.percent(Estimate(-0.05)) == ("−5.0", "")
    assert tables.percent(Estimate(0.956, 0.9, 1.01), 0) == ("96", "90–101")


def test_the_terminal_has_the_same_table(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path)
    (folder / "report.html").write_text("")
    console = Console(file=io.StringIO(), width=200)
    print_pipeline_summary(console, folder)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"│ adder +│ +90\.0 │ +20\.0 │ +55\.0 │", told)
    assert re.search(r"│ each expert on its own +│ +90\.0 │ +80\.0 │ +85\.0 │", told)
    assert "opd has 82" in told
    assert f"report.html: {folder / 'report.html'}" in told


def test_runs_that_learn_to_judge_have_their_curves_on_the_page(tmp_path: Path, undrawn: dict[str, list[Dot]]) -> None:
    folder = write_pipeline(tmp_path)
    write_training(folder, "plain")
    joint = write_training(folder, "joint", seed=2)
    lines = [
        {"step": step, "accuracy/reverse": 0.1 * step, "accuracy/judge": 0.5 + 0.1 * step, "kappa/judge": 0.2 * step}
        for step in (0, 2, 4)
    ]
    (joint / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = build_report(folder).read_text()
    text = text_of(page)
    assert undrawn
    assert "Answering and judging" in text
    assert "joint, seed 2 Right answers to prompts kept out of training" in text
    assert text.count("Cohen's κ of verdicts") == 1  # of the one run that judges
    checker = _Checker()
    checker.feed(page)
    assert len(checker.ids) == len(set(checker.ids))
    (joint / "evaluations.jsonl").write_text(json.dumps({"step": 0, "accuracy/reverse": 0.1}) + "\n")
    assert "Answering and judging" not in text_of(build_report(folder).read_text())


def test_what_judges_are_worth_and_what_probes_did_to_them(tmp_path: Path, undrawn: dict[str, list[Dot]]) -> None:
    folder = write_pipeline(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    figures = {
        "split": "test",
        "asked": 20,
        "verdicts": 10,
        "agreement": {"count": 10, "exact": 0.9, "kappa": 0.8, "distance": 0.1},
        "calibration": {"fifths": [], "error": 0.05},
        "length_bias": {"spearman": 0.5, "partial": -0.125},
        "position_bias": None,
        "probe": None,
        "probed": None,
    }
    other = {**figures, "agreement": {"count": 10, "exact": 0.8, "kappa": None, "distance": 0.2}}
    pairs = {**figures, "length_bias": None, "position_bias": {"votes": 10, "first": 0.034, "changes": 0.2}}
    nothing = dict.fromkeys(("agreement", "calibration", "length_bias", "position_bias"))
    probe = {
        **nothing,
        "split": "test",
        "asked": 16,
        "verdicts": 10,
        "probe": "length",
        "probed": {"count": 9, "shift": -0.25, "raised": 0.125},
    }
    results["judges"] = {
        "union": {
            "verdicts": [{"seed": 0, "stage": "evaluate", **figures}, {"seed": 1, "stage": "evaluate", **other}],
            "pairs": [
                {"seed": 0, "stage": "early", **other, "split": "validation"},
                {"seed": 0, "stage": "evaluate", **pairs},
            ],
            "repeated": [{"seed": 0, "stage": "evaluate", **probe}],
        }
    }
    (folder / "results.json").write_text(json.dumps(results))
    summary = summarize(folder)
    first, second = tables.judge_rows(summary)
    assert (first.name, first.kind) == ("union", "verdicts")
    values = [cell.value for cell in first.cells]
    assert values == ["50.0 %", "85.0 %", "0.800", "0.150", "0.050", "−0.125", "—", "—"]
    assert [cell.value for cell in second.cells][-3:] == ["—", "+3.4 %", "20.0 %"]
    (probed,) = tables.probe_rows(summary)
    assert (probed.kind, [cell.value for cell in probed.cells]) == ("length (repeated)", ["62.5 %", "−0.250", "12.5 %"])
    text = text_of(build_report(folder).read_text())
    assert undrawn
    assert "Models as judges" in text
    assert "length (repeated) 62.5 % −0.250 12.5 %" in text
    results["judges"]["union"]["pairs"].pop(0)  # as accuracies: of several evaluations the one on test prompts
    assert summary.to_json()["judges"] == results["judges"]
