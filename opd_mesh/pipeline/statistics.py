"""What a pipeline came to: ``results.json`` and the answers that it names → accuracies, recovered gain and paired
differences with intervals, and the content of an experiment's JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opd_mesh.errors import NotFoundError, OpdError, PreconditionError
from opd_mesh.report.bootstrap import RESAMPLES, TAIL, Answers, Comparison, Estimate, read_answers

RESULTS, RECIPE = "results.json", "pipeline.yaml"
STUDENTS = ("opd", "soup", "cold_start", "mixed")  # what is to unite the experts' skills


# --- who is who --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Roles:
    """What the systems are to each other.

    Attributes:
        base: what the experts began with.
        experts: domain → the specialist that teaches it.
        students: what is to have every skill; ``headline`` is the one that the others are compared with.
    """

    base: str | None = None
    experts: Mapping[str, str] = field(default_factory=dict)
    students: Sequence[str] = ()
    headline: str | None = None

    @classmethod
    def of(cls, systems: Mapping[str, Any], recipe: Mapping[str, Any]) -> Roles:
        """From ``systems`` of results.json and the pipeline's recipe (as plain values, may be empty)."""
        stages = {name: stage for name, stage in (recipe.get("stages") or {}).items() if isinstance(stage, dict)}
        kinds = {name: str(system.get("kind", "")) for name, system in systems.items()}
        domains = list(dict.fromkeys(domain for system in systems.values() for domain in system.get("domains") or {}))
        experts: dict[str, str] = {}
        for name in [name for name, stage in stages.items() if stage.get("kind") == "opd"]:
            for domain, teachers in (stages[name].get("teachers") or {}).items():
                weights = teachers if isinstance(teachers, dict) else {teachers: 1.0}
                experts.setdefault(domain, max(weights, key=lambda one: weights[one]))
        mixed = [name for name in kinds if len(stages.get(name, {}).get("domains") or ()) > 1]
        for name, kind in kinds.items():
            if kind == "specialist" and name not in mixed:
                for domain in stages.get(name, {}).get("domains") or [name]:
                    experts.setdefault(domain, name)
        experts = {domain: experts[domain] for domain in domains if experts.get(domain) in kinds}
        begun = [stages.get(name, {}).get("from") for name in experts.values()]
        bases = [name for name, kind in kinds.items() if kind == "base"]
        base = next((name for name in begun if name in kinds), bases[0] if bases else None)
        united = [
            name
            for name, kind in kinds.items()
            if name != base
            and name not in experts.values()
            and (kind in STUDENTS or kind == "base" or (kind == "specialist" and name in mixed))
        ]
        default = ((recipe.get("defaults") or {}).get("objective") or {}).get("name", "reverse_kl")
        opd = [name for name in united if kinds[name] == "opd"]
        objectives = {
            name: ((stages.get(name, {}).get("recipe") or {}).get("objective") or {}).get("name", default)
            for name in opd
        }
        full = [name for name in opd if objectives[name] == "reverse_kl"]
        return cls(base, experts, united, next(iter([*full, *opd, *united]), None))


# --- the whole ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Paired:
    """a − b, over all domains and by domain."""

    a: str
    b: str
    over_all: Estimate
    domains: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class SystemSummary:
    """One model of the pipeline.

    Attributes:
        domains: accuracies; ``seeds`` and ``mean_seeds`` hold the seeds' own values.
        counts: by domain, over seeds: answers, graded, unparsed, ungraded.
        recovered, mean_recovered: of students, the share of the experts' gain.
    """

    name: str
    kind: str
    domains: Mapping[str, Estimate]
    seeds: Mapping[str, Mapping[int, float]]
    mean: Estimate | None
    mean_seeds: Mapping[int, float]
    counts: Mapping[str, Mapping[str, int]]
    recovered: Mapping[str, Estimate | None] | None = None
    mean_recovered: Estimate | None = None


@dataclass(frozen=True, slots=True)
class ExperimentSummary:
    """What a pipeline came to.

    Attributes:
        phases: specialist → "before" and its phases → domain → seed → accuracy on validation prompts.
        chosen: stage → what its sweep chose, as results.json has it.
        judges: model → judging domain → a line per seed, see :mod:`opd_mesh.pipeline.judges`.
        cost: stage → seconds, tokens_trained, steps: of its own training, the mean over seeds, without its sweep.
        status: of the pipeline: running, finished, failed or stopped; empty where an earlier version did not tell.
        wall_s: of all calls of ``opd run``; ``job_seconds`` is the sum over jobs, sweeps included.
        experts_mean: accuracy over the domains, each by its own expert: what a student is to reach.
        notes: what could not be told, and why.
    """

    name: str
    seeds: Sequence[int]
    domains: Sequence[str]
    systems: Mapping[str, SystemSummary]
    roles: Roles
    paired: Sequence[Paired]
    phases: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
    chosen: Mapping[str, Any]
    cost: Mapping[str, Mapping[str, float]]
    judges: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    experts_mean: Estimate | None = None
    status: str = ""
    wall_s: float | None = None
    job_seconds: float | None = None
    notes: Sequence[str] = ()

    def best(self, domain: str | None = None) -> list[str]:
        """The student with the highest accuracy in a domain, or in the mean; several where they are equal."""
        found = {
            name: self.systems[name].mean if domain is None else self.systems[name].domains.get(domain)
            for name in self.roles.students
        }
        values = {name: estimate.mean for name, estimate in found.items() if estimate is not None}
        return [name for name, value in values.items() if value == max(values.values())]

    def to_json(self, command: str | None = None) -> dict[str, Any]:
        """The content of an experiment's JSON: accuracies, gains and differences are shares, 1.0 for all."""
        return ({} if command is None else {"command": command}) | {
            "pipeline": self.name,
            "seeds": list(self.seeds),
            "interval": f"{1 - 2 * TAIL:.0%} percentile bootstrap over seeds and prompts, {RESAMPLES} resamples",
            "base": self.roles.base,
            "experts": dict(self.roles.experts),
            "systems": {name: _system_json(system) for name, system in self.systems.items()},
            "experts_mean": _json(self.experts_mean),
            "recovered": {
                name: {
                    "domains": {domain: _json(value) for domain, value in system.recovered.items()},
                    "mean": _json(system.mean_recovered),
                }
                for name, system in self.systems.items()
                if system.recovered is not None
            },
            "paired": [
                {"a": pair.a, "b": pair.b, **_difference_json(pair.over_all)}
                | {"domains": {domain: _difference_json(value) for domain, value in pair.domains.items()}}
                for pair in self.paired
            ],
            "phases": self.phases,
            **({"judges": self.judges} if self.judges else {}),
            "chosen": dict(self.chosen),
            "cost": {"stages": dict(self.cost), "wall_s": self.wall_s, "job_seconds": self.job_seconds},
            "notes": list(self.notes),
        }


def _json(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else estimate.to_json()


def _difference_json(estimate: Estimate) -> dict[str, float | None]:
    return {"difference": estimate.mean, "low": estimate.low, "high": estimate.high}


def _seeds_json(values: Mapping[int, float]) -> dict[str, float]:
    return {str(seed): value for seed, value in values.items()}


def _system_json(system: SystemSummary) -> dict[str, Any]:
    return {
        "kind": system.kind,
        "domains": {
            domain: estimate.to_json() | {"seeds": _seeds_json(system.seeds[domain])} | dict(system.counts[domain])
            for domain, estimate in system.domains.items()
        },
        "mean": None if system.mean is None else system.mean.to_json() | {"seeds": _seeds_json(system.mean_seeds)},
    }


def summarize(run_dir: Path, *, resamples: int = RESAMPLES) -> ExperimentSummary:
    """From a pipeline's folder, as far as it is evaluated.

    Raises:
        NotFoundError: no results yet.
        PreconditionError: what is there cannot be read.
    """
    results = _results(run_dir / RESULTS)
    recipe = _recipe(run_dir / RECIPE)
    trained: dict[str, dict[str, Any]] = results["systems"]
    systems = {name: system for name, system in trained.items() if system.get("domains")}
    roles = Roles.of(systems, recipe)
    notes: list[str] = []
    comparison = Comparison(_answers(run_dir, systems, notes), resamples=resamples)
    domains = list(dict.fromkeys(domain for system in systems.values() for domain in system["domains"]))
    return ExperimentSummary(
        name=_name(results, recipe, run_dir),
        seeds=list(results.get("seeds") or comparison.seeds),
        domains=domains,
        systems={name: _system(name, system, domains, roles, comparison) for name, system in systems.items()},
        roles=roles,
        paired=_paired(comparison, roles, domains, notes),
        phases=_phases(results.get("phases")),
        chosen={name: system["chosen"] for name, system in trained.items() if system.get("chosen")},
        cost={name: dict(system["cost"]) for name, system in trained.items() if system.get("cost")},
        judges={
            name: {domain: _of_one_stage(entries) for domain, entries in found.items()}
            for name, found in (results.get("judges") or {}).items()
        },
        experts_mean=comparison.mean_of_experts(roles.experts),
        status=str(results.get("status", "")),
        wall_s=results.get("wall_s"),
        job_seconds=results.get("job_seconds"),
        notes=notes,
    )


def _results(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{path} is not there yet: it is written when models have been evaluated", field="run_dir"
        ) from error
    except ValueError as error:
        raise PreconditionError(
            f"{path} cannot be read ({error}): run the pipeline on, and it is written again"
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get("systems"), dict):
        raise PreconditionError(f"{path} has no `systems`: run the pipeline on, and it is written again")
    return value


def _recipe(path: Path) -> dict[str, Any]:
    """Empty where there is none: then roles are told by kinds and names alone."""
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise PreconditionError(f"{path} is not YAML: {error}", field="run_dir") from error
    return value if isinstance(value, dict) else {}


def _name(results: Mapping[str, Any], recipe: Mapping[str, Any], run_dir: Path) -> str:
    told = results.get("pipeline") or recipe.get("pipeline")
    return str((told.get("name") if isinstance(told, dict) else told) or run_dir.resolve().name)


def _answers(run_dir: Path, systems: Mapping[str, Any], notes: list[str]) -> dict[tuple[str, str, int], Answers]:
    found: dict[tuple[str, str, int], Answers] = {}
    for name, system in systems.items():
        for domain, entries in system["domains"].items():
            for entry in _of_one_stage(entries):
                try:
                    found[name, domain, int(entry["seed"])] = read_answers(run_dir / entry["answers"])
                except OpdError as error:
                    notes.append(f"{name}, {domain}, seed {entry['seed']} is left out: {error.message}")
                else:
                    if not found[name, domain, int(entry["seed"])].graded:
                        notes.append(f"{name}, {domain}, seed {entry['seed']}: there are no answers")
    return found


def _of_one_stage(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of several evaluations of a model the first on test prompts counts, or else the first."""
    first = next((entry for entry in entries if entry.get("split") == "test"), entries[0] if entries else {})
    return [entry for entry in entries if entry.get("stage") == first.get("stage")]


def _system(
    name: str, system: Mapping[str, Any], domains: Sequence[str], roles: Roles, comparison: Comparison
) -> SystemSummary:
    own = {domain: comparison.accuracy(name, domain) for domain in domains}
    known = {domain: estimate for domain, estimate in own.items() if estimate is not None}
    recovered = None
    if name in roles.students and roles.base is not None and roles.experts:
        recovered = {
            domain: comparison.recovered(name, roles.base, expert, domain) for domain, expert in roles.experts.items()
        }
    return SystemSummary(
        name=name,
        kind=str(system.get("kind", "")),
        domains=known,
        seeds={domain: comparison.by_seed(name, domain) for domain in known},
        mean=comparison.mean_accuracy(name, domains),
        mean_seeds=comparison.mean_by_seed(name, domains) if len(known) == len(domains) else {},
        counts={domain: comparison.counts(name, domain) for domain in known},
        recovered=recovered,
        mean_recovered=comparison.mean_recovered(name, roles.base or "", roles.experts) if recovered else None,
    )


def _paired(comparison: Comparison, roles: Roles, domains: Sequence[str], notes: list[str]) -> list[Paired]:
    """The headline student against every other; what cannot be compared is told in ``notes``."""
    pairs = []
    for other in roles.students:
        if roles.headline is None or other == roles.headline:
            continue
        try:
            by_domain = {domain: comparison.difference(roles.headline, other, [domain]) for domain in domains}
            over_all = comparison.difference(roles.headline, other, domains)
        except PreconditionError as error:
            notes.append(f"{roles.headline} and {other} are not compared: {error.message}")
            continue
        pairs.append(Paired(roles.headline, other, over_all, by_domain))
    return pairs


def _phases(value: Any) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    return {
        stage: {
            phase: {
                domain: {str(one["seed"]): one["accuracy"] for one in entries} for domain, entries in domains.items()
            }
            for phase, domains in phases.items()
        }
        for stage, phases in (value or {}).items()
    }
