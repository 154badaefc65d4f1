"""One forward pass of any transformers causal language model, for the logits of its last position."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class LastTokenForward:
    """Calls a causal language model for the logits of its last position only.

    The forward's signature is read once: ``logits_to_keep`` and ``position_ids`` are passed where it has them, and the
    name under which it takes its cache back is found (``past_key_values``, or ``cache_params`` for Mamba).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # A PEFT wrapper hides the forward it wraps behind **kwargs.
        get_base_model = getattr(model, "get_base_model", None)
        parameters = inspect.signature((get_base_model() if get_base_model else model).forward).parameters
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._takes_positions = "position_ids" in parameters
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.model.parameters()).device

    def __call__(
        self,
        ids_BT: Tensor,
        *,
        use_cache: bool = True,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """int64 [B, T] → (fp32 logits [B, V] of the last column, the cache as the model returned it)."""
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids if self._takes_positions else None}
        # What is None is left out: some forwards have no such argument.
        given: dict[str, Any] = {name: value.to(self.device) for name, value in inputs.items() if value is not None}
        if cache is not None:
            given[self._cache_name] = cache
        out = self.model(input_ids=ids_BT.to(self.device), use_cache=use_cache, **self._keep, **given)
        return out.logits[:, -1].float(), out.get(self._cache_name) if use_cache else None
