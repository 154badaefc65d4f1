"""Which weights leave when others need their room: a pure function, without I/O or clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Resident:
    """Weights in memory.

    Attributes:
        key: what tells it from others; hashable.
        last_used: a counter; larger is later.
        in_use: a forward pass needs it, or it is being loaded.
    """

    key: Any
    num_bytes: int
    last_used: int
    in_use: bool


def choose_victims(
    residents: Iterable[Resident], needed_bytes: int, budget_bytes: int, *, keep: Collection[Any] = ()
) -> list[Any] | None:
    """Keys to evict so that ``needed_bytes`` fit: least recently used first, and none without need.

    Args:
        keep: not to be evicted, though not in use.

    Returns:
        Empty where there is room already; None where there is none to be made now.
    """
    residents = list(residents)
    excess = sum(item.num_bytes for item in residents) + needed_bytes - budget_bytes
    victims: list[Resident] = []
    for item in sorted(residents, key=lambda item: item.last_used):
        if excess <= 0:
            break
        if not item.in_use and item.key not in keep:
            victims.append(item)
            excess -= item.num_bytes
    if excess > 0:
        return None
    # A small one that was taken first may not be needed any more beside a large one taken later.
    for item in sorted(victims, key=lambda item: -item.last_used):
        if excess + item.num_bytes <= 0:
            victims.remove(item)
            excess += item.num_bytes
    return [item.key for item in victims]
