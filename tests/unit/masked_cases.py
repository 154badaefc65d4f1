"""Responses that an engine wrote under masks, and the student that wrote them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_models import EOS_ID, save_tiny_checkpoint
from torch import Tensor

from opd_mesh.config.sections import StudentConfig
from opd_mesh.grammar import Grammars, TokenVocabulary
from opd_mesh.trajectory import SamplingParams, Trajectory
from rollout_server.decode_engine import DecodeEngine
from rollout_server.generation import GenerationRequest, TokenEvent
from student_trainer.batch import Sample, plan_batch
from student_trainer.heads import HeadStore
from student_trainer.objective import Objective
from student_trainer.passes import TokenMeans
from student_trainer.student import Student
from student_trainer.update import compute_gradients

VERDICT = r'start: "score: " /[1-5]/ " because " /[a-z ]{3,9}/ "\n"'
ADVANTAGES = [1.5, -0.75, 0.5, -1.25, 0.25]


class WrittenCase:
    """A tiny student, what an engine wrote with its weights, and the weights in float64.

    Args:
        samplings: how each of five responses is drawn, beside its seed.
        free_tokens: of the first one without a grammar; those behind have more.
    """

    def __init__(
        self, folder: Path, samplings: Sequence[dict[str, Any]], *, temperature: float, free_tokens: int
    ) -> None:
        path = save_tiny_checkpoint(
            folder / "student", "llama", 0, vocab_size=137, tokenizer_vocab_size=131, logit_std=2.0
        )
        self.student = Student(StudentConfig(path=path), device="cpu", deterministic=False, seed=0)
        self.exact = copy.deepcopy(self.student.model).double()
        self.heads = HeadStore(folder / "heads", "cpu")
        self.grammars = Grammars(TokenVocabulary.of(self.student.tokenizer, self.student.vocab_size))
        engine = DecodeEngine(
            copy.deepcopy(self.student.model),
            policy_version=1,
            valid_vocab_size=self.student.vocab_size,
            max_context_tokens=90,
            grammars=self.grammars,
        )
        requests = {}
        for index, changes in enumerate(samplings):
            longest = 40 if changes.get("grammar") else free_tokens + index
            sampling = SamplingParams(index, temperature, max_new_tokens=longest, stop_token_ids=(EOS_ID,), **changes)
            requests[f"t{index}"] = GenerationRequest(f"t{index}", tuple(range(20, 25 + index)), sampling)
            engine.submit(requests[f"t{index}"])
        events: dict[str, list[TokenEvent]] = {name: [] for name in requests}
        while not engine.idle:
            for event in engine.step():
                events[event.request_id].append(event)
        self.trajectories = [
            Trajectory(
                trajectory_id=name,
                domain="judging" if request.sampling.grammar else "writing",
                token_ids=(*request.prompt_ids, *(event.token_id for event in events[name])),
                scored_spans=((len(request.prompt_ids), len(request.prompt_ids) + len(events[name])),),
                sampling_logprobs=tuple(event.sampling_logprob for event in events[name]),
                policy_logprobs=tuple(event.policy_logprob for event in events[name]),
                sampling=request.sampling,
                kept_token_ids=tuple(event.kept for event in events[name] if event.kept),
            )
            for name, request in requests.items()
        ]
        self.lengths = [trajectory.num_scored for trajectory in self.trajectories]

    def samples(self) -> list[Sample]:
        """With their advantages."""
        return [Sample(one, advantage=value) for one, value in zip(self.trajectories, ADVANTAGES, strict=True)]

    def gradients_of(
        self, objective: Objective, samples: list[Sample], tokens_per_pass: int = 10_000
    ) -> tuple[float, TokenMeans, dict[str, Tensor]]:
        """(loss, metrics, gradients by parameter)."""
        self.student.model.zero_grad(set_to_none=True)
        plan = plan_batch(samples, tokens_per_pass=tokens_per_pass, heads_together=1)
        loss, means = compute_gradients(plan, self.student, objective, self.heads)
        found = {name: p.grad.clone() for name, p in self.student.model.named_parameters() if p.grad is not None}
        return loss, means, found
