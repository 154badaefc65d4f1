"""What one model says of T response tokens: from its whole distribution down to one log-probability."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opd_kernels.head import LinearHead


@dataclass(frozen=True, slots=True)
class Signal:
    """Exactly one of four forms. No gradient flows into any of them.

    Attributes:
        hidden_TE, head: last hidden states [T, E] and the head that belongs to them.
        logits_TV: [T, V] final logits (scale and soft-cap applied, padding sliced off), finite.
        top_k_ids_TK, top_k_logprobs_TK: [T, K] distinct ids and their log-probabilities over the whole vocabulary at
            temperature 1.
        token_logprobs_T: [T] log-probability of each sampled id at temperature 1.
    """

    hidden_TE: Tensor | None = None
    head: LinearHead | None = None
    logits_TV: Tensor | None = None
    top_k_ids_TK: Tensor | None = None
    top_k_logprobs_TK: Tensor | None = None
    token_logprobs_T: Tensor | None = None

    @property
    def is_full(self) -> bool:
        """Whether the whole distribution is known."""
        return self.hidden_TE is not None or self.logits_TV is not None

    @property
    def is_top_k(self) -> bool:
        return self.top_k_ids_TK is not None
