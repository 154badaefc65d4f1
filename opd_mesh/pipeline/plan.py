"""From a pipeline's recipe to jobs. Pure: no file is read and nothing is run, so that a mistake in the last stage is
found before the first one begins."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mesh.config.pipeline import (
    MODEL,
    BaseStage,
    ColdStartStage,
    EvaluateStage,
    OpdStage,
    PipelineRecipe,
    SoupStage,
    SpecialistStage,
    TrainingStage,
)
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.training import SftConfig
from opd_mesh.errors import ConfigError
from opd_mesh.pipeline.jobs import PLACEHOLDER, Answers, Choose, Evaluate, Init, Job, Kind, Plan, Soup, Train
from opd_mesh.pipeline.order import GRPO, OPD, SFT, in_order, references
from opd_mesh.pipeline.partial import check_part, combinations, has, merged, whole_recipe, with_value

Source = str | Path
# Of `rollout`: what bounds an answer.
_ANSWERED_UNDER = ("max_new_tokens", "stop_token_ids", "engine.max_context_tokens")


@dataclass(frozen=True)
class Phase:
    """One training run of a stage, before sweeps.

    Attributes:
        label: "sft" or "grpo" of a specialist, else empty.
        part: as the recipe has it; ``field`` is where.
        objective: what it must have, for errors, and which names that are; the first is the default.
        domains: of the run's recipe, those that are trained on.
    """

    label: str
    part: Mapping[str, Any]
    field: str
    objectives: tuple[str, ...]
    domains: Mapping[str, Mapping[str, Any]]
    teachers: tuple[str, ...] = ()
    trajectories: Mapping[str, tuple[str, str]] | None = None


def plan(pipeline: PipelineRecipe) -> Plan:
    """All jobs of a pipeline, for every seed.

    Raises:
        ConfigError: naming the field; whatever can be known to be wrong before anything runs.
    """
    planner = _Planner(pipeline)
    for seed in pipeline.pipeline.seeds:
        planner.add_seed(seed)
    return Plan(planner.jobs, planner.models, planner.phases, planner.choices)


class _Planner:
    def __init__(self, pipeline: PipelineRecipe) -> None:
        self._pipeline = pipeline
        self._first_seed = pipeline.pipeline.seeds[0]
        check_part(pipeline.defaults, "defaults")
        self._order = in_order(pipeline)
        self.jobs: dict[str, Job] = {}
        self.models: dict[tuple[int, str], Source] = {}
        self.phases: dict[tuple[int, str], tuple[tuple[str, ...], ...]] = {}
        self.choices: dict[tuple[int, str], str] = {}

    def _add(self, job_id: str, kind: Kind, stage: str, seed: int, name: str, inputs: Any, payload: Any) -> str:
        job = Job(job_id, kind, stage, seed, name, dict(inputs), payload)
        if self.jobs.setdefault(job_id, job) != job:
            field = f"stages.{stage}"
            raise ConfigError(f"{field}: two different jobs would be called {job_id}", field=field)
        return job_id

    def add_seed(self, seed: int) -> None:
        """Jobs of all stages; each finds the models that it begins with in :attr:`models`."""
        model = self._pipeline.model
        if model.init is not None:
            payload = Init(model.init, seed)
            self.models[seed, MODEL] = self._add(f"seed{seed}/{MODEL}", "init", MODEL, seed, MODEL, {}, payload)
        else:
            assert model.path is not None  # the model has one of the two
            self.models[seed, MODEL] = model.path
        for name in self._order:
            stage = self._pipeline.stages[name]
            match stage:
                case BaseStage():
                    self._train(name, stage, seed, MODEL, [self._base(name, stage)])
                case SpecialistStage():
                    self._train(name, stage, seed, stage.from_, self._specialist(name, stage))
                case ColdStartStage():
                    self._cold_start(name, stage, seed)
                case OpdStage():
                    self._train(name, stage, seed, stage.from_, [self._opd(name, stage)])
                case SoupStage():
                    self._soup(name, stage, seed)
                case EvaluateStage():
                    self._evaluate(name, stage, seed)

    # --- training stages ---------------------------------------------------------------------------------------
    def _base(self, name: str, stage: BaseStage) -> Phase:
        return Phase("", stage.recipe, f"stages.{name}.recipe", SFT, self._domains_of(stage.domains))

    def _specialist(self, name: str, stage: SpecialistStage) -> list[Phase]:
        domains = self._domains_of(stage.domains)
        phases = []
        if stage.sft is not None:
            phases.append(Phase("sft", stage.sft, f"stages.{name}.sft", SFT, domains))
        if stage.grpo is not None:
            for domain in stage.domains:
                if not self._pipeline.domains[domain].is_rewarded:
                    field = f"domains.{domain}.verifier"
                    raise ConfigError(
                        f"{field}: stage {name} trains by rewards; name a verifier, or a reward by a GRM", field=field
                    )
            phases.append(Phase("grpo", stage.grpo, f"stages.{name}.grpo", GRPO, domains))
        if not phases:
            raise ConfigError(f"stages.{name}: give it `sft`, `grpo` or both", field=f"stages.{name}")
        return phases

    def _opd(self, name: str, stage: OpdStage) -> Phase:
        domains: dict[str, dict[str, Any]] = {}
        for domain, teachers in stage.teachers.items():
            domains[domain] = self._dumped(domain, stage.shares.get(domain)) | {"teachers": dict(teachers)}
        used = dict.fromkeys(teacher for teachers in stage.teachers.values() for teacher in teachers)
        return Phase("", stage.recipe, f"stages.{name}.recipe", OPD, domains, teachers=tuple(used))

    def _cold_start(self, name: str, stage: ColdStartStage, seed: int) -> None:
        """The teachers write, then the student learns what they have written."""
        by_teacher: dict[str, list[str]] = {}
        domains: dict[str, dict[str, Any]] = {}
        trajectories: dict[str, tuple[str, str]] = {}
        for domain, teacher in stage.teachers.items():
            by_teacher.setdefault(teacher, []).append(domain)
            written = f"{domain}-by-{teacher}"
            trajectories[written] = teacher, domain
            share = self._pipeline.domains[domain].share
            domains[written] = {"trajectories": {"path": str(PLACEHOLDER)}, "share": share or 1.0}
        answers = self._answers(
            f"seed{seed}/{name}/answers",
            name,
            seed,
            {teacher: tuple(theirs) for teacher, theirs in by_teacher.items()},
            split="train",
            settings=stage.responses,
        )
        field = f"stages.{name}.recipe"
        phase = Phase("", stage.recipe, field, SFT, domains, trajectories=trajectories)
        inputs = {f"answers/{written}": f"{answers}#{teacher}" for written, (teacher, _) in trajectories.items()}
        self._train(name, stage, seed, stage.from_, [phase], inputs=inputs, own=tuple(stage.teachers))

    def _train(
        self,
        name: str,
        stage: TrainingStage,
        seed: int,
        start: str,
        phases: list[Phase],
        *,
        inputs: Mapping[str, Source] | None = None,
        own: tuple[str, ...] | None = None,
    ) -> None:
        """Jobs of a training stage: its phases one after the other, for every combination of its sweep where it is to
        be chosen, and for the chosen one under the other seeds."""
        for phase in phases:
            check_part(phase.part, phase.field)
        options = combinations(self._split_sweep(name, stage, phases))
        candidates = [[self._recipe(name, seed, phase, option) for option in options] for phase in phases]
        own = own or tuple(phases[0].domains)
        chosen_by: str | None = None
        runs = [(option, [(recipes[place],) for recipes in candidates]) for place, option in enumerate(options)]
        if stage.sweep:
            self._check_choice(name, own, candidates[-1])
            if seed != self._first_seed:
                chosen_by = self.choices[self._first_seed, name]
                runs = [({}, [tuple(recipes) for recipes in candidates])]  # type: ignore[misc]
        made: list[tuple[str, ...]] = []
        for option, of_phases in runs:
            source = self.models[seed, start]
            ids: list[str] = []
            for place, (phase, recipes) in enumerate(zip(phases, of_phases, strict=True)):
                roles: dict[str, Source] = {"student": source, **(inputs or {})}
                roles |= {f"teacher/{teacher}": self.models[seed, teacher] for teacher in recipes[0].teachers}
                if chosen_by is not None:
                    roles["choice"] = chosen_by
                job_id = "/".join(filter(None, (f"seed{seed}", name, phase.label)))
                job_id += self._values_until(option, phases[: place + 1])
                payload = Train(recipes, chosen_by, phase.trajectories or {}, own, phase.label)
                source = self._add(job_id, "train", name, seed, recipes[0].run.name, roles, payload)
                ids.append(source)
            made.append(tuple(ids))
        self.phases[seed, name] = tuple(made)
        self.models[seed, name] = made[0][-1]
        if chosen_by is not None:
            self.choices[seed, name] = chosen_by
        elif stage.sweep:
            self.choices[seed, name] = self.models[seed, name] = self._choose(name, seed, stage, made, own)

    def _choose(
        self,
        name: str,
        seed: int,
        stage: TrainingStage,
        made: list[tuple[str, ...]],
        own: tuple[str, ...],
    ) -> str:
        last = tuple(ids[-1] for ids in made)
        payload = Choose(tuple(combinations(stage.sweep)), last, own)
        inputs = {f"option/{place}": job_id for place, job_id in enumerate(last)}
        return self._add(f"seed{seed}/{name}/choose", "choose", name, seed, f"{name}-choice", inputs, payload)

    # --- sweeps ------------------------------------------------------------------------------------------------
    def _split_sweep(self, name: str, stage: TrainingStage, phases: list[Phase]) -> dict[str, list[Any]]:
        """The sweep with every key behind the label of its phase."""
        sweep: dict[str, list[Any]] = {}
        labels = [phase.label for phase in phases]
        for key, values in stage.sweep.items():
            field = f"stages.{name}.sweep.{key}"
            first, _, rest = key.partition(".")
            if labels == [""]:
                label, path = "", key
            elif first in labels:
                label, path = first, rest
            elif len(labels) == 1:
                label, path = labels[0], key
            else:
                ways = " or ".join(f"{label}.{key}" for label in labels)
                raise ConfigError(f"{field}: the stage trains twice; write {ways}", field=field)
            check_part(with_value({}, path, 0), field.removesuffix(f".{path}"))
            sweep[f"{label}:{path}"] = values
        return sweep

    @staticmethod
    def _values_until(option: Mapping[str, Any], phases: list[Phase]) -> str:
        """What tells the jobs of a sweep apart: the values that went into them so far."""
        labels = {phase.label for phase in phases}
        values = [(key.partition(":"), value) for key, value in option.items()]
        parts = [f"{path}={json.dumps(value, default=str)}" for (label, _, path), value in values if label in labels]
        return f"[{','.join(parts)}]" if parts else ""

    def _check_choice(self, name: str, own: tuple[str, ...], recipes: list[Recipe]) -> None:
        field = f"stages.{name}.sweep"
        for domain in own:
            if self._pipeline.domains[domain].verifier is None:
                raise ConfigError(
                    f"{field}: what is best is told by answers to {domain}; give it a verifier", field=field
                )
        if any(recipe.evaluation.accuracy is None for recipe in recipes):
            raise ConfigError(
                f"{field}: the best is chosen by validation accuracy; set evaluation.accuracy in the stage or in "
                "defaults",
                field=field,
            )

    # --- recipes -----------------------------------------------------------------------------------------------
    def _dumped(self, domain: str, share: float | None = None, answer: str | None = None) -> dict[str, Any]:
        config = self._pipeline.domains[domain]
        return config.model_dump(mode="json") | {
            "share": config.share if share is None else share,
            "answer": config.answer if answer is None else answer,
            "teachers": {},
        }

    def _domains_of(self, domains: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {name: self._dumped(name, domain.share, domain.answer) for name, domain in domains.items()}

    def _with_judged(self, domains: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """And those whose answers they judge, where these are not among them: never trained on."""
        judged = [self._pipeline.domains[name].answering_domain for name in domains if name in self._pipeline.domains]
        missing = [name for name in judged if name is not None and name not in domains]
        return {**domains, **{name: self._dumped(name, 0.0) for name in missing}}

    def _efforts(self) -> dict[str, Any]:
        return {name: effort.model_dump(mode="json") for name, effort in self._pipeline.efforts.items()}

    def _recipe(self, name: str, seed: int, phase: Phase, option: Mapping[str, Any]) -> Recipe:
        """What the trainer will be given, with placeholders where other stages' results go."""
        defaults, own = self._pipeline.defaults, dict(phase.part)
        for key, setting in option.items():
            label, _, path = key.partition(":")
            if label == phase.label:
                own = with_value(own, path, setting)
        value = merged({"objective": {"name": phase.objectives[0]}}, defaults, own)
        run_name = "-".join(filter(None, (name, phase.label)))
        value = merged(value, {"run": {"name": run_name, "seed": seed}, "student": {"path": str(PLACEHOLDER)}})
        value["domains"] = dict(phase.domains)
        if has(value, "evaluation.accuracy") and value["evaluation"]["accuracy"] is not None:
            for domain, config in self._pipeline.domains.items():
                # What is tried on judges is for evaluations: of a run's curves there would be one for each trick.
                if domain not in value["domains"] and config.verifier is not None and not config.is_probe:
                    value["domains"][domain] = self._dumped(domain, 0.0)
        value["domains"] = self._with_judged(value["domains"])
        teachers = dict.fromkeys([*phase.teachers, *references(value)])
        value["teachers"] = {teacher: {"path": str(PLACEHOLDER)} for teacher in teachers}
        value["efforts"] = self._efforts()
        objective = value["objective"].get("name", phase.objectives[0])
        if objective not in phase.objectives:
            field = f"{phase.field}.objective.name"
            raise ConfigError(f"{field}: it must be {' or '.join(phase.objectives)} here, not {objective}", field=field)
        return self._whole(value, own, phase.field)

    def _whole(self, value: dict[str, Any], own: Mapping[str, Any], field: str) -> Recipe:
        if has(value, "rollout.log") and isinstance(value["rollout"]["log"], Mapping):
            value = merged(value, {"rollout": {"log": {"path": str(PLACEHOLDER)}}})
        recipe = whole_recipe(value, own=own, defaults=self._pipeline.defaults, field=field)
        if recipe.rollout.peers.addresses:
            place = (field if has(own, "rollout.peers") else "defaults") + ".rollout"
            if self._pipeline.pipeline.jobs > 1:
                raise ConfigError(
                    f"{place}.peers.addresses: jobs side by side would take the servers' policy from each other; set "
                    "pipeline.jobs: 1, or leave the addresses out",
                    field=f"{place}.peers.addresses",
                )
            if recipe.rollout.log is not None:
                raise ConfigError(
                    f"{place}.log: it is of servers that a job starts, but peers.addresses names some that run "
                    "already; leave it out",
                    field=f"{place}.log",
                )
        return recipe

    # --- answers -----------------------------------------------------------------------------------------------
    def _check_same_length(self, seed: int, models: Iterable[str], answers: Recipe) -> None:
        """Models answer under `defaults.rollout`: one that was trained under other limits would not show its skill."""
        for model in models:
            for job_id in (job_id for ids in self.phases.get((seed, model), ()) for job_id in ids):
                payload = self.jobs[job_id].payload
                assert isinstance(payload, Train)  # phases are training runs
                part = payload.phase or "recipe"
                for key in _ANSWERED_UNDER:
                    wanted = _value_at(answers.rollout, key)
                    if any(_value_at(recipe.rollout, key) != wanted for recipe in payload.options):
                        field = f"stages.{model}.{part}.rollout.{key}"
                        raise ConfigError(
                            f"{field}: the model also answers in other stages, and there defaults.rollout holds "
                            f"({key}: {wanted}); set it in defaults, for all",
                            field=field,
                        )

    def _answers(
        self, job_id: str, name: str, seed: int, domains: Mapping[str, tuple[str, ...]], *, split: Any, settings: Any
    ) -> str:
        """A job in which models answer prompts of their domains."""
        used = [domain for domain in self._pipeline.domains if any(domain in theirs for theirs in domains.values())]
        kept = {key: part for key, part in self._pipeline.defaults.items() if key in ("rollout", "student", "run")}
        # Where domains have no splits, what is held out depends on this.
        held_out = dict(self._pipeline.defaults.get("evaluation") or {})
        value = merged(
            kept,
            {
                "objective": SftConfig().model_dump(),
                "run": {"name": f"{name}-answers", "seed": seed, "steps": 1},
                "student": {"path": str(PLACEHOLDER)},
                "evaluation": {**held_out, "accuracy": {}},  # a rollout server is needed
            },
        )
        value["domains"] = self._with_judged({domain: self._dumped(domain, 1.0) for domain in used})
        value["efforts"] = self._efforts()
        recipe = self._whole(value, {}, f"stages.{name}")
        self._check_same_length(seed, domains, recipe)
        payload = Answers(
            recipe,
            dict(domains),
            split,
            settings.prompts_per_domain,
            getattr(settings, "responses_per_prompt", 1),
            settings.temperature,
        )
        inputs = {f"model/{model}": self.models[seed, model] for model in domains}
        return self._add(job_id, "answers", name, seed, f"{name}-answers", inputs, payload)

    def _evaluate(self, name: str, stage: EvaluateStage, seed: int) -> None:
        known = self._pipeline.domains
        domains = stage.domains or [domain for domain, config in known.items() if config.verifier is not None]
        if not domains:
            field = f"stages.{name}"
            raise ConfigError(f"{field}: no domain has a verifier, so no answer can be graded", field=field)
        for domain in domains:
            field = f"stages.{name}.domains"
            if domain not in known:
                raise ConfigError(f"{field}: {domain!r} is none of {', '.join(known)}", field=field)
            if known[domain].verifier is None:
                field = f"domains.{domain}.verifier"
                raise ConfigError(f"{field}: stage {name} grades answers; name a verifier", field=field)
            if stage.split == "test" and not known[domain].has_test_prompts:
                field = f"domains.{domain}.splits"
                raise ConfigError(
                    f"{field}: stage {name} asks for test prompts; write for example splits: {{validation: 0.1, test: "
                    "0.1}, or evaluate on the split validation",
                    field=field,
                )
        models = tuple(dict.fromkeys(stage.models))
        theirs = {model: tuple(domains) for model in models}
        answers = self._answers(f"seed{seed}/{name}/answers", name, seed, theirs, split=stage.split, settings=stage)
        inputs = {f"answers/{model}": f"{answers}#{model}" for model in models}
        self._add(f"seed{seed}/{name}", "evaluate", name, seed, name, inputs, Evaluate(models))

    # --- others ------------------------------------------------------------------------------------------------
    def _soup(self, name: str, stage: SoupStage, seed: int) -> None:
        field = f"stages.{name}.weights"
        given = stage.weights or [1.0] * len(stage.of)
        if len(given) != len(stage.of):
            raise ConfigError(f"{field}: {len(stage.of)} models need as many weights, not {len(given)}", field=field)
        total = sum(given)
        if not total:
            raise ConfigError(f"{field}: all are 0", field=field)
        inputs = {f"model/{place}": self.models[seed, model] for place, model in enumerate(stage.of)}
        payload = Soup(tuple(weight / total for weight in given))
        self.models[seed, name] = self._add(f"seed{seed}/{name}", "soup", name, seed, name, inputs, payload)


def _value_at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = getattr(config, key)
    return config
