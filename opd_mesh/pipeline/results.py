"""``results.json``: what the pipeline's models can do, what they cost, and what was chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from opd_mesh.config.pipeline import EvaluateStage, PipelineRecipe, SpecialistStage
from opd_mesh.pipeline.digests import Resolved
from opd_mesh.pipeline.jobs import Plan, Train
from opd_mesh.pipeline.judges import judge_figures
from opd_mesh.pipeline.store import Artefact, Store

Status = Literal["running", "finished", "failed", "stopped"]
_COSTS = ("seconds", "tokens_trained", "steps")


class Results:
    """Collects from the artefacts of a pipeline. Of one that is not done yet, what is there."""

    def __init__(self, pipeline: PipelineRecipe, plan: Plan, resolved: Mapping[str, Resolved], store: Store) -> None:
        self._pipeline = pipeline
        self._seeds = pipeline.pipeline.seeds
        self._plan = plan
        self._resolved = resolved
        self._store = store

    def as_dict(self, status: Status, wall_s: float) -> dict[str, Any]:
        """All of it as plain values. ``wall_s`` is of all calls in the folder."""
        return {
            "pipeline": self._pipeline.pipeline.name,
            "status": status,
            "seeds": self._seeds,
            "systems": self._systems(),
            "phases": self._phases(),
            **({"judges": judges} if (judges := self._judges()) else {}),
            "wall_s": wall_s,
            "job_seconds": self._job_seconds(),
        }

    def text(self, status: Status, wall_s: float) -> str:
        """As JSON."""
        return json.dumps(self.as_dict(status, wall_s), indent=1) + "\n"

    def _job_seconds(self) -> float:
        """Of all jobs of the recipe that are done, sweeps included, each once."""
        found = {digest for one in self._resolved.values() for digest in (one.digest, *one.parts.values())}
        artefacts = [artefact for digest in found if (artefact := self._artefact(digest)) is not None]
        # Answers and choices of an earlier version do not tell theirs.
        return float(sum(artefact.facts.get("seconds", 0.0) for artefact in artefacts))

    def _artefact(self, digest: Any) -> Artefact | None:
        return self._store.find(digest) if isinstance(digest, str) else None

    # --- systems -----------------------------------------------------------------------------------------------
    def _systems(self) -> dict[str, Any]:
        systems: dict[str, Any] = {}
        for name, stage in self._pipeline.stages.items():
            if not isinstance(stage, EvaluateStage):
                systems[name] = {"kind": stage.kind, "domains": {}, "cost": self._cost(name)}
                if (chosen := self._chosen(name)) is not None:
                    systems[name]["chosen"] = {key: fact for key, fact in chosen.facts.items() if key != "seconds"}
        for where, model, answers in self._evaluated():
            system = systems.setdefault(model, {"kind": "model", "domains": {}, "cost": None})
            for domain, scores in answers.facts["scores"].items():
                if self._pipeline.domains[domain].is_probe:  # no skill: see _judges
                    continue
                accuracy, graded = scores["accuracy"], scores["graded"]
                line = {
                    **where,
                    "accuracy": accuracy,
                    "correct": None if accuracy is None else round(accuracy * graded),
                    **{key: scores[key] for key in ("graded", "unparsed", "ungraded", "score", "mean_length")},
                    "answers": self._relative(_answers_file(answers, domain)),
                }
                system["domains"].setdefault(domain, []).append(line)
        return systems

    def _evaluated(self) -> Iterator[tuple[dict[str, Any], str, Artefact]]:
        """(seed, stage and split, model, its answers) of every evaluation that is done."""
        for name, stage in self._pipeline.stages.items():
            if not isinstance(stage, EvaluateStage):
                continue
            for seed in self._seeds:
                inputs = self._resolved[f"seed{seed}/{name}"].inputs
                for model in dict.fromkeys(stage.models):
                    if (answers := self._artefact(inputs.get(f"answers/{model}"))) is not None:
                        yield {"seed": seed, "stage": name, "split": stage.split}, model, answers

    def _relative(self, path: Path) -> str:
        """To the pipeline's folder."""
        return str(path.relative_to(self._store.root.parent))

    def _judges(self) -> dict[str, Any]:
        """Model → judging domain → a line per seed, see :func:`opd_mesh.pipeline.judges.judge_figures`."""
        found: dict[str, Any] = {}
        domains = self._pipeline.domains
        for where, model, answers in self._evaluated():
            judging = [domain for domain in answers.facts["scores"] if domains[domain].judging is not None]
            rows = {domain: _rows(_answers_file(answers, domain)) for domain in judging}
            for domain, figures in judge_figures(domains, rows).items():
                line = {**where, **figures, "answers": self._relative(_answers_file(answers, domain))}
                found.setdefault(model, {}).setdefault(domain, []).append(line)
        return found

    # --- training ----------------------------------------------------------------------------------------------
    def _runs(self, seed: int, name: str) -> list[tuple[str, Artefact, Resolved]]:
        """(phase, run, its job) of a stage's training; of a sweep those of the choice."""
        options = self._plan.phases.get((seed, name), ())
        if not options:
            return []
        option = 0
        if len(options) > 1:
            chosen = self._chosen(name)
            if chosen is None:
                return []
            option = int(chosen.facts["option"])
        found = []
        for job_id in options[option]:
            resolved = self._resolved[job_id]
            artefact = self._artefact(resolved.digest)
            if artefact is not None and isinstance(resolved.job.payload, Train):
                found.append((resolved.job.payload.phase or "training", artefact, resolved))
        return found

    def _chosen(self, name: str) -> Artefact | None:
        choice = self._plan.choices.get((self._seeds[0], name))
        return None if choice is None else self._artefact(self._resolved[choice].digest)

    def _cost(self, name: str) -> dict[str, float] | None:
        """Of the stage's own training, the mean over seeds, without its sweep."""
        by_seed = [runs for seed in self._seeds if (runs := self._runs(seed, name))]
        if not by_seed:
            return None
        return {key: sum(run.facts[key] for runs in by_seed for _, run, _ in runs) / len(by_seed) for key in _COSTS}

    def _phases(self) -> dict[str, Any]:
        """Specialist → phase ("before" training, then its runs) → domain → a line per seed, on validation prompts."""
        phases: dict[str, Any] = {}
        for name, stage in self._pipeline.stages.items():
            if not isinstance(stage, SpecialistStage):
                continue
            for seed in self._seeds:
                for place, (phase, run, resolved) in enumerate(self._runs(seed, name)):
                    accuracies = run.facts["accuracies"]
                    # Domains that a run only looks at may have changed since, which does not make it another run.
                    looked_at = run.facts.get("looked_at", {})
                    old = {domain for domain in looked_at if looked_at[domain] != resolved.looked_at.get(domain)}
                    parts = {"before": accuracies["before"]} if place == 0 else {}
                    for label, found in (parts | {phase: accuracies["after"]}).items():
                        for domain in [domain for domain in found if domain not in old]:
                            line = {"seed": seed, "accuracy": found[domain]}
                            phases.setdefault(name, {}).setdefault(label, {}).setdefault(domain, []).append(line)
        return phases


def _answers_file(answers: Artefact, domain: str) -> Path:
    return answers.path / "answers" / f"{domain}.jsonl"


def _rows(path: Path) -> list[dict[str, Any]]:
    """Of an answers file; none where an earlier version wrote none of a domain."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
