"""One replica of a service: its channel, its health, its circuit; and the addresses behind a name."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from opd_mesh.clients.circuit import Circuit
from opd_mesh.config.services import ChannelConfig
from opd_mesh.errors import OpdError
from opd_mesh.rpc.channel import open_channel


class Health(StrEnum):
    """What is known of a replica."""

    UNKNOWN = "not asked yet"
    SERVING = "serving"
    NOT_SERVING = "not serving"  # loads, or drains: no new items, those in flight are waited for
    UNREACHABLE = "unreachable"


class Stream(Protocol):
    """What a client keeps open to a replica."""

    @property
    def broken(self) -> OpdError | None:
        """Why it takes no more items."""

    @property
    def credits(self) -> int | None:
        """Items that the server allows in flight; None: not told yet."""

    def abandon(self, error: OpdError) -> None:
        """Fail everything in flight with ``error``, at once."""

    async def close(self) -> None:
        """End it."""


@dataclass(slots=True)
class ReplicaCounts:
    """Since the client began."""

    items: int = 0  # answered
    retries: int = 0  # items that had failed elsewhere before they were asked of this one
    failures: int = 0  # attempts that this one failed


@dataclass(eq=False)
class Replica:
    """One address. The loop must run: a channel is opened."""

    address: str
    service: str
    config: ChannelConfig
    name: str = ""  # host:port that resolved to it
    health: Health = Health.UNKNOWN
    trouble: str = ""  # the last; not the error itself, which holds on to the frames of every item that it ended
    in_flight: int = 0
    tokens_in_flight: int = 0
    calls: int = 0  # others than items, under way
    busy_until: float = 0.0  # of the loop's clock: it has said that it is overloaded
    leaving: bool = False
    stream: Stream | None = None
    # None: it could not say. ``refused``: what it lists, but must not be asked for.
    teacher_ids: frozenset[str] | None = None
    refused: dict[str, OpdError] = field(default_factory=dict)
    counts: ReplicaCounts = field(default_factory=ReplicaCounts)
    look: asyncio.Event = field(default_factory=asyncio.Event)
    must_reopen: bool = False

    def __post_init__(self) -> None:
        config = self.config
        self.circuit = Circuit(config.circuit_failures, config.circuit_cool_down_s, config.circuit_max_cool_down_s)
        self.channel = open_channel(self.address, self.service, config)
        self.gone: asyncio.Future[OpdError] = asyncio.Future()

    def serves(self, teacher_id: str) -> bool:
        """Whether it can be asked about this teacher (any, where empty)."""
        return (
            self.health is Health.SERVING
            and not self.leaving
            and teacher_id not in self.refused
            and (not teacher_id or self.teacher_ids is None or teacher_id in self.teacher_ids)
        )

    def usable(self, teacher_id: str, now: float) -> bool:
        """Whether an item for this teacher may be sent now, but for room."""
        return self.serves(teacher_id) and self.circuit.admits(now) and now >= self.busy_until

    @property
    def idle(self) -> bool:
        """Whether its channel may be closed: nothing is under way there."""
        return not self.in_flight and not self.calls

    @property
    def capacity(self) -> int:
        """Items that may be in flight."""
        credits = self.stream.credits if self.stream is not None else None
        return min(self.config.max_in_flight, credits or self.config.max_in_flight)

    def end_calls(self, error: OpdError) -> None:
        """What waits for an answer other than an item's fails with ``error``."""
        gone, self.gone = self.gone, asyncio.Future()
        gone.set_result(error)

    async def reopen(self) -> None:
        """A new channel: the old one would wait up to two minutes between its attempts to connect."""
        await self.close()
        self.channel = open_channel(self.address, self.service, self.config)
        self.must_reopen = False

    async def close(self) -> None:
        """Ends stream and channel."""
        stream, self.stream = self.stream, None
        if stream is not None:
            await stream.close()
        await self.channel.close()

    def __str__(self) -> str:
        return f"{self.address} ({self.name})" if self.name else self.address


def speaks_of_the_replica(error: OpdError) -> bool:
    """Whether another replica may answer where this one said ``error``: it is away, late, busy or defect."""
    return error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "CANCELLED")


def is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


async def resolve_records(host: str, port: int) -> list[str]:
    """host:port of every address record. IPv4 where there is any: dual-stack hosts would count twice.

    Raises:
        OSError: the name does not resolve.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    fours = sorted({f"{address[0]}:{port}" for family, *_, address in found if family == socket.AF_INET})
    return fours or sorted({f"[{address[0]}]:{port}" for family, *_, address in found if family == socket.AF_INET6})
