"""Which replica gets the next item: places at them handed out, first come, first served.

The choice itself is :mod:`opd_mesh.clients.replica_choice`; what is known of the replicas,
:mod:`opd_mesh.clients.replica_watch`. What an item is and how it is sent, the client above knows
(:mod:`opd_mesh.clients.teacher`).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

from opd_mesh.clients.replica import Health, Replica, speaks_of_the_replica
from opd_mesh.clients.replica_choice import Candidate, Policy, choose_replica
from opd_mesh.clients.replica_watch import ReplicaWatch
from opd_mesh.config.services import ChannelConfig
from opd_mesh.errors import OpdError, UnavailableError, UnknownTeacherError

ResultT = TypeVar("ResultT")
# Teacher, and the addresses to avoid: of two waiters with the same, either both find a place or none.
Wish: TypeAlias = tuple[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Place:
    """A context manager: inside, an item is in flight at the replica."""

    replica: Replica
    release: Callable[[], None]

    def __enter__(self) -> Replica:
        return self.replica

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(eq=False, slots=True)
class _Waiter:
    number: int  # in order of arrival
    wish: Wish
    tokens: int
    future: asyncio.Future[Place]


class ReplicaSet(ReplicaWatch):
    """Replicas that are looked after, and items and calls given to them. Arguments as :class:`ReplicaWatch`."""

    def __init__(
        self,
        addresses: Sequence[str],
        service: str,
        config: ChannelConfig,
        admit: Callable[[Replica], Awaitable[None]],
    ) -> None:
        super().__init__(addresses, service, config, admit)
        # One queue a wish. An ordered dict, because waiters leave from the front and, when cancelled, from anywhere.
        self._waiting: dict[Wish, OrderedDict[_Waiter, None]] = {}
        self._arrivals = itertools.count()
        self._turn = 0

    def _tell(self) -> None:
        super()._tell()
        self._hand_out(news=True)

    async def place(self, teacher_id: str, tokens: int, avoid: Collection[str]) -> Place:
        """A place for one item; waits while all usable replicas are full.

        Args:
            avoid: addresses that have failed this item already.

        Raises:
            UnavailableError: none is usable, and ``retry_delay_s`` says when one may be; or the client was closed.
            UnknownTeacherError, PreconditionError: they serve, but not this teacher, or not the same as the others.
        """
        if self._closed:
            raise self._over()
        if self.lone:
            (replica,) = self.all
            return self._reserve(replica, tokens)
        self._start()
        future: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(next(self._arrivals), (teacher_id, frozenset(avoid)), tokens, future)
        if not self._serve(waiter):
            self._waiting.setdefault(waiter.wish, OrderedDict())[waiter] = None
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                waiter.future.result().release()
            raise
        finally:
            self._forget(waiter)

    def _forget(self, waiter: _Waiter) -> None:
        queue = self._waiting.get(waiter.wish)
        if queue is not None:
            queue.pop(waiter, None)
            if not queue:
                del self._waiting[waiter.wish]

    def _reserve(self, replica: Replica, tokens: int) -> Place:
        replica.in_flight += 1
        replica.tokens_in_flight += tokens
        self._turn += 1
        trial = replica.circuit.begin(asyncio.get_running_loop().time())
        return Place(replica, partial(self._release, replica, tokens, trial))

    def _release(self, replica: Replica, tokens: int, trial: bool) -> None:
        replica.in_flight -= 1
        replica.tokens_in_flight -= tokens
        if trial:
            replica.circuit.withdraw()
        self._part_if_idle(replica)
        self._hand_out(news=False)

    def _hand_out(self, *, news: bool) -> None:
        """Give free places to those who wait, first come, first served; ``news``: some may have nothing to wait for."""
        # Thousands may wait, and this runs after every item: it must cost no more than there are places and wishes.
        if not news and not self._has_room():
            return
        heads = [(next(iter(queue)).number, wish) for wish, queue in self._waiting.items()]
        heapq.heapify(heads)
        while heads and (news or self._has_room()):
            _, wish = heapq.heappop(heads)
            queue = self._waiting[wish]
            waiter = next(iter(queue))
            if self._serve(waiter):  # else the others of this wish would find nothing, either
                self._forget(waiter)
                if queue:
                    heapq.heappush(heads, (next(iter(queue)).number, wish))

    def _has_room(self) -> bool:
        # Those that are down have nothing in flight, and no room for that.
        return any(each.in_flight < each.capacity and self._may_have_item(each, "") for each in self._replicas.values())

    def _serve(self, waiter: _Waiter) -> bool:
        """A place or a reason why there will be none; False where it must wait."""
        if waiter.future.done():
            return True  # given up
        if self._closed:
            waiter.future.set_exception(self._over())
            return True
        teacher_id, avoid = waiter.wish
        replica = self._choice(teacher_id, avoid, bounded=True)
        if replica is not None:
            waiter.future.set_result(self._reserve(replica, waiter.tokens))
        elif self._settled and not self.usable(teacher_id, avoid):
            waiter.future.set_exception(self._none_for(teacher_id))
        return waiter.future.done()

    def usable(self, teacher_id: str, avoid: Collection[str] = ()) -> list[Replica]:
        """Those that an item may go to, once they have room."""
        return [each for each in self.all if each.address not in avoid and self._may_have_item(each, teacher_id)]

    def _may_have_item(self, replica: Replica, teacher_id: str) -> bool:
        # With one record behind a name there is nothing to spare it for.
        if len(self._replicas) == 1:
            return replica.serves(teacher_id)
        return replica.usable(teacher_id, asyncio.get_running_loop().time())

    def _choice(self, teacher_id: str, avoid: Collection[str], *, bounded: bool) -> Replica | None:
        """``bounded``: for an item, which needs room and a circuit that admits it."""
        candidates = [
            Candidate(each.address, self._may_have_item(each, teacher_id), each.in_flight, each.capacity)
            if bounded
            else Candidate(each.address, each.serves(teacher_id), each.in_flight, each.in_flight + 1)
            for each in self.all
            if each.address not in avoid
        ]
        address = choose_replica(
            candidates,
            policy=self.policy,
            teacher_id=teacher_id,
            turn=self._turn,
            spill_in_flight=self._config.spill_in_flight,
        )
        return None if address is None else self._replicas[address]

    @property
    def policy(self) -> Policy:
        """The one in force: ``auto`` is rendezvous where a replica lists several teachers."""
        if self._config.balance != "auto":
            return self._config.balance
        pools = any(len(each.teacher_ids or ()) > 1 for each in self._replicas.values())
        return "rendezvous" if pools else "round_robin"

    async def ask_any(self, teacher_id: str, ask: Callable[[Replica], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """A short call that any replica can answer, of the next one where the first does not.

        Raises:
            UnavailableError: none is usable within the channel's ``timeout_s``, or the last one's error.
            OpdError: what a replica says of the call itself.
        """
        if self.lone:
            return await ask(self.all[0])
        avoid: set[str] = set()
        last: OpdError | None = None
        while (replica := await self.pick(teacher_id, avoid, self._config.timeout_s)) is not None:
            try:
                return await self.while_there(replica, ask(replica))
            except OpdError as error:
                if not speaks_of_the_replica(error):
                    raise
                avoid.add(replica.address)
                last, replica.trouble = error, str(error)
        raise last or self._none_for(teacher_id)

    async def pick(self, teacher_id: str, avoid: Collection[str], timeout_s: float) -> Replica | None:
        """One for a call that takes no place; None where those in ``avoid`` were all, or none came in time."""
        if self.lone:
            return self.all[0]
        found: list[Replica] = []

        def look() -> bool:
            replica = self._choice(teacher_id, avoid, bounded=False)
            found[:] = [] if replica is None else [replica]
            hopeless = bool(avoid) or all(each.health is Health.SERVING for each in self._replicas.values())
            return bool(found) or (self._settled and hopeless)

        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._until(look)
        self._turn += 1
        return found[0] if found else None

    async def while_there(self, replica: Replica, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """The result of ``work``; :class:`UnavailableError` as soon as the replica is lost, or the client closed."""
        if self.lone:
            return await work
        if self._closed:
            work.close()
            raise self._over()
        task, gone = asyncio.ensure_future(work), replica.gone
        either: list[asyncio.Future[Any]] = [task, gone]
        replica.calls += 1
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise gone.result()
            if task.cancelled():  # by its channel, not by our caller, who did not ask for it
                raise UnavailableError(f"{replica.address}: the connection was closed here")
            return await task
        finally:
            replica.calls -= 1
            self._part_if_idle(replica)
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _none_for(self, teacher_id: str) -> OpdError:
        refused = [each.refused[teacher_id] for each in self.all if teacher_id in each.refused]
        if self._replicas and all(each.health is Health.SERVING for each in self._replicas.values()):
            listed = [each.teacher_ids for each in self.all if each.teacher_ids is not None]
            if len(listed) == len(self._replicas) and not any(teacher_id in ids for ids in listed):
                known = ", ".join(sorted(set().union(*listed)))
                return UnknownTeacherError(f"no teacher {teacher_id!r} at {self.target}; served are: {known}")
            if refused and len(refused) == len(self._replicas):
                return refused[0]
        now = asyncio.get_running_loop().time()
        waits = [
            max(each.circuit.wait_s(now), each.busy_until - now) for each in self.all if each.health is Health.SERVING
        ]
        return UnavailableError(
            f"no replica of {teacher_id!r} can be asked ({self.troubles()})",
            retry_delay_s=max(0.0, min(waits, default=0.0)) or None,
        )
