"""The report of a run: tolerant of what a run in progress looks like, strict about nothing to show."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from opd_mesh.errors import NotFoundError
from opd_mesh.report import build_report, figures
from opd_mesh.report import page as page_module
from opd_mesh.report.build import Change
from opd_mesh.report.data import Series, load_run
from opd_mesh.report.plots import MAX_POINTS, Line, Panel, _attribute, _short_scientific, bucketed, draw, smoothed
from opd_mesh.report.words import format_bytes, format_count, format_duration, format_kl, signed_percent

RECIPE = {
    "run": {"name": "demo", "steps": 20},
    "student": {"path": "models/student"},
    "teachers": {"math": {"path": "models/math"}, "chat": {"addresses": ["dns:///chat:50051"]}},
    "domains": {"sums": {"teachers": {"math": 1.0}}, "talk": {"teachers": {"chat": 0.7, "math": 0.3}}},
    "redis_url": "redis://user:hunter2@host:6379/0",
    "extra": {"api_key": "hunter2", "tokens_per_pass": 4096, "list": ["rediss://u:hunter2@h/0"]},
}


def metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1.0 / step,
        "tokens": 100,
        "tokens_per_s": 50.0,
        "kl/math": 0.9 / step,
        "kl/chat": 1.1 / step,
        "entropy/student": 1.0,
        "entropy/math": 0.8,
        "overlap/math": 0.7,
        "overlap_mass/math": 0.9,
        "kl_domain/sums": 0.9 / step,
        "kl_domain/talk": 1.0 / step,
        "response_length": 12.5,
        "seconds/step": 3.0,
        "seconds/rollout": 1.0,
        "seconds/update": 1.9,
        "seconds/policy": 0.1,
        "seconds/policy_swap": 0.05,
        "wire_bytes": 4096,
        "grad_norm": 1.0,
        "lr": 1e-5,
        "staleness": 0,
    }


def evaluation(step: int, kl: float, domain: str = "sums") -> dict[str, Any]:
    return {
        "step": step,
        f"heldout_kl/{domain}": kl,
        f"heldout_kl/{domain}/student_responses": kl * 0.9,
        f"heldout_kl/{domain}/teacher_responses": kl * 1.1,
        f"on_policy_kl/{domain}": kl / 2,
        f"response_length/{domain}": 10 + step,
    }


EVALUATIONS = [evaluation(0, 0.8) | evaluation(0, 1.0, "talk"), evaluation(20, 0.2) | evaluation(20, 1.1, "talk")]
SUMMARY = {
    "run_id": "demo-1",
    "status": "completed",
    "steps": 20,
    "heldout_kl_before": {"sums": 0.8, "talk": 1.0},
    "heldout_kl_after": {"sums": 0.2, "talk": 1.1},
    "heldout": {"sums": {"student_responses": {"before": 0.8, "after": 0.2}}},
    "on_policy_kl": {"sums": {"before": 0.7, "after": 0.15}},
    "response_length": {"sums": {"before": 10, "after": 14}},
    "tokens_trained": 2000,
    "wall_s": 61.4,
    "teachers": {"math": {"vocab_size": 49152}},
    "warnings": ["<script>alert(1)</script> & more"],
    "environment": {"python": "3.11"},
}


def write_run(
    folder: Path,
    lines: list[Any] | None = None,
    recipe: Any = RECIPE,
    summary: Any = None,
    evaluations: list[Any] | None = None,
    tail: str = "",
) -> Path:
    records = [metrics(step) for step in range(1, 21)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    if evaluations is not None:
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evaluations))
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S)))


class _Checker(HTMLParser):
    """Collects what would be loaded or run, and duplicate ids."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.loads.append(f"{tag} {name}")
            if name == "id":
                self.ids.append(value or "")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished run, drawn in full once."""
    return build_report(write_run(tmp_path_factory.mktemp("run"), summary=SUMMARY, evaluations=EVALUATIONS))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Panel]]]:
    """Drawing is most of the time of a report: where words matter, (name, panels) of each figure is noted instead."""
    drawn: list[tuple[str, list[Panel]]] = []

    def note(name: str, panels: list[Panel], description: str, **_: Any) -> str:
        drawn.append((name, panels))
        return f'<svg role="img" aria-label="{_attribute(description)}"></svg>'

    monkeypatch.setattr(figures, "draw", note)
    return drawn


def test_a_finished_run_is_told_in_full(finished: Path) -> None:
    assert finished.name == "report.html"
    text = text_of(finished.read_text())
    assert "demo-1" in text
    assert "completed" in text
    assert "Closer to the teachers in 1 of 2 domains (held-out KL down 75 %); moved away in talk (up 10 %)" in text
    assert re.search(r"0\.800 → 0\.200 −75 %", text)
    assert "math × 0.3" in text
    assert "1 min 1 s" in text
    for title in ("On-policy KL", "Entropy gap", "Overlap", "Response length", "Where the time goes", "Loss and"):
        assert title in text
    assert [item.name for item in finished.parent.iterdir() if item.name.startswith(".")] == []


def test_the_page_stands_alone(finished: Path) -> None:
    page = finished.read_text()
    checker = _Checker()
    checker.feed(page)
    assert checker.loads == []
    assert checker.tags.isdisjoint({"script", "link", "iframe", "img", "object"})
    assert len(checker.ids) == len(set(checker.ids))
    assert "http://" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert not re.findall(r"#0[ac]0[bcd][0-9a-f]{2}", page)  # every stand-in colour has become a variable


def test_secrets_stay_at_home(finished: Path) -> None:
    page = finished.read_text()
    assert "hunter2" not in page
    assert "4096" in page


def test_evaluations_are_drawn_by_domain(tmp_path: Path, undrawn: list[tuple[str, list[Panel]]]) -> None:
    page = build_report(write_run(tmp_path, summary=SUMMARY, evaluations=EVALUATIONS)).read_text()
    drawn = dict(undrawn)
    kl, length = drawn["heldout0"]
    assert {line.label: line.series for line in kl.lines} == {
        "student_responses": Series([0, 20], [0.8 * 0.9, 0.2 * 0.9]),
        "teacher_responses": Series([0, 20], [0.8 * 1.1, 0.2 * 1.1]),
        figures.FRESH: Series([0, 20], [0.4, 0.1]),
    }
    assert len({line.style for line in kl.lines}) == 3
    assert [line.series for line in length.lines] == [Series([0, 20], [10.0, 30.0])]
    assert "heldout1" in drawn
    assert "swatch dotted" in page
    # One teacher marks both domains, so they are told apart; what is inside another phase is no layer of its own.
    assert [line.label for line in drawn["kl_domain"][0].lines] == ["sums", "talk"]
    assert [line.label for line in drawn["seconds"][0].lines] == ["rollout", "update", "policy"]
    assert len(drawn["overlap"]) == 2


def test_a_domain_per_teacher_needs_no_figure_by_domain(tmp_path: Path, undrawn: list[tuple[str, list[Panel]]]) -> None:
    recipe = RECIPE | {"domains": {"sums": {"teachers": {"math": 1.0}}, "talk": {"teachers": {"chat": 1.0}}}}
    build_report(write_run(tmp_path, recipe=recipe))
    assert "kl" in dict(undrawn)
    assert "kl_domain" not in dict(undrawn)


def test_one_number_for_both_sets_is_shown_as_such(tmp_path: Path, undrawn: list[tuple[str, list[Panel]]]) -> None:
    build_report(write_run(tmp_path, evaluations=[{"step": 0, "heldout_kl/sums": 0.5}]))
    assert [line.label for line in dict(undrawn)["heldout0"][0].lines] == [figures.WHOLE]


@pytest.mark.usefixtures("undrawn")
def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">'
    recipe = {**RECIPE, "teachers": {evil: {"path": evil}}, "domains": {evil: {"teachers": {evil: 1.0}}}}
    summary = {**SUMMARY, "run_id": evil, "status": evil, "heldout_kl_before": {evil: 1.0}}
    lines = [{**metrics(step), f"kl/{evil}": 1.0, f"seconds/{evil}": 1.0} for step in (1, 2)]
    page = build_report(write_run(tmp_path, lines, recipe, summary, [evaluation(0, 1.0, evil)])).read_text()
    checker = _Checker()
    checker.feed(page)
    assert checker.loads == []
    assert "img" not in checker.tags
    assert "script" not in checker.tags
    assert evil not in page
    assert "&lt;img" in page


@pytest.mark.usefixtures("undrawn")
def test_a_run_in_progress_is_told_as_far_as_it_is(tmp_path: Path) -> None:
    lines = [metrics(step) for step in range(1, 6)]
    evaluations = [evaluation(0, 0.8), evaluation(4, 0.4)]
    run = write_run(tmp_path, lines, evaluations=evaluations, tail='{"step": 6, "loss": 0.1, "kl/ma')
    assert load_run(run).notes == []  # a line being written is no defect
    text = text_of(build_report(run).read_text())
    assert "in progress, or interrupted" in text
    assert (
        "So far, at step 5: The student came closer to its teachers in the only domain: held-out KL down 50 %" in text
    )
    assert "the first student&#39;s answers 0.720 → 0.360 −50 %" in text
    assert "0.400 → 0.200 10 → 14" in text  # on-policy KL and tokens per answer


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_has_only_been_evaluated(tmp_path: Path) -> None:
    run = write_run(tmp_path, [], evaluations=[evaluation(0, 0.8)])
    assert load_run(run).last_step == 0
    assert "0.800 → —" in text_of(build_report(run).read_text())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "lines", [[{"step": 1}], [{"step": 1, "loss": 0.5}], [{"step": 0, "kl/math": math.nan}], [{"step": 3, "lr": "x"}]]
)
def test_absent_keys_and_files_leave_gaps_only(tmp_path: Path, lines: list[Any]) -> None:
    text = text_of(build_report(write_run(tmp_path, lines, recipe=None)).read_text())
    assert tmp_path.name in text
    assert "recipe.yaml is absent" in text
    assert "nan" not in text


def test_unreadable_lines_are_counted_not_hidden(tmp_path: Path) -> None:
    good = json.dumps(metrics(1))
    broken = ["{", "[]", '{"step": "2"}', '{"step": true}', '{"loss": 1}', "\xff"]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join([good, *broken, json.dumps(metrics(2)), ""]).encode("latin-1"))
    run = load_run(tmp_path)
    assert [record["step"] for record in run.metrics.records] == [1, 2]
    assert any("lines 2, 3, 4 and 3 more cannot be read" in note for note in run.notes)


def test_not_finite_numbers_are_gaps_and_noted(tmp_path: Path) -> None:
    lines = [metrics(step) for step in range(1, 6)]
    lines[2]["loss"] = math.nan
    lines[3]["loss"] = -math.inf
    run = load_run(write_run(tmp_path, lines))
    assert run.metrics.series("loss").steps == [1, 2, 5]
    assert any("loss was not a finite number at steps 3, 4" in note for note in run.notes)


def test_a_resumed_run_replaces_the_steps_it_took_again(tmp_path: Path) -> None:
    lines: list[Any] = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4, 5)]
    lines += [{"step": 3, "loss": 2.0}, {"step": 4, "loss": 2.0}]
    run = load_run(write_run(tmp_path, lines, evaluations=[evaluation(0, 1.0), evaluation(5, 0.1), evaluation(4, 0.2)]))
    assert run.metrics.series("loss") == Series([1, 2, 3, 4], [1.0, 1.0, 2.0, 2.0])
    assert run.evaluations.series("on_policy_kl/sums") == Series([0, 4], [0.5, 0.1])


@pytest.mark.parametrize("content", [None, "", "\n\n", '{"step": 1, "lo', "[]\n"])
def test_nothing_to_show_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(NotFoundError, match="holds no metrics to report on"):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(NotFoundError, match="no run directory"):
        build_report(tmp_path / "absent")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("broken", ["{", "- a list\n", "a: [", "\x00"])
def test_a_broken_recipe_or_summary_is_noted(tmp_path: Path, broken: str) -> None:
    run = write_run(tmp_path, recipe=None)
    (run / "recipe.yaml").write_text(broken)
    (run / "summary.json").write_text(broken)
    text = text_of(build_report(run).read_text())
    assert "recipe.yaml" in text
    assert "summary.json" in text
    assert "left out" in text


@pytest.mark.usefixtures("undrawn")
def test_summaries_of_another_shape_do_not_break_the_page(tmp_path: Path) -> None:
    strange = dict.fromkeys(SUMMARY, 7) | {"heldout_kl_after": {"sums": None}, "response_length": {"sums": [1]}}
    assert "sums" in build_report(write_run(tmp_path, summary=strange)).read_text()


def test_many_teachers_and_long_runs_stay_small(tmp_path: Path) -> None:
    lines = [{"step": step, **{f"kl/t{teacher}": 1.0 / step for teacher in range(11)}} for step in range(1, 1501)]
    path = build_report(write_run(tmp_path, lines, recipe=None))
    assert path.stat().st_size < 600_000
    assert "swatch dashed" in path.read_text()  # the ninth teacher has the first colour again, dashed


@pytest.mark.usefixtures("undrawn")
def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_report(write_run(tmp_path))
    before = path.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(page_module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        build_report(tmp_path)
    assert path.read_text() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.yaml", "report.html"]


def test_bucketing_keeps_range_mean_and_gaps() -> None:
    steps = [*range(1000), *range(2000, 3000)]
    series = Series(steps, [float(step % 2) for step in steps])
    at, means, lows, highs = bucketed(series)
    assert len(at) == len(means) == len(lows) == len(highs) <= MAX_POINTS
    assert at == sorted(at)
    assert not any(1010 < step < 1990 for step in at)
    assert (min(lows), max(highs)) == (0.0, 1.0)
    assert all(low <= mean <= high for low, mean, high in zip(lows, means, highs, strict=True))
    few = Series([1, 5], [2.0, 3.0])
    assert bucketed(few) == ([1.0, 5.0], [2.0, 3.0], [2.0, 3.0], [2.0, 3.0])


def test_smoothing_is_a_centred_mean() -> None:
    assert smoothed([0.0, 3.0, 6.0], 1) == [1.5, 3.0, 4.5]
    assert smoothed([5.0], 3) == [5.0]


@pytest.mark.parametrize(("count", "value"), [(1, 0.0), (40, -1e-9), (500, 1e12)])
def test_any_series_draws_as_well_formed_svg(count: int, value: float) -> None:
    series = Series(list(range(count)), [value] * count)
    lines = [Line("a", series, 9), Line("b", series)]
    svg = draw("x", [Panel(lines, "nats", stacked=stacked) for stacked in (False, True)], 'a "quoted" <name>')
    assert "nan" not in svg
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'a "quoted" <name>'


@pytest.mark.parametrize(
    ("before", "after", "percent", "tone"),
    [
        (1.0, 0.25, "−75 %", "good"),
        (1.0, 1.05, "+5.0 %", "bad"),
        (1.0, 0.99, "−1.0 %", "flat"),
        (0.1, 2.0, "×20", "bad"),
        (0.0, 1.0, "—", "flat"),
        (None, 1.0, "—", "flat"),
    ],
)
def test_changes_in_words(before: float | None, after: float, percent: str, tone: str) -> None:
    change = Change(before, after)
    assert (change.percent, change.tone) == (percent, tone)


def test_numbers_in_words() -> None:
    assert [signed_percent(share) for share in (-0.5, 0.0995, 0.004)] == ["−50 %", "+10 %", "+0.4 %"]
    assert [format_kl(value) for value in (None, 0.0, 1.23456, 0.00123)] == ["—", "0.000", "1.235", "1.23e-03"]
    assert [format_count(value) for value in (None, 7, 12.34, 12_345, 1.5e6)] == ["—", "7", "12.3", "12,345", "1.5 M"]
    assert [format_bytes(value) for value in (0, 512, 1536, 5 * 2**30)] == ["—", "512 B", "1.5 KiB", "5 GiB"]
    assert [format_duration(value) for value in (None, 2.04, 61.4, 7300)] == ["—", "2.0 s", "1 min 1 s", "2 h 1 min"]
    assert [_short_scientific(value) for value in (0, 5e-5, 2.5e-4)] == ["0", "5e-5", "2.5e-4"]
