"""The shared cache against a naive one: a list of values per row."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.cache import KeyValues, RightAlignedCache


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(0, 100)), min_size=1, max_size=25))
def test_right_aligned_rows_hold_what_was_written(operations: list[tuple[int, int, int]]) -> None:
    shared = RightAlignedCache(2)
    rows: list[list[float]] = []
    clock = 0.0

    def write(cache: RightAlignedCache, values_BT: torch.Tensor) -> None:
        cache.inputs(values_BT.shape[1])
        for layer in range(2):
            states = (values_BT + 1000 * layer)[:, None, :, None]
            keys, values = cache.update(states, -states, layer)
            torch.testing.assert_close(keys, -values, rtol=0, atol=0, equal_nan=True)
        cache.commit(values_BT.shape[1])

    for kind, amount, choice in operations:
        if kind == 0 and rows:
            gone = sorted({(choice + step * amount) % len(rows) for step in range(1 + choice % 4)})
            moves = shared.remove_rows(gone)
            kept = len(rows) - len(gone)
            assert {target for _, target in moves} == {row for row in gone if row < kept}
            assert {source for source, _ in moves} == set(range(kept, len(rows))) - set(gone)
            for source, target in moves:
                rows[target] = rows[source]
            del rows[kept:]
        elif kind == 1 or not rows:
            lengths = [amount, 1 + choice // 2]
            fresh = RightAlignedCache.for_pass(2, [KeyValues(), KeyValues()], lengths, max(lengths))
            values_BT = clock + torch.arange(2.0 * max(lengths)).reshape(2, -1)
            if choice % 3 == 0:
                values_BT[0] = math.nan  # a request whose numbers went wrong, not yet removed
            for row, length in enumerate(lengths):
                values_BT[row, : max(lengths) - length] = math.nan  # what padding leaves may be anything
            write(fresh, values_BT)
            order = [1, 0, 0] if choice % 2 else [0]
            placed = shared.append_rows([fresh.row(row) for row in order])
            assert sorted(placed) == list(range(len(order)))
            rows += [values_BT[order[index], max(lengths) - lengths[order[index]] :].tolist() for index in placed]
        else:
            for _ in range(amount):
                column = clock + torch.arange(float(len(rows)))
                write(shared, column[:, None])
                rows = [[*row, value] for row, value in zip(rows, column.tolist(), strict=True)]
                clock += len(rows)
        clock += 400
        if not rows:
            continue
        mask, positions = shared.inputs(1)
        view, end = shared._columns.view, shared._columns.end
        assert view == end - max(len(row) for row in rows)
        assert positions.flatten().tolist() == [len(row) for row in rows]
        assert mask is not None or len({len(row) for row in rows}) == 1
        for layer_index, layer in enumerate(shared._layers):
            for row, expected in enumerate(rows):
                start = end - len(expected)
                held = layer.keys[row, 0, start:end, 0] - 1000 * layer_index
                torch.testing.assert_close(held, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
                assert torch.isfinite(layer.keys[row, 0, :start]).all()
                if mask is not None:
                    assert mask[row].tolist() == [0] * (start - view) + [1] * (len(expected) + 1)
            # Nobody reads what is not in use.
            layer.keys[len(rows) :] = math.nan
            layer.keys[:, :, end:] = math.nan
