"""The write-ahead log of a rollout server: every token is in it before a client sees it.

One writer per log. Appending is one ``write`` under one lock; fdatasync and compaction run outside it but for their
last step. See docs/token-log.md for the format and for what is promised when.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_mesh.config.services import TokenLogConfig
from opd_mesh.errors import InternalError, LogFullError, LogOwnedError, OpdError
from rollout_server.log_folder import FolderLock, SegmentFiles, log_id, remove_obsolete, sync_file, sync_folder
from rollout_server.log_format import (
    MAX_HANDLE,
    SNAPSHOT_BYTES,
    End,
    Kind,
    LoggedToken,
    RecoveredRequest,
    Segment,
    encode_delivered,
    encode_ended,
    encode_forgotten,
    encode_masked_tokens,
    encode_request,
    encode_tokens,
)
from rollout_server.log_recovery import LoggedRequest, Recovery, Replay, recover, replay_closed
from rollout_server.log_writer import SegmentWriter

__all__ = ["LoggedToken", "RecoveredRequest", "TokenLog"]

log = logging.getLogger("rollout_server")
LOOK_FOR_ROOM_S = 0.5


@dataclass(slots=True)
class _Known:
    """What the writer must remember of a request to refuse what recovery would refuse."""

    n_bytes: int  # of its snapshot
    next_index: int = 0
    keeps: bool = False  # its tokens come with the ids that they were drawn from
    finished: bool = False  # its last token is written
    ended: bool = False


class TokenLog:
    """An open log. Every method may be called from any thread.

    Any method that writes raises:
        LogFullError: no room. Nothing was logged; try again later. ``full`` is True until there is room.
        LogOwnedError: ``fence`` says that another server may own the log. What was to be logged may be on the disk, and
            the successor may count it or not: it must not be shown to anybody.
        InternalError: the log is closed; or a write or an fsync has failed, after which nothing is accepted: what is on
            the disk is unknown until the log is opened again.
    """

    def __init__(self, config: TokenLogConfig, writer: SegmentWriter, flock: FolderLock, recovery: Recovery) -> None:
        """Private: see :meth:`open`."""
        self.path: Path = config.path
        self.epoch = writer.epoch
        self.clean = recovery.clean
        self._config = config
        self._writer = writer
        self._flock = flock
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()  # taken before _lock
        self._compact_lock = threading.Lock()  # taken before both
        self._known = {handle: _known_of(request) for handle, request in recovery.replay.requests.items()}
        self._live_bytes = sum(request.n_bytes for request in self._known.values())
        self._next_handle = recovery.replay.next_handle
        self._compact_from_bytes = int(config.compact_above_bytes)
        self._stopping = threading.Event()
        self._compactor: threading.Thread | None = None
        self._syncer: threading.Thread | None = None
        self._room_wanted = threading.Event()
        writer.on_full = self._room_wanted.set
        if writer.full:
            self._room_wanted.set()
        self._room_finder = threading.Thread(target=self._look_for_room, name="token-log-room", daemon=True)
        self._room_finder.start()
        if config.durability == "interval":
            self._syncer = threading.Thread(target=self._sync_regularly, name="token-log-sync", daemon=True)
            self._syncer.start()

    @staticmethod
    def identify(config: TokenLogConfig) -> bytes:
        """The 16 bytes that name the log; folder and id are made where there are none. Needs no ownership.

        Raises:
            CorruptLogError: the id cannot be read.
        """
        return log_id(config.path)

    @classmethod
    def open(
        cls,
        config: TokenLogConfig,
        *,
        epoch: int = 0,
        fence: Callable[[], None] | None = None,
        flock: FolderLock | None = None,
    ) -> tuple[TokenLog, list[RecoveredRequest]]:
        """Take the log over: lock, recover, begin an epoch. Blocks for as long as reading the log takes.

        Args:
            epoch: that came with a lease; 0: there is no lease, and the epoch is the one after the newest in the
                folder. The lease is what counts: an earlier leaseholder that is stopped on this machine, its flock in
                hand, does not keep us out, and neither does it come back as a later one.
            fence: see :attr:`fence`; it also stops an owner that loses its lease in here.
            flock: of the folder, where the caller has tried for it. The log closes it, or this does on an error.

        Returns:
            The log, and the requests that it holds in order of first appearance.

        Raises:
            LogOwnedError: another process of this machine has it, a later owner was here, or the fence says so.
            CorruptLogError: damage that no torn write explains; nothing was changed on the disk.
            LogFullError: no room to begin an epoch.
        """
        path, identity = config.path, log_id(config.path)
        flock = flock or FolderLock(path, leased=epoch > 0)
        try:
            recovery = recover(identity, SegmentFiles(path))
            if 0 < epoch <= recovery.newest_epoch:
                raise LogOwnedError(
                    f"the token log {path} has an owner of epoch {recovery.newest_epoch}, and our lease is for epoch "
                    f"{epoch}: it came late"
                )
            if recovery.torn:
                whole, n_bytes = recovery.torn
                log.warning("token log %s: %s ends in %d bytes of a torn write, left out", path, whole.name, n_bytes)
            if recovery.segments:
                # Its owner may have ended before its newest bytes were durable; what will name them is durable at once.
                sync_file(path / recovery.segments[-1].name)
            epoch = epoch or recovery.newest_epoch + 1
            flock.take_over()
            writer = SegmentWriter(path, identity, epoch, int(config.segment_bytes), recovery.segments, fence)
            try:
                # No successor counts these, either: it comes after the fence was asked, and reads what we have begun.
                remove_obsolete(path, epoch, (segment.name for segment in recovery.segments))
                token_log = cls(config, writer, flock, recovery)
            except BaseException:
                writer.close()
                raise
        except BaseException as error:
            flock.close()
            if fence is not None and isinstance(error, Exception):
                fence()  # what a late owner stumbles over is its successor's work, not damage
            raise
        return token_log, [request.recovered(handle) for handle, request in recovery.replay.requests.items()]

    @property
    def fence(self) -> Callable[[], None] | None:
        """Called before and after every write; raises LogOwnedError where another server may own the log."""
        return self._writer.fence

    @fence.setter
    def fence(self, fence: Callable[[], None] | None) -> None:
        self._writer.fence = fence

    @property
    def on_failed(self) -> Callable[[BaseException], None] | None:
        """Called once with what failed the log, from whichever thread met it, and at once where the log has failed.

        It must not call the log, whose lock is held.
        """
        return self._writer.on_failed

    @on_failed.setter
    def on_failed(self, on_failed: Callable[[BaseException], None] | None) -> None:
        with self._lock:
            self._writer.on_failed = on_failed
            if on_failed is not None and self._writer.failure is not None:
                on_failed(self._writer.failure)

    # --- what the server calls -----------------------------------------------------------------------------------
    def begin(self, payload: bytes, lineage: int) -> int:
        """Log a request; returns its handle, which no other request of this log has."""
        return self.begin_many([(payload, lineage)])[0]

    def begin_many(self, requests: Sequence[tuple[bytes, int]]) -> list[int]:
        """:meth:`begin` for many (payload, lineage) in one write, all or none; returns their handles."""
        with self._lock:
            first = self._next_handle
            if first + len(requests) - 1 > MAX_HANDLE:
                raise InternalError("the log has used up its handles: begin a new one")
            records = self._writer.put_many(
                Kind.REQUEST,
                [encode_request(first + index, lineage, payload) for index, (payload, lineage) in enumerate(requests)],
            )
            self._next_handle += len(requests)
            for handle, (payload, _) in enumerate(requests, first):
                self._known[handle] = _Known(SNAPSHOT_BYTES + len(payload))
                self._live_bytes += SNAPSHOT_BYTES + len(payload)
        self._settle(records)
        return list(range(first, first + len(requests)))

    def append(self, tokens: Sequence[LoggedToken]) -> None:
        """Log the tokens of a step, with their kept ids: all or none. Those of forgotten requests are passed over.

        Raises :class:`InternalError` for a token that does not follow what is logged of its request.
        """
        with self._lock:
            known, written = self._known, tokens
            taken: list[_Known] = []
            try:
                for token in tokens:
                    request = known.get(token.handle)
                    if request is None:
                        self._require_begun(token.handle)
                        written = [item for item in tokens if item.handle in known]
                        continue
                    if token.index != request.next_index or request.finished:
                        raise InternalError(
                            f"token {token.index} of handle {token.handle} does not follow: "
                            f"{request.next_index} are logged{', and the response has finished' * request.finished}"
                        )
                    if token.index == 0:
                        request.keeps = bool(token.kept)
                    elif request.keeps != bool(token.kept):
                        raise InternalError(f"of handle {token.handle} all tokens have kept ids, or none")
                    request.next_index += 1
                    request.finished = token.finish is not None
                    taken.append(request)
                if not written:
                    return
                if any(token.kept for token in written):
                    records = self._writer.put(Kind.MASKED_TOKENS, encode_masked_tokens(written))
                else:
                    records = self._writer.put(Kind.TOKENS, encode_tokens(written))
            except BaseException:
                for request in taken:  # none of them had finished before, or it would not have been taken
                    request.next_index -= 1
                    request.finished = False
                raise
            for request, token in zip(taken, written, strict=True):
                self._grow(request, token.snapshot_bytes)
                request.ended = request.ended or request.finished
            self._compact_if_due()
        self._settle(records)

    def end_cancelled(self, handle: int) -> None:
        """The request was cancelled. Its first end counts: nothing is logged where it has one."""
        self._end(handle, End.CANCELLED, "", "")

    def end_failed(self, handle: int, reason: str, message: str) -> None:
        """Generation failed; ``reason`` is an error's stable word. Its first end counts, as above."""
        self._end(handle, End.FAILED, reason, message)

    def _end(self, handle: int, end: End, reason: str, message: str) -> None:
        with self._lock:
            request = self._find(handle)
            if request is None or request.ended:
                return
            payload = encode_ended(handle, end, reason, message)
            records = self._writer.put(Kind.ENDED, payload, must=True)
            request.ended = True
            self._grow(request, len(payload))
        self._settle(records)

    def delivered(self, handle: int, stream_entry_id: str) -> None:
        """The stream has the trajectory. Not waited for: delivering again after a crash finds the same entry."""
        self.delivered_many([(handle, stream_entry_id)])

    def delivered_many(self, entries: Sequence[tuple[int, str]]) -> None:
        """:meth:`delivered` for many (handle, stream entry id) in one write."""
        with self._lock:
            found = [(request, handle, entry) for handle, entry in entries if (request := self._find(handle))]
            payloads = [encode_delivered(handle, entry) for _, handle, entry in found]
            if not payloads:
                return
            self._writer.put_many(Kind.DELIVERED, payloads, must=True)
            for (request, _, _), payload in zip(found, payloads, strict=True):
                self._grow(request, len(payload))

    def forget(self, handle: int) -> None:
        """Nobody needs the request any more: compaction may leave it out. Not waited for."""
        self.forget_many([handle])

    def forget_many(self, handles: Sequence[int]) -> None:
        """:meth:`forget` for many in one write."""
        with self._lock:
            found = [handle for handle in dict.fromkeys(handles) if self._find(handle) is not None]
            if not found:
                return
            self._writer.put_many(Kind.FORGOTTEN, [encode_forgotten(handle) for handle in found], must=True)
            for handle in found:
                self._live_bytes -= self._known.pop(handle).n_bytes
            self._compact_if_due()

    def sync(self) -> None:
        """Returns once everything logged so far is durable."""
        with self._lock:
            records = self._writer.records
        self._sync_to(records)

    def close(self) -> None:
        """End the log cleanly, durably, and give it up. Calling it again does nothing."""
        self._stopping.set()
        self._room_wanted.set()
        for thread in (self._syncer, self._compactor, self._room_finder):
            if thread is not None:
                thread.join()
        with self._sync_lock, self._lock:
            if self._writer.closed:
                return
            try:
                if self._writer.failure is None:
                    self._writer.put(Kind.CLOSED, b"", must=True)
                    self._writer.sync()
            except (LogOwnedError, LogFullError) as error:  # it is whole all the same, only not marked as closed
                log.warning("token log %s: not marked as closed: %s", self.path, error)
            finally:
                self._writer.close()
                self._flock.close()

    @property
    def full(self) -> bool:
        """Whether the last write met a full disk, or could be made only from the reserve, and there is no room yet.

        Neither waits nor looks: a thread clears it within a second of there being room.
        """
        return self._writer.full

    # --- under _lock ---------------------------------------------------------------------------------------------
    def _require_begun(self, handle: int) -> None:
        if not 0 <= handle < self._next_handle:
            raise InternalError(f"no request of the log has handle {handle}")

    def _find(self, handle: int) -> _Known | None:
        """None where it is forgotten."""
        request = self._known.get(handle)
        if request is None:
            self._require_begun(handle)
        return request

    def _grow(self, request: _Known, n_bytes: int) -> None:
        request.n_bytes += n_bytes
        self._live_bytes += n_bytes

    # --- durability ----------------------------------------------------------------------------------------------
    def _settle(self, records: int) -> None:
        if self._config.durability == "always":
            self._sync_to(records)
            self._writer.require_owned()  # it may have taken long

    def _sync_to(self, records: int) -> None:
        """Group commit: whoever comes first syncs for all who wrote by then, and they find it done."""
        with self._sync_lock:
            with self._lock:
                if self._writer.synced_records >= records:
                    return
                self._writer.require_usable(fenced=False)
                covered = self._writer.records
                fd = self._writer.active_fd()
            try:
                os.fdatasync(fd)
            except OSError as error:
                with self._lock:
                    self._writer.fail(error)
            finally:
                os.close(fd)
            with self._lock:
                self._writer.count_synced(covered)

    def _sync_regularly(self) -> None:
        while not self._stopping.wait(self._config.sync_interval_s):
            try:
                self._sync_to(self._writer.records)
            except Exception as error:  # noqa: BLE001 - whatever it was, nothing is synced any more
                with self._lock:
                    self._writer.mark_failed(error)
                log.error("token log %s: not synced any more: %s", self.path, error)  # noqa: TRY400 - it says why
                return

    # --- room ----------------------------------------------------------------------------------------------------
    def _look_for_room(self) -> None:
        """While the log is full, look whether there is room; asleep otherwise."""
        while self._room_wanted.wait() and not self._stopping.is_set():
            self._room_wanted.clear()
            while self._writer.full and not self._stopping.wait(LOOK_FOR_ROOM_S):
                with self._lock:
                    try:
                        self._writer.require_usable()
                    except OpdError:
                        return
                    self._writer.look_for_room()

    # --- compaction ----------------------------------------------------------------------------------------------
    def _compact_if_due(self) -> None:
        on_disk = self._writer.bytes_on_disk
        if on_disk <= self._compact_from_bytes or self._live_bytes >= on_disk / 2 or self._stopping.is_set():
            return
        if self._compactor is None or not self._compactor.is_alive():
            self._compactor = threading.Thread(target=self._compact_quietly, name="token-log-compact", daemon=True)
            self._compactor.start()

    def _compact_quietly(self) -> None:
        try:
            self.compact()
        except (OpdError, OSError) as error:
            log.warning("token log %s: not compacted: %s", self.path, error)
            with self._lock:  # not again at once
                self._compact_from_bytes = self._writer.bytes_on_disk + int(self._config.segment_bytes)

    def compact(self) -> None:
        """Write what is still known into one new segment, and remove those that it replaces.

        ``_lock`` is held twice, each time for an fdatasync of the active segment and the making of the next; reading
        and writing happen outside it. The manifest of the last segment made is the one step that counts: before it the
        old segments are the log, after it the new one is.

        Raises:
            LogFullError: no room for it, the reserve included.
            CorruptLogError: a closed segment has been damaged since it was written.
        """
        with self._compact_lock:
            writer = self._writer
            with self._lock:
                writer.require_usable()
                number = writer.number + 1  # before the segment that is written meanwhile, as recovery reads it
                writer.rotate(number + 1, must=True)
                replaced = list(writer.segments)
            replay, files = Replay(), SegmentFiles(self.path)
            for segment in replaced:
                if self._stopping.is_set():
                    return
                replay_closed(replay, writer.log_id, segment, files)
            snapshot = self._write_snapshot(number, replay)
            try:
                with self._lock:
                    writer.require_usable()
                    writer.rotate(writer.number + 1, replaced, snapshot, must=True)
                    self._compact_from_bytes = int(self._config.compact_above_bytes)
            except OpdError:
                if writer.failure is None:  # the room is wanted; after a failure nobody knows which of them counts
                    for segment in snapshot:
                        os.unlink(self.path / segment.name)
                raise
            writer.require_usable()  # an owner that slept until here must not remove what another builds on
            for segment in replaced:
                os.unlink(self.path / segment.name)
            sync_folder(self.path)
            log.info("token log %s: %d segments compacted", self.path, len(replaced))

    def _write_snapshot(self, number: int, replay: Replay) -> list[Segment]:
        """The segment that holds all of ``replay``; none where there is nothing to hold."""
        if not replay.requests:
            return []

        def records() -> Iterator[tuple[Kind, bytes]]:
            for handle, request in replay.requests.items():
                yield from request.records(handle)

        fd, size = self._writer.sure(lambda: self._writer.create(number, [], records()))
        os.close(fd)
        return [Segment(self._writer.epoch, number, size)]


def _known_of(request: LoggedRequest) -> _Known:
    return _Known(
        n_bytes=request.snapshot_bytes,
        next_index=request.n_tokens,
        keeps=bool(request.kept),
        finished=bool(request.tokens and request.tokens[-1]),
        ended=request.end is not End.NONE,
    )
