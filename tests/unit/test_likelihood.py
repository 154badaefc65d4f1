"""SFT and policy gradients through whole passes, against autograd over a whole float64 model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_checkpoint
from torch import Tensor

from opd_mesh.config.sections import StudentConfig
from opd_mesh.config.training import DapoConfig, DrGrpoConfig, GrpoConfig, PolicyGradientConfig
from opd_mesh.errors import InternalError
from opd_mesh.signals import SignalKind
from opd_mesh.trajectory import Trajectory
from student_trainer.batch import HeldAnswer, Mark, Sample, plan_batch
from student_trainer.heads import HeadStore
from student_trainer.likelihood import PolicyGradient, Sft
from student_trainer.objective import Objective
from student_trainer.passes import TokenMeans
from student_trainer.student import Student
from student_trainer.update import compute_gradients

VOCAB_SIZE = 61
# (tokens, scored spans): a response of one token, of many, and two spans in one; means of means would differ.
SHAPES = [(7, [(3, 7)]), (19, [(4, 8), (11, 19)]), (12, [(11, 12)]), (9, [(1, 9)])]
ADVANTAGES = [1.5, -0.75, 0.5, -1.25]
LONGEST = 12
WHOLE = 10_000  # tokens in a pass: all of them


class Case:
    """A tiny student, and a copy of it in float64 that sees whole sequences, one by one."""

    def __init__(self, folder: Path) -> None:
        path = save_tiny_checkpoint(folder / "student", "llama", 0, vocab_size=VOCAB_SIZE, logit_std=3.0)
        self.student = Student(StudentConfig(path=path), device="cpu", deterministic=False, seed=0)
        self.exact = copy.deepcopy(self.student.model).double()
        self.heads = HeadStore(folder / "heads", "cpu")
        generator = torch.Generator().manual_seed(4)
        self.trajectories = [
            Trajectory(
                trajectory_id=f"t{index}",
                domain=f"domain_{index % 2}",
                token_ids=tuple(torch.randint(4, VOCAB_SIZE, (total,), generator=generator).tolist()),
                scored_spans=tuple(spans),
            )
            for index, (total, spans) in enumerate(SHAPES)
        ]
        self.lengths = [trajectory.num_scored for trajectory in self.trajectories]
        tokens = sum(self.lengths)
        self.gaps_R = 0.3 * torch.randn(tokens, generator=generator, dtype=torch.float64)  # log π − log μ
        self.reference_R = -4 * torch.rand(tokens, generator=generator, dtype=torch.float64)

    def logprobs_R(self, temperature: float) -> Tensor:
        """Of all response tokens, in order of samples, with gradient in the float64 model."""
        rows = []
        for trajectory in self.trajectories:
            ids = torch.tensor([trajectory.token_ids])
            logits = self.exact(input_ids=ids, use_cache=False).logits[0, trajectory.predicting_positions]
            log_p = (logits[:, :VOCAB_SIZE] / temperature).log_softmax(-1)
            rows.append(log_p[torch.arange(len(log_p)), torch.tensor(trajectory.scored_token_ids)])
        return torch.cat(rows)

    def samples(self, behaviour_R: Tensor) -> list[Sample]:
        """With advantages, what the policy that wrote said, and what the reference says."""
        samples = []
        parts = zip(behaviour_R.split(self.lengths), self.reference_R.split(self.lengths), strict=True)
        for trajectory, advantage, (behaviour, reference) in zip(self.trajectories, ADVANTAGES, parts, strict=True):
            said = HeldAnswer({"logprobs": reference.numpy().astype(np.float32)})
            mark = Mark("reference", 0.0, SignalKind.TOKEN_LOGPROBS, None, said)
            written = replace(trajectory, sampling_logprobs=tuple(behaviour.tolist()))
            samples.append(Sample(written, reference=mark, advantage=advantage))
        return samples

    def exact_gradients(self, loss: Tensor) -> dict[str, Tensor]:
        self.exact.zero_grad(set_to_none=True)
        loss.backward()
        return {name: p.grad for name, p in self.exact.named_parameters() if p.grad is not None}

    def gradients(
        self, objective: Objective, samples: list[Sample], tokens_per_pass: int
    ) -> tuple[float, TokenMeans, dict[str, Tensor], int]:
        """(loss, diagnostics, gradient by parameter, passes) as the trainer computes them."""
        self.student.model.zero_grad(set_to_none=True)
        plan = plan_batch(samples, tokens_per_pass=tokens_per_pass, heads_together=1)
        loss, means = compute_gradients(plan, self.student, objective, self.heads)
        found = {name: p.grad.clone() for name, p in self.student.model.named_parameters() if p.grad is not None}
        return loss, means, found, len(plan.passes)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("likelihood"))


def gradient_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    difference = sum(float((found[name].double() - wanted[name]).pow(2).sum()) for name in wanted)
    return float((difference / sum(float(wanted[name].pow(2).sum()) for name in wanted)) ** 0.5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("tokens_per_pass", "passes"), [(WHOLE, 1), (21, 3), (1, 4)])
def test_sft_is_the_mean_over_all_answer_tokens(
    case: Case, tokens_per_pass: int, passes: int, deterministic: bool
) -> None:
    exact_R = case.logprobs_R(1.0)
    wanted = case.exact_gradients(-exact_R.mean())
    samples = [Sample(trajectory) for trajectory in case.trajectories]
    loss, means, found, count = case.gradients(Sft(deterministic=deterministic), samples, tokens_per_pass)
    assert count == passes
    assert loss == pytest.approx(-float(exact_R.detach().mean()), rel=1e-6)
    assert gradient_error(found, wanted) < 1e-5
    # A mean of the passes' or the answers' means is another number by far.
    of_answers = -torch.stack([part.mean() for part in exact_R.detach().split(case.lengths)])
    assert abs(float(of_answers.mean()) / loss - 1) > 0.02
    metrics = means.means()
    by_domain = exact_R.detach().split(case.lengths)
    for index in (0, 1):
        nll = -float(torch.cat(by_domain[index::2]).mean())
        assert metrics[f"nll_domain/domain_{index}"] == pytest.approx(nll, rel=1e-5)
    assert 0 < metrics["entropy/student"] < np.log(VOCAB_SIZE)


def exact_loss(case: Case, config: PolicyGradientConfig, temperature: float) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(loss over whole sequences as the papers write it, log μ, metrics)."""
    log_p = case.logprobs_R(temperature)
    log_mu = log_p.detach() - case.gaps_R
    ratio_R = (log_p - log_mu).exp()
    per_response = []
    clipped, masked = [], []
    starts = np.cumsum([0, *case.lengths])
    for advantage, start, end in zip(ADVANTAGES, starts, starts[1:], strict=False):
        ratio, rows = ratio_R[start:end], slice(start, end)
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        loss = -torch.minimum(ratio * advantage, bounded * advantage)
        clipped.append((loss.detach() != (-ratio * advantage).detach()).double())
        too_far = advantage < 0 and config.mask_above is not None
        too_far = too_far and float(-case.gaps_R[rows].mean()) > (config.mask_above or 0)
        masked.append(torch.full((end - start,), float(too_far)))
        if too_far:
            loss = 0 * loss
        if config.kl is not None:
            log_q = case.reference_R[rows] - log_p[rows]
            kl = log_q.exp() - log_q - 1
            loss = loss + config.kl.coefficient * (ratio * kl if config.kl.estimator == "unbiased" else kl)
        per_response.append(loss)
    match config.aggregation:
        case "sequence_mean":
            total = torch.stack([loss.mean() for loss in per_response]).mean()
        case "token_mean":
            total = torch.cat(per_response).mean()
        case "constant_length":
            total = torch.stack([loss.sum() / (config.length or LONGEST) for loss in per_response]).mean()
    metrics = {
        "clip_fraction": float(torch.cat(clipped).mean()),
        "mask_fraction": float(torch.cat(masked).mean()),
        "kl_behaviour": float(-case.gaps_R.mean()),
    }
    return total, log_mu, metrics


KL = {"reference": "reference", "coefficient": 0.2}
OBJECTIVES: dict[str, Any] = {
    "grpo": (GrpoConfig(), 1.0),
    "grpo, unbiased KL, mask": (GrpoConfig(kl={**KL, "estimator": "unbiased"}, mask_above=0.05), 1.0),  # type: ignore[arg-type]
    "grpo, k3": (GrpoConfig(kl={**KL, "estimator": "k3"}), 1.0),  # type: ignore[arg-type]
    "dapo at a temperature": (DapoConfig(), 0.7),
    "dr_grpo": (DrGrpoConfig(), 1.0),
    "dr_grpo of a length, hot": (DrGrpoConfig(length=7), 1.6),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_policy_gradient_equals_autograd_over_the_whole_batch(case: Case, name: str) -> None:
    """However the mini-batch is split into passes."""
    config, temperature = OBJECTIVES[name]
    exact, log_mu, told = exact_loss(case, config, temperature)
    wanted = case.exact_gradients(exact)
    objective = PolicyGradient(config, temperature, LONGEST)
    samples = case.samples(log_mu)
    for tokens_per_pass, passes in ((WHOLE, 1), (21, 3), (1, 4)):
        loss, means, found, count = case.gradients(objective, samples, tokens_per_pass)
        assert count == passes
        assert loss == pytest.approx(float(exact.detach()), rel=1e-5, abs=1e-6)
        assert gradient_error(found, wanted) < 2e-5
        metrics = means.means()
        for key, value in told.items():
            assert metrics[key] == pytest.approx(value, abs=1e-5), key
        assert ("kl_reference" in metrics) == (config.kl is not None)
    assert told["clip_fraction"] > 0
    assert (told["mask_fraction"] > 0) == (config.mask_above is not None)


def test_the_cases_tell_the_temperature_and_the_reference(case: Case) -> None:
    """What the comparison would miss if either were left out."""
    config, temperature = OBJECTIVES["dapo at a temperature"]
    exact, log_mu, _ = exact_loss(case, config, temperature)
    loss, *_ = case.gradients(PolicyGradient(config, 1.0, LONGEST), case.samples(log_mu), WHOLE)
    assert abs(loss - float(exact.detach())) > 1e-2
    with_kl, without = OBJECTIVES["grpo, k3"][0], OBJECTIVES["grpo"][0]
    _, log_mu, _ = exact_loss(case, with_kl, 1.0)
    losses = [
        case.gradients(PolicyGradient(config, 1.0, LONGEST), case.samples(log_mu), WHOLE)[0]
        for config in (with_kl, without)
    ]
    assert abs(losses[0] - losses[1]) > 1e-2


def test_a_response_without_an_advantage_is_a_mistake_of_ours(case: Case) -> None:
    samples = [replace(sample, advantage=None) for sample in case.samples(case.logprobs_R(1.0).detach())]
    with pytest.raises(InternalError, match="without an advantage"):
        case.gradients(PolicyGradient(GrpoConfig(), 1.0, LONGEST), samples, WHOLE)


def test_a_response_of_no_advantage_moves_nothing(case: Case) -> None:
    _, log_mu, _ = exact_loss(case, GrpoConfig(), 1.0)
    samples = [replace(sample, advantage=0.0) for sample in case.samples(log_mu)]
    loss, _, found, _ = case.gradients(PolicyGradient(GrpoConfig(), 1.0, LONGEST), samples, WHOLE)
    assert loss == 0
    assert all(not gradient.any() for gradient in found.values())


def test_a_references_answer_is_let_go_of_when_its_pass_is_over(case: Case) -> None:
    """Once each, and not before what it says has been read."""
    told: list[str] = []

    class Answer(HeldAnswer):
        def release(self) -> None:
            told.append("released")

        def tensors(self) -> Any:
            told.append("read")
            return super().tensors()

    _, log_mu, _ = exact_loss(case, GrpoConfig(), 1.0)
    samples = []
    for sample in case.samples(log_mu):
        assert sample.reference is not None
        answer = Answer(sample.reference.answer.tensors())
        samples.append(replace(sample, reference=replace(sample.reference, answer=answer)))
    case.gradients(PolicyGradient(OBJECTIVES["grpo, k3"][0], 1.0, LONGEST), samples, 21)
    # Passes of 1, 1 and 2 responses.
    assert sorted(told) == ["read"] * 4 + ["released"] * 4
    assert told[0] == "read"
    assert told.index("released") < len(told) - 1 - told[::-1].index("read")
