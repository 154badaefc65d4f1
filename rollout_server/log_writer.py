"""Segments of the token log as one owner writes them: the active one, its successors, and the reserve behind them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from opd_mesh.errors import InternalError, LogFullError, LogOwnedError
from rollout_server.log_folder import Reserve, create_file, is_full, write_whole
from rollout_server.log_format import (
    RECORD_HEADER_BYTES,
    Kind,
    Segment,
    encode_header,
    encode_manifest,
    encode_record,
    segment_name,
    segment_seed,
)

FULL_RETRY_DELAY_S = 1.0
ResultT = TypeVar("ResultT")


class SegmentWriter:
    """Appends records to the active segment of one epoch. Not thread-safe: its owner holds a lock around every call.

    Methods that write raise LogFullError (nothing was written), LogOwnedError (the fence, or another owner of the same
    epoch), and InternalError where the log is closed or has failed. After a failed write or fsync the log has failed
    for good: which pages reached the disk is unknown, and asking again would only hide it.

    Attributes:
        fence: raises LogOwnedError where another server may own the log; once it has, nothing is written any more.
        on_failed: called once when the log fails.
        on_full: called when ``full`` becomes True, and perhaps again while it is.
        segments: closed, and counting, in order.
        records: written in this epoch; those up to ``synced_records`` are durable.
    """

    def __init__(
        self,
        path: Path,
        log_id: bytes,
        epoch: int,
        segment_bytes: int,
        segments: Sequence[Segment],
        fence: Callable[[], None] | None = None,
    ) -> None:
        """Begins the epoch with a segment that builds on ``segments``."""
        self.path, self.log_id, self.epoch = path, log_id, epoch
        self.fence = fence
        self.on_failed: Callable[[BaseException], None] | None = None
        self.on_full: Callable[[], None] | None = None
        self.reserve = Reserve(path)
        self.failure: BaseException | None = None
        self.closed = False
        self.number = self.size = self.records = self.synced_records = 0
        self.met_full_disk = False
        self._disowned: LogOwnedError | None = None
        self._segment_bytes = segment_bytes
        self.require_owned()
        self._start(0, segments, sure=True)
        try:
            self.require_owned()  # a successor that came before the segment did not see it, and does not count it
        except BaseException:
            self.close()
            raise
        self.reserve.restore()

    @property
    def bytes_on_disk(self) -> int:
        """Of the segments that count."""
        return self._closed_bytes + self.size

    @property
    def full(self) -> bool:
        """Whether the last write met a full disk, or used the reserve, and no room has been seen since."""
        return (self.met_full_disk or self.reserve.spent) and not self.closed

    def look_for_room(self) -> None:
        """Clear ``full`` where there is room again; whoever begins nothing while it is full would never see that."""
        if self.reserve.spent and not self.reserve.restore():
            return
        self.met_full_disk = not self.reserve.room_at(self.size)

    def require_owned(self) -> None:
        """Raises LogOwnedError where another server may own the log."""
        if self._disowned is not None:
            raise LogOwnedError(str(self._disowned))
        if self.fence is not None:
            try:
                self.fence()
            except LogOwnedError as error:
                self._disowned = error  # the record before it may be on the disk, and must not be written again
                raise

    def require_usable(self, *, fenced: bool = True) -> None:
        """Raises what the class says for a log that nothing may be written to."""
        if self.closed:
            raise InternalError("the token log is closed")
        if self.failure is not None:
            raise InternalError(
                f"the token log {self.path} has failed ({self.failure}); what the disk holds is unknown: restart the "
                "server, which recovers what is there"
            ) from self.failure
        if fenced:
            self.require_owned()

    def mark_failed(self, error: BaseException) -> None:
        """Refuse everything from now on; the first error counts."""
        if self.failure is None:
            self.failure = error
            if self.on_failed is not None:
                self.on_failed(error)

    def fail(self, error: BaseException) -> NoReturn:
        """Refuse everything from now on, this call first."""
        self.mark_failed(error)
        self.require_usable()
        raise AssertionError("a failed log is not usable")

    def put(self, kind: Kind, payload: bytes, *, must: bool = False) -> int:
        """:meth:`put_many` of one."""
        return self.put_many(kind, [payload], must=must)

    def put_many(self, kind: Kind, payloads: Sequence[bytes], *, must: bool = False) -> int:
        """Write records of one kind, all or none of them in the eyes of this process; returns how many there are now.

        After a crash the first of them alone may be there. The fence is asked before and after: an owner that was
        suspended between the two may have written what its successor does not count, and must not say that it is
        logged.

        Args:
            must: they make room or end something, so they may use the reserve, and never wait for a new segment.
        """
        self.require_usable()
        if not must:
            if self.reserve.spent and not self.reserve.restore():
                self._refuse(OSError(errno.ENOSPC, "there is room for the end of requests only"))
            n_bytes = sum(RECORD_HEADER_BYTES + len(payload) for payload in payloads)
            if self.size + n_bytes > self._segment_bytes and self.size > self._empty_size:
                self.rotate(self.number + 1)
        self._sure(lambda: self._write(kind, payloads), must)
        self.met_full_disk = False
        self.require_owned()
        return self.records

    def rotate(
        self,
        number: int,
        obsolete: Sequence[Segment] = (),
        instead: Sequence[Segment] = (),
        *,
        must: bool = False,
    ) -> None:
        """Close the active segment and go on in another, which builds on all but the ``obsolete`` ones.

        The closed one is durable first, whatever the durability: its successor names how much of it counts.
        """
        self.sync()
        kept = self.segments[len(obsolete) :]
        closed_fd = self._fd
        self._start(number, [*instead, *kept, Segment(self.epoch, self.number, self.size)], sure=must)
        os.close(closed_fd)

    def create(
        self, number: int, segments: Sequence[Segment], records: Iterable[tuple[Kind, bytes]] = ()
    ) -> tuple[int, int]:
        """(descriptor, bytes) of a new, durable segment. Touches nothing else, so it needs no lock.

        Raises:
            OSError: nothing was made.
        """
        seed, size = segment_seed(self.log_id, self.epoch, number), 0

        def parts() -> Iterator[bytes]:
            nonlocal size
            part = encode_header(self.log_id, self.epoch, number)
            size = len(part)
            part += encode_record(seed, size, Kind.MANIFEST, encode_manifest(segments))
            size = len(part)
            yield part
            for kind, payload in records:
                part = encode_record(seed, size, kind, payload)
                size += len(part)
                yield part

        try:
            fd = create_file(self.path / segment_name(self.epoch, number), parts())
        except FileExistsError as error:
            raise LogOwnedError(f"another server writes epoch {self.epoch} of the token log {self.path}") from error
        return fd, size

    def sync(self) -> None:
        """fdatasync of the active segment."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self.fail(error)  # also where it says that the disk is full: the pages are lost
        self.count_synced(self.records)

    def active_fd(self) -> int:
        """A descriptor of one's own for the active segment; a rotation may close the writer's."""
        try:
            return os.dup(self._fd)
        except OSError as error:
            self.fail(error)

    def count_synced(self, covered: int) -> None:
        """The first ``covered`` records are durable."""
        self.synced_records = max(self.synced_records, covered)

    def close(self) -> None:
        """Give up the descriptor."""
        self.closed = True
        os.close(self._fd)

    def sure(self, attempt: Callable[[], ResultT]) -> ResultT:
        """Try, then try again with the reserve's room; an error that is not a full disk fails the log."""
        return self._sure(attempt, must=True)

    def _sure(self, attempt: Callable[[], ResultT], must: bool) -> ResultT:
        try:
            return attempt()
        except OSError as error:
            if not (must and is_full(error) and self.reserve.spend()):
                self._refuse(error)
        self._tell_full()
        try:
            return attempt()
        except OSError as again:
            self._refuse(again)

    def _refuse(self, error: OSError) -> NoReturn:
        if not is_full(error):
            self.fail(error)
        self.met_full_disk = True
        self._tell_full()
        raise LogFullError(
            f"the disk of the token log {self.path} is full ({error}): make room there",
            retry_delay_s=FULL_RETRY_DELAY_S,
        ) from error

    def _tell_full(self) -> None:
        if self.on_full is not None:
            self.on_full()

    def _write(self, kind: Kind, payloads: Sequence[bytes]) -> None:
        records, size = [], self.size
        for payload in payloads:
            records.append(encode_record(self._seed, size, kind, payload))
            size += len(records[-1])
        try:
            write_whole(self._fd, b"".join(records))
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.size = size
        self.records += len(records)

    def _start(self, number: int, segments: Sequence[Segment], *, sure: bool) -> None:
        """Make the active segment; on an error all stays as it is."""
        self._fd, size = self._sure(lambda: self.create(number, segments), sure)
        self.number, self.size, self._empty_size = number, size, size
        self._seed = segment_seed(self.log_id, self.epoch, number)
        self.segments = list(segments)
        self._closed_bytes = sum(segment.n_bytes for segment in segments)
