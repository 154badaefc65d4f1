"""The trajectory stream: finished trajectories wait here, as opaque bytes, between rollout and trainer.

Delivery is at least once, and nothing is ever dropped to make room:

- ``publish`` is guarded: an id whose entry still waits for its acknowledgement is not added a second time, so a
  publisher may repeat itself freely after a lost answer. The guard is a hash (id → entry) from which ``acknowledge``
  removes what it acknowledges, so it never outgrows the stream. An id published again *after* its acknowledgement is a
  new entry; the trainer's record of consumed ids is what makes training exactly once.
- ``read`` hands out, in this order: what this consumer name was given before a crash, what dead consumers hold, new
  entries. A consumer is dead when its lease (a key that a background task renews) has run out. Idle time alone would
  not do: entries are acknowledged at checkpoints, so a healthy trainer holds them for as long as a checkpoint is apart.
- An entry handed out ``max_deliveries`` times without an acknowledgement moves to the dead-letter stream, where it
  stays until somebody looks (``dead_letters``, ``requeue_dead_letters``).
- ``acknowledge`` is called after a durable checkpoint holds the ids. It then trims below the oldest entry that any
  group still needs, by MINID; MAXLEN would destroy unread entries.
- A full server refuses the publisher (``OverloadedError``), never the reader: reading and acknowledging are what
  makes room.

Keys of a run: ``opd:RUN:trajectories``, ``opd:RUN:dead``, ``opd:RUN:ids`` (the guard), ``opd:RUN:consumer:NAME``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opd_mesh.errors import InvalidInputError, OpdError, RequestConflictError, StreamUnavailableError, TooLongError
from opd_mesh.stream_redis import GroupMissingError, RedisLink

logger = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 16 * 2**20  # tensors stay out of Redis; a trajectory of 100,000 tokens is about 3 MB
PAGE = 256  # entries per script call: a script stops the whole server while it runs


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """One delivery. ``deliveries`` counts this one, so it is 1 the first time anybody is given the entry."""

    entry_id: str
    trajectory_id: str
    payload: bytes
    deliveries: int = 1


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry set aside, and why. ``entry_id`` is its id in the dead-letter stream."""

    entry_id: str
    trajectory_id: str
    payload: bytes
    deliveries: int
    reason: str


class TrajectoryStream:
    """One consumer's (and any publisher's) view of a run's trajectory stream. For one event loop.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://`` URL.
        run_id: names the keys.
        group: the consumer group; it sees the stream from its beginning.
        consumer: unique among live processes, and the same after a restart: that is how a restarted trainer gets back
            at once what it held. With another name it has to wait for the old name's lease to run out.
        timeout_s: how long any call may go without an answer from Redis, reconnecting all the while.
        lease_s: after this long without a sign of life a consumer's entries go to others.
        max_deliveries: deliveries before an entry is dead; an interrupted trainer counts one for all it held, so this
            is far above the number of restarts one expects between two checkpoints.

    Every method raises :class:`StreamUnavailableError` when Redis does not answer within ``timeout_s`` or refuses the
    command. Nothing is lost by that: what was published stays, what was delivered is delivered again.
    """

    def __init__(
        self,
        url: str,
        run_id: str,
        group: str = "trainer",
        consumer: str = "trainer-0",
        *,
        timeout_s: float = 10.0,
        lease_s: float = 30.0,
        max_deliveries: int = 10,
    ) -> None:
        for name, value in (("run_id", run_id), ("group", group), ("consumer", consumer)):
            if not value:
                raise InvalidInputError("must not be empty", field=name)
        for name, number in (("timeout_s", timeout_s), ("lease_s", lease_s), ("max_deliveries", max_deliveries)):
            if not number > 0:
                raise InvalidInputError(f"must be above 0, got {number!r}", field=name)
        self.run_id = run_id
        self.group = group
        self.consumer = consumer
        self.stream_key = f"opd:{run_id}:trajectories"
        self.dead_key = f"opd:{run_id}:dead"
        self._ids_key = f"opd:{run_id}:ids"
        self._timeout_s = timeout_s
        self._lease_s = lease_s
        self._max_deliveries = max_deliveries
        self._link = RedisLink(url, timeout_s)
        self._held: set[str] = set()  # handed to our caller, not acknowledged yet
        # True whenever Redis may have given us entries that never reached our caller: after a restart, a lost answer or
        # a cancelled read.
        self._may_have_lost_a_delivery = True
        self._group_exists = False
        self._heartbeat: asyncio.Task[None] | None = None
        self._next_look_at_the_dead = 0.0

    # --- the publisher's side ----------------------------------------------------------------------------------
    async def publish(self, trajectory_id: str, payload: bytes) -> str:
        """Add a trajectory; safe to repeat. Returns its entry id (the one it already has, when it is repeated).

        Raises:
            OverloadedError: the server is full; try again after ``retry_delay_s``, when the trainer has caught up.
            RequestConflictError: the id waits in the stream with another payload.
            InvalidInputError, TooLongError: an empty id, or more than ``MAX_PAYLOAD_BYTES``.
        """
        (outcome,) = await self.publish_many([(trajectory_id, payload)])
        if isinstance(outcome, OpdError):
            raise outcome
        return outcome

    async def publish_many(self, entries: Sequence[tuple[str, bytes]]) -> list[str | OpdError]:
        """:meth:`publish` for many (trajectory id, payload), a round trip for up to ``PAGE`` of them; in this order.

        Returns:
            For each its entry id, or the error that it alone has: InvalidInputError, TooLongError or
            RequestConflictError.

        Raises:
            OverloadedError, StreamUnavailableError: some may have been added; repeating all of them is safe.
        """
        outcomes: list[str | OpdError | None] = [_refusal(name, payload) for name, payload in entries]
        keys = [self.stream_key, self._ids_key]
        for page in _publish_pages(entries, [index for index, refused in enumerate(outcomes) if refused is None]):
            args = [part for index in page for part in entries[index]]
            answer = await self._link.script("publish", keys, args)
            for index, entry_id, same in zip(page, answer[::2], answer[1::2], strict=True):
                outcomes[index] = _text(entry_id) if same else _conflict(entries[index][0], _text(entry_id))
        return [outcome for outcome in outcomes if outcome is not None]

    # --- the trainer's side ------------------------------------------------------------------------------------
    async def read(self, max_count: int, block_s: float) -> list[StreamEntry]:
        """Up to ``max_count`` entries, as soon as there is one; an empty list after ``block_s`` without any.

        An entry is handed out once per object; it comes again only after a restart, or to another consumer.
        """
        if max_count < 1:
            raise InvalidInputError(f"must be at least 1, got {max_count}", field="max_count")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(block_s, 0.0)
        await self._announce()
        while True:
            entries: list[StreamEntry] = []
            try:
                if self._may_have_lost_a_delivery:
                    entries = await self._take_own_pending(max_count)
                if not entries and loop.time() >= self._next_look_at_the_dead:
                    entries = await self._take_from_the_dead(max_count)
                    if not entries:
                        self._next_look_at_the_dead = loop.time() + self._lease_s / 3
                if not entries:
                    # Short waits, so that a silent server, and a consumer that dies meanwhile, are noticed.
                    wait_s = min(deadline - loop.time(), self._timeout_s / 2, self._lease_s / 3)
                    entries = await self._take_new(max_count, wait_s)
            except GroupMissingError:
                if loop.time() >= deadline + self._timeout_s:
                    raise StreamUnavailableError(f"the stream {self.stream_key} keeps disappearing") from None
                logger.warning("group %s of %s has disappeared; creating it again", self.group, self.stream_key)
                self._group_exists = False
                await self._announce()
                continue
            if entries or loop.time() >= deadline:
                self._held.update(entry.entry_id for entry in entries)
                return entries

    async def acknowledge(self, entry_ids: Iterable[str]) -> int:
        """Say that a *durable checkpoint* holds these entries, and free what nobody needs any more.

        Returns how many were still pending; acknowledging twice is harmless. Entries that never passed through this
        object (known from a checkpoint) may be named too.
        """
        ids = list(dict.fromkeys(entry_ids))
        acknowledged = 0
        for page in _pages(ids):
            keys = [self.stream_key, self._ids_key]
            acknowledged += int(await self._link.script("acknowledge", keys, [self.group, *page]))
            self._held.difference_update(page)
        await self._link.script("trim", [self.stream_key])
        return acknowledged

    async def dead_letter(self, entry_id: str, reason: str) -> bool:
        """Set one pending entry aside for good: the trainer cannot use it. False when it was no longer pending."""
        keys = [self.stream_key, self.dead_key, self._ids_key]
        moved = bool(await self._link.script("bury", keys, [self.group, entry_id, reason]))
        self._held.discard(entry_id)
        if moved:
            logger.warning("stream entry %s of run %s went to %s: %s", entry_id, self.run_id, self.dead_key, reason)
        return moved

    async def dead_letters(self, max_count: int = 100) -> list[DeadLetter]:
        """The oldest ``max_count`` entries that were set aside."""
        rows = await self._link.call("XRANGE", lambda: self._link.redis.xrange(self.dead_key, count=max_count))
        letters = []
        for entry_id, fields in rows:
            values = {_text(key): value for key, value in fields.items()}
            letters.append(
                DeadLetter(
                    entry_id=_text(entry_id),
                    trajectory_id=_text(values.get("id", b"")),
                    payload=values.get("payload", b""),
                    deliveries=int(values.get("deliveries", 0)),
                    reason=_text(values.get("reason", b"")),
                )
            )
        return letters

    async def requeue_dead_letters(self) -> int:
        """Put every dead letter back at the end of the stream, with a fresh delivery count; returns how many."""
        moved = 0
        keys = [self.stream_key, self.dead_key, self._ids_key]
        while await self._link.script("requeue", keys, []):
            moved += 1
        return moved

    async def length(self) -> int:
        """Entries in the stream, read and unread (acknowledged ones are trimmed)."""
        return int(await self._link.call("XLEN", lambda: self._link.redis.xlen(self.stream_key)))

    async def pending(self) -> int:
        """Entries delivered to this group and not acknowledged."""
        try:
            await self._ensure_group()
            summary = await self._link.call("XPENDING", lambda: self._link.redis.xpending(self.stream_key, self.group))
        except GroupMissingError:
            self._group_exists = False
            return 0
        return int(summary["pending"])

    async def close(self) -> None:
        """Give up the lease (others may take over at once) and the connections. What is pending stays pending."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._heartbeat
            self._heartbeat = None
            # A server that is gone needs no goodbye: the lease runs out by itself.
            with contextlib.suppress(OpdError, TimeoutError):
                async with asyncio.timeout(min(self._timeout_s, 1.0)):
                    lease = self._lease_key(self.consumer)
                    await self._link.call("DEL", lambda: self._link.redis.delete(lease))
        await self._link.redis.aclose()

    # --- taking entries ----------------------------------------------------------------------------------------
    async def _take_own_pending(self, max_count: int) -> list[StreamEntry]:
        """What Redis says we were given, less what our caller holds; clears the flag when there is no more."""
        start = "-"
        while True:
            rows = await self._pending_rows(self.consumer, PAGE, start)
            unknown = [row for row in rows if _text(row["message_id"]) not in self._held]
            if unknown:
                entries = await self._claim(unknown[:max_count], self.consumer)
                if entries:
                    return entries
                # Dead or deleted, all of them: they have left the list of pending entries, so the page is another now.
            elif len(rows) < PAGE:
                self._may_have_lost_a_delivery = False
                return []
            else:
                start = "(" + _text(rows[-1]["message_id"])

    async def _take_from_the_dead(self, max_count: int) -> list[StreamEntry]:
        """Entries held by consumers whose lease has run out."""
        consumers = await self._link.call(
            "XINFO", lambda: self._link.redis.xinfo_consumers(self.stream_key, self.group)
        )
        for name in [_text(consumer["name"]) for consumer in consumers if consumer["pending"]]:
            if name == self.consumer or await self._is_alive(name):
                continue
            rows = await self._pending_rows(name, max_count)
            self._may_have_lost_a_delivery = True  # until the answer is here
            entries = await self._claim(rows, name)
            self._may_have_lost_a_delivery = False
            if entries:
                logger.info("took over %d stream entries of the dead consumer %s", len(entries), name)
                return entries
        return []

    async def _claim(self, rows: Sequence[dict[str, Any]], owner: str) -> list[StreamEntry]:
        """Make pending ``rows`` of ``owner`` ours, those beyond the delivery cap excepted: these are set aside."""
        ids: list[str] = []
        for row in rows:
            entry_id, deliveries = _text(row["message_id"]), int(row["times_delivered"])
            if deliveries >= self._max_deliveries:
                await self.dead_letter(entry_id, f"delivered {deliveries} times without an acknowledgement")
            else:
                ids.append(entry_id)
        entries: list[StreamEntry] = []
        for page in _pages(ids):
            keys, args = [self.stream_key], [self.group, self.consumer, owner, *page]
            for raw_id, deliveries, flat in await self._link.script("claim", keys, args):
                entry_id = _text(raw_id)
                if not deliveries:
                    logger.error("entry %s of %s was deleted by others while pending", entry_id, self.stream_key)
                    continue
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                entries += await self._decoded(entry_id, fields, int(deliveries))
        # If our lease had lapsed, what we get back may be what our caller still holds.
        return [entry for entry in entries if entry.entry_id not in self._held]

    async def _take_new(self, max_count: int, wait_s: float) -> list[StreamEntry]:
        wait_ms = max(1, round(wait_s * 1000)) if wait_s > 0 else None  # BLOCK 0 would wait for ever
        self._may_have_lost_a_delivery = True  # until the answer is here
        answer = await self._link.call(
            "XREADGROUP",
            lambda: self._link.redis.xreadgroup(
                self.group, self.consumer, {self.stream_key: ">"}, count=max_count, block=wait_ms
            ),
            extra_s=max(wait_s, 0.0),
        )
        entries: list[StreamEntry] = []
        for _, rows in answer or []:
            for entry_id, fields in rows:
                entries += await self._decoded(_text(entry_id), fields or {}, 1)
        self._may_have_lost_a_delivery = False
        return entries

    async def _decoded(self, entry_id: str, fields: dict[bytes, bytes], deliveries: int) -> list[StreamEntry]:
        """One entry, or none when it was not written by ``publish``: then it is set aside, said and kept."""
        if b"id" not in fields or b"payload" not in fields:
            await self.dead_letter(entry_id, "malformed: an entry needs the fields id and payload")
            return []
        return [StreamEntry(entry_id, _text(fields[b"id"]), fields[b"payload"], deliveries)]

    async def _pending_rows(self, consumer: str, count: int, start: str = "-") -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = await self._link.call(
            "XPENDING",
            lambda: self._link.redis.xpending_range(self.stream_key, self.group, start, "+", count, consumer),
        )
        return rows

    # --- being there -------------------------------------------------------------------------------------------
    async def _announce(self) -> None:
        """Group and lease exist before the first entry is ours."""
        await self._ensure_group()
        if self._heartbeat is None or self._heartbeat.done():
            await self._renew_lease()
            self._heartbeat = asyncio.create_task(self._renew_lease_for_ever(), name="opd-stream-lease")

    async def _ensure_group(self) -> None:
        if not self._group_exists:
            await self._link.script("group", [self.stream_key], [self.group])
            self._group_exists = True

    def _lease_key(self, consumer: str) -> str:
        return f"opd:{self.run_id}:consumer:{consumer}"

    async def _is_alive(self, consumer: str) -> bool:
        return bool(await self._link.call("EXISTS", lambda: self._link.redis.exists(self._lease_key(consumer))))

    async def _renew_lease(self) -> None:
        lease_ms = max(1, round(self._lease_s * 1000))
        await self._link.script("lease", [self._lease_key(self.consumer)], [lease_ms])

    async def _renew_lease_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self._renew_lease()
            except OpdError as error:
                # Not fatal here: the next read meets the same trouble, and reports it.
                logger.warning("could not renew the lease of consumer %s: %s", self.consumer, error)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


def _refusal(trajectory_id: str, payload: bytes) -> OpdError | None:
    if not trajectory_id:
        return InvalidInputError("must not be empty", field="trajectory_id")
    if len(payload) > MAX_PAYLOAD_BYTES:
        return TooLongError(f"{len(payload)} bytes, but at most {MAX_PAYLOAD_BYTES} are accepted", field="payload")
    return None


def _conflict(trajectory_id: str, entry_id: str) -> RequestConflictError:
    return RequestConflictError(
        f"trajectory {trajectory_id!r} is already in the stream with other contents (entry {entry_id})",
        field="trajectory_id",
    )


def _publish_pages(entries: Sequence[tuple[str, bytes]], indices: Sequence[int]) -> Iterator[list[int]]:
    """Indices by script call: no more than ``PAGE``, and no more bytes than the largest single one may have."""
    page: list[int] = []
    num_bytes = 0
    for index in indices:
        size = len(entries[index][1])
        if page and (len(page) == PAGE or num_bytes + size > MAX_PAYLOAD_BYTES):
            yield page
            page, num_bytes = [], 0
        page.append(index)
        num_bytes += size
    if page:
        yield page


def _pages(ids: list[str]) -> list[list[str]]:
    return [ids[start : start + PAGE] for start in range(0, len(ids), PAGE)]
