"""Which waiting items share the next forward pass, and whose turn it is: pure functions, without I/O or clock."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the choice depends on."""

    teacher_id: str
    num_tokens: int


def teachers_in_order(waiting: Sequence[Waiting]) -> list[str]:
    """Teachers by their oldest item."""
    return list(dict.fromkeys(item.teacher_id for item in waiting))


def choose_turn(
    waiting: Sequence[Waiting],
    current: str | None,
    *,
    served_tokens: int,
    turn_tokens: int,
    ready: Collection[str],
    passed_over: str | None = None,
) -> str | None:
    """The teacher that computes next, so that weights are exchanged as seldom as fairness allows.

    The present one goes on while it has items, for ``turn_tokens`` at most where others wait. Then comes the teacher
    with the oldest item among those whose weights are in memory; the oldest of all where none is, or where it was
    passed over once already.

    Args:
        waiting: oldest first.
        served_tokens: that ``current`` has computed in this turn.
        ready: teachers whose weights are in memory.
        passed_over: who had the oldest item when the last turn went to somebody else.
    """
    teachers = teachers_in_order(waiting)
    if not teachers:
        return None
    others = [teacher for teacher in teachers if teacher != current]
    if current in teachers and (served_tokens < turn_tokens or not others):
        return current
    if others[0] == passed_over:
        return passed_over
    return next((teacher for teacher in others if teacher in ready), others[0])


def passed_over_by(chosen: str | None, waiting: Sequence[Waiting], current: str | None) -> str | None:
    """Who had the oldest item when the turn went from ``current`` to ``chosen``; None where that was ``chosen``."""
    oldest = next((teacher for teacher in teachers_in_order(waiting) if teacher != current), None)
    return oldest if oldest != chosen else None


def choose_batch(
    waiting: Sequence[Waiting], teacher_id: str, *, token_budget: int, max_items: int, in_order: bool = False
) -> list[int]:
    """Indices into ``waiting`` (oldest first) of the teacher's next batch.

    Its oldest item is always taken, so nothing starves, even if it alone is over the budget; then further items of the
    same teacher in order of arrival while they fit. An item that does not fit is passed over, not waited for.

    Args:
        in_order: take only items that arrived one after the other.
    """
    chosen: list[int] = []
    tokens = 0
    for index, item in enumerate(waiting):
        if len(chosen) >= max_items:
            break
        if item.teacher_id != teacher_id:
            if in_order and chosen:
                break
            continue
        if not chosen or tokens + item.num_tokens <= token_budget:
            chosen.append(index)
            tokens += item.num_tokens
        elif in_order:
            break
    return chosen
