"""Advantages, clipping, masks, KL estimators and aggregations: by hand, by enumeration, and against TRL's own code."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.policy_gradient import (
    Aggregation,
    group_advantages,
    policy_terms,
    reference_kl,
    token_weights,
)

LOG = math.log


# --- groups ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rewards", "scale", "values"),
    [
        # mean 0.5; sample variance 4 · 0.25 / 3, so std 0.57735
        ((1.0, 0.0, 0.0, 1.0), "group_std", (0.866024, -0.866024, -0.866024, 0.866024)),
        ((1.0, 0.0, 0.0, 1.0), "none", (0.5, -0.5, -0.5, 0.5)),
        # mean 0.25; sample variance (0.5625 + 3 · 0.0625) / 3 = 0.25
        ((1.0, 0.0, 0.0, 0.0), "group_std", (1.499997, -0.499999, -0.499999, -0.499999)),
        ((1.0, 0.0, 0.0, 0.0), "none", (0.75, -0.25, -0.25, -0.25)),
        # penalties make rewards negative: mean −0.25
        ((0.5, -1.0), "none", (0.75, -0.75)),
        # two, however far apart, are ±1 / √2
        ((0.5, -1.0), "group_std", (0.707106, -0.707106)),
        # what could not be graded counts neither as 0 nor among the G
        ((1.0, None, 0.0, 0.0, None, 1.0), "group_std", (0.866024, None, -0.866024, -0.866024, None, 0.866024)),
        ((None, 3.0, 1.0), "none", (None, 1.0, -1.0)),
    ],
)
def test_advantages_by_hand(rewards: Any, scale: Any, values: Any) -> None:
    found = group_advantages(rewards, scale)
    assert found.degenerate is None
    assert [value is None for value in found.values] == [value is None for value in values]
    for one, other in zip(found.values, values, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("scale", ["group_std", "none"])
@pytest.mark.parametrize(
    ("rewards", "why", "values"),
    [
        ((1.0,), "single", (0.0,)),
        ((), "single", ()),
        ((None, None), "single", (None, None)),
        ((None, 0.5, None), "single", (None, 0.0, None)),
        ((0.0, 0.0, 0.0), "equal", (0.0, 0.0, 0.0)),
        ((1.0, None, 1.0), "equal", (0.0, None, 0.0)),
        ((0.1 + 0.2, 0.3), "equal", (0.0, 0.0)),  # a rounding is no difference, and is not blown up by the std
    ],
)
def test_groups_that_teach_nothing(rewards: Any, why: str, values: Any, scale: Any) -> None:
    found = group_advantages(rewards, scale)
    assert (found.values, found.degenerate) == (values, why)


REWARDS = st.lists(st.integers(-8, 8).map(lambda n: n / 8), min_size=2, max_size=9)


@given(REWARDS, st.randoms(use_true_random=False), st.integers(-3, 3), st.integers(1, 5))
def test_advantages_know_differences_only(rewards: list[float], random: Any, shift: int, factor: int) -> None:
    """They sum to 0, follow their response, and are unmoved by what all rewards have in common."""
    for scale in ("none", "group_std"):
        values = group_advantages(rewards, scale).values  # type: ignore[arg-type]
        assert math.fsum(v for v in values if v is not None) == pytest.approx(0, abs=1e-9)
        order = list(range(len(rewards)))
        random.shuffle(order)
        shuffled = group_advantages([rewards[i] + shift for i in order], scale).values  # type: ignore[arg-type]
        assert shuffled == pytest.approx([values[i] for i in order], abs=1e-9)
        holes = group_advantages([*rewards, None], scale).values  # type: ignore[arg-type]
        assert holes == (*values, None)
        scaled = group_advantages([factor * reward for reward in rewards], scale).values  # type: ignore[arg-type]
        expected = [(factor if scale == "none" else 1) * (v or 0.0) for v in values]
        assert scaled == pytest.approx(expected, abs=1e-4)  # 1e-6 is added to the std


# --- clipping --------------------------------------------------------------------------------------------------
def ratio_terms(ratios: Sequence[float], advantages: Sequence[float], **options: Any) -> tuple[Any, list[float]]:
    """Terms of tokens of given π/μ, as one response each; and the gradient at each log π."""
    behaviour_R = torch.tensor([-1.5] * len(ratios), dtype=torch.float64)
    logprobs_R = (behaviour_R + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    settings = {"clip_low": 0.2, "clip_high": 0.28} | options
    advantages_R = torch.tensor(advantages, dtype=torch.float64)
    terms = policy_terms(logprobs_R, behaviour_R, advantages_R, [1] * len(ratios), **settings)
    terms.loss_R.sum().backward()
    assert logprobs_R.grad is not None
    return terms, logprobs_R.grad.tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.0, -2.0, 2.0, 2.0, False),
        (1.2, 2.0, -2.4, -2.4, False),
        (1.5, 2.0, -2.56, 0.0, True),  # 1.28 · 2: a good token has become likely enough
        (0.5, 2.0, -1.0, -1.0, False),  # a good token that became unlikely is pulled back
        (0.5, -2.0, 1.6, 0.0, True),  # 0.8 · 2: a bad token has become unlikely enough
        (1.5, -2.0, 3.0, 3.0, False),  # a bad token that became likely is pushed down, without bound
        (0.81, -2.0, 1.62, 1.62, False),
        (1.27, 2.0, -2.54, -2.54, False),
        (3.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    """d(ρ A)/d log π = ρ A."""
    terms, found = ratio_terms([ratio], [advantage])
    assert terms.loss_R.item() == pytest.approx(loss, rel=1e-12)
    assert found == pytest.approx([gradient], rel=1e-12)
    assert terms.clipped_R.tolist() == [clipped]
    assert terms.masked_R.tolist() == [False]


def test_the_sequence_mask_by_hand() -> None:
    """Means of log μ − log π: 0.5, 0.5, 0.4, −1; only a negative advantage is masked, and as a whole response."""
    gaps = [[0.9, 0.1], [0.0, 1.5, 0.0], [0.4], [-1.0]]
    advantages = [-1.0, 1.0, -1.0, -1.0]
    lengths = [len(gap) for gap in gaps]
    behaviour_R = torch.full((sum(lengths),), -2.0, dtype=torch.float64)
    logprobs_R = (behaviour_R - torch.tensor([value for gap in gaps for value in gap])).requires_grad_()
    advantages_R = torch.tensor(advantages, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
    masked = []
    for bound in (None, 0.45, 0.3):
        terms = policy_terms(
            logprobs_R, behaviour_R, advantages_R, lengths, clip_low=0.9, clip_high=9.0, mask_above=bound
        )
        (gradient,) = torch.autograd.grad(terms.loss_R.sum(), logprobs_R)
        assert ((gradient == 0) == terms.masked_R).all()
        assert ((terms.loss_R == 0) == terms.masked_R).all()
        masked.append(terms.masked_R.int().tolist())
    assert masked == [[0] * 7, [1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1, 0]]


# --- the KL to the reference -----------------------------------------------------------------------------------
def test_estimators_by_hand() -> None:
    """π_ref/π = 2, so k3 = 2 − log 2 − 1 = 0.306853; π/μ = 0.5 halves it."""
    arguments = [torch.tensor([value], dtype=torch.float64) for value in (LOG(0.2), LOG(0.4), LOG(0.4))]
    assert reference_kl(*arguments, "k3").item() == pytest.approx(0.306853, abs=1e-6)  # type: ignore[arg-type, misc]
    assert reference_kl(*arguments, "unbiased").item() == pytest.approx(0.153426, abs=1e-6)  # type: ignore[arg-type, misc]
    for estimator in ("k3", "unbiased"):
        assert reference_kl(arguments[0], arguments[0], arguments[2], estimator).item() == 0  # type: ignore[arg-type]


def test_a_reference_that_finds_a_token_far_likelier_leaves_the_gradient_exact() -> None:
    """−π/μ · log(π_ref/π), in float32: as k3 · π/μ is written, terms of e^14 would cancel in it."""
    logprobs_R = torch.tensor([-15.0, -8.0], requires_grad=True)
    reference_kl(logprobs_R, torch.tensor([-1.0, -9.0]), torch.tensor([-15.5, -8.25]), "unbiased").sum().backward()
    assert logprobs_R.grad is not None
    assert logprobs_R.grad.tolist() == pytest.approx([-14 * math.exp(0.5), math.exp(0.25)], rel=1e-6)


def expectations(seed: int, estimator: Any) -> tuple[list[Tensor], list[Tensor]]:
    """([reverse KL, its gradient], [expectation of the estimator over y ~ μ, its gradient]), by enumeration."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference, behaviour = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    log_p, log_r, log_mu = (x.log_softmax(0) for x in (logits, reference, behaviour))
    exact = (log_p.exp() * (log_p - log_r)).sum()
    mean = (log_mu.exp() * reference_kl(log_p, log_r, log_mu, estimator)).sum()
    found = [[value.detach(), *torch.autograd.grad(value, logits, retain_graph=True)] for value in (exact, mean)]
    return found[0], found[1]


@given(st.integers(0, 10_000))
def test_the_unbiased_estimator_is_that_of_the_reverse_kl(seed: int) -> None:
    for wanted, found in zip(*expectations(seed, "unbiased"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_k3_is_not_where_another_policy_has_written(seed: int) -> None:
    for wanted, found in zip(*expectations(seed, "k3"), strict=True):
        assert float((found - wanted).abs().max()) > 0.05


def test_k3_has_the_wrong_gradient_even_of_the_present_policys_own_tokens() -> None:
    """y ~ π: the value of k3 is right, its gradient is that of the forward KL, π − π_ref."""
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    log_p, log_r = logits.log_softmax(0), torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64).log()
    mean = (log_p.detach().exp() * reference_kl(log_p, log_r, log_p.detach(), "k3")).sum()
    (found,) = torch.autograd.grad(mean, logits, retain_graph=True)
    torch.testing.assert_close(found, (log_p.exp() - log_r.exp()).detach())
    torch.testing.assert_close(mean, (log_p.exp() * (log_p - log_r)).sum())


# --- aggregation -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("token_mean", [0.1, 0.1, 0.1]),
        ("sequence_mean", [1 / 6, 1 / 9, 1 / 15]),
        ("constant_length", [1 / 24, 1 / 24, 1 / 24]),
    ],
)
def test_weights_by_hand(aggregation: Aggregation, weights: list[float]) -> None:
    assert token_weights([2, 3, 5], aggregation, constant=8) == pytest.approx(weights, rel=1e-12)


def test_a_constant_length_must_be_told() -> None:
    with pytest.raises(ValueError, match="constant: the length to divide by is required"):
        token_weights([2], "constant_length")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_means_weigh_one_in_all(lengths: list[int]) -> None:
    for aggregation in ("token_mean", "sequence_mean"):
        weights = token_weights(lengths, aggregation)  # type: ignore[arg-type]
        assert math.fsum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1)


# --- TRL -------------------------------------------------------------------------------------------------------
LENGTHS = [3, 7, 1, 5]
LONGEST = 9
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
TRL_NAMES: dict[Aggregation, tuple[str, ...]] = {
    "sequence_mean": ("grpo",),
    "token_mean": ("bnpo", "dapo"),
    "constant_length": ("dr_grpo",),
}


@pytest.fixture(scope="module")
def trl_loss() -> Any:
    """``GRPOTrainer._compute_loss``, imported where it is needed: that takes seconds."""
    from trl import GRPOTrainer

    def loss(self: Any, inputs: dict[str, Any]) -> Tensor:
        self.get_off_policy_mask = GRPOTrainer.get_off_policy_mask
        result: Tensor = GRPOTrainer._compute_loss(self, None, inputs)
        return result

    return loss


def stand_in(loss_type: str, logprobs_ST: Tensor, *, beta: float, unbiased: bool, mask_above: float | None) -> Any:
    """What ``_compute_loss`` reads of its trainer: settings, and the log-probabilities of the model."""
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, sync_gradients=True
    )
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs_ST, torch.zeros_like(logprobs_ST), None),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=accelerator,
        args=SimpleNamespace(use_bias_correction_kl=unbiased, delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=CLIPS["clip_high"],
        epsilon_low=CLIPS["clip_low"],
        importance_sampling_level="token",
        loss_type=loss_type,
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=mask_above,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )


@pytest.mark.parametrize("mask_above", [None, 0.15], ids=["unmasked", "masked"])
@pytest.mark.parametrize("kl", [None, "k3", "unbiased"])
@pytest.mark.parametrize(
    ("aggregation", "loss_type"), [(aggregation, name) for aggregation, names in TRL_NAMES.items() for name in names]
)
def test_trl_says_the_same(
    trl_loss: Any, aggregation: Aggregation, loss_type: str, kl: Any, mask_above: float | None
) -> None:
    """Loss, gradient and clipped share on the same tensors, rows of differing lengths, to 1e-6."""
    beta = 0.3 if kl else 0.0
    generator = torch.Generator().manual_seed(3)
    size = (len(LENGTHS), max(LENGTHS))
    behaviour_ST, reference_ST = -3 * torch.rand(2, *size, generator=generator)
    given_ST = (behaviour_ST + 0.4 * torch.randn(size, generator=generator)).clamp(max=0.0)
    rewards = torch.tensor([0.0, 1.0, 0.25, 0.5])
    advantages = group_advantages(rewards.tolist(), "group_std").values
    real = torch.arange(size[1])[None] < torch.tensor(LENGTHS)[:, None]
    ids = torch.zeros(size, dtype=torch.long)

    theirs_ST = given_ST.clone().requires_grad_()
    trainer = stand_in(loss_type, theirs_ST, beta=beta, unbiased=kl == "unbiased", mask_above=mask_above)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids, "completion_mask": real.long(), "advantages": torch.tensor(advantages),
        "old_per_token_logps": behaviour_ST, "ref_per_token_logps": reference_ST,
        "num_items_in_batch": torch.tensor(sum(LENGTHS)),
    }  # fmt: skip
    theirs = trl_loss(trainer, inputs)
    theirs.backward()

    ours_R = given_ST[real].clone().requires_grad_()
    lengths = torch.tensor(LENGTHS)
    terms = policy_terms(
        ours_R,
        behaviour_ST[real],
        torch.tensor(advantages).repeat_interleave(lengths),
        LENGTHS,
        **CLIPS,
        mask_above=mask_above,
    )
    loss_R = terms.loss_R
    if kl:
        loss_R = loss_R + beta * reference_kl(ours_R, reference_ST[real], behaviour_ST[real], kl)
    weights = torch.tensor(token_weights(LENGTHS, aggregation, constant=LONGEST)).repeat_interleave(lengths)
    ours = (weights * loss_R).sum()
    ours.backward()

    assert theirs_ST.grad is not None
    assert ours_R.grad is not None
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert float((ours_R.grad - theirs_ST.grad[real]).abs().max()) <= 1e-6
    assert float(theirs_ST.grad[~real].abs().max()) == 0
    (clipped,) = trainer._metrics["train"]["clip_ratio/region_mean"]
    assert terms.clipped_R.double().mean().item() == pytest.approx(clipped)
    # The case has all there is to differ in: both clips, responses of every sign, and one that the mask takes out.
    signs = {math.copysign(1, a) for a, n in zip(advantages, LENGTHS, strict=True) if a}
    assert signs == {-1.0, 1.0}
    assert terms.clipped_R.any()
    assert terms.masked_R.any() == (mask_above is not None)
    assert not terms.masked_R.all()


def test_the_cases_against_trl_tell_the_aggregations_apart(trl_loss: Any) -> None:
    """Otherwise agreement with each would show nothing."""
    logprobs_ST = torch.linspace(-2.0, -0.1, 4 * 7).reshape(4, 7)
    real = torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]
    ids = torch.zeros(4, 7, dtype=torch.long)
    losses = []
    for loss_type in ("grpo", "bnpo", "dr_grpo"):
        trainer = stand_in(loss_type, logprobs_ST, beta=0.0, unbiased=False, mask_above=None)
        inputs = {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": real.long(),
            "advantages": torch.tensor([1.0, -2.0, 0.5, 3.0]), "old_per_token_logps": logprobs_ST - 0.1,
        }  # fmt: skip
        losses.append(trl_loss(trainer, inputs).item())
    assert all(abs(one - other) > 1e-2 for one, other in pairwise(sorted(losses)))
