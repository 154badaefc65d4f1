"""A job's digest: SHA-256 over everything that determines its result, and nothing else.

Names, devices, threads, addresses, time limits and memory limits are left out; files from outside go in by their
contents, other jobs by their digests. What a digest names is therefore found again as long as a result would be the
same, and made anew once it would not. Code is not part of it: neither ours, nor that of a verifier in Python.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_mesh.config.judging import FrozenJudgeConfig
from opd_mesh.config.pipeline import InitConfig
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError, InternalError, ModelNotFoundError
from opd_mesh.files import sha256
from opd_mesh.pipeline.jobs import Answers, Choose, Evaluate, Init, Job, Plan, Soup, Train
from opd_mesh.pipeline.partial import has

FORMAT = 1
_WITHOUT_EFFECT = (
    "run.name", "run.device", "run.threads", "student.path", "checkpoint", "diagnostics", "trainer", "pool",
    "teacher_channel", "redis_url", "redis_timeout_s", "teacher_timeout_s", "rollout.peers", "rollout.log",
    "rollout.timeout_s",
    "rollout.engine.device", "rollout.engine.threads", "rollout.engine.max_waiting", "rollout.engine.finished_kept",
    "rollout.engine.cache_bytes", "rollout.engine.vllm", "batch.marks_memory_bytes", "batch.marks_spill",
    "objective.implementation", "domains", "efforts", "teachers", "grm",
)  # fmt: skip
_FILES = {
    "jsonl": ("path", "heldout"),
    "dataset": ("path",),
    "trajectories": ("path",),
    "judging": ("rubric", "path"),
}
# Keys of a domain that came later: where they are unset, what was made without them is the same.
_LATER = ("judging", "reward")


def digest_of(value: Any) -> str:
    """SHA-256 (hex) over canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class FileDigests:
    """SHA-256 of files and folders, each read once. Folders: over the sorted (relative name, digest) of their files."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}
        self._states: dict[Path, list[Any]] = {}

    def check(self, paths: Iterable[Path]) -> None:
        """Read again what has been touched since it was read.

        Raises:
            ConfigError: its contents have changed, or it is gone.
        """
        for path in paths:
            if path in self._known and _state(path) != self._states[path]:
                if not path.exists() or FileDigests().of(path) != self._known[path]:
                    raise ConfigError(
                        f"{path} has changed while a job was reading it, so nobody knows what its result is made of: "
                        "leave it alone until the pipeline has ended, and run it again",
                        field=str(path),
                    )
                self._states[path] = _state(path)

    def of(self, path: Path) -> str:
        """Raises :class:`ConfigError` where there is nothing."""
        if path not in self._known:
            try:
                self._states[path] = _state(path)
                self._known[path] = self._folder(path) if path.is_dir() else sha256(path)
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}", field=str(path)) from error
        return self._known[path]

    def _folder(self, path: Path) -> str:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return digest_of([[str(file.relative_to(path)), sha256(file)] for file in files])


class _Noted(FileDigests):
    """The same, noting what is asked for."""

    def __init__(self, files: FileDigests) -> None:
        self._files = files
        self.paths: dict[Path, None] = {}

    def of(self, path: Path) -> str:
        self.paths[path] = None
        return self._files.of(path)


def _state(path: Path) -> list[Any]:
    """What changes whenever a file or folder is written to."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(str(file), file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A job with what is known of its inputs.

    Attributes:
        digest: None while a choice that it depends on is not made.
        parts: of answers: digest by model.
        inputs: role → digest, or a folder from outside.
        option: of a training run, which of its recipes.
        files: from outside, that went into the digests.
        looked_at: of a training run, domains that it is evaluated on without learning them: digest of the definition.
    """

    job: Job
    digest: str | None
    parts: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str | Path] = field(default_factory=dict)
    option: int = 0
    files: tuple[Path, ...] = ()
    looked_at: Mapping[str, str] = field(default_factory=dict)


def resolve(plan: Plan, choice_of: Callable[[str], int | None], files: FileDigests) -> dict[str, Resolved]:
    """All jobs with their digests, as far as choices are made.

    Args:
        choice_of: digest of a choice → which option it took, None as long as it is not made.

    Raises:
        ConfigError, ModelNotFoundError: a file that does not exist.
    """
    found: dict[str, Resolved] = {}

    def input_of(source: str | Path) -> str | Path | None:
        if isinstance(source, Path):
            if not source.is_dir():
                raise ModelNotFoundError(
                    f"{source} does not exist; give the folder of a checkpoint", field="model.path"
                )
            return source
        job_id, _, part = source.partition("#")
        resolved = found[job_id]
        if part:
            return resolved.parts.get(part)
        if isinstance(resolved.job.payload, Choose):
            option = None if resolved.digest is None else choice_of(resolved.digest)
            return None if option is None else input_of(resolved.job.payload.last[option])
        return resolved.digest

    for job in plan.jobs.values():
        inputs: dict[str, str | Path] = {}
        noted = _Noted(files)
        known, option = True, 0
        for role, source in job.inputs.items():
            if role == "choice":
                choice = found[str(source)].digest
                taken = None if choice is None else choice_of(choice)
                known, option = known and taken is not None, taken or 0
                continue
            value = input_of(source)
            if value is None:
                known = False
            else:
                inputs[role] = value
        if isinstance(job.payload, Answers):
            parts = {
                model: _part_digest(job.payload, model, inputs[f"model/{model}"], noted)
                for model in job.payload.domains
                if f"model/{model}" in inputs
            }
            found[job.id] = Resolved(job, digest_of(parts) if known else None, parts, inputs, files=tuple(noted.paths))
            continue
        digest, looked_at = None, {}
        if known:
            sources = {role: _source_digest(value, noted) for role, value in inputs.items()}
            digest = digest_of([FORMAT, job.kind, _determines(job, option, noted), sources])
            if isinstance(job.payload, Train):
                looked_at = _looked_at(job.payload.options[option], noted)
        found[job.id] = Resolved(job, digest, {}, inputs, option, tuple(noted.paths), looked_at)
    return found


def _source_digest(source: str | Path, files: FileDigests) -> str:
    return files.of(source) if isinstance(source, Path) else source


def _part_digest(answers: Answers, model: str, source: str | Path, files: FileDigests) -> str:
    recipe = answers.recipe
    domains = answers.domains[model]
    value = {
        "seed": recipe.run.seed,
        "deterministic": recipe.run.deterministic,
        "rollout": _without(recipe.model_dump(mode="json"), _WITHOUT_EFFECT)["rollout"],
        "dtype": recipe.student.dtype,
        "held_out": recipe.evaluation.prompts_per_domain,
        "domains": [_domain(recipe, name, files, keep_share=False) for name in domains],
        "split": answers.split,
        "prompts": answers.prompts_per_domain,
        "responses": answers.responses_per_prompt,
        "temperature": answers.temperature,
    }
    return digest_of([FORMAT, "answers", value, {"model": _source_digest(source, files)}])


def _determines(job: Job, option: int, files: FileDigests) -> Any:
    """What of the payload a result depends on, as plain values."""
    match job.payload:
        case Init(config, seed):
            return {"config": InitConfig.model_dump(config, mode="json"), "seed": seed}
        case Train() as train:
            return _recipe(train.options[option], files, set(train.trajectories))
        case Choose(options, _, domains):
            return {"options": [dict(values) for values in options], "domains": list(domains)}
        case Soup(weights):
            return {"weights": list(weights)}
        case Evaluate(models):
            return {"models": list(models)}
    raise InternalError(f"{job.id}: no digest for {job.kind}")


def _recipe(recipe: Recipe, files: FileDigests, written: set[str]) -> dict[str, Any]:
    """Domains that are only looked at do not determine the weights, so those of others may change."""
    value = _without(recipe.model_dump(mode="json"), _WITHOUT_EFFECT)
    value["domains"] = [
        _domain(recipe, name, files, keep_share=True, written=name in written) for name in recipe.trained_domains
    ]
    value["teachers"] = {
        name: _without(teacher.model_dump(mode="json"), ("path", "adapter", "addresses", "domains"))
        for name, teacher in recipe.teachers.items()
    }
    if recipe.judged_domains:
        value["grm"] = _grm(recipe, files)
    return value


def _grm(recipe: Recipe, files: FileDigests) -> dict[str, Any]:
    """Who judges and how; of servers that run already their addresses, for nothing else is known of them."""
    engine = tuple(key.replace("rollout.", "judge.", 1) for key in _WITHOUT_EFFECT if key.startswith("rollout.engine."))
    value = _without(recipe.grm.model_dump(mode="json"), ("peers.channel", *engine))
    if isinstance(recipe.grm.judge, FrozenJudgeConfig):
        value["judge"] = {**value["judge"], "model": files.of(recipe.grm.judge.model)}
    if recipe.grm.rubrics is not None:
        value["rubrics"] = files.of(recipe.grm.rubrics)
    return value


def _looked_at(recipe: Recipe, files: FileDigests) -> dict[str, str]:
    others = [name for name in recipe.domains if name not in recipe.trained_domains]
    return {name: digest_of(_domain(recipe, name, files, keep_share=False)) for name in others}


def _domain(recipe: Recipe, name: str, files: FileDigests, *, keep_share: bool, written: bool = False) -> list[Any]:
    """[name, configuration with contents in the place of files, its effort]."""
    config = recipe.domains[name]
    value = _without(config.model_dump(mode="json"), ("verifier.timeout_s",))
    value = _without(value, tuple(key for key in _LATER if value[key] is None))
    if not keep_share:
        value = _without(value, ("share", "teachers"))
    if not keep_share or name not in recipe.judged_domains:
        value.pop("reward", None)
    if written:
        value["trajectories"] = "written"  # by another job, which is among the inputs
    else:
        _put_contents(value, files)
        if config.others is not None:
            _put_contents(value["others"], files)
        if config.reward is not None and "reward" in value and isinstance(config.reward.rubric, Path):
            value["reward"] = {**value["reward"], "rubric": files.of(config.reward.rubric)}
        if config.answering_domain is not None:
            value["judged"] = _domain(recipe, config.answering_domain, files, keep_share=False)
    effort = None if config.effort is None else recipe.efforts[config.effort].model_dump(mode="json")
    return [name, value, effort]


def _put_contents(value: dict[str, Any], files: FileDigests) -> None:
    for source, keys in _FILES.items():
        for key in keys:
            if has(value, f"{source}.{key}") and value[source][key] is not None:
                value[source] = {**value[source], key: files.of(Path(value[source][key]))}


def _without(value: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    """A copy with some dotted keys left out."""
    result = dict(value)
    for path in paths:
        first, _, rest = path.partition(".")
        if not rest:
            result.pop(first, None)
        elif isinstance(result.get(first), Mapping):
            result[first] = _without(result[first], (rest,))
    return result
