"""The token log's folder: its id, its lock, its reserve, and files that appear whole or not at all.

Nothing here knows what a record is. Errors are :class:`OSError` where not said otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from opd_mesh.errors import CorruptLogError, LogOwnedError, PreconditionError
from rollout_server.log_format import SEGMENT_HEADER_BYTES, header_log_id, parse_segment_name

log = logging.getLogger("rollout_server")

ID_FILE, LOCK_FILE, RESERVE_FILE = "ID", "LOCK", "RESERVE"
WITH_LEASE = ", with a lease"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
UNFINISHED = ".tmp"  # the ending of a file that has not got its name yet, after a random part
# Room for the records that end and forget requests, and for a small compaction, when the disk is full.
RESERVE_BYTES = 1 << 20
PROBE_BYTES = 1 << 16
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_full(error: OSError) -> bool:
    """Whether ``error`` says that there is no room, and not that the disk is ill."""
    return error.errno in FULL_ERRNOS


def write_whole(fd: int, data: bytes) -> None:
    """One write. A short one is a full disk: what it left behind is the caller's to cut off."""
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, "short write")


def sync_folder(path: Path) -> None:
    """Make names in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def create_file(path: Path, parts: Iterable[bytes]) -> int:
    """A file that is whole and durable once it has its name; returns a descriptor that appends to it.

    Raises:
        FileExistsError: the name is taken; an existing file is never replaced.
        OSError: nothing was made; but for EIO, after which nobody knows.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        try:
            for part in parts:
                write_whole(fd, part)
            os.fsync(fd)
            os.link(unfinished, path)  # unlike rename it does not replace what another owner may have made
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished)
        try:
            sync_folder(path.parent)
        except OSError as error:  # it may be there after a crash or not, so it must not pass for a full disk
            raise OSError(errno.EIO, f"the folder cannot be synced: {error}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_file(path: Path) -> bytes:
    """Contents; a symlink is not followed."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(fd, "rb") as file:
        return file.read()


def sync_file(path: Path) -> None:
    """Make durable what any process has written to ``path``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class SegmentFiles(Mapping[str, bytes]):
    """Segments of a folder by name, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = sorted(name for name in os.listdir(path) if parse_segment_name(name))

    def __getitem__(self, name: str) -> bytes:
        try:
            return read_file(self._path / name)
        except FileNotFoundError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def newest_epoch(path: Path) -> int:
    """Of any segment in the folder; 0 where there is none."""
    return max((place[0] for name in os.listdir(path) if (place := parse_segment_name(name))), default=0)


def log_id(path: Path) -> bytes:
    """The 16 bytes that name the log in ``path``; folder and id are made where there are none.

    Needs no ownership: whoever wants to own the log must know its name first.

    Raises:
        CorruptLogError: the id cannot be read, from its file or else from any segment.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = path / ID_FILE
    with contextlib.suppress(FileNotFoundError):
        return _parse_id(read_file(file))
    segments = SegmentFiles(path)
    found = next((name for data in segments.values() if (name := header_log_id(data[:SEGMENT_HEADER_BYTES]))), None)
    if segments and found is None:
        raise CorruptLogError(f"{file} is missing and no segment's header is whole", metadata={"file": ID_FILE})
    made = found or secrets.token_bytes(16)
    unfinished = path / f"{ID_FILE}.{secrets.token_hex(8)}{UNFINISHED}"
    try:
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_whole(fd, made.hex().encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
        with contextlib.suppress(FileExistsError):  # another server was first: its id counts
            os.link(unfinished, file)
        sync_folder(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
    return _parse_id(read_file(file))


def _parse_id(text: bytes) -> bytes:
    if not re.fullmatch(rb"[0-9a-f]{32}\n", text):
        raise CorruptLogError(f"{ID_FILE} at byte 0: it is not a log's id", metadata={"file": ID_FILE, "offset": "0"})
    return bytes.fromhex(text.decode())


def remove_obsolete(path: Path, epoch: int, kept: Iterable[str]) -> None:
    """Remove segments of earlier epochs but the ``kept`` ones, and what a crash left without a name."""
    names = set(kept)
    for name in os.listdir(path):
        stem, wal, rest = name.partition(".wal")
        place = parse_segment_name(stem + wal)
        if place and place[0] < epoch and name not in names and (not rest or rest.endswith(UNFINISHED)):
            with contextlib.suppress(FileNotFoundError):  # an owner that does not know that it is none any more
                os.unlink(path / name)


class FolderLock:
    """The flock on a log's folder, tried for once and given up by ``close``.

    A server with a lease (``leased``) may go without: another leaseholder that has it while the lease is ours is
    stopped or hangs, and its fence stops it when it goes on. A holder without a lease knows no fence.

    Attributes:
        held: it is ours.
        place: names this machine's boot and the lock file, the same for every process that could hold this flock; empty
            where it is not ours, or the machine does not tell.

    Raises:
        LogOwnedError: another process of this machine holds it, and we may not go without.
        PreconditionError: the lock is a symlink.
    """

    def __init__(self, path: Path, *, leased: bool = False) -> None:
        self._path, self._leased = path, leased
        self._other = ""
        self.held, self.place = True, ""
        file = path / LOCK_FILE
        try:
            self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise PreconditionError(f"{file} is a symlink, which is not followed: remove it") from error
            raise
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.held = False
                self._other = os.pread(self._fd, 64, 0).decode("utf-8", "replace").strip() or "another process"
                if not (leased and self._other.endswith(WITH_LEASE)):
                    raise LogOwnedError(f"the token log {path} is owned by {self._other} on this machine") from error
            else:
                self._sign()
                self.place = self._find_place()
        except BaseException:
            os.close(self._fd)
            raise

    def take_over(self) -> None:
        """The lease is ours, so the log is, too, whoever has the flock."""
        if not self.held:
            log.warning(
                "the token log %s is locked by %s, whose lease has run out: taken over", self._path, self._other
            )
            self._sign()

    def close(self) -> None:
        """Give it up."""
        os.close(self._fd)

    def _sign(self) -> None:
        with contextlib.suppress(OSError):  # for whoever finds it taken; the disk may be full
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()}{WITH_LEASE if self._leased else ''}\n".encode(), 0)

    def _find_place(self) -> str:
        try:
            boot = BOOT_ID.read_text().strip()
        except OSError:
            return ""
        stat = os.fstat(self._fd)
        return hashlib.sha256(f"{boot} {stat.st_dev} {stat.st_ino}".encode()).hexdigest()[:16] if boot else ""


class Reserve:
    """A file that keeps room for what must be written even when the disk is full.

    ``spent`` is True from when it was given up until there is room for it again.
    """

    def __init__(self, path: Path) -> None:
        self._file = path / RESERVE_FILE
        self.spent = False

    def spend(self) -> bool:
        """Free the room; returns whether there was any."""
        if self.spent:
            return False
        self.spent = True
        try:
            os.unlink(self._file)
        except OSError:
            return False
        return True

    def room_at(self, offset: int) -> bool:
        """Whether a file could grow by ``PROBE_BYTES`` from ``offset`` on."""
        probe = self._file.with_name(RESERVE_FILE + UNFINISHED)
        try:
            fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(fd, offset, PROBE_BYTES)
            finally:
                os.close(fd)
                os.unlink(probe)
        except OSError as error:
            return not is_full(error)
        return True

    def restore(self) -> bool:
        """Take the room again; returns whether there is enough. A file system that cannot reserve is not held to it."""
        with contextlib.suppress(OSError):
            if self._file.stat(follow_symlinks=False).st_size == RESERVE_BYTES:
                self.spent = False
                return True
            os.unlink(self._file)
        try:
            fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, RESERVE_BYTES)
            finally:
                os.close(fd)
            self.spent = False
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(self._file)
            self.spent = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not self.spent:
                log.warning("the token log goes without a reserve: %s", error)
        return not self.spent
