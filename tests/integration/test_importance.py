"""Importance weights against a plain reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exactness import Case, gradient_error, in_float64

from opd_mesh.config.training import ImportanceConfig
from opd_mesh.errors import TrajectoryError
from opd_mesh.models.checkpoint import load_causal_lm
from opd_mesh.trajectory import SamplingParams, Trajectory
from student_trainer.batch import plan_batch
from student_trainer.distillation import Distillation, build_divergence
from student_trainer.heads import HeadStore
from student_trainer.importance import check_behaviour
from student_trainer.update import compute_gradients

TRUNCATE_AT = 1.5


async def test_every_tokens_loss_is_weighted_by_its_truncated_ratio(tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    await case.through_the_mesh()
    generator = torch.Generator().manual_seed(0)
    samples, wanted = [], {}
    for number, sample in enumerate(case.samples):
        trajectory, temperature = sample.trajectory, (1.0, 0.6, 1.7)[number % 3]
        with torch.no_grad():
            logits = case.student.model(input_ids=torch.tensor([trajectory.token_ids])).logits
        rows = logits[0, trajectory.predicting_positions, : case.student.vocab_size].double() / temperature
        now = rows.log_softmax(-1)[torch.arange(len(rows)), torch.tensor(trajectory.scored_token_ids)]
        then = now + 0.5 * torch.randn(len(now), generator=generator)
        sampling = SamplingParams(temperature=temperature)
        written = replace(trajectory, sampling=sampling, sampling_logprobs=tuple(then.tolist()))
        samples.append(replace(sample, trajectory=written))
        wanted[trajectory.trajectory_id] = (now - then).exp()

    measure, seen = build_divergence(case.recipe.objective), []

    def recording(*args: Any, **kwargs: Any) -> Any:
        divergence = measure(*args, **kwargs)
        seen.append((kwargs["token_weights_NR"], divergence.kl_T, divergence.loss.detach()))
        return divergence

    plan = plan_batch(samples, tokens_per_pass=40, heads_together=1)
    objective = Distillation(recording, ImportanceConfig(truncate_at=TRUNCATE_AT))
    loss, means = compute_gradients(plan, case.student, objective, case.heads)
    tokens = sum(len(ratios) for ratios in wanted.values())
    ordered = torch.cat([wanted[one.trajectory.trajectory_id] for part in plan.passes for one in part])
    weights = torch.cat([weight[0] for weight, _, _ in seen]) * tokens
    assert (ordered > TRUNCATE_AT).any()
    assert torch.allclose(weights.double(), ordered.clamp(max=TRUNCATE_AT), rtol=1e-4)
    kl = torch.cat([kl_NR[0] for _, kl_NR, _ in seen]).double()
    assert loss == pytest.approx(float((ordered.clamp(max=TRUNCATE_AT) * kl).mean()), rel=1e-4)
    metrics = means.means()
    assert metrics["importance/mean"] == pytest.approx(float(ordered.clamp(max=TRUNCATE_AT).mean()), rel=1e-4)
    assert metrics["importance/truncated"] == pytest.approx(float((ordered > TRUNCATE_AT).double().mean()))
    # What is told of the teachers stays unweighted.
    assert metrics["kl/one"] == pytest.approx(case.gradients(samples)[0]["kl/one"], rel=1e-6)


async def test_every_teacher_of_a_token_is_weighted_alike_in_every_pass(tmp_path: Path) -> None:
    """Two teachers mark each sample, and the mini-batch takes several passes: against one loss over all tokens."""
    case = Case("llama", tmp_path)
    shares = {"one": 1.0, "two": 0.25}
    domains = {name: domain.replace(teachers=shares) for name, domain in case.recipe.domains.items()}
    case.recipe = case.recipe.replace(domains=domains)
    await case.through_the_mesh()
    model = in_float64(case.student.model)
    teachers = {name: in_float64(load_causal_lm(path).model) for name, path in case.paths.items()}
    generator = torch.Generator().manual_seed(1)
    samples, weighted = [], []
    for sample in case.samples:
        trajectory = sample.trajectory
        ids, rows = torch.tensor([trajectory.token_ids]), trajectory.predicting_positions
        log_p = model(input_ids=ids, use_cache=False).logits[0, rows, : case.student.vocab_size].log_softmax(-1)
        now = log_p.detach()[torch.arange(len(rows)), torch.tensor(trajectory.scored_token_ids)]
        then = now + 0.5 * torch.randn(len(now), generator=generator)
        ratios = (now - then).exp().clamp(max=TRUNCATE_AT)
        for name, share in shares.items():
            with torch.no_grad():
                logits = teachers[name](input_ids=ids, use_cache=False).logits[0, rows, : case.student.vocab_size]
            kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)
            weighted.append(share * ratios * kl)
        samples.append(replace(sample, trajectory=replace(trajectory, sampling_logprobs=tuple(then.tolist()))))
    tokens = sum(sample.trajectory.num_scored for sample in samples)
    wanted = torch.cat(weighted).sum() / tokens
    wanted.backward()

    for heads in (1, 2):  # a sample's teachers one after the other, and side by side
        case.student.model.zero_grad(set_to_none=True)
        plan = plan_batch(samples, tokens_per_pass=40, heads_together=heads)
        assert len(plan.passes) > 1
        head_store = HeadStore(tmp_path / "heads", "cpu", resident=heads)
        objective = Distillation(build_divergence(case.recipe.objective), ImportanceConfig(truncate_at=TRUNCATE_AT))
        loss, means = compute_gradients(plan, case.student, objective, head_store)
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
        found = {name: p.grad for name, p in case.student.model.named_parameters() if p.grad is not None}
        exact = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradient_error(found, exact) < 1e-4
        assert means.means()["importance/mean"] < TRUNCATE_AT


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sampling_logprobs": ()}, "sampling_logprobs"),
        ({"sampling_logprobs": (float("nan"),)}, "sampling_logprobs"),
        ({"sampling_logprobs": (float("-inf"),)}, "sampling_logprobs"),
        ({"sampling_logprobs": (0.01,)}, "sampling_logprobs"),
        ({"sampling": SamplingParams(top_p=0.9)}, "kept_token_ids"),
        ({"sampling": SamplingParams(top_k=3)}, "kept_token_ids"),
        ({"sampling": SamplingParams(temperature=0.0)}, "sampling.temperature"),
    ],
    ids=["no log-probabilities", "nan", "infinite", "above 0", "top_p", "top_k", "greedy"],
)
def test_a_trajectory_whose_ratios_are_unknown_is_refused(changes: dict[str, Any], field: str) -> None:
    good = Trajectory("t", "d", (1, 2), ((1, 2),), sampling_logprobs=(-1.0,))
    check_behaviour(good)
    with pytest.raises(TrajectoryError) as error:
        check_behaviour(replace(good, **changes))
    assert error.value.field == field
