"""AdamW and Muon around their schedule, and that a resumed optimizer takes the very same step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opd_mesh.config.training import AdamWConfig, MuonConfig
from opd_mesh.errors import CorruptWeightsError
from student_trainer.optimizer import Optimizer, learning_rate

SHAPES = {"matrix": (4, 3), "norm": (3,), "scalar": (), "expert": (2, 2), "embedding": (5, 3), "stack": (2, 3, 3)}
EMBEDDINGS = ("embedding",)
CONFIGS = pytest.mark.parametrize("config", [AdamWConfig, MuonConfig])


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def optimizer(
    named: dict[str, nn.Parameter],
    total_steps: int = 10,
    config: type[AdamWConfig] | type[MuonConfig] = AdamWConfig,
    **fields: Any,
) -> Optimizer:
    return Optimizer(config(**fields), list(named.items()), total_steps=total_steps, embeddings=EMBEDDINGS)


def give_gradients(named: dict[str, nn.Parameter], step: int, *, without: tuple[str, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for name, parameter in named.items():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name in without else gradient


# --- schedule -------------------------------------------------------------------------------------------------
@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    warmup_steps=st.integers(0, 12),
    total_steps=st.integers(1, 30),
    final=st.just(0.0) | st.floats(1e-6, 1),  # a subnormal ratio of a small rate is 0, and may be
)
def test_the_rate_rises_to_its_peak_and_never_rises_again(
    schedule: str, warmup_steps: int, total_steps: int, final: float
) -> None:
    config = AdamWConfig(lr=2e-3, schedule=schedule, warmup_steps=warmup_steps, final_lr_ratio=final)  # type: ignore[arg-type]
    rates = [learning_rate(config, step, total_steps) for step in range(max(total_steps, warmup_steps) + 3)]
    warm, rest = rates[:warmup_steps], rates[warmup_steps:]
    assert warm == pytest.approx([2e-3 * (step + 1) / warmup_steps for step in range(warmup_steps)])
    assert rest[0] == pytest.approx(2e-3)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(rest))
    assert all(rate > 0 or final == 0 for rate in rates)
    floor = 2e-3 * (1.0 if schedule == "constant" else final)
    if warmup_steps < total_steps:
        assert rates[total_steps] == pytest.approx(floor, abs=1e-18)


def test_the_rate_halfway() -> None:
    half = {"constant": 1.0, "cosine": 0.55, "linear": 0.55}
    for schedule, expected in half.items():
        config = AdamWConfig(lr=1.0, schedule=schedule, warmup_steps=2, final_lr_ratio=0.1)  # type: ignore[arg-type]
        assert learning_rate(config, 6, 10) == pytest.approx(expected)
    quarter = AdamWConfig(lr=1.0, schedule="cosine", final_lr_ratio=0.1)
    assert learning_rate(quarter, 2, 8) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)


def test_steps_use_the_rate_of_their_number() -> None:
    named = parameters()
    mine = optimizer(named, total_steps=4, lr=1e-2, schedule="linear", warmup_steps=2, final_lr_ratio=0.0)
    rates = []
    for step in range(4):
        give_gradients(named, step)
        before = named["scalar"].item()
        rates.append(mine.step())
        if step == 0:  # the first step of Adam has the size of its rate
            assert abs(named["scalar"].item() - before) == pytest.approx(rates[0], rel=1e-4)
    assert rates == pytest.approx([0.5e-2, 1e-2, 1e-2, 0.5e-2])
    assert mine.steps_done == 4
    assert all(parameter.grad is None for parameter in named.values())


# --- one step, against the formula -----------------------------------------------------------------------------
def test_a_step_is_adamw_in_float64() -> None:
    named = parameters()
    config = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    mine = optimizer(named, **config)
    expected = {name: parameter.detach().double() for name, parameter in named.items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(1, 4):
        give_gradients(named, step)
        gradients = {name: parameter.grad.double() for name, parameter in named.items() if parameter.grad is not None}
        mine.step()
        for name, gradient in gradients.items():
            decay = 0.1 if expected[name].ndim >= 2 else 0.0  # norms and biases do not decay
            expected[name] *= 1 - 1e-2 * decay
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            root = (second[name] / (1 - 0.9**step)).sqrt() + 1e-6
            expected[name] -= 1e-2 * (first[name] / (1 - 0.8**step)) / root
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_vectors_do_not_decay() -> None:
    named = parameters()
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    mine = optimizer(named, lr=0.1, weight_decay=0.5)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    mine.step()
    for name, parameter in named.items():
        factor = 0.95 if len(SHAPES[name]) >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_muon_moves_matrices_by_an_orthogonal_step_of_adamws_size() -> None:
    """Keller Jordan's Muon with Moonlight's scale: lr · 0.2 · √max(rows, columns) · U Vᵀ of the Nesterov momentum.

    Five Newton-Schulz iterations in bfloat16 bring the singular values to about 1, not to 1.
    """
    shape, lr = (12, 7), 0.01
    named = {"matrix": nn.Parameter(torch.zeros(shape))}
    mine = Optimizer(MuonConfig(lr=lr), list(named.items()), total_steps=10)
    momentum = torch.zeros(shape, dtype=torch.float64)
    for step in range(3):
        before = named["matrix"].detach().double()
        give_gradients(named, step)
        assert named["matrix"].grad is not None
        gradient = named["matrix"].grad.double()
        momentum = momentum + 0.05 * (gradient - momentum)  # torch averages: momentum 0.95
        left, _, right = torch.linalg.svd(gradient + 0.95 * (momentum - gradient), full_matrices=False)
        mine.step()
        moved = (before - named["matrix"].detach().double()) / (lr * 0.2 * math.sqrt(max(shape)))
        aligned = left.T @ moved @ right.T  # diagonal if the singular vectors are those of U Vᵀ
        assert (aligned.diagonal() > 0.65).all()
        assert (aligned.diagonal() < 1.25).all()
        assert (aligned - aligned.diagonal().diag()).abs().max() < 0.06


def test_muon_leaves_embeddings_vectors_and_stacks_to_adamw() -> None:
    with_muon, with_adamw = parameters(), parameters()
    mine = optimizer(with_muon, config=MuonConfig, lr=1e-2, weight_decay=0.1)
    run_on(with_muon, mine, range(2))
    run_on(with_adamw, optimizer(with_adamw, lr=1e-2, weight_decay=0.1), range(2))
    same = {name for name in with_muon if torch.equal(with_muon[name], with_adamw[name])}
    assert same == {"norm", "scalar", "embedding", "stack"}
    assert {name for name in mine.state_tensors() if name.startswith("momentum_buffer.")} == {
        "momentum_buffer.matrix",
        "momentum_buffer.expert",
    }


def test_clipping_is_by_the_norm_of_all_together() -> None:
    named = {"a": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(torch.zeros(3))}
    mine = optimizer(named, max_grad_norm=1.0)
    named["a"].grad, named["b"].grad = torch.full((2, 2), 3.0), torch.tensor([8.0, 0.0, 0.0])
    assert mine.clip() == pytest.approx(10.0)
    assert named["a"].grad.tolist() == [pytest.approx([0.3, 0.3], rel=1e-4)] * 2
    assert named["b"].grad.tolist() == pytest.approx([0.8, 0.0, 0.0], rel=1e-4)
    assert mine.clip() == pytest.approx(1.0, rel=1e-4)
    named["a"].grad, named["b"].grad = torch.full((2, 2), 0.1), None
    assert mine.clip() == pytest.approx(0.2)
    assert named["a"].grad.flatten().tolist() == pytest.approx([0.1] * 4)  # a small one is left as it is


# --- state ----------------------------------------------------------------------------------------------------
SETTINGS: dict[str, Any] = {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1}


def run_on(named: dict[str, nn.Parameter], mine: Optimizer, steps: range, without: tuple[str, ...] = ()) -> None:
    for step in steps:
        give_gradients(named, step, without=without)
        mine.clip()
        mine.step()


@CONFIGS
@pytest.mark.parametrize("without", [(), ("expert",), ("expert", "norm")])
def test_a_resumed_optimizer_takes_the_very_same_steps(
    without: tuple[str, ...], config: type[AdamWConfig] | type[MuonConfig]
) -> None:
    # A parameter may have had no gradient yet: an expert that no token was routed to.
    named = parameters()
    mine = optimizer(named, config=config, **SETTINGS)
    run_on(named, mine, range(4), without)
    saved = {name: tensor.clone() for name, tensor in mine.state_tensors().items()}
    resumed_named = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
    resumed = optimizer(resumed_named, config=config, **SETTINGS)
    resumed.load_state_tensors(saved, 4)
    run_on(named, mine, range(4, 7))
    run_on(resumed_named, resumed, range(4, 7))
    for name in named:
        assert torch.equal(named[name], resumed_named[name]), name
    for name, tensor in mine.state_tensors().items():
        assert torch.equal(tensor, resumed.state_tensors()[name]), name
    assert resumed.steps_done == mine.steps_done == 7


def test_without_its_state_the_step_would_be_another() -> None:
    """That the comparison above can fail."""
    named = parameters()
    mine = optimizer(named, **SETTINGS)
    run_on(named, mine, range(4))
    other_named = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
    other = optimizer(other_named, **SETTINGS)
    run_on(named, mine, range(4, 5))
    run_on(other_named, other, range(4, 5))
    assert not any(torch.equal(named[name], other_named[name]) for name in named)


def test_the_state_is_not_shared_with_what_was_loaded() -> None:
    named = parameters()
    mine = optimizer(named, **SETTINGS)
    run_on(named, mine, range(2))
    saved = {name: tensor.clone() for name, tensor in mine.state_tensors().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    mine.load_state_tensors(saved, 2)
    run_on(named, mine, range(2, 4))
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def test_at_step_zero_there_is_nothing_to_load() -> None:
    mine = optimizer(parameters())
    assert mine.state_tensors() == {}
    mine.load_state_tensors({}, 0)
    assert mine.steps_done == 0


def test_a_state_that_does_not_fit_is_refused() -> None:
    named = parameters()
    mine = optimizer(named, **SETTINGS)
    run_on(named, mine, range(2))
    state = mine.state_tensors()
    broken = {
        "has no": {name: tensor for name, tensor in state.items() if name != "exp_avg_sq.matrix"},
        "has shape": {**state, "exp_avg.matrix": torch.zeros(3, 4)},
        "exp_avg_sq.matrix has shape": {**state, "exp_avg_sq.matrix": torch.zeros(4, 4)},
        "another student": {**state, "exp_avg.stranger": torch.zeros(2)},
        "is empty": {},
    }
    for message, wrong in broken.items():
        with pytest.raises(CorruptWeightsError, match=message):
            optimizer(parameters(), **SETTINGS).load_state_tensors(wrong, 2)
    with pytest.raises(CorruptWeightsError, match=r"another optimizer\.name"):
        optimizer(parameters(), config=MuonConfig, **SETTINGS).load_state_tensors(state, 2)
