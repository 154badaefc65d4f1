"""How the engine calls the model: one class per cache mode, behind one small interface.

Letters: n sequences, V vocabulary rows of the head. All logits are those of the last position of each sequence.

A sequence is first read, in one pass or several, into a *context* of its own: what the model keeps of its tokens. Then
it joins the rows, which decode together, under a key (the request id). A backend knows nothing of sampling, of
stopping or of policies. A call that raises may have left behind what cannot be used: :meth:`Backend.read` of its
contexts, ``join`` and ``decode`` of all rows.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from rollout_server.cache import CacheMode, KeyValues, RightAlignedCache, batched_obstacle
from rollout_server.forward import LastTokenForward

# A pass over several sequences may hold this much padding, as a share of its tokens, before it is split in two.
_MAX_PADDING_SHARE = 0.25


class Context(Protocol):
    """What the model keeps of one sequence."""

    @property
    def length(self) -> int:
        """Tokens read."""


ContextT = TypeVar("ContextT", bound=Context)


@dataclass(frozen=True, slots=True)
class Reading(Generic[ContextT]):
    """Tokens to feed to one sequence: those of ``token_ids`` behind the first ``context.length``, one at least."""

    context: ContextT
    token_ids: Sequence[int]

    @property
    def new_tokens(self) -> int:
        """How many."""
        return len(self.token_ids) - self.context.length


class Backend(ABC, Generic[ContextT]):
    """Sequences in progress.

    Attributes:
        mode: which one this is.
        token_bytes: memory for keys and values of one token.
    """

    mode: CacheMode

    def __init__(self, forward: LastTokenForward, token_bytes: int = 0) -> None:
        self._forward = forward
        self.token_bytes = token_bytes

    def probe(self) -> None:
        """One pass over one fixed token, which concerns no sequence: raises if the model cannot run at all."""
        # 0 exists in every vocabulary. What a device could not do may not come to light before its result is copied.
        self._forward(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)[0].cpu()

    # --- sequences on their own ------------------------------------------------------------------------------
    @abstractmethod
    def empty(self) -> ContextT:
        """The context of no tokens."""

    @abstractmethod
    def copy(self, context: ContextT) -> ContextT:
        """One that can be read on while ``context`` stays as it is."""

    @abstractmethod
    def read(self, readings: Sequence[Reading[ContextT]]) -> tuple[list[ContextT], Tensor]:
        """One pass → (contexts of all their tokens, fp32 logits [n, V]). The contexts given are used up."""

    def groups(self, readings: Sequence[Reading[ContextT]]) -> list[list[int]]:
        """Which of these to read in one pass: indices."""
        return [[index] for index in range(len(readings))]

    def own_storage(self, context: ContextT) -> None:
        """Before a context is kept for long: let it hold no memory beyond its own."""

    # --- the rows --------------------------------------------------------------------------------------------
    @abstractmethod
    def join(self, contexts: Mapping[str, ContextT]) -> None:
        """Sequences that were read, by key, become rows. The contexts are used up."""

    @abstractmethod
    def decode(self, tokens: Mapping[str, int]) -> tuple[list[str], Tensor]:
        """Append one token to every row → (the keys, in the order of the rows; fp32 logits [n, V])."""

    @abstractmethod
    def drop(self, keys: Sequence[str]) -> None:
        """Forget rows."""

    @abstractmethod
    def drop_all(self) -> None:
        """Forget every row, and free their memory."""

    # --- memory ----------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Keys and values of the rows, with all the room that was set aside for them."""

    @abstractmethod
    def needed_bytes(self, lengths: Iterable[int]) -> int:
        """The least that rows of these lengths can be held in."""

    def limit(self, max_bytes: int) -> None:
        """Hold no more than this, unless the rows need more."""

    # --- keys and values that leave the process --------------------------------------------------------------
    def export(self, key: str) -> KeyValues | None:
        """Copies of the keys and values of a row, or None."""
        return None

    def restore(self, key_values: KeyValues) -> ContextT | None:
        """A context made of what :meth:`export` gave, or None where this mode has no use for it."""
        return None


@dataclass(slots=True)
class TokenIds:
    """A sequence of which the model keeps nothing."""

    ids: list[int]

    @property
    def length(self) -> int:
        """Tokens read."""
        return len(self.ids)


class UncachedBackend(Backend[TokenIds]):
    """Keeps the ids and runs the whole sequence, alone, for every token."""

    mode = CacheMode.UNCACHED

    def __init__(self, forward: LastTokenForward) -> None:
        super().__init__(forward)
        self._rows: dict[str, TokenIds] = {}

    def empty(self) -> TokenIds:
        return TokenIds([])

    def copy(self, context: TokenIds) -> TokenIds:
        return TokenIds(list(context.ids))

    def read(self, readings: Sequence[Reading[TokenIds]]) -> tuple[list[TokenIds], Tensor]:
        contexts = [TokenIds(list(reading.token_ids)) for reading in readings]
        return contexts, self._run(contexts)

    def join(self, contexts: Mapping[str, TokenIds]) -> None:
        self._rows.update(contexts)

    def decode(self, tokens: Mapping[str, int]) -> tuple[list[str], Tensor]:
        for key, token in tokens.items():
            self._rows[key].ids.append(token)
        return list(tokens), self._run([self._rows[key] for key in tokens])

    def drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            del self._rows[key]

    def drop_all(self) -> None:
        self._rows.clear()

    @property
    def held_bytes(self) -> int:
        return 0

    def needed_bytes(self, lengths: Iterable[int]) -> int:
        return 0

    def _run(self, contexts: Sequence[TokenIds]) -> Tensor:
        return torch.cat([self._forward(torch.tensor([context.ids]), use_cache=False)[0] for context in contexts])


@dataclass(slots=True)
class OwnCache:
    """A sequence in the cache that the model made for it (None before its first pass)."""

    cache: Any
    length: int


class PerRequestBackend(Backend[OwnCache]):
    """Each sequence owns the cache the model made for it and runs in a batch of one.

    The shapes of every call depend on the sequence alone, which is what the deterministic mode asks for.
    """

    mode = CacheMode.PER_REQUEST

    def __init__(self, forward: LastTokenForward, token_bytes: int = 0) -> None:
        super().__init__(forward, token_bytes)
        self._rows: dict[str, OwnCache] = {}

    def empty(self) -> OwnCache:
        return OwnCache(None, 0)

    def copy(self, context: OwnCache) -> OwnCache:
        """The layers of plain caches put new tensors in the place of old ones, so those may be shared."""
        if context.cache is None or batched_obstacle(context.cache):
            return copy.deepcopy(context)
        cache = copy.copy(context.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        return OwnCache(cache, context.length)

    def read(self, readings: Sequence[Reading[OwnCache]]) -> tuple[list[OwnCache], Tensor]:
        contexts, rows = [], []
        for reading in readings:
            ids_1T = torch.tensor([reading.token_ids[reading.context.length :]])
            logits, cache = self._forward(ids_1T, cache=reading.context.cache)
            contexts.append(OwnCache(cache, len(reading.token_ids)))
            rows.append(logits)
        return contexts, torch.cat(rows)

    def join(self, contexts: Mapping[str, OwnCache]) -> None:
        self._rows.update(contexts)

    def decode(self, tokens: Mapping[str, int]) -> tuple[list[str], Tensor]:
        rows = []
        for key, token in tokens.items():
            row = self._rows[key]
            logits, row.cache = self._forward(torch.tensor([[token]]), cache=row.cache)
            row.length += 1
            rows.append(logits)
        return list(tokens), torch.cat(rows)

    def drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            del self._rows[key]

    def drop_all(self) -> None:
        self._rows.clear()

    @property
    def held_bytes(self) -> int:
        return self.needed_bytes(row.length for row in self._rows.values())

    def needed_bytes(self, lengths: Iterable[int]) -> int:
        return self.token_bytes * sum(lengths)

    def export(self, key: str) -> KeyValues | None:
        row = self._rows[key]
        if batched_obstacle(row.cache) or any(type(layer) is not DynamicLayer for layer in row.cache.layers):
            return None  # a window has forgotten what it no longer needs
        layers: list[Any] = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in row.cache.layers]
        return KeyValues(layers, row.length)

    def restore(self, key_values: KeyValues) -> OwnCache | None:
        cache = DynamicCache()
        for index, pair in enumerate(key_values.layers):
            if pair is None:
                return None
            cache.update(pair[0][None], pair[1][None], index)
        return OwnCache(cache, key_values.length)


class BatchedBackend(Backend[KeyValues]):
    """All rows share one right-aligned cache; a step is one forward pass over one column."""

    mode = CacheMode.BATCHED

    def __init__(self, forward: LastTokenForward, token_bytes: int, num_layers: int) -> None:
        super().__init__(forward, token_bytes)
        self._num_layers = num_layers
        self._cache = RightAlignedCache(num_layers)
        self._rows: list[str] = []  # key of each row of the cache

    def empty(self) -> KeyValues:
        return KeyValues()

    def copy(self, context: KeyValues) -> KeyValues:
        return context.copy()

    def groups(self, readings: Sequence[Reading[KeyValues]]) -> list[list[int]]:
        """Of like length, in new tokens and in all: no group is more than a quarter padding."""
        groups: list[list[int]] = []
        sizes = [(reading.new_tokens, len(reading.token_ids)) for reading in readings]
        for index in sorted(range(len(readings)), key=lambda index: sizes[index]):
            group = [*groups[-1], index] if groups else [index]
            if groups and all(_padding_share([sizes[i][kind] for i in group]) <= _MAX_PADDING_SHARE for kind in (0, 1)):
                groups[-1] = group
            else:
                groups.append([index])
        return groups

    def read(self, readings: Sequence[Reading[KeyValues]]) -> tuple[list[KeyValues], Tensor]:
        queries = max(reading.new_tokens for reading in readings)
        cache = RightAlignedCache.for_pass(
            self._num_layers,
            [reading.context for reading in readings],
            [len(reading.token_ids) for reading in readings],
            queries,
        )
        # Padding is hidden by the mask; 0 exists in every vocabulary.
        rows = [list(reading.token_ids[-queries:]) for reading in readings]
        logits_BV = self._advance(cache, torch.tensor([[0] * (queries - len(ids)) + ids for ids in rows]))
        return [cache.row(row) for row in range(len(readings))], logits_BV

    def own_storage(self, context: KeyValues) -> None:
        context.own_storage()

    def join(self, contexts: Mapping[str, KeyValues]) -> None:
        keys = list(contexts)
        self._rows += [keys[index] for index in self._cache.append_rows(list(contexts.values()))]

    def decode(self, tokens: Mapping[str, int]) -> tuple[list[str], Tensor]:
        logits_BV = self._advance(self._cache, torch.tensor([[tokens[key]] for key in self._rows]))
        return list(self._rows), logits_BV

    def drop(self, keys: Sequence[str]) -> None:
        if len(keys) == len(self._rows):
            self.drop_all()
            return
        gone = set(keys)
        for source, target in self._cache.remove_rows([row for row, key in enumerate(self._rows) if key in gone]):
            self._rows[target] = self._rows[source]
        del self._rows[len(self._rows) - len(keys) :]

    def drop_all(self) -> None:
        max_cells = self._cache.max_cells
        self._cache = RightAlignedCache(self._num_layers)
        self._cache.max_cells = max_cells
        self._rows = []

    @property
    def held_bytes(self) -> int:
        return self._cache.cells * self.token_bytes

    def needed_bytes(self, lengths: Iterable[int]) -> int:
        """Every row has the columns of the longest."""
        lengths = list(lengths)
        return self.token_bytes * len(lengths) * max(lengths, default=0)

    def limit(self, max_bytes: int) -> None:
        self._cache.max_cells = max_bytes // self.token_bytes
        self._cache.shrink()

    def export(self, key: str) -> KeyValues | None:
        row = self._cache.row(self._rows.index(key))
        row.layers = [pair and (pair[0].clone(), pair[1].clone()) for pair in row.layers]
        return row

    def restore(self, key_values: KeyValues) -> KeyValues | None:
        return key_values.copy()

    def _advance(self, cache: RightAlignedCache, ids_BT: Tensor) -> Tensor:
        queries = ids_BT.shape[1]
        mask, positions = cache.inputs(queries)
        logits_BV, _ = self._forward(ids_BT, cache=cache, attention_mask=mask, position_ids=positions)
        cache.commit(queries)
        return logits_BV


def _padding_share(sizes: Sequence[int]) -> float:
    return 1 - sum(sizes) / (len(sizes) * max(sizes))


def make_backend(mode: CacheMode, model: nn.Module, *, num_cache_layers: int, token_bytes: int) -> Backend[Any]:
    """The backend of a mode.

    Args:
        num_cache_layers: what the model's own cache has; only BATCHED uses it.
        token_bytes: what a token takes in the model's own cache.
    """
    forward = LastTokenForward(model)
    match mode:
        case CacheMode.BATCHED:
            return BatchedBackend(forward, token_bytes, num_cache_layers)
        case CacheMode.PER_REQUEST:
            return PerRequestBackend(forward, token_bytes)
        case CacheMode.UNCACHED:
            return UncachedBackend(forward)
