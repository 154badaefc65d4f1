"""The shared key-value cache of a batch that changes at every step, and the keys and values of one sequence.

Letters: B rows (requests), H key-value heads, T tokens of one sequence, C columns of capacity, K columns in view,
D head size, Q new columns.

All rows are right-aligned: the newest token of every request stands in the same column, so one step writes one
contiguous column for the whole batch, and the distance between two columns of a row is the distance between their
positions. That is why the model's own masks, sliding windows included, hold with nothing but a 2-D padding mask.

    column      0 1 2 3 4 5 6 7
    request a   . . . a a a a a     start 3
    request b   . . . . . b b b     start 5, admitted later
                      ^view     ^end

Rows join and leave by copying themselves, never the batch. Columns left of a row's start are finite (zero), because a
masked key has attention weight 0 and 0 × NaN is NaN: what one request left behind must not poison the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

_MIN_COLUMNS = 64


class CacheMode(StrEnum):
    """How the keys and values of running requests are kept, fastest first."""

    BATCHED = "batched"  # one right-aligned cache, one forward pass per step for all requests
    PER_REQUEST = "per_request"  # each request owns whatever cache the model makes; batch 1
    UNCACHED = "uncached"  # the whole sequence again for every token; the reference


class KeyValues:
    """Keys and values of one sequence outside the shared cache. The tensors are never written again.

    Attributes:
        layers: per layer (keys, values), each [H, T, D]; None for a layer that borrows another layer's. Empty at T = 0.
        length: T.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor] | None] | None = None, length: int = 0) -> None:
        self.layers = layers or []
        self.length = length

    def copy(self) -> KeyValues:
        """Another owner of the same tensors."""
        return KeyValues(list(self.layers), self.length)

    def take(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """One layer, which is forgotten here: while a sequence moves, only one layer of it exists twice."""
        taken, self.layers[layer] = self.layers[layer], None
        return taken

    def own_storage(self) -> None:
        """Copy what is a view into something larger, which it would keep in memory."""
        self.layers = [pair and (_own_storage(pair[0]), _own_storage(pair[1])) for pair in self.layers]


def _own_storage(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _Columns:
    """What all layers share. A forward pass writes [end, end + Q) in every layer before ``end`` moves on."""

    def __init__(self) -> None:
        self.view = 0  # first column any row needs
        self.end = 0  # one beyond the newest column
        self.capacity = 0  # C
        self.capacity_rows = 0

    @property
    def length(self) -> int:
        return self.end - self.view


class RightAlignedLayer(DynamicLayer):
    """Keys and values of one layer in buffers [capacity rows, H, C, D].

    It stands for sliding-window layers too: it keeps every column and the model's mask hides those beyond the window.
    """

    is_croppable = False
    keys: Any  # a Tensor from the first update on; None before
    values: Any

    def __init__(self, columns: _Columns) -> None:
        super().__init__()
        self._columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states [..., H, T, D]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, columns = self._columns.capacity_rows, self._columns.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[-3], columns, key_states.shape[-1])
        self.values = value_states.new_zeros(rows, value_states.shape[-3], columns, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, D] at the end, where there is room; return the views [B, H, K + Q, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, queries, _ = key_states.shape
        view, end = self._columns.view, self._columns.end
        self.keys[:rows, :, end : end + queries] = key_states
        self.values[:rows, :, end : end + queries] = value_states
        return self.keys[:rows, :, view : end + queries], self.values[:rows, :, view : end + queries]

    def write_rows(self, row: int, end: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put (keys, values), all [H, T, D] of one T, into columns [end − T, end) of the rows from ``row`` on, and zero
        before them."""
        if not self.is_initialized:
            self.lazy_initialization(*pairs[0])
        for buffer, states in zip((self.keys, self.values), zip(*pairs, strict=True), strict=True):
            start = end - states[0].shape[1]
            buffer[row : row + len(states), :, :start].zero_()
            buffer[row : row + len(states), :, start:end] = states[0] if len(states) == 1 else torch.stack(states)

    def move(self, rows: int, old: slice, new: slice) -> None:
        """Move columns ``old`` of the first rows to ``new``, into buffers of the capacity there is by now. The columns
        before them become zero."""
        for name in ("keys", "values"):
            buffer = target = getattr(self, name)
            capacity = (self._columns.capacity_rows, self._columns.capacity)
            if (buffer.shape[0], buffer.shape[2]) != capacity:
                target = buffer.new_zeros(capacity[0], buffer.shape[1], capacity[1], buffer.shape[3])
                target[:rows, :, new] = buffer[:rows, :, old]
            elif old != new:
                # The two ranges may overlap, hence the copy.
                target[:rows, :, new] = buffer[:rows, :, old].clone()
                target[:rows, :, : new.start].zero_()
            setattr(self, name, target)

    def get_seq_length(self) -> int:
        """Columns in view, K."""
        return self._columns.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(K + Q, 0): the model's mask spans the view."""
        return self._columns.length + query_length, 0


class RightAlignedCache(Cache):
    """A transformers cache whose rows come and go.

    Use: ``inputs`` for the new tokens' masks and positions, one forward pass, then ``commit``. Until ``commit`` a
    forward pass that raised has changed nothing that is visible.

    Buffers grow by doubling, rows and columns each, so that a column is copied O(1) times per token on average.

    Attributes:
        max_cells: rows × columns that the buffers may grow to, where what has to be held fits; None: no bound.
    """

    def __init__(self, num_layers: int) -> None:
        self._columns = _Columns()
        self._starts: list[int] = []
        self._layers = [RightAlignedLayer(self._columns) for _ in range(num_layers)]
        self.max_cells: int | None = None
        super().__init__(layers=list(self._layers))

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self._starts)

    @property
    def cells(self) -> int:
        """Rows × columns of the buffers."""
        return self._columns.capacity_rows * self._columns.capacity

    @classmethod
    def for_pass(
        cls, num_layers: int, contexts: Sequence[KeyValues], lengths: Sequence[int], queries: int
    ) -> RightAlignedCache:
        """A cache for one pass of Q columns over B sequences of these lengths, new tokens included.

        Of each sequence the last Q tokens are read, again if they are known already; a shorter one is padded on the
        left. ``contexts`` (with as many tokens as go before the pass, or more) are used up.
        """
        cache = cls(num_layers)
        columns = cache._columns
        columns.end = max(0, max(lengths) - queries)
        columns.capacity, columns.capacity_rows = columns.end + queries, len(contexts)
        cache._starts = [columns.capacity - length for length in lengths]
        columns.view = min(cache._starts)
        for index, layer in enumerate(cache._layers):
            for row, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
                pair = context.take(index) if context.layers else None
                if pair is not None and length > queries:
                    before = slice(length - queries)
                    layer.write_rows(row, columns.end, [(pair[0][:, before], pair[1][:, before])])
        return cache

    def inputs(self, queries: int) -> tuple[Tensor | None, Tensor]:
        """For Q new columns: the padding mask int64 [B, K + Q], or None where nothing is padded, and the position
        ids int64 [B, Q] (0 on padding)."""
        self._make_room(self.num_rows, self._columns.length, queries)
        starts = torch.tensor(self._starts)
        end = self._columns.end
        positions = (torch.arange(end, end + queries) - starts[:, None]).clamp_min_(0)
        if max(self._starts) <= self._columns.view:
            return None, positions
        mask = torch.arange(self._columns.view, end + queries) >= starts[:, None]
        return mask.long(), positions

    def commit(self, queries: int) -> None:
        """The forward pass over Q columns succeeded."""
        self._columns.end += queries

    def row(self, row: int) -> KeyValues:
        """Views of one row."""
        columns = slice(self._starts[row], self._columns.end)
        layers = [
            (layer.keys[row, :, columns], layer.values[row, :, columns]) if layer.is_initialized else None
            for layer in self._layers
        ]
        return KeyValues(layers, columns.stop - columns.start)

    def append_rows(self, contexts: Sequence[KeyValues]) -> list[int]:
        """Copy sequences behind the rows here, aligned to the same end → which of them each new row is. They are used
        up. Those of one length are copied together."""
        if not self._starts:
            self._columns.view = self._columns.end = 0
        order = sorted(range(len(contexts)), key=lambda index: contexts[index].length)
        longest = contexts[order[-1]].length
        first = self.num_rows
        self._make_room(first + len(order), max(self._columns.length, longest), 0)
        end = self._columns.end
        for index, layer in enumerate(self._layers):
            row = first
            for _, group in groupby(order, key=lambda number: contexts[number].length):
                pairs = [contexts[number].take(index) for number in group]
                states = [pair for pair in pairs if pair is not None]
                if states:
                    layer.write_rows(row, end, states)
                row += len(pairs)
        self._starts += [end - contexts[number].length for number in order]
        self._columns.view = min(self._starts)
        return order

    def remove_rows(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """The last rows that stay take the places of those that go → (from, to) of each; the others keep theirs."""
        kept = self.num_rows - len(rows)
        gone = set(rows)
        moves = list(
            zip(
                [row for row in range(kept, self.num_rows) if row not in gone],
                sorted(row for row in gone if row < kept),
                strict=True,
            )
        )
        if moves:
            sources, targets = ([move[side] for move in moves] for side in (0, 1))
            columns = slice(self._columns.view, self._columns.end)
            for layer in self._layers:
                if layer.is_initialized:
                    for buffer in (layer.keys, layer.values):
                        buffer[targets, :, columns] = buffer[sources, :, columns]
            for source, target in moves:
                self._starts[target] = self._starts[source]
        del self._starts[kept:]
        if self._starts:
            self._columns.view = min(self._starts)
        return moves

    def shrink(self) -> None:
        """Give back what the buffers hold beyond ``max_cells``, as far as the rows do without."""
        if self.max_cells is not None and self.cells > self.max_cells:
            columns = self._columns
            rows = max(self.num_rows, 1)
            self._move(rows, max(columns.length, min(columns.capacity, self.max_cells // rows)), columns.length)

    def _make_room(self, rows: int, span: int, queries: int) -> None:
        """For so many rows, so many columns before the end (which moves right for it), and Q columns behind it."""
        columns = self._columns
        if rows <= columns.capacity_rows and span <= columns.end and columns.end + queries <= columns.capacity:
            return
        needed = span + queries
        capacity_rows = columns.capacity_rows if rows <= columns.capacity_rows else max(rows, 2 * columns.capacity_rows)
        # To gain columns at the right end the view slides to column 0 once those before it are as many as those in it.
        slides = columns.end + queries <= columns.capacity or columns.view >= columns.length
        keeps = needed <= columns.capacity and slides
        capacity = columns.capacity if keeps else max(needed, 2 * columns.capacity, _MIN_COLUMNS)
        if self.max_cells is not None and capacity_rows * capacity > self.max_cells:
            if capacity_rows * needed > self.max_cells:
                capacity_rows = rows
            capacity = max(needed, min(capacity, self.max_cells // capacity_rows))
        self._move(capacity_rows, capacity, span)

    def _move(self, capacity_rows: int, capacity: int, to_end: int) -> None:
        """Give the buffers a capacity, and move all rows so that the newest column is ``to_end`` − 1."""
        columns = self._columns
        columns.capacity_rows, columns.capacity = capacity_rows, capacity
        shift = to_end - columns.end
        old = slice(columns.view, columns.end)
        new = slice(old.start + shift, old.stop + shift)
        for layer in self._layers:
            if layer.is_initialized:
                layer.move(self.num_rows, old, new)
        columns.view, columns.end = new.start, new.stop
        self._starts = [start + shift for start in self._starts]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: keys [heads, key_size] and values [heads, value_size].

    ``windowed``: the model's own layer forgets what is behind its window.
    """

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    windowed: bool = False

    def fits(self, keys: Tensor, values: Tensor, length: int) -> bool:
        """Whether these are keys [H, T, D] and values of so many tokens."""
        return (
            keys.shape == (self.heads, length, self.key_size)
            and values.shape == (self.heads, length, self.value_size)
            and keys.dtype == values.dtype == self.dtype
        )


def layer_shapes(cache: Cache) -> tuple[LayerShape | None, ...]:
    """Of a cache that was written to and that :func:`batched_obstacle` finds plain."""
    shapes: list[LayerShape | None] = []
    layers: list[Any] = cache.layers
    for layer in layers:
        if layer.keys is None or layer.values is None:
            shapes.append(None)
        else:
            _, heads, _, size = layer.keys.shape
            windowed = isinstance(layer, DynamicSlidingWindowLayer)
            shapes.append(LayerShape(heads, size, layer.values.shape[-1], layer.keys.dtype, windowed))
    return tuple(shapes)


def bytes_per_token(cache: Any, tokens: int) -> int:
    """What a token takes in a cache that holds ``tokens``.

    Exact for plain layers, as if no window forgot anything. Of any other cache it is the memory of all its tensors
    shared out, which for a short probe is more than a token of a long sequence takes: compressed layers grow slower
    than their sequence.
    """
    if batched_obstacle(cache) is None:
        return sum(
            shape.heads * (shape.key_size + shape.value_size) * shape.dtype.itemsize
            for shape in layer_shapes(cache)
            if shape is not None
        )
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors_in(cache)}
    return -(-sum(storages.values()) // tokens)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """In attributes, lists and dicts of a cache and of its layers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, (Cache, CacheLayerMixin)):
        yield from _tensors_in(vars(value))


# A DummyLayer belongs to a layer that borrows another's keys and values: nothing is ever written to it.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


def batched_obstacle(cache: Cache | None) -> str | None:
    """Why rows of this model's own cache cannot share one right-aligned cache, or None.

    Compressed, recurrent and indexed layers keep more than one key and value per token, tied to absolute positions.
    """
    if not isinstance(cache, DynamicCache):
        return f"the model makes a {type(cache).__name__}, not a DynamicCache"
    strange = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in _PLAIN_LAYERS})
    return f"its cache has layers of type {', '.join(strange)}" if strange else None
