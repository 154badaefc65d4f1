"""The objectives, as values. What each minimizes per token, and its gradient to the logits over τ.

p is the student's distribution, q the teacher's, both softmax(logits / τ) over the V ids that are tokens; z_v is the
student's logit of id v over τ. With ∂p_u/∂z_v = p_u (1[u=v] − p_v), every objective F has the gradient
p_v (∂F/∂p_v − Σ_u p_u ∂F/∂p_u), in which a constant added to all ∂F/∂p_u cancels. All gradients below are derived so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ReverseKL:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v); gradient p_v (log p_v − log q_v − KL).

    DeepSeek-V4 report, arXiv 2606.19348, Eq. 29.
    """


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """KL(q ‖ p) = Σ_v q_v (log q_v − log p_v); gradient p_v − q_v."""


@dataclass(frozen=True, slots=True)
class JSD:
    """β KL(q ‖ m) + (1 − β) KL(p ‖ m), m = β q + (1 − β) p; gradient (1 − β) p_v (log p_v − log m_v − KL(p ‖ m)).

    Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv 2306.13649, Eq. 1. Divided by β it tends to
    the forward KL as β → 0, divided by 1 − β to the reverse KL as β → 1; those ends are objectives of their own.

    Raises:
        ValueError: ``beta`` is not strictly between 0 and 1.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta: {self.beta} is not strictly between 0 and 1; the limits are ForwardKL (0) and ReverseKL (1)"
            )


@dataclass(frozen=True, slots=True)
class ExOPD:
    """KL(p ‖ q_λ) with q_λ ∝ q^λ · r^(1−λ), r the reference model; gradient p_v (log p_v − log q_λ,v − KL).

    G-OPD ("Learning beyond Teacher"): its reward log q − log r, scaled by λ and regularized towards r, has the optimum
    log p = λ log q + (1 − λ) log r + const. λ = 1 is the reverse KL; λ > 1 extrapolates beyond the teacher. The paper's
    own loss differs by the normalizer of q_λ, which does not depend on p: the gradient is the same, and this one is
    zero at the optimum.

    Raises:
        ValueError: ``lam`` is not above 0 and finite.
    """

    lam: float = 1.25

    def __post_init__(self) -> None:
        if not 0.0 < self.lam < float("inf"):
            raise ValueError(f"lam: {self.lam} is not above 0 and finite")


@dataclass(frozen=True, slots=True)
class TopK:
    """Reverse KL between p and q after merging all ids outside a set K of k ids into one event, the tail.

    Σ_{e ∈ K ∪ {tail}} P_e ℓ_e with ℓ_e = log P_e − log Q_e; gradient p_v (ℓ_{e(v)} − Σ_e P_e ℓ_e). K is the teacher's
    top k, or the ids that the teacher's log-probabilities came with. It is a lower bound on KL(p ‖ q), and because the
    tail counts, no mass can be drained out of K for free.

    Attributes:
        k: size of K where the teacher's whole distribution is known; otherwise the signal's own width counts.

    Raises:
        ValueError: ``k`` is below 1.
    """

    k: int = 64

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: {self.k} is below 1")


@dataclass(frozen=True, slots=True)
class SampledToken:
    """log p_y − log q_y at the sampled id y: the one-sample estimate of the reverse KL, by its policy gradient.

    Gradient A (1[v=y] − p_v) with A = log p_y − log q_y taken as a constant: in expectation over y ~ p that of the full
    reverse KL, since E[∇ log p_y] = 0. The value must not be differentiated as it stands, for then the teacher would
    drop out of the gradient. Lu et al., "On-Policy Distillation" (Thinking Machines, 2025).
    """


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """log p_y of a given id y; gradient 1[v=y] − p_v, which is SampledToken's with A = 1.

    It has no teacher, so it is none of the objectives that a divergence can have: it is what
    :func:`opd_kernels.token_logprobs` asks of the same machinery.
    """


Objective: TypeAlias = ReverseKL | ForwardKL | JSD | ExOPD | TopK | SampledToken
