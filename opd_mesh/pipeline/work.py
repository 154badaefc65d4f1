"""Doing a job: a run of the trainer, models that answer, models that are made; each ends as an artefact."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_mesh.config.answers import AnswersConfig
from opd_mesh.config.base import dump_config
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import InternalError, OpdError, PreconditionError, UnavailableError
from opd_mesh.files import write_durably
from opd_mesh.pipeline.digests import FileDigests, Resolved
from opd_mesh.pipeline.jobs import Answers, Choose, Evaluate, Init, Soup, Train
from opd_mesh.pipeline.scheduler import JobStoppedError
from opd_mesh.pipeline.store import SHORT, Artefact, Store
from opd_mesh.pipeline.view import JobView
from opd_mesh.process import error_in
from opd_mesh.supervisor import LocalMesh, run_mesh, run_training

MODEL, STUDENT, ANSWERS, SCORES, CHOICE = "model", "student", "answers", "scores.json", "choice.json"
ROLLOUT_LOG = "rollout-log"
# Of a run that has ended; what is told of it stays: metrics, evaluations, report, logs.
_USED_UP = ("checkpoints", "valkey", ROLLOUT_LOG, "heads", "heldout", "spill", "services")


class Worker:
    """Does jobs whose inputs are there.

    Args:
        files: by which the jobs' digests were made.
        threads: of each process of a run that says nothing of it; 0: as torch chooses.
        stop: once set, what runs is to end.
        keep_open: file descriptors for every process.
    """

    def __init__(
        self,
        store: Store,
        files: FileDigests,
        *,
        threads: int,
        stop: asyncio.Event,
        keep_open: tuple[int, ...] = (),
    ) -> None:
        self._store = store
        self._files = files
        self._threads = threads
        self._stop = stop
        self._keep_open = keep_open

    async def do(self, resolved: Resolved, view: JobView) -> None:
        """Make the job's artefact.

        Raises:
            OpdError: it cannot be made.
            JobStoppedError: it was to end before it was done.
        """
        match resolved.job.payload:
            case Init(config, seed):
                job = {"make": "random", "init": config.model_dump(mode="json"), "seed": seed}
                await self._make(resolved, job, view)
            case Soup(weights):
                models = [str(self._model(resolved, f"model/{place}")) for place in range(len(weights))]
                await self._make(resolved, {"make": "soup", "models": models, "weights": list(weights)}, view)
            case Train() as train:
                await self._train(resolved, train, view)
            case Answers() as answers:
                await self._answer(resolved, answers, view)
            case Choose() as choose:
                self._choose(resolved, choose)
            case Evaluate(models):
                self._evaluate(resolved, models)

    def clear_up(self, resolved: Resolved) -> None:
        """Remove what a job whose result is there needs no more, where that could not be done at its end."""
        if isinstance(resolved.job.payload, Train):
            artefact = self._artefact(str(resolved.digest))
            for name in _USED_UP:
                shutil.rmtree(artefact.path / name, ignore_errors=True)
        elif isinstance(resolved.job.payload, Answers):
            shutil.rmtree(self._answering(resolved), ignore_errors=True)

    # --- inputs and results ------------------------------------------------------------------------------------
    def _artefact(self, digest: str) -> Artefact:
        artefact = self._store.find(digest)
        if artefact is None:
            raise InternalError(f"the artefact {digest[:SHORT]} is not there, though its job has ended")
        return artefact

    def _model(self, resolved: Resolved, role: str) -> Path:
        source = resolved.inputs[role]
        if isinstance(source, Path):
            return source
        model = self._artefact(source).model
        if model is None:
            raise InternalError(f"{resolved.job.id}: {role} holds no model")
        return model

    def _finish(self, resolved: Resolved, folder: Path, **result: Any) -> None:
        assert resolved.digest is not None  # its inputs are there
        job = resolved.job
        made_of = {role: str(source) for role, source in resolved.inputs.items()}
        self._files.check(resolved.files)
        self._store.finish(folder, resolved.digest, kind=job.kind, name=job.name, made_of=made_of, **result)

    def _folder(self, resolved: Resolved) -> Path:
        assert resolved.digest is not None  # its inputs are there
        return self._store.folder(resolved.job.name, resolved.digest)

    # --- models made on the spot -------------------------------------------------------------------------------
    async def _make(self, resolved: Resolved, job: Mapping[str, Any], view: JobView) -> None:
        folder = self._folder(resolved)
        view.activity("making the model")
        started = time.monotonic()
        await self._making(folder, job, folder / MODEL)
        facts = {"seconds": time.monotonic() - started}
        await asyncio.to_thread(self._finish, resolved, folder, files=[MODEL], model=MODEL, facts=facts)

    async def _making(self, folder: Path, job: Mapping[str, Any], out: Path) -> None:
        """Run :mod:`.making` in a process of its own."""
        config, log_path = folder / "making.json", folder / "logs" / "making.log"
        log_path.parent.mkdir(exist_ok=True)
        config.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "opd_mesh.pipeline.making", "--config", str(config), "--out", str(out)]
        with log_path.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *command,
                "--die-with-parent",
                str(os.getpid()),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=self._keep_open,
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            )
        ended, stopped = asyncio.create_task(process.wait()), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                raise JobStoppedError
        finally:
            stopped.cancel()
            if not ended.done():
                process.kill()  # what it leaves is thrown away
                await ended
        if process.returncode:
            said = error_in(log_path.read_text(encoding="utf-8", errors="replace").splitlines())
            raise PreconditionError(said or f"it ended with code {process.returncode}: see {log_path}")

    # --- training ----------------------------------------------------------------------------------------------
    def _concrete(self, recipe: Recipe, resolved: Resolved, train: Train) -> Recipe:
        """The recipe with the folders of the inputs in the place of placeholders."""
        teachers = {
            name: teacher.replace(path=self._model(resolved, f"teacher/{name}"))
            for name, teacher in recipe.teachers.items()
        }
        domains = dict(recipe.domains)
        for name, (_, domain) in train.trajectories.items():
            answers = self._artefact(str(resolved.inputs[f"answers/{name}"]))
            path = answers.path / ANSWERS / f"{domain}.jsonl"
            domains[name] = domains[name].replace(trajectories={"path": path})
        student = recipe.student.replace(path=self._model(resolved, "student"))
        return recipe.replace(student=student, teachers=teachers, domains=domains)

    def _of_this_job(self, recipe: Recipe, folder: Path) -> Recipe:
        """With its part of the cores, and a token log of its own."""
        run, log = recipe.run, recipe.rollout.log
        if not (run.threads or run.deterministic):  # a deterministic run has one unless it says otherwise
            recipe = recipe.replace(run=run.replace(threads=self._threads))
        if log is None:
            return recipe
        return recipe.replace(rollout=recipe.rollout.replace(log=log.replace(path=folder / ROLLOUT_LOG)))

    async def _train(self, resolved: Resolved, train: Train, view: JobView) -> None:
        folder = self._folder(resolved)
        recipe = self._of_this_job(self._concrete(train.options[resolved.option], resolved, train), folder)
        view.total = recipe.run.steps
        if not _has_ended(folder):
            dump_config(recipe, folder / "recipe.yaml")
            mesh = LocalMesh(recipe, folder, keep_open=self._keep_open)
            resume = (folder / "run.json").exists()
            code = await run_training(mesh, resume=resume, view=view, stop=self._stop)
            if not _has_ended(folder):
                if self._stop.is_set() and code in (0, 130):
                    raise JobStoppedError
                cause = mesh.trainer.said_error() if mesh.trainer is not None else f"it ended with code {code}"
                raise UnavailableError(view.error or cause)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        model = STUDENT
        if recipe.student.lora is not None:  # what comes after it takes plain models
            view.activity("merging the adapter")
            job = {"make": "merged", "base": str(recipe.student.path), "adapter": str(folder / STUDENT)}
            await self._making(folder, job | {"dtype": recipe.student.dtype}, folder / MODEL)
            model = MODEL
        facts = {
            "seconds": summary["wall_s"],
            "tokens_trained": summary["tokens_trained"],
            "steps": summary["steps"],
            "accuracies": _accuracies(folder),
            "looked_at": dict(resolved.looked_at),
        }
        files = [name for name in (STUDENT, "metrics.jsonl", "evaluations.jsonl") if (folder / name).exists()]
        files = list(dict.fromkeys([model, *files]))
        await asyncio.to_thread(self._finish, resolved, folder, files=files, model=model, facts=facts)
        await asyncio.to_thread(self.clear_up, resolved)

    # --- answers -----------------------------------------------------------------------------------------------
    def _answering(self, resolved: Resolved) -> Path:
        assert resolved.digest is not None  # its inputs are there
        return self._store.root.parent / "answering" / f"{resolved.job.name}-{resolved.digest[:SHORT]}"

    async def _answer(self, resolved: Resolved, answers: Answers, view: JobView) -> None:
        """All models that have not answered yet, in one process. What one has answered is kept at its end."""
        started = time.monotonic()
        missing = {
            f"{model}-{digest[:SHORT]}": model
            for model, digest in resolved.parts.items()
            if self._store.find(digest) is None
        }
        view.total = len(missing)
        folder = self._answering(resolved)
        out = folder / "out"
        out.mkdir(parents=True, exist_ok=True)
        # Who asks begins anew: what a killed server was still writing is for nobody.
        await asyncio.to_thread(shutil.rmtree, folder / ROLLOUT_LOG, ignore_errors=True)
        models = {name: self._model(resolved, f"model/{model}") for name, model in missing.items()}
        recipe = self._of_this_job(answers.recipe, folder)
        recipe = recipe.replace(student=recipe.student.replace(path=next(iter(models.values()))))
        config = AnswersConfig(
            recipe=recipe,
            models=models,
            domains={name: list(answers.domains[model]) for name, model in missing.items()},
            split=answers.split,
            prompts_per_domain=answers.prompts_per_domain,
            responses_per_prompt=answers.responses_per_prompt,
            temperature=answers.temperature,
        )
        mesh = LocalMesh(recipe, folder, keep_open=self._keep_open)

        async def begin() -> Any:
            view.activity("starting the rollout server")
            mesh.start(resume=False)
            return await mesh.start_answers(config, out)

        async def follow(_: Any) -> None:
            while True:
                await asyncio.sleep(0.25)
                told = _read_json(out / "progress.json")
                if told is not None:
                    view.step = len(missing) - told["total"] + told["done"]
                    name = missing.get(told["model"], "")
                    view.activity(f"{name} answers" if name else "answering")

        try:
            # The answering process gives its server one policy after the other: a new server would wait for ever.
            code = await run_mesh(mesh, begin, follow, view=view, stop=self._stop, restarts=False)
        finally:
            done = [(out / name, model) for name, model in missing.items() if (out / name / SCORES).exists()]
            for made, model in done:
                self._keep_answers(made, resolved, model, (time.monotonic() - started) / len(done))
        if any(self._store.find(digest) is None for digest in resolved.parts.values()):
            if self._stop.is_set():
                raise JobStoppedError
            child = next((child for child in mesh.children if child.name == "answers"), None)
            raise UnavailableError(view.error or (child.said_error() if child else f"it ended with code {code}"))
        await asyncio.to_thread(self.clear_up, resolved)

    def _keep_answers(self, made: Path, resolved: Resolved, model: str, seconds: float) -> None:
        """Make what a model has answered an artefact."""
        digest = resolved.parts[model]
        if self._store.find(digest) is not None:
            return  # another job has had the same answers made meanwhile
        self._files.check(resolved.files)
        folder = self._store.folder(f"answers-{model}", digest)
        shutil.rmtree(folder / ANSWERS, ignore_errors=True)
        made.replace(folder / ANSWERS)
        scores = json.loads((folder / ANSWERS / SCORES).read_text(encoding="utf-8"))
        source = str(resolved.inputs[f"model/{model}"])
        self._store.finish(
            folder,
            digest,
            kind="answers",
            name=f"answers-{model}",
            files=[ANSWERS],
            facts={"seconds": seconds, "scores": scores},
            made_of={"model": source},
        )

    # --- what needs no process ---------------------------------------------------------------------------------
    def _choose(self, resolved: Resolved, choose: Choose) -> None:
        """The option with the best mean accuracy; of several, the first."""
        started = time.monotonic()
        means, accuracies = [], []
        for place, values in enumerate(choose.options):
            found = self._artefact(str(resolved.inputs[f"option/{place}"])).facts["accuracies"]["after"]
            missing = [domain for domain in choose.domains if domain not in found]
            if missing:
                raise PreconditionError(f"{resolved.job.id}: {values} has no accuracy on {', '.join(missing)}")
            accuracies.append({domain: found[domain] for domain in choose.domains})
            means.append(sum(accuracies[-1].values()) / len(choose.domains))
        best = max(range(len(means)), key=means.__getitem__)
        options = [
            {"values": dict(values), "accuracy": mean, "accuracies": found}
            for values, mean, found in zip(choose.options, means, accuracies, strict=True)
        ]
        choice = {"option": best, "values": dict(choose.options[best]), "accuracy": means[best], "options": options}
        folder = self._folder(resolved)
        write_durably(folder / CHOICE, json.dumps(choice, indent=1) + "\n")
        self._finish(resolved, folder, files=[CHOICE], facts=choice | {"seconds": time.monotonic() - started})

    def _evaluate(self, resolved: Resolved, models: tuple[str, ...]) -> None:
        """The scores of all models in one file."""
        started = time.monotonic()
        scores = {}
        for model in models:
            artefact = self._artefact(str(resolved.inputs[f"answers/{model}"]))
            scores[model] = {"scores": artefact.facts["scores"], "answers": artefact.path.name}
        folder = self._folder(resolved)
        write_durably(folder / SCORES, json.dumps(scores, indent=1) + "\n")
        self._finish(resolved, folder, files=[SCORES], facts={"seconds": time.monotonic() - started})


def _has_ended(folder: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    summary = _read_json(folder / "summary.json")
    return summary is not None and summary["status"] == "finished" and (folder / STUDENT).is_dir()


def _accuracies(folder: Path) -> dict[str, dict[str, float]]:
    """By domain, on validation prompts, before the first step and after the last; empty where not measured."""
    path = folder / "evaluations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found: dict[str, dict[str, float]] = {"before": {}, "after": {}}
    for line in lines:
        part = {key.removeprefix("accuracy/"): value for key, value in line.items() if key.startswith("accuracy/")}
        found["before" if line["step"] == 0 else "after"] = part
    return found


def _read_json(path: Path) -> Any:
    """None where there is none yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def cause_of(error: BaseException | None) -> str:
    """For people: an :class:`OpdError` speaks for itself, anything else needs its kind."""
    return str(error) if isinstance(error, OpdError) else f"{type(error).__name__}: {error}"
