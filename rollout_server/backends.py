"""How the engine calls the model: one class per cache mode, behind one small interface.

Letters: n sequences, V vocabulary rows of the head. All logits are those of the last position of each sequence.

A backend knows sequences by key (the request id). It is told what to prefill, asked to decode one token for *every*
sequence it holds, and told what to drop. It knows nothing of sampling, of stopping or of policies. A call that raises
may have left caches half written: the engine then drops everything and prefills again.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from rollout_server.cache import CacheMode, RightAlignedCache

# A prefill batch may hold this much padding, as a share of its tokens, before it is split in two.
_MAX_PADDING_SHARE = 0.25


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


class Backend(ABC):
    """Sequences in progress, each known by a key."""

    mode: CacheMode

    def __init__(self, forward: LastTokenForward) -> None:
        self._forward = forward

    @abstractmethod
    def prefill(self, contexts: Mapping[str, Sequence[int]]) -> Tensor:
        """Take in sequences of at least one token → fp32 logits [n, V], in the mapping's order."""

    @abstractmethod
    def decode(self, tokens: Mapping[str, int]) -> tuple[list[str], Tensor]:
        """Append one token to every sequence held → (the keys, in the order of the rows; fp32 logits [n, V])."""

    @abstractmethod
    def drop(self, key: str) -> None:
        """Forget a sequence that is held."""

    @abstractmethod
    def drop_all(self) -> None:
        """Forget every sequence, and free their memory."""


class UncachedBackend(Backend):
    """Keeps the ids and runs the whole sequence, alone, for every token."""

    mode = CacheMode.UNCACHED

    def __init__(self, forward: LastTokenForward) -> None:
        super().__init__(forward)
        self._ids: dict[str, list[int]] = {}

    def prefill(self, contexts: Mapping[str, Sequence[int]]) -> Tensor:
        return self._run({key: list(ids) for key, ids in contexts.items()})

    def decode(self, tokens: Mapping[str, int]) -> tuple[list[str], Tensor]:
        return list(tokens), self._run({key: [*self._ids[key], token] for key, token in tokens.items()})

    def drop(self, key: str) -> None:
        del self._ids[key]

    def drop_all(self) -> None:
        self._ids.clear()

    def _run(self, ids: dict[str, list[int]]) -> Tensor:
        logits = torch.cat([self._forward(torch.tensor([row]), use_cache=False)[0] for row in ids.values()])
        self._ids |= ids
        return logits


class PerRequestBackend(Backend):
    """Each sequence owns the cache the model made for it and runs in a batch of one.

    The shapes of every call depend on the sequence alone, which is what the deterministic mode asks for.
    """

    mode = CacheMode.PER_REQUEST

    def __init__(self, forward: LastTokenForward) -> None:
        super().__init__(forward)
        self._caches: dict[str, Any] = {}

    def prefill(self, contexts: Mapping[str, Sequence[int]]) -> Tensor:
        rows = []
        for key, ids in contexts.items():
            logits, self._caches[key] = self._forward(torch.tensor([list(ids)]))
            rows.append(logits)
        return torch.cat(rows)

    def decode(self, tokens: Mapping[str, int]) -> tuple[list[str], Tensor]:
        rows = []
        for key, token in tokens.items():
            logits, self._caches[key] = self._forward(torch.tensor([[token]]), cache=self._caches[key])
            rows.append(logits)
        return list(tokens), torch.cat(rows)

    def drop(self, key: str) -> None:
        del self._caches[key]

    def drop_all(self) -> None:
        self._caches.clear()

    def cache_of(self, key: str) -> Cache:
        """The model's own cache of a sequence."""
        return self._caches[key]


class BatchedBackend(Backend):
    """All sequences share one right-aligned cache; a step is one forward pass over one column."""

    mode = CacheMode.BATCHED

    def __init__(self, forward: LastTokenForward, num_layers: int) -> None:
        super().__init__(forward)
        self._num_layers = num_layers
        self._cache = RightAlignedCache(num_layers)
        self._rows: list[str] = []  # key of each row of the cache

    def prefill(self, contexts: Mapping[str, Sequence[int]]) -> Tensor:
        """Prefill apart from the running rows, in groups of like length, then copy into the shared cache.

        Equal contexts are run once: the answers that a group draws to one prompt share its prefill.
        """
        keys_by_context: dict[tuple[int, ...], list[str]] = {}
        for key, ids in contexts.items():
            keys_by_context.setdefault(tuple(ids), []).append(key)
        finished = []
        logits_of: dict[str, Tensor] = {}
        for group in _like_length_groups(list(keys_by_context)):
            cache = RightAlignedCache(self._num_layers)
            cache.open_rows([len(ids) for ids in group])
            longest = max(len(ids) for ids in group)
            # The padding id is hidden by the mask; 0 exists in every vocabulary.
            ids_BT = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in group])
            logits_BV = self._advance(cache, ids_BT)
            keys, source_rows = [], []
            for row, ids in enumerate(group):
                for key in keys_by_context[ids]:
                    keys.append(key)
                    source_rows.append(row)
                    logits_of[key] = logits_BV[row]
            finished.append((cache, keys, source_rows))
        # Only now, so that a pass that raises leaves the running rows alone.
        for cache, keys, source_rows in finished:
            self._cache.append_rows(cache, source_rows)
            self._rows += keys
        return torch.stack([logits_of[key] for key in contexts])

    def decode(self, tokens: Mapping[str, int]) -> tuple[list[str], Tensor]:
        logits_BV = self._advance(self._cache, torch.tensor([[tokens[key]] for key in self._rows]))
        return list(self._rows), logits_BV

    def drop(self, key: str) -> None:
        row = self._rows.index(key)
        self._cache.remove_row(row)
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def drop_all(self) -> None:
        self._cache = RightAlignedCache(self._num_layers)
        self._rows = []

    def _advance(self, cache: RightAlignedCache, ids_BT: Tensor) -> Tensor:
        queries = ids_BT.shape[1]
        mask, positions = cache.inputs(queries)
        logits_BV, _ = self._forward(ids_BT, cache=cache, attention_mask=mask, position_ids=positions)
        cache.commit(queries)
        return logits_BV


def _like_length_groups(contexts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Partition by length so that no group is more than a quarter padding."""
    groups: list[list[tuple[int, ...]]] = []
    for ids in sorted(contexts, key=len):
        group = [*groups[-1], ids] if groups else [ids]
        padding = sum(len(ids) - len(member) for member in group)
        if groups and padding <= _MAX_PADDING_SHARE * len(ids) * len(group):
            groups[-1] = group
        else:
            groups.append([ids])
    return groups


def make_backend(mode: CacheMode, model: nn.Module, *, num_cache_layers: int) -> Backend:
    """The backend of a mode. ``num_cache_layers`` is what the model's own cache has; only BATCHED uses it."""
    forward = LastTokenForward(model)
    match mode:
        case CacheMode.BATCHED:
            return BatchedBackend(forward, num_cache_layers)
        case CacheMode.PER_REQUEST:
            return PerRequestBackend(forward)
        case CacheMode.UNCACHED:
            return UncachedBackend(forward)
