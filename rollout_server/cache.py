"""The shared key-value cache of a batch that changes at every step.

Letters: B rows (requests), H key-value heads, C columns of capacity, K columns in view, D head size, Q new columns.

All rows are right-aligned: the newest token of every request stands in the same column, so one step writes one
contiguous column for the whole batch, and the distance between two columns of a row is the distance between their
positions. That is why the model's own masks, sliding windows included, hold with nothing but a 2-D padding mask.

    column      0 1 2 3 4 5 6 7
    request a   . . . a a a a a     start 3
    request b   . . . . . b b b     start 5, admitted later
                      ^view     ^end

Rows join and leave by copying one row, never the batch. Columns left of a row's start are finite (zero), because a
masked key has attention weight 0 and 0 × NaN is NaN: what one request left behind must not poison the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_MIN_COLUMNS = 64


class CacheMode(StrEnum):
    """How the keys and values of running requests are kept, fastest first."""

    BATCHED = "batched"  # one right-aligned cache, one forward pass per step for all requests
    PER_REQUEST = "per_request"  # each request owns whatever cache the model makes; batch 1
    UNCACHED = "uncached"  # the whole sequence again for every token; the reference


class _Columns:
    """The columns all layers share. A forward pass writes [end, end + Q) in every layer before ``end`` moves on."""

    def __init__(self) -> None:
        self.view = 0  # first column any row needs
        self.end = 0  # one beyond the newest column

    @property
    def length(self) -> int:
        return self.end - self.view


class RightAlignedLayer(DynamicLayer):
    """Keys and values of one layer in buffers [rows, H, C, D] that grow by doubling.

    It stands for sliding-window layers too: it keeps every column and the model's mask hides those beyond the window.
    """

    is_croppable = False
    keys: Any  # a Tensor [rows, H, C, D] from the first update on; None before
    values: Any

    def __init__(self, columns: _Columns) -> None:
        super().__init__()
        self._columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the first [B, H, Q, D] written."""
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (key_states.shape[0], key_states.shape[1], max(_MIN_COLUMNS, key_states.shape[2]))
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, D] at the end; return the views [B, H, K + Q, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, queries, _ = key_states.shape
        view, end = self._columns.view, self._columns.end
        self.reserve(rows, end + queries)
        self.keys[:rows, :, end : end + queries] = key_states
        self.values[:rows, :, end : end + queries] = value_states
        return self.keys[:rows, :, view : end + queries], self.values[:rows, :, view : end + queries]

    def reserve(self, rows: int, columns: int) -> None:
        """Grow to at least [rows, H, columns, D], doubling what is too small and keeping what is in view."""
        old_rows, _, old_columns, _ = self.keys.shape
        if rows <= old_rows and columns <= old_columns:
            return
        new_rows = old_rows if rows <= old_rows else max(rows, 2 * old_rows)
        new_columns = old_columns if columns <= old_columns else max(columns, 2 * old_columns)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(new_rows, old.shape[1], new_columns, old.shape[3])
            new[:old_rows, :, :old_columns] = old
            setattr(self, name, new)

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
    """

    def __init__(self, num_layers: int) -> None:
        self._columns = _Columns()
        self._starts: list[int] = []
        self._layers = [RightAlignedLayer(self._columns) for _ in range(num_layers)]
        super().__init__(layers=list(self._layers))

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self._starts)

    def open_rows(self, lengths: Sequence[int]) -> None:
        """Turn an empty cache into one of B rows whose prompts, padded on the left to the longest, come next."""
        longest = max(lengths)
        self._starts = [longest - length for length in lengths]

    def inputs(self, queries: int) -> tuple[Tensor | None, Tensor]:
        """For Q new columns: the padding mask int64 [B, K + Q], or None where nothing is padded, and the position
        ids int64 [B, Q] (0 on padding)."""
        self._make_room(queries)
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

    def append_rows(self, source: RightAlignedCache, source_rows: Sequence[int]) -> None:
        """Copy rows of ``source`` behind the rows here, aligned to the same end. A row may be copied repeatedly."""
        lengths = [source._columns.end - source._starts[row] for row in source_rows]
        if not self._starts:
            self._columns.view = self._columns.end = 0
        if max(lengths) > self._columns.end:
            self._move_view(to_end=max(lengths))
        end, first = self._columns.end, self.num_rows
        for mine, theirs in zip(self._layers, source._layers, strict=True):
            if not theirs.is_initialized:
                continue  # a layer that borrows another layer's keys and values
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys[:1, :, :1], theirs.values[:1, :, :1])
            mine.reserve(first + len(source_rows), end)
            for offset, (row, length) in enumerate(zip(source_rows, lengths, strict=True)):
                columns = slice(source._starts[row], source._columns.end)
                for buffer, from_buffer in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    buffer[first + offset, :, : end - length].zero_()
                    buffer[first + offset, :, end - length : end] = from_buffer[row, :, columns]
        self._starts += [end - length for length in lengths]
        self._columns.view = min(self._starts)

    def remove_row(self, row: int) -> None:
        """The last row takes the place of ``row``; the order of the others stays."""
        last = self.num_rows - 1
        if row != last:
            columns = slice(self._columns.view, self._columns.end)
            for layer in self._layers:
                if layer.is_initialized:
                    layer.keys[row, :, columns] = layer.keys[last, :, columns]
                    layer.values[row, :, columns] = layer.values[last, :, columns]
        self._starts[row] = self._starts[last]
        self._starts.pop()
        if self._starts:
            self._columns.view = min(self._starts)

    def _make_room(self, queries: int) -> None:
        """Slide the view to column 0 once the columns before it are as many as those in it.

        Otherwise the buffers grow by doubling. Either way a column is copied O(1) times per token on average.
        """
        initialized = [layer for layer in self._layers if layer.is_initialized]
        capacity = min((layer.keys.shape[2] for layer in initialized), default=0)
        if self._columns.end + queries > capacity and self._columns.view >= max(self._columns.length, 1):
            self._move_view(to_end=self._columns.length)

    def _move_view(self, to_end: int) -> None:
        """Move all rows so that the newest column is ``to_end`` − 1. Columns before the view become zero."""
        shift = to_end - self._columns.end
        old = slice(self._columns.view, self._columns.end)
        new = slice(old.start + shift, old.stop + shift)
        for layer in self._layers:
            if not layer.is_initialized or not self._starts:
                continue
            layer.reserve(self.num_rows, to_end)
            for buffer in (layer.keys, layer.values):
                # The two ranges may overlap, hence the copy.
                buffer[: self.num_rows, :, new] = buffer[: self.num_rows, :, old].clone()
                buffer[: self.num_rows, :, : new.start].zero_()
        self._columns.view, self._columns.end = new.start, new.stop
        self._starts = [start + shift for start in self._starts]


def batched_obstacle(cache: Cache | None) -> str | None:
    """Why rows of this model's own cache cannot share one right-aligned cache, or None.

    Compressed, recurrent and indexed layers keep more than one key and value per token, tied to absolute positions.
    """
    if not isinstance(cache, DynamicCache):
        return f"the model makes a {type(cache).__name__}, not a DynamicCache"
    # A DummyLayer belongs to a layer that borrows another's keys and values: nothing is ever written to it.
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    strange = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in plain})
    return f"its cache has layers of type {', '.join(strange)}" if strange else None
