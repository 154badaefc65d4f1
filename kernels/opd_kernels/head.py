"""A language model's head: everything between the last hidden state and the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearHead:
    """``logits = cap(scale · (hidden @ weight.T + bias))``, ``cap(z) = soft_cap · tanh(z / soft_cap)`` if set.

    Attributes:
        weight: [V, d].
        bias: [V] or None.
        logit_scale: multiplies the projection (Cohere's ``logit_scale``; 1 / Granite's ``logits_scaling``).
        soft_cap: Gemma 2's final logit soft-cap, or None.
        valid_vocab_size: ids at or above it are padding: their logit is −inf. None: every row is a token.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    valid_vocab_size: int | None = None

    @property
    def vocab_size(self) -> int:
        """Rows that are tokens: V without padding."""
        return self.weight.shape[0] if self.valid_vocab_size is None else self.valid_vocab_size

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, d] → [T, vocab_size], in the dtype of the operands. Padding rows are left out rather than masked."""
        valid = self.vocab_size
        logits_TV = torch.nn.functional.linear(
            hidden_TD, self.weight[:valid], None if self.bias is None else self.bias[:valid]
        )
        if self.logit_scale != 1.0:
            logits_TV = logits_TV * self.logit_scale
        if self.soft_cap is not None:
            logits_TV = self.soft_cap * torch.tanh(logits_TV / self.soft_cap)
        return logits_TV


@dataclass(frozen=True, slots=True)
class Form:
    """A head's form with the temperature folded in: after_cap · tanh(before · (h Wᵀ + b)), or before · (h Wᵀ + b).

    Attributes:
        before: logit_scale / soft_cap, or logit_scale / τ without a soft-cap.
        after_cap: soft_cap / τ, or None.
    """

    before: float
    after_cap: float | None

    @classmethod
    def of(cls, head: LinearHead, temperature: float) -> Form:
        return cls(
            before=head.logit_scale / (temperature if head.soft_cap is None else head.soft_cap),
            after_cap=None if head.soft_cap is None else head.soft_cap / temperature,
        )

    @property
    def slope(self) -> float:
        """Derivative of the output by (h Wᵀ + b), tanh' left out."""
        return self.before * (1.0 if self.after_cap is None else self.after_cap)
