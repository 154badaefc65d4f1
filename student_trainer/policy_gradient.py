"""The clipped policy gradient with group advantages: GRPO, and what DAPO, Dr. GRPO and DeepSeek-V3.2 change. Pure.

Of a group of G responses to one prompt with rewards r_i, response i has the advantage (r_i − mean r) / std r, or
r_i − mean r. With ρ_t = π(y_t) / μ(y_t), μ the policy that wrote token t, a token's loss is

    − M_i · min(ρ_t A_i, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_i) + β · KL_t

Sources: GRPO, arXiv 2402.03300, Eq. 3; DAPO, arXiv 2503.14476, Eq. 8; Dr. GRPO, arXiv 2503.20783; the mask M and the
unbiased KL: DeepSeek-V3.2, arXiv 2512.02556. Letters: R response tokens of a pass, S responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STD_EPS = 1e-6  # added to a group's standard deviation
EQUAL_WITHIN = 1e-9  # rewards that differ by no more are equal but for a verifier's rounding

Scale = Literal["group_std", "none"]
Aggregation = Literal["sequence_mean", "token_mean", "constant_length"]


# --- groups ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class GroupAdvantages:
    """Of one group.

    Attributes:
        values: one per response; None where it has no reward, and is left out.
        degenerate: why nothing can be learned from it ("single", "equal"), or None.
    """

    values: tuple[float | None, ...]
    degenerate: Literal["single", "equal"] | None


def all_equal(values: Sequence[float]) -> bool:
    """Whether they differ by no more than a verifier's rounding; at least one."""
    return max(values) - min(values) <= EQUAL_WITHIN


def group_advantages(rewards: Sequence[float | None], scale: Scale) -> GroupAdvantages:
    """Advantages within one group.

    A degenerate group (fewer than two rewards, or all equal) has advantages of exactly 0. The standard deviation is
    that of a sample (G − 1 in the denominator), as in TRL and verl.

    Args:
        rewards: None: the response could not be graded, which is no reward of 0.
    """
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2 or all_equal(known):
        zeros = tuple(None if reward is None else 0.0 for reward in rewards)
        return GroupAdvantages(zeros, "single" if len(known) < 2 else "equal")
    mean = math.fsum(known) / len(known)
    divisor = 1.0
    if scale == "group_std":
        divisor = math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / (len(known) - 1)) + STD_EPS
    return GroupAdvantages(tuple(None if reward is None else (reward - mean) / divisor for reward in rewards), None)


# --- tokens ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """Of every token.

    Attributes:
        loss_R: without the KL; differentiable.
        clipped_R: bool, the clip keeps the token from being learned from.
        masked_R: bool, the sequence mask does.
    """

    loss_R: Tensor
    clipped_R: Tensor
    masked_R: Tensor


def policy_terms(
    logprobs_R: Tensor,
    behaviour_R: Tensor,
    advantages_R: Tensor,
    lengths: Sequence[int],
    *,
    clip_low: float,
    clip_high: float,
    mask_above: float | None = None,
) -> PolicyTerms:
    """− M · min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A), token by token.

    Args:
        logprobs_R: log π, nats, with gradient.
        behaviour_R: log μ, of the policy that wrote.
        advantages_R: A of each token's response.
        lengths: tokens of each response, in order; they sum to R.
        mask_above: responses with A < 0 whose mean of log μ − log π exceeds it have M = 0.
    """
    ratio_R = (logprobs_R - behaviour_R).exp()
    clipped_ratio_R = ratio_R.clamp(1 - clip_low, 1 + clip_high)
    loss_R = -torch.minimum(ratio_R * advantages_R, clipped_ratio_R * advantages_R)
    ratio_R = ratio_R.detach()
    clipped_R = ((ratio_R < 1 - clip_low) & (advantages_R < 0)) | ((ratio_R > 1 + clip_high) & (advantages_R > 0))
    masked_R = torch.zeros_like(clipped_R)
    if mask_above is not None:
        lengths_S = torch.tensor(lengths, device=logprobs_R.device)
        gaps = (behaviour_R - logprobs_R.detach()).double().split(list(lengths))
        mean_S = torch.stack([gap.mean() for gap in gaps]) if gaps else lengths_S.double()
        masked_R = (mean_S > mask_above).repeat_interleave(lengths_S) & (advantages_R < 0)
        loss_R = loss_R.masked_fill(masked_R, 0.0)
    return PolicyTerms(loss_R, clipped_R, masked_R)


def reference_kl(
    logprobs_R: Tensor, reference_R: Tensor, behaviour_R: Tensor, estimator: Literal["unbiased", "k3"]
) -> Tensor:
    """An estimate of KL(π ‖ π_ref) from each token that was written, with gradient.

    k3 = π_ref/π − log(π_ref/π) − 1 (Schulman). Where y ~ μ, its gradient is that of another divergence; weighted by
    π/μ (DeepSeek-V3.2, section 3.1) value and gradient are unbiased for the reverse KL.
    """
    log_quotient_R = reference_R - logprobs_R
    if estimator == "k3":
        return torch.expm1(log_quotient_R) - log_quotient_R
    # k3 · π/μ, multiplied out: its gradient −π/μ · log(π_ref/π) then is no difference of terms as large as π_ref/π.
    return (reference_R - behaviour_R).exp() - (logprobs_R - behaviour_R).exp() * (log_quotient_R + 1)


def token_weights(lengths: Sequence[int], aggregation: Aggregation, *, constant: int | None = None) -> list[float]:
    """What every token of response i counts in the loss of a whole mini-batch.

    Args:
        lengths: tokens of all responses of the mini-batch, over all passes.
        constant: L of constant_length.
    """
    match aggregation:
        case "token_mean":
            return [1.0 / sum(lengths)] * len(lengths)
        case "sequence_mean":
            return [1.0 / (len(lengths) * length) for length in lengths]
        case "constant_length":
            if constant is None:
                raise ValueError("constant: the length to divide by is required")
            return [1.0 / (len(lengths) * constant)] * len(lengths)
