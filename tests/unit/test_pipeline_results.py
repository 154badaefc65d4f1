"""results.json from artefacts that are there, all or some."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pipeline_cases import pipeline

from opd_mesh.pipeline.digests import FileDigests, Resolved, resolve
from opd_mesh.pipeline.jobs import Plan
from opd_mesh.pipeline.plan import plan
from opd_mesh.pipeline.results import Results
from opd_mesh.pipeline.store import Store

CHANGES: dict[str, Any] = {
    "pipeline.seeds": [0, 1],
    "stages.add.grpo": {"run": {"steps": 4}, "batch": {"responses_per_prompt": 2}},
    "stages.add.sweep": {"grpo.optimizer.lr": [1e-3, 2e-3]},
}


class Folder:
    """A pipeline's folder in which jobs are done by hand."""

    def __init__(self, path: Path, changes: dict[str, Any] | None = None) -> None:
        self.pipeline = pipeline(CHANGES if changes is None else changes)
        self.plan: Plan = plan(self.pipeline)
        self.store = Store(path / "artefacts")
        self.store.root.mkdir(exist_ok=True)
        self.resolved: Mapping[str, Resolved] = {}
        self.look()

    def look(self) -> None:
        def choice_of(digest: str) -> int | None:
            found = self.store.find(digest)
            return None if found is None else int(found.facts["option"])

        self.resolved = resolve(self.plan, choice_of, FileDigests())

    def done(self, digest: str | None, kind: str, **facts: Any) -> None:
        assert digest is not None
        self.store.finish(self.store.folder(kind, digest), digest, kind=kind, name=kind, files=[], facts=facts)

    def trained(self, job_id: str, after: float, *, before: float = 0.1, steps: int = 2) -> None:
        facts: dict[str, Any] = {"seconds": 10.0 * steps, "tokens_trained": 100 * steps, "steps": steps}
        facts["looked_at"] = dict(self.resolved[job_id].looked_at)
        accuracies = {"before": {"add": before, "reverse": 0.9}, "after": {"add": after, "reverse": 0.8}}
        self.done(self.resolved[job_id].digest, "train", **facts, accuracies=accuracies)

    def answered(self, seed: int, model: str, accuracy: float | None) -> None:
        scores = {
            "accuracy": accuracy, "score": accuracy, "answers": 8, "graded": 8 if accuracy is not None else 0,
            "unparsed": 1, "ungraded": 0, "mean_length": 3.5,
        }  # fmt: skip
        part = self.resolved[f"seed{seed}/evaluate/answers"].parts[model]
        self.done(part, "answers", scores={"add": scores})

    def results(self) -> dict[str, Any]:
        text = Results(self.pipeline, self.plan, self.resolved, self.store).text("running", 12.5)
        value: dict[str, Any] = json.loads(text)
        return value


def test_nothing_is_there_at_first(tmp_path: Path) -> None:
    results = Folder(tmp_path).results()
    assert results["pipeline"] == "tiny"
    assert (results["seeds"], results["wall_s"], results["phases"]) == ([0, 1], 12.5, {})
    assert results["systems"]["add"] == {"kind": "specialist", "domains": {}, "cost": None}
    assert list(results["systems"]) == ["base", "add", "reverse", "cold", "opd", "soup"]


def test_scores_have_a_line_per_seed_and_the_path_of_their_answers(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.answered(0, "base", 0.25)
    folder.answered(1, "base", None)
    first, second = folder.results()["systems"]["base"]["domains"]["add"]
    part = folder.resolved["seed0/evaluate/answers"].parts["base"]
    assert first == {
        "seed": 0, "stage": "evaluate", "split": "test", "accuracy": 0.25, "correct": 2, "graded": 8, "unparsed": 1,
        "ungraded": 0, "score": 0.25, "mean_length": 3.5, "answers": f"artefacts/answers-{part[:12]}/answers/add.jsonl",
    }  # fmt: skip
    assert (second["seed"], second["accuracy"], second["correct"]) == (1, None, None)


def test_judges_are_told_by_their_verdicts_and_probes_are_no_skill(tmp_path: Path) -> None:
    rubric = tmp_path / "r.yaml"
    rubric.write_text("name: r\nreasons: none\nform: score\ncriteria: [{name: right, scale: {min: 0, max: 1}}]\n")
    judging = {"rubric": str(rubric), "domain": "add"}
    probe = {"judging": {**judging, "probe": "verdict"}, "max_new_tokens": 2}
    folder = Folder(
        tmp_path,
        {"domains.judge": {"judging": judging, "max_new_tokens": 2}, "domains.tried": probe, "pipeline.seeds": [0]},
    )
    part = folder.resolved["seed0/evaluate/answers"].parts["base"]
    assert part is not None
    path = folder.store.folder("answers", part)
    (path / "answers").mkdir(parents=True)
    said = {"judge": [1.0, 0.0, 0.0], "tried": [1.0, 1.0, 0.0]}
    for domain, scores in said.items():
        rows = [
            {"prompt_index": index, "said": score, "gold": float(index == 0), "judged_chars": 3 + index}
            for index, score in enumerate(scores)
        ]
        (path / "answers" / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {"accuracy": 0.5, "score": 0.5, "graded": 2, "unparsed": 0, "ungraded": 0, "mean_length": 2.0}
    scores = dict.fromkeys(("add", "judge", "tried"), counts)
    folder.store.finish(path, part, kind="answers", name="answers", files=[], facts={"scores": scores})
    results = folder.results()
    assert list(results["systems"]["base"]["domains"]) == ["add", "judge"]
    (judge,), (tried,) = results["judges"]["base"]["judge"], results["judges"]["base"]["tried"]
    assert (judge["seed"], judge["stage"], judge["split"], judge["asked"]) == (0, "evaluate", "test", 3)
    assert (judge["agreement"]["exact"], judge["probe"]) == (1.0, None)
    assert (tmp_path / tried["answers"]).is_file()
    assert (tried["probe"], tried["probed"]) == ("verdict", {"count": 3, "shift": pytest.approx(1 / 3), "raised": 0.5})
    assert "judges" not in Folder(tmp_path, {}).results()


def test_cost_and_phases_are_of_what_the_sweep_chose(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.trained("seed0/add/sft", 0.3)
    folder.trained("seed0/add/grpo[optimizer.lr=0.001]", 0.4, before=0.3, steps=4)
    folder.trained("seed0/add/grpo[optimizer.lr=0.002]", 0.8, before=0.3, steps=4)
    assert folder.results()["phases"] == {}  # not chosen yet
    folder.done(
        folder.resolved["seed0/add/choose"].digest, "choose", option=1, values={"grpo.optimizer.lr": 2e-3}, seconds=0.5
    )
    folder.look()
    results = folder.results()
    assert results["systems"]["add"]["chosen"]["values"] == {"grpo.optimizer.lr": 2e-3}
    assert results["systems"]["add"]["cost"] == {"seconds": 60.0, "tokens_trained": 600.0, "steps": 6.0}
    assert results["phases"] == {
        "add": {
            "before": {"add": [{"seed": 0, "accuracy": 0.1}], "reverse": [{"seed": 0, "accuracy": 0.9}]},
            "sft": {"add": [{"seed": 0, "accuracy": 0.3}], "reverse": [{"seed": 0, "accuracy": 0.8}]},
            "grpo": {"add": [{"seed": 0, "accuracy": 0.8}], "reverse": [{"seed": 0, "accuracy": 0.8}]},
        }
    }
    assert results["job_seconds"] == 20.0 + 2 * 40.0 + 0.5  # with what was tried and not chosen
    assert "seconds" not in results["systems"]["add"]["chosen"]
    folder.trained("seed1/add/sft", 0.2)
    folder.trained("seed1/add/grpo", 0.6, steps=8)
    results = folder.results()
    assert results["phases"]["add"]["grpo"]["add"] == [{"seed": 0, "accuracy": 0.8}, {"seed": 1, "accuracy": 0.6}]
    assert results["systems"]["add"]["cost"]["steps"] == (6 + 10) / 2


def test_an_accuracy_on_a_domain_that_was_another_then_is_left_out(tmp_path: Path) -> None:
    """A run that only looks at a domain is kept when that changes, but what it saw there is of the old one."""
    extra = {
        "reasoning_gym": {"task": "spell_backward", "params": {"min_word_len": 3, "max_word_len": 6}},
        "prompt": "{{ metadata.word }}:",
        "verifier": {"name": "reasoning_gym"},
        "splits": {"validation": 0.2, "test": 0.2},
    }
    before = Folder(tmp_path, {"domains.extra": extra})
    assert before.resolved["seed0/add/sft"].looked_at.keys() == {"reverse", "extra"}
    facts = {"seconds": 1.0, "tokens_trained": 1, "steps": 1, "looked_at": before.resolved["seed0/add/sft"].looked_at}
    after = {"add": 0.3, "reverse": 0.8, "extra": 0.7}
    before.done(before.resolved["seed0/add/sft"].digest, "train", accuracies={"before": {}, "after": after}, **facts)
    assert set(before.results()["phases"]["add"]["sft"]) == {"add", "reverse", "extra"}
    harder = Folder(tmp_path, {"domains.extra": extra | {"prompt": "{{ metadata.word }}?"}})
    assert set(harder.results()["phases"]["add"]["sft"]) == {"add", "reverse"}
    assert set(Folder(tmp_path, {}).results()["phases"]["add"]["sft"]) == {"add", "reverse"}


def test_what_an_earlier_version_has_made_is_told_as_it_is(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    digest = folder.resolved["seed0/reverse/grpo"].digest
    accuracies = {"before": {}, "after": {"add": 0.5, "reverse": 0.25}}
    folder.done(digest, "train", seconds=1.0, tokens_trained=1, steps=1, accuracies=accuracies)
    folder.answered(0, "base", 0.25)  # without its seconds
    results = folder.results()
    assert set(results["phases"]["reverse"]["grpo"]) == {"add", "reverse"}
    assert results["job_seconds"] == 1.0
