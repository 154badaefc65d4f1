"""Means, intervals, recovered gain and paired differences: against sums done by hand, and by simulation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from opd_mesh.errors import NotFoundError, PreconditionError
from opd_mesh.pipeline.statistics import Roles, summarize
from opd_mesh.report import bootstrap
from opd_mesh.report.bootstrap import Answers, Comparison, Estimate, read_answers
from student_trainer.answers import CORRECT

RECIPE: dict[str, Any] = {
    "pipeline": {"name": "tiny", "seeds": [0, 1]},
    "stages": {
        "base": {"kind": "base", "domains": {"add": {}, "sort": {}}},
        "adder": {"kind": "specialist", "from": "base", "domains": {"add": {}}},
        "sorter": {"kind": "specialist", "from": "base", "domains": {"sort": {}}},
        "mixed": {"kind": "specialist", "from": "base", "domains": {"add": {}, "sort": {}}},
        "sampled": {
            "kind": "opd",
            "teachers": {"add": {"adder": 1.0}, "sort": {"sorter": 0.7, "adder": 0.3}},
            "recipe": {"objective": {"name": "sampled_token"}},
        },
        "opd": {"kind": "opd", "teachers": {"add": {"adder": 1.0}, "sort": {"sorter": 1.0}}, "recipe": {}},
        "soup": {"kind": "soup", "of": ["adder", "sorter"]},
        "evaluate": {"kind": "evaluate"},
    },
}
# Right answers among 10, by system and domain, for seeds 0 and 1.
RIGHT: dict[str, dict[str, tuple[int, int]]] = {
    "base": {"add": (2, 4), "sort": (3, 3)},
    "adder": {"add": (8, 10), "sort": (2, 2)},
    "sorter": {"add": (1, 1), "sort": (8, 8)},
    "mixed": {"add": (6, 6), "sort": (6, 6)},
    "sampled": {"add": (5, 5), "sort": (5, 5)},
    "opd": {"add": (8, 7), "sort": (7, 8)},
    "soup": {"add": (4, 4), "sort": (5, 5)},
}


def answers(right: Sequence[bool | float | None], first: int = 0) -> Answers:
    """One answer per prompt."""
    return Answers.of(
        {"prompt_index": first + place, "score": float(value), "parsed": True}
        if value is not None
        else {"prompt_index": first + place, "score": None, "parsed": False, "failure": "the verifier raised"}
        for place, value in enumerate(right)
    )


def write_pipeline(folder: Path, right: Mapping[str, Mapping[str, Sequence[int]]] = RIGHT, count: int = 10) -> Path:
    """A finished pipeline's recipe, results and answers."""
    systems: dict[str, Any] = {}
    for system, domains in right.items():
        kind = RECIPE["stages"].get(system, {}).get("kind", "model")
        cost = {"seconds": 12.5, "tokens_trained": 3000, "steps": 40}
        systems[system] = {"kind": kind, "domains": {}, "cost": None if kind == "soup" else cost}
        for domain, seeds in domains.items():
            for seed, correct in enumerate(seeds):
                path = folder / "artefacts" / f"{system}-{seed}" / "answers" / f"{domain}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [{"prompt_index": at, "score": float(at < correct), "parsed": True} for at in range(count)]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
                entry = {"seed": seed, "stage": "evaluate", "split": "test", "accuracy": correct / count}
                entry |= {"answers": str(path.relative_to(folder))}
                systems[system]["domains"].setdefault(domain, []).append(entry)
    choice = {"option": 1, "values": {"optimizer.lr": 0.002}, "accuracy": 0.75}
    choice["options"] = [
        {"values": {"optimizer.lr": 0.001}, "accuracy": 0.5, "accuracies": {"add": 0.5, "sort": 0.5}},
        {"values": {"optimizer.lr": 0.002}, "accuracy": 0.75, "accuracies": {"add": 0.7, "sort": 0.8}},
    ]
    if "opd" in systems:
        systems["opd"]["chosen"] = choice
    phases = {
        "adder": {
            phase: {"add": [{"seed": 0, "accuracy": low}, {"seed": 1, "accuracy": low + 0.1}]}
            for phase, low in (("before", 0.2), ("sft", 0.4), ("grpo", 0.8))
        }
    }
    results = {"pipeline": "tiny", "seeds": [0, 1], "systems": systems, "phases": phases}
    results |= {"status": "finished", "wall_s": 61.4, "job_seconds": 400.0}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_what_counts_as_right_is_what_the_trainer_counts() -> None:
    assert bootstrap.CORRECT == CORRECT


def test_answers_are_counted_by_prompt() -> None:
    lines = [
        {"prompt_index": 3, "score": 1.0, "parsed": True},
        {"prompt_index": 3, "score": 0.5, "parsed": True},
        {"prompt_index": 4, "score": 0.0, "parsed": False},
        {"prompt_index": 5, "score": None, "parsed": False, "failure": "it was cancelled"},
        {"prompt_index": 6, "score": None, "parsed": False, "failure": None},  # not to be verified
    ]
    found = Answers.of(lines)
    assert (found.correct, found.graded) == ({3: 1, 4: 0, 5: 0, 6: 0}, {3: 2, 4: 1, 5: 0, 6: 0})
    assert (found.unparsed, found.ungraded) == (1, 1)
    assert found.accuracy == pytest.approx(1 / 3)
    assert Answers.of([]).accuracy is None


def test_one_seed_resamples_prompts() -> None:
    found = Comparison({("a", "d", 7): answers([1] * 6 + [0] * 4)}).accuracy("a", "d")
    assert found is not None
    assert found.mean == pytest.approx(0.6)
    # The number of right answers among 10 draws is binomial(10, 0.6); its 2.5% and 97.5% points are 3 and 9.
    assert (found.low, found.high) == (pytest.approx(0.3), pytest.approx(0.9))


def test_seeds_are_drawn_before_prompts() -> None:
    found = Comparison({("a", "d", seed): answers([seed] * 10) for seed in (0, 1)}).accuracy("a", "d")
    # Prompts say nothing here: a resample is 0, ½ or 1, with probabilities ¼, ½, ¼.
    assert found == Estimate(0.5, 0.0, 1.0)


def test_the_mean_over_seeds_is_of_their_accuracies() -> None:
    comparison = Comparison({("a", "d", 0): answers([1, 1, None, None]), ("a", "d", 1): answers([1, 0, 0, 0])})
    found = comparison.accuracy("a", "d")
    assert found is not None
    assert found.mean == pytest.approx((1.0 + 0.25) / 2)
    assert comparison.by_seed("a", "d") == {0: 1.0, 1: 0.25}
    assert comparison.counts("a", "d") == {"answers": 8, "graded": 6, "unparsed": 0, "ungraded": 2}


def test_a_difference_is_paired_by_prompt() -> None:
    pattern = [1, 0] * 20
    comparison = Comparison({("a", "d", 0): answers(pattern), ("b", "d", 0): answers(pattern)})
    assert comparison.difference("a", "b", ["d"]) == Estimate(0.0, 0.0, 0.0)
    opposite = Comparison({("a", "d", 0): answers(pattern), ("b", "d", 0): answers([1 - value for value in pattern])})
    found = opposite.difference("a", "b", ["d"])
    assert found.mean == 0
    assert found.low is not None
    assert found.low < -0.2


def test_a_difference_is_paired_by_seed() -> None:
    """Both systems are better under seed 1: drawn apart, the interval would have to hold 0."""
    cells = {("a", "d", seed): answers([1] * (3 + 5 * seed) + [0] * (7 - 5 * seed)) for seed in (0, 1)}
    cells |= {("b", "d", seed): answers([1] * (1 + 5 * seed) + [0] * (9 - 5 * seed)) for seed in (0, 1)}
    found = Comparison(cells).difference("a", "b", ["d"])
    assert found.mean == pytest.approx(0.2)
    assert found.low is not None
    assert found.low >= 0


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({("b", "d", 0): answers([1, 0, 1])}, "same prompts of d under seed 0 \\(1 were answered"),
        ({("b", "d", 0): answers([1, 0], first=5)}, "same prompts of d"),
        ({("b", "d", 1): answers([1, 0])}, "b did not answer d under seed 0"),
        ({("b", "e", 0): answers([1, 0])}, "b did not answer d"),
    ],
)
def test_prompts_that_do_not_match_are_refused(other: dict[tuple[str, str, int], Answers], what: str) -> None:
    comparison = Comparison({("a", "d", 0): answers([1, 0]), **other}, resamples=100)
    with pytest.raises(PreconditionError, match=what) as caught:
        comparison.difference("a", "b", ["d"])
    assert caught.value.field == "systems.b.domains.d"


def test_recovered_gain() -> None:
    cells = {
        ("base", "d", 0): answers([1] * 20 + [0] * 80),
        ("expert", "d", 0): answers([1] * 90 + [0] * 10),
        ("student", "d", 0): answers([1] * 55 + [0] * 45),
    }
    comparison = Comparison(cells)
    found = comparison.recovered("student", "base", "expert", "d")
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert found.low is not None
    assert found.high is not None
    assert 0.3 < found.low < 0.45
    assert 0.55 < found.high < 0.7
    assert comparison.recovered("expert", "base", "expert", "d") == Estimate(1.0, 1.0, 1.0)
    assert comparison.recovered("student", "expert", "base", "d") is None  # that "expert" has lost
    assert comparison.recovered("student", "base", "absent", "d") is None
    assert comparison.mean_recovered("student", "base", {"d": "expert"}) == found


def test_a_gain_that_may_be_nothing_has_no_interval() -> None:
    cells = {("base", "d", 0): answers([1, 0] * 10), ("student", "d", 0): answers([0] * 20)}
    cells["expert", "d", 0] = answers([0, 1] * 10 + [1])
    found = Comparison(cells).recovered("student", "base", "expert", "d")
    assert found is not None
    assert (found.low, found.high) == (None, None)


def test_the_mean_over_domains_asks_for_all_of_them() -> None:
    comparison = Comparison(
        {("a", "d", 0): answers([1, 0]), ("a", "e", 0): answers([1, 1]), ("b", "d", 0): answers([1])}
    )
    found = comparison.mean_accuracy("a", ["d", "e"])
    assert found is not None
    assert found.mean == pytest.approx(0.75)
    assert comparison.mean_accuracy("b", ["d", "e"]) is None
    assert comparison.mean_accuracy("a", []) is None
    assert comparison.mean_by_seed("a", ["d", "e"]) == {0: 0.75}


def test_what_else_is_compared_changes_no_interval() -> None:
    cells = {("a", "d", seed): answers([1, 0, 1, 1, 0, seed]) for seed in (0, 1)}
    more = {("b", "d", seed): answers([0, 0, 1, 1, 0, 1]) for seed in (0, 1)}
    more |= {("a", "e", seed): answers([1, 0, 1]) for seed in (0, 1)}
    assert Comparison(cells).accuracy("a", "d") == Comparison({**more, **cells}).accuracy("a", "d")


@pytest.mark.parametrize(
    ("seeds", "prompts", "spread", "least"),
    [(1, 60, 0.0, 0.92), (8, 40, 0.08, 0.91), (3, 60, 0.0, 0.92), (3, 60, 0.08, 0.90)],
    ids=["prompts alone", "eight seeds", "three alike", "three apart"],
)
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, prompts: int, spread: float, least: float) -> None:
    """Items that are as hard under every seed: drawing them anew for each would miss the truth far more often."""
    generator = np.random.default_rng(5)
    trials, held = 300, 0
    for _ in range(trials):
        hardness_P = generator.beta(0.5, 0.5, size=prompts)  # mean ½, and items differ much
        shift_N1 = generator.normal(0, spread, size=(seeds, 1))
        right_NP = generator.random((seeds, prompts)) < np.clip(hardness_P + shift_N1, 0, 1)
        cells = {("a", "d", seed): answers(list(right_NP[seed])) for seed in range(seeds)}
        found = Comparison(cells, resamples=300).accuracy("a", "d")
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.5 <= found.high
    # Where seeds are alike, what tells them apart is chance counted twice: too wide, if anything.
    assert least <= held / trials < 1


# --- a pipeline's folder -----------------------------------------------------------------------------------------
def test_roles_are_told_by_the_recipe() -> None:
    systems = {name: {"kind": RECIPE["stages"][name]["kind"], "domains": dict.fromkeys(RIGHT[name])} for name in RIGHT}
    assert Roles.of(systems, RECIPE) == Roles(
        "base", {"add": "adder", "sort": "sorter"}, ["mixed", "sampled", "opd", "soup"], "opd"
    )
    by_kind = Roles.of({"base": {"kind": "base", "domains": {"d": []}}, "d": {"kind": "specialist"}}, {})
    assert by_kind == Roles("base", {"d": "d"}, [], None)
    assert Roles.of({}, {}) == Roles(None, {}, [], None)


def test_a_pipeline_in_figures(tmp_path: Path) -> None:
    told = summarize(write_pipeline(tmp_path), resamples=500).to_json("opd run tiny.yaml")
    assert told["command"] == "opd run tiny.yaml"
    assert list(told["systems"]) == list(RIGHT)
    add = told["systems"]["base"]["domains"]["add"]
    assert add["mean"] == pytest.approx(0.3)
    assert add["seeds"] == {"0": 0.2, "1": 0.4}
    assert add["low"] < 0.3 < add["high"]
    assert add["graded"] == 20
    opd = told["systems"]["opd"]["mean"]
    assert opd["mean"] == pytest.approx(0.75)
    assert opd["seeds"] == {"0": 0.75, "1": 0.75}
    recovered = told["recovered"]["opd"]
    assert recovered["domains"]["add"]["mean"] == pytest.approx((0.75 - 0.3) / (0.9 - 0.3))
    assert recovered["mean"]["mean"] == pytest.approx((0.75 + 0.9) / 2)
    assert [(pair["a"], pair["b"]) for pair in told["paired"]] == [
        ("opd", "mixed"),
        ("opd", "sampled"),
        ("opd", "soup"),
    ]
    assert told["paired"][2]["difference"] == pytest.approx(0.3)
    assert told["paired"][2]["domains"]["sort"]["difference"] == pytest.approx(0.25)
    assert told["phases"]["adder"]["grpo"] == {"add": {"0": 0.8, "1": pytest.approx(0.9)}}
    assert told["chosen"]["opd"]["values"] == {"optimizer.lr": 0.002}
    assert told["cost"]["stages"]["adder"]["steps"] == 40
    assert told["notes"] == []
    assert json.loads(json.dumps(told)) == told


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path)
    (run / "artefacts" / "soup-1" / "answers" / "add.jsonl").unlink()
    (run / "artefacts" / "soup-0" / "answers" / "sort.jsonl").write_text('{"prompt_index": 1}\n')
    summary = summarize(run, resamples=100)
    assert [note.partition(":")[0] for note in summary.notes] == [
        "soup, add, seed 1 is left out",
        "soup, sort, seed 0 is left out",
        "opd and soup are not compared",
    ]
    assert summary.systems["soup"].seeds == {"add": {0: 0.4}, "sort": {1: 0.5}}
    assert summary.systems["soup"].mean_seeds == {}
    assert summary.best() == ["opd"]


def test_of_two_evaluations_the_one_on_test_prompts_counts(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path, {"base": {"add": (2, 4)}})
    results = json.loads((run / "results.json").read_text())
    entries = results["systems"]["base"]["domains"]["add"]
    early = [{**entry, "stage": "early", "split": "validation", "answers": "nowhere"} for entry in entries]
    results["systems"]["base"]["domains"]["add"] = [*early, *entries]
    (run / "results.json").write_text(json.dumps(results))
    summary = summarize(run, resamples=100)
    assert summary.notes == []
    assert summary.systems["base"].seeds == {"add": {0: 0.2, 1: 0.4}}


def test_no_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="not there yet"):
        summarize(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(PreconditionError, match="cannot be read"):
        summarize(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(PreconditionError, match="no `systems`"):
        summarize(tmp_path)
    with pytest.raises(NotFoundError, match="evaluate stage"):
        read_answers(tmp_path / "absent.jsonl")
