"""The trip through the mesh gives the numbers of a float64 computation over full logits in one process.

Hidden states travel in float32 over a real socket, the head is downloaded and verified, the trainer computes loss and
gradient. The reference never sees a hidden state: the models' own logits, log-softmax, autograd, all in float64.
"""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mesh import serving_teachers, teacher_config, tiny_recipe
from tiny_models import save_tiny_checkpoint, tiny_tokenizer

from opd_mesh.models.checkpoint import load_causal_lm
from opd_mesh.models.tokenizer import tokenizer_fingerprint
from opd_mesh.signals import SignalKind
from opd_mesh.trajectory import Trajectory
from student_trainer.batch import HeldAnswer, Mark, Sample, plan_batch
from student_trainer.distillation import Distillation, build_divergence
from student_trainer.heads import HeadStore
from student_trainer.mark_buffer import MarkBuffer
from student_trainer.objective import build_objective
from student_trainer.server import load_student
from student_trainer.student import Student
from student_trainer.teachers import Teachers
from student_trainer.update import compute_gradients

ARCHITECTURES = ["llama", "qwen3", "gemma2", "cohere", "granite", "gpt2", "phi", "deepseek_v4"]
# Mutants that change nothing: most heads have no soft-cap, scale or bias.
ORDINARY = {"no soft-cap", "no logit scale", "no bias"}
HARMLESS = {
    "gemma2": ORDINARY - {"no soft-cap"},
    "cohere": ORDINARY - {"no logit scale"},
    "granite": ORDINARY - {"no logit scale"},
    "phi": ORDINARY - {"no bias"},
}
KL_TOLERANCE = 1e-5  # relative to max(1 nat, KL)
GRADIENT_TOLERANCE = 1e-4


def trajectories(vocab_size: int) -> list[Trajectory]:
    """Awkward lengths, two spans in one, both domains."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(7, [(3, 7)]), (23, [(5, 9), (14, 23)]), (31, [(30, 31)]), (12, [(1, 12)])]
    return [
        Trajectory(
            trajectory_id=f"t{index}",
            domain=f"domain_{index % 2}",
            token_ids=tuple(torch.randint(4, vocab_size, (total,), generator=generator).tolist()),
            scored_spans=tuple(spans),
        )
        for index, (total, spans) in enumerate(shapes)
    ]


def in_float64(model: Any) -> Any:
    """A float64 copy."""
    model = copy.deepcopy(model).double()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped GEMM has no float64
    return model


def float64_reference(
    student: Any, teachers: dict[str, Any], samples: list[Trajectory], routing: dict[str, str]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], float]:
    """(per-token KL of each trajectory, gradient of their mean by parameter, largest standard deviation of logits)."""
    student = in_float64(student)
    kls = []
    spread = 0.0
    for sample in samples:
        ids = torch.tensor([sample.token_ids])
        rows = sample.predicting_positions
        logits = student(input_ids=ids, use_cache=False).logits[0, rows].double()
        with torch.no_grad():
            theirs = teachers[routing[sample.domain]](input_ids=ids, use_cache=False).logits[0, rows].double()
        log_p, log_q = logits.log_softmax(-1), theirs.log_softmax(-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        spread = max(spread, float(logits.detach().std()))
    torch.cat(kls).mean().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return [kl.detach() for kl in kls], gradients, spread


def held(sample: Sample) -> Sample:
    """The sample with its answers in hand."""

    def have(mark: Mark) -> Mark:
        return replace(mark, answer=HeldAnswer(mark.answer.tensors()))

    reference = None if sample.reference is None else have(sample.reference)
    return Sample(sample.trajectory, tuple(have(mark) for mark in sample.marks), reference)


def rows_of(mark: Mark) -> np.ndarray:
    return next(iter(mark.answer.tensors().values()))


class Case:
    """One architecture: what the mesh computed, and what float64 says."""

    def __init__(self, arch: str, folder: Path) -> None:
        self.arch = arch
        student = save_tiny_checkpoint(folder / "student", arch, 0)
        self.paths = {name: save_tiny_checkpoint(folder / name, arch, seed) for seed, name in ((1, "one"), (2, "two"))}
        self.recipe = tiny_recipe(student, self.paths, batch={"tokens_per_pass": 40})
        self.folder = folder
        self.student: Student
        self.samples: list[Sample] = []

    async def through_the_mesh(self) -> None:
        """Cards, heads and marks over the wire."""
        self.student, _ = load_student(self.recipe)
        fingerprint = tokenizer_fingerprint(tiny_tokenizer().get_vocab())
        async with serving_teachers(teacher_config(self.paths)) as address:
            teachers = {name: t.replace(addresses=[address]) for name, t in self.recipe.teachers.items()}
            client = Teachers(self.recipe.replace(teachers=teachers), fingerprint)
            await client.connect()
            self.heads = HeadStore(self.folder / "heads", "cpu")
            for name in client.head_digests:
                self.heads.add(await client.get_head(name))
            buffer = MarkBuffer(1 << 30)
            asked = [client.ask(trajectory, buffer) for trajectory in trajectories(self.student.vocab_size)]
            self.head_digests = client.head_digests
            self.samples = await asyncio.to_thread(lambda: [held(sample) for sample in asked])
            await client.close()

    def gradients(self, samples: list[Sample]) -> tuple[dict[str, float], Any]:
        """(KL by domain, gradient by parameter) as the trainer computes them."""
        self.student.model.zero_grad(set_to_none=True)
        objective = build_objective(self.recipe)
        plan = plan_batch(samples, tokens_per_pass=40, heads_together=1)
        self.passes = len(plan.passes)
        self.loss, means = compute_gradients(plan, self.student, objective, self.heads)
        grads = {n: p.grad for n, p in self.student.model.named_parameters() if p.grad is not None}
        return means.means(), grads

    def token_kls(self, sample: Sample) -> torch.Tensor:
        """[R] of one sample."""
        recorded: list[torch.Tensor] = []
        measure = build_divergence(self.recipe.objective)

        def recording(*args: Any, **kwargs: Any) -> Any:
            divergence = measure(*args, **kwargs)
            recorded.append(divergence.kl_T[0])
            return divergence

        plan = plan_batch([sample], tokens_per_pass=40, heads_together=1)
        compute_gradients(plan, self.student, Distillation(recording), self.heads)
        return torch.cat(recorded)


@pytest.fixture(params=ARCHITECTURES, scope="module")
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


async def prepared(arch: str, folder: Path) -> Case:
    case = Case(arch, folder)
    await case.through_the_mesh()
    return case


def worst_kl_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float(((a.double() - b).abs() / b.clamp(min=1.0)).max()) for a, b in zip(found, wanted, strict=True))


def gradient_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    difference = sum(float((found[name].double() - wanted[name]).pow(2).sum()) for name in wanted)
    size = sum(float(wanted[name].pow(2).sum()) for name in wanted)
    return (difference / size) ** 0.5


async def test_kl_and_gradient_equal_float64(arch: str, tmp_path: Path) -> None:
    case = await prepared(arch, tmp_path)
    assert all(rows_of(sample.marks[0]).dtype == np.float32 for sample in case.samples)
    assert not any(mark.signal is SignalKind.LOGITS for sample in case.samples for mark in sample.marks)
    teachers = {name: in_float64(load_causal_lm(path).model) for name, path in case.paths.items()}
    routing = {"domain_0": "one", "domain_1": "two"}
    wanted, wanted_gradient, spread = float64_reference(
        case.student.model, teachers, [sample.trajectory for sample in case.samples], routing
    )
    assert spread >= 5
    assert float(torch.cat(wanted).mean()) >= 0.5

    found = [case.token_kls(sample) for sample in case.samples]
    assert worst_kl_error(found, wanted) < KL_TOLERANCE
    _, gradient = case.gradients(case.samples)
    assert case.passes > 1
    assert case.loss == pytest.approx(float(torch.cat(wanted).mean()), rel=1e-5)
    assert gradient_error(gradient, wanted_gradient) < GRADIENT_TOLERANCE

    # Mutants: each is a mistake that has been made elsewhere, and each must be seen by the same comparison.
    for name, mutant in mutants(case).items():
        mutated = mutant()
        assert (mutated is None) == (name in HARMLESS.get(arch, ORDINARY)), name
        if mutated is not None:
            assert worst_kl_error(mutated, wanted) > 100 * KL_TOLERANCE, f"mutant {name!r} passes unnoticed"


def mutants(case: Case) -> dict[str, Any]:
    """Name → function that computes the KLs wrongly, or None where the architecture has nothing to mutate."""

    def with_head(**changes: Any) -> list[torch.Tensor] | None:
        original = case.heads.get
        if not any(getattr(case.student.head, key) not in (value, None) for key, value in changes.items()):
            return None
        case.heads.get = lambda digest: replace(original(digest), **changes)  # type: ignore[method-assign]
        try:
            return [case.token_kls(sample) for sample in case.samples]
        finally:
            case.heads.get = original  # type: ignore[method-assign]

    def with_marks(change: Any) -> list[torch.Tensor]:
        return [
            case.token_kls(Sample(sample.trajectory, tuple(change(mark) for mark in sample.marks)))
            for sample in case.samples
        ]

    def shifted(mark: Mark) -> Mark:
        return replace(mark, answer=HeldAnswer({"hidden_states": np.roll(rows_of(mark), 1, axis=0)}))

    def swapped(mark: Mark) -> Mark:
        other = {"one": "two", "two": "one"}[mark.teacher_id]
        return replace(mark, teacher_id=other, head_digest=case.head_digests[other])

    return {
        "no soft-cap": lambda: with_head(soft_cap=None) if case.student.head.soft_cap else None,
        "no logit scale": lambda: with_head(logit_scale=1.0),
        "no bias": lambda: with_head(bias=None) if case.student.head.bias is not None else None,
        "rows shifted by one": lambda: with_marks(shifted),
        "teachers swapped": lambda: with_marks(swapped),
    }


async def test_logits_signal_equals_float64(tmp_path: Path) -> None:
    case = Case("gemma2", tmp_path)
    case.recipe = case.recipe.replace(objective=case.recipe.objective.replace(signal="logits"))
    await case.through_the_mesh()
    assert all(mark.signal is SignalKind.LOGITS for sample in case.samples for mark in sample.marks)
    teachers = {name: in_float64(load_causal_lm(path).model) for name, path in case.paths.items()}
    wanted, *_ = float64_reference(
        case.student.model,
        teachers,
        [sample.trajectory for sample in case.samples],
        {"domain_0": "one", "domain_1": "two"},
    )
    assert worst_kl_error([case.token_kls(sample) for sample in case.samples], wanted) < KL_TOLERANCE


async def test_weighted_teachers_of_one_sample_equal_float64(tmp_path: Path) -> None:
    """Σ_i w_i KL(p ‖ q_i), averaged over all response tokens; the gradient of all teachers in one backward pass."""
    case = Case("qwen3", tmp_path)
    weights = {"one": 0.7, "two": 1.6}
    domains = {name: domain.replace(teachers=weights) for name, domain in case.recipe.domains.items()}
    case.recipe = case.recipe.replace(domains=domains)
    await case.through_the_mesh()
    assert all(len(sample.marks) == 2 for sample in case.samples)
    teachers = {name: in_float64(load_causal_lm(path).model) for name, path in case.paths.items()}
    loss, gradient = 0.0, {}
    for name, weight in weights.items():
        kls, grads, _ = float64_reference(
            case.student.model,
            teachers,
            [sample.trajectory for sample in case.samples],
            {"domain_0": name, "domain_1": name},
        )
        loss += weight * float(torch.cat(kls).mean())
        for key, value in grads.items():
            gradient[key] = gradient.get(key, 0) + weight * value
    _, found = case.gradients(case.samples)
    assert case.loss == pytest.approx(loss, rel=1e-5)
    assert gradient_error(found, gradient) < GRADIENT_TOLERANCE


def naive(name: str, log_p: torch.Tensor, log_q: torch.Tensor, log_r: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Per token, as the papers write it; of sampled_token what is to be differentiated."""
    p, q = log_p.exp(), log_q.exp()
    match name:
        case "forward_kl":
            return (q * (log_q - log_p)).sum(-1)
        case "jsd":
            log_m = (0.3 * q + 0.7 * p).log()
            return 0.3 * (q * (log_q - log_m)).sum(-1) + 0.7 * (p * (log_p - log_m)).sum(-1)
        case "exopd":
            return (p * (log_p - (1.25 * log_q - 0.25 * log_r).log_softmax(-1))).sum(-1)
        case "top_k":
            top = log_q.topk(8).indices
            inside_p, inside_q = p.gather(1, top), q.gather(1, top)
            tail_p, tail_q = 1 - inside_p.sum(-1), 1 - inside_q.sum(-1)
            return (inside_p * (inside_p / inside_q).log()).sum(-1) + tail_p * (tail_p / tail_q).log()
        case "sampled_token":
            log_p_y, log_q_y = (x.gather(1, ids[:, None])[:, 0] for x in (log_p, log_q))
            return (log_p_y - log_q_y).detach() * log_p_y
    raise AssertionError(name)


@pytest.mark.parametrize("heads_resident", [1, 2])
@pytest.mark.parametrize(
    "objective",
    [
        {"name": "forward_kl"},
        {"name": "jsd", "beta": 0.3},
        {"name": "exopd", "lam": 1.25, "reference": "base"},
        {"name": "top_k", "k": 8},
        {"name": "sampled_token"},
    ],
    ids=lambda value: value["name"],
)
async def test_every_objective_equals_float64(objective: dict[str, Any], heads_resident: int, tmp_path: Path) -> None:
    """Gradient of Σ_i w_i D(student, teacher_i), two teachers for every token, at a temperature."""
    case, weights = Case("qwen3", tmp_path), {"one": 0.7, "two": 1.6}
    case.paths["base"] = save_tiny_checkpoint(tmp_path / "base", "qwen3", 3)
    paths = case.paths if objective["name"] == "exopd" else {name: case.paths[name] for name in weights}
    domains = {
        name: domain.model_dump(mode="json") | {"teachers": weights} for name, domain in case.recipe.domains.items()
    }
    case.recipe = tiny_recipe(tmp_path / "student", paths, domains=domains, objective={"temperature": 2.0, **objective})
    await case.through_the_mesh()

    student = in_float64(case.student.model)
    teachers = {name: in_float64(load_causal_lm(path).model) for name, path in case.paths.items()}
    values = []
    for sample in case.samples:
        ids = torch.tensor([sample.trajectory.token_ids])
        rows, sampled = sample.trajectory.predicting_positions, torch.tensor(sample.trajectory.scored_token_ids)

        def log_probs(model: Any, ids: torch.Tensor = ids, rows: tuple[int, ...] | list[int] = rows) -> torch.Tensor:
            return (model(input_ids=ids, use_cache=False).logits[0, rows].double() / 2.0).log_softmax(-1)

        with torch.no_grad():
            said = {name: log_probs(model) for name, model in teachers.items()}
        log_p = log_probs(student)
        values.append(
            sum(w * naive(objective["name"], log_p, said[name], said["base"], sampled) for name, w in weights.items())
        )
    torch.cat(values).mean().backward()
    wanted = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    case.student.model.zero_grad(set_to_none=True)
    calls, computed = [], build_divergence(case.recipe.objective)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2])
        return computed(*args, **kwargs)

    plan = plan_batch(case.samples, tokens_per_pass=40, heads_together=heads_resident)
    passes = len(plan.passes)
    loss, means = compute_gradients(
        plan, case.student, Distillation(counting), HeadStore(case.folder / "heads", "cpu", resident=heads_resident + 1)
    )
    found = {n: p.grad for n, p in case.student.model.named_parameters() if p.grad is not None}
    assert gradient_error(found, wanted) < GRADIENT_TOLERANCE
    # One projection of the student for both teachers where their heads fit side by side.
    assert len(calls) == passes * (2 if heads_resident == 1 else 1)
    metrics = means.means()
    assert metrics["kl/one"] > 0.1
    whole = sum(
        metrics[f"kl_domain/{name}"] * sum(s.trajectory.num_scored for s in case.samples if s.trajectory.domain == name)
        for name in case.recipe.domains
    ) / sum(sample.trajectory.num_scored for sample in case.samples)
    assert whole == pytest.approx(sum(weight * metrics[f"kl/{name}"] for name, weight in weights.items()), rel=1e-5)
    if objective["name"] != "sampled_token":
        assert loss == pytest.approx(float(torch.cat(values).detach().mean()), rel=1e-5)
