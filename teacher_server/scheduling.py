"""Which waiting items share the next forward pass: a pure function, without I/O or clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the choice depends on."""

    teacher_id: str
    num_tokens: int


def choose_batch(waiting: Sequence[Waiting], *, token_budget: int, max_items: int) -> list[int]:
    """Indices into ``waiting`` (oldest first) of the next batch.

    The oldest item is always taken, so nothing starves, even if it alone is over the budget; then further items of
    the same teacher in order of arrival while they fit. An item that does not fit is passed over, not waited for.
    """
    if not waiting:
        return []
    teacher_id = waiting[0].teacher_id
    chosen = [0]
    tokens = waiting[0].num_tokens
    for index in range(1, len(waiting)):
        if len(chosen) >= max_items:
            break
        item = waiting[index]
        if item.teacher_id == teacher_id and tokens + item.num_tokens <= token_budget:
            chosen.append(index)
            tokens += item.num_tokens
    return chosen
