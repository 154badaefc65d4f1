"""What a plan consists of: jobs, where each takes its models from, and what it is to do with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opd_mesh.config.pipeline import InitConfig
from opd_mesh.config.recipe import Recipe

Kind = Literal["init", "train", "answers", "choose", "soup", "evaluate"]
# The student's path in a recipe that is not run yet.
PLACEHOLDER = Path("(made by another stage)")


@dataclass(frozen=True, slots=True)
class Init:
    """Random weights and a tokenizer."""

    config: InitConfig
    seed: int


@dataclass(frozen=True, slots=True)
class Train:
    """One run of the trainer.

    Attributes:
        options: recipes with placeholders for paths; several where a choice among them is still to be made.
        chosen_by: the job that makes it.
        trajectories: domain of the recipe → (model, domain) of the answers that it learns.
        domains: those of the pipeline that the run is about.
    """

    options: tuple[Recipe, ...]
    chosen_by: str | None = None
    trajectories: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    phase: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """Models answer prompts. Each model's answers are an artefact of their own.

    Attributes:
        recipe: its domains, efforts and rollout settings are used; the student's path is a placeholder.
        domains: by model, the domains that it answers.
    """

    recipe: Recipe
    domains: Mapping[str, tuple[str, ...]]
    split: Literal["train", "validation", "test"]
    prompts_per_domain: int
    responses_per_prompt: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Choose:
    """The best of a sweep.

    Attributes:
        options: values by dotted key, of each combination.
        last: the job that ends each combination.
        domains: whose mean accuracy counts.
    """

    options: tuple[Mapping[str, Any], ...]
    last: tuple[str, ...]
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Soup:
    """Weighted mean; the weights sum to 1."""

    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Scores of all models in one place; the answers are another job's."""

    models: tuple[str, ...]


Payload = Init | Train | Answers | Choose | Soup | Evaluate


@dataclass(frozen=True, slots=True)
class Job:
    """A unit of work with a result of its own.

    Attributes:
        id: unique in the plan, for people, for instance ``seed0/add/grpo``.
        name: of its artefact.
        inputs: role → id of another job, ``id#model`` for one model's answers, or a folder from outside. Where the job
            named is a choice, what it has chosen is meant.
    """

    id: str
    kind: Kind
    stage: str
    seed: int
    name: str
    inputs: Mapping[str, str | Path]
    payload: Payload

    @property
    def needs(self) -> list[str]:
        """Jobs that must have ended before."""
        return [source.partition("#")[0] for source in self.inputs.values() if isinstance(source, str)]


@dataclass(frozen=True)
class Plan:
    """All jobs, each behind those that it needs.

    Attributes:
        models: (seed, stage) → what holds the stage's model: a job's id, or a folder from outside.
        phases: (seed, stage) → jobs of the stage's training by phase; of a stage that sweeps, those of the choice are
            found by :attr:`choices`.
        choices: (seed, stage) → the job that chose.
    """

    jobs: Mapping[str, Job]
    models: Mapping[tuple[int, str], str | Path]
    phases: Mapping[tuple[int, str], tuple[tuple[str, ...], ...]]
    choices: Mapping[tuple[int, str], str]
