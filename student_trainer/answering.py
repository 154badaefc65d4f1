"""Finished models answer prompts, and their answers are graded: one model after the other on the same rollout servers.

    python -m student_trainer.answering --config answers.yaml --out DIR

For each model ``DIR/<model>/<domain>.jsonl`` has a line per answer: ``trajectory_id``, ``domain``, ``prompt_index``,
``split``, ``token_ids``, ``scored_spans``, ``finish_reason``, ``tokenizer_fingerprint``, ``text`` (of the response),
``score`` (null where it could not be graded, or the domain has no verifier), ``parsed`` and ``failure``; of a verdict
also ``said`` (its overall score, null where it is none), ``gold`` and ``judged_chars`` (length of the answer that was
judged, null of a pair). They are trajectories that SFT can learn from. ``DIR/<model>/scores.json``, written last, has
by domain what :func:`student_trainer.answers.figures` tells; a model that has it is left out when asked again. Progress
goes to ``DIR/progress.json``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

from opd_mesh.config.answers import AnswersConfig
from opd_mesh.files import write_durably
from opd_mesh.models.checkpoint import ADAPTER_CONFIG, load_causal_lm, served_tensors
from opd_mesh.models.runtime import configure_torch
from opd_mesh.models.tokenizer import load_tokenizer, tokenizer_fingerprint, valid_vocab_size
from opd_mesh.policy import PolicyId
from opd_mesh.policy_weights import PolicyWeights
from opd_mesh.process import ServiceArguments
from opd_mesh.torch_tensors import TORCH_DTYPES, to_numpy
from student_trainer.answers import Answer, answers_to, drawn_at, figures
from student_trainer.rollouts import Rollouts
from student_trainer.tasks import Domain, Grader, Prompt, open_domains

log = logging.getLogger("student_trainer")
SCORES = "scores.json"


class Answering:
    """All models of one configuration."""

    def __init__(self, config: AnswersConfig, out: Path) -> None:
        self._config = config
        self._out = out
        recipe = config.recipe
        self._tokenizer = load_tokenizer(recipe.student.path)
        self._fingerprint = tokenizer_fingerprint(self._tokenizer.get_vocab())
        self._run_id = f"answers.{recipe.run.name}.{time.time_ns():x}"
        self._rollouts = Rollouts(
            recipe,
            run_id=self._run_id,
            tokenizer_fingerprint=self._fingerprint,
            eos_token_id=self._tokenizer.eos_token_id,
            vocab_size=valid_vocab_size(self._tokenizer),
            for_training=False,
        )
        self._device = configure_torch(recipe.run.device, threads=recipe.run.threads, deterministic=False)

    async def run(self) -> None:
        """Every model that has no scores yet. Raises :class:`OpdError` naming what is wrong."""
        missing = [name for name in self._config.models if not (self._out / name / SCORES).exists()]
        domains = {domain.name: domain for domain in await asyncio.to_thread(self._open_domains)}
        grader = Grader(list(domains.values()))
        try:
            await self._rollouts.connect()
            await grader.start()
            for number, name in enumerate(missing):
                self._tell(name, number, len(missing))
                await self._serve(self._config.models[name], number)
                await self._answer(name, number, [domains[key] for key in self._config.domains_of(name)], grader)
            self._tell("", len(missing), len(missing))
        finally:
            await grader.close()
            await self._rollouts.close()

    def _open_domains(self) -> list[Domain]:
        return open_domains(self._config.recipe, self._tokenizer)

    async def _serve(self, path: Path, number: int) -> None:
        """Give a model's weights to the rollout servers."""
        weights = await asyncio.to_thread(self._weights, path)
        policy = PolicyId(self._run_id, 1, number, weights.digest)
        await self._rollouts.push_policy(policy, weights, merged=lambda: weights)

    def _weights(self, path: Path) -> PolicyWeights:
        student = self._config.recipe.student
        adapter = path if (path / ADAPTER_CONFIG).exists() else None
        model = load_causal_lm(
            student.path if adapter else path,
            adapter=adapter,
            dtype=TORCH_DTYPES[student.dtype],
            device=self._device,
        ).model
        return PolicyWeights.of({name: to_numpy(tensor) for name, tensor in served_tensors(model)})

    async def _answer(self, name: str, number: int, domains: list[Domain], grader: Grader) -> None:
        folder = self._out / name
        folder.mkdir(parents=True, exist_ok=True)
        scores = {}
        for domain in domains:
            answers = await self._answers(name, number, domain, grader)
            lines = (json.dumps(answer.to_json(self._fingerprint)) + "\n" for answer in answers)
            write_durably(folder / f"{domain.name}.jsonl", "".join(lines))
            scores[domain.name] = figures(answers)
            log.info("%s on %s: %s", name, domain.name, scores[domain.name])
        write_durably(folder / SCORES, json.dumps(scores, indent=1))

    def _prompts(self, domain: Domain) -> list[Prompt]:
        count = self._config.prompts_per_domain
        if self._config.split == "train":
            return domain.after(0, count)[0]
        return domain.held_out(self._config.split, count)

    async def _answers(self, name: str, number: int, domain: Domain, grader: Grader) -> list[Answer]:
        config = self._config
        prompts = await asyncio.to_thread(self._prompts, domain)
        if len(prompts) < config.prompts_per_domain:
            log.warning(
                "domain %s has %d %s prompts, fewer than the %d asked for (prompts_per_domain)",
                domain.name,
                len(prompts),
                config.split,
                config.prompts_per_domain,
            )
        repeated = [prompt for prompt in prompts for _ in range(config.responses_per_prompt)]
        asked = [
            (
                f"e{number:04d}-{name}-{domain.name}-{place}",
                prompt,
                drawn_at(self._rollouts.sampling(domain.name, config.split, prompt.index, place), config.temperature),
            )
            for place, prompt in enumerate(repeated)
        ]
        return await answers_to(asked, domain, self._rollouts, grader)

    def _tell(self, model: str, done: int, total: int) -> None:
        partial = self._out / "progress.partial"
        partial.write_text(json.dumps({"model": model, "done": done, "total": total}), encoding="utf-8")
        partial.replace(self._out / "progress.json")


async def serve(arguments: ServiceArguments[AnswersConfig]) -> int:
    """Answer everything, then end."""
    out: Path = arguments.extra["out"]
    out.mkdir(parents=True, exist_ok=True)
    answering = Answering(arguments.config, out)  # on the loop, where its channels belong; nobody else waits yet
    arguments.announce("")  # it listens nowhere
    await answering.run()
    return 0


def main() -> None:
    """Parse the command line, then answer."""
    from opd_mesh.process import parse_arguments, run

    extra: dict[str, dict[str, Any]] = {"--out": {"type": Path, "required": True, "help": "folder of the answers"}}
    run(serve(parse_arguments("answers", AnswersConfig, extra=extra)))


if __name__ == "__main__":
    main()
