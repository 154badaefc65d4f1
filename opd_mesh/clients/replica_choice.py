"""Which replica gets the next item: a pure function."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Policy: TypeAlias = Literal["round_robin", "rendezvous"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as the choice sees it. ``usable``: healthy, its circuit admits an item, and it has the teacher."""

    address: str
    usable: bool
    in_flight: int
    max_in_flight: int


def rendezvous_ranking(teacher_id: str, addresses: Collection[str]) -> list[str]:
    """Highest random weight first: where a replica comes or goes, only the teachers it held or now holds move."""

    def weight(address: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{teacher_id}\0{address}".encode(), digest_size=8).digest(), address

    return sorted(addresses, key=weight, reverse=True)


def choose_replica(
    candidates: Sequence[Candidate],
    *,
    policy: Policy,
    teacher_id: str,
    turn: int,
    spill_in_flight: int,
) -> str | None:
    """The address that gets the next item; None where nobody usable has room.

    Args:
        candidates: in an order that does not change from call to call, but for who comes and goes.
        turn: number of choices made before; breaks ties.
        spill_in_flight: with rendezvous, an item goes past replicas that have so many.
    """
    free = [each for each in candidates if each.usable and each.in_flight < each.max_in_flight]
    if not free:
        return None
    if policy == "rendezvous":
        ranking = rendezvous_ranking(teacher_id, [each.address for each in free])
        by_address = {each.address: each for each in free}
        for address in ranking:
            if by_address[address].in_flight < spill_in_flight:
                return address
        return min(ranking, key=lambda address: by_address[address].in_flight)
    places = range(len(free))
    return free[min(places, key=lambda place: (free[place].in_flight, (place - turn) % len(free)))].address
