"""The token log on a real disk: what is logged comes back, whatever happens to the writer, the disk or the bytes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rollout_server.token_log as token_log_module
from opd_mesh.config.services import TokenLogConfig
from opd_mesh.errors import CorruptLogError, InternalError, LogFullError, LogOwnedError, PreconditionError
from opd_mesh.trajectory import FinishReason
from rollout_server.log_folder import SegmentFiles, log_id
from rollout_server.log_format import RECORD_HEADER_BYTES, unpack_ids
from rollout_server.log_recovery import recover
from rollout_server.token_log import LoggedToken, RecoveredRequest, TokenLog

ROOT = Path(__file__).resolve().parents[2]
Files = dict[str, bytes]


def config(path: Path, **fields: Any) -> TokenLogConfig:
    """Without validation: segments of a few hundred bytes make small logs of many segments."""
    settings = {"durability": "os", "segment_bytes": 64 << 20, "compact_above_bytes": 256 << 20, **fields}
    return TokenLogConfig.model_construct(**{**TokenLogConfig(path=path).model_dump(), **settings})


def token(handle: int, index: int, finish: FinishReason | None = None, *, keeps: bool = False) -> LoggedToken:
    """The one token that a request may hold at an index."""
    kept = kept_ids(handle, index) if keeps else ()
    return LoggedToken(handle, index, 1000 * handle + index, -0.5 * index, -index / 8, 10 + index, finish, kept)


def kept_ids(handle: int, index: int) -> tuple[int, ...]:
    """The ids that it may have been drawn from."""
    return tuple(1000 * handle + index + other for other in range(1 + (handle + index) % 3))


def columns(request: RecoveredRequest) -> list[tuple[int, float, float, int]]:
    return list(
        zip(request.tokens, request.sampling_logprobs, request.policy_logprobs, request.policy_versions, strict=True)
    )


def assert_prefix(request: RecoveredRequest, n_tokens: int | None = None) -> None:
    """The first tokens of what :func:`token` makes, and no others."""
    expected = [token(request.handle, index) for index in range(len(request.tokens))]
    assert columns(request) == [
        (item.token_id, item.sampling_logprob, item.policy_logprob, item.policy_version) for item in expected
    ]
    assert n_tokens is None or len(request.tokens) == n_tokens
    found = list(map(unpack_ids, request.kept))
    assert found in ([], [kept_ids(request.handle, index) for index in range(len(request.tokens))])


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reopened(path: Path, **fields: Any) -> list[RecoveredRequest]:
    log, requests = TokenLog.open(config(path, **fields))
    log.close()
    return requests


@pytest.fixture
def unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a shared volume, where a lock does not reach the other machine."""
    monkeypatch.setattr(fcntl, "flock", lambda fd, operation: None)


class Moments:
    """A fence: what happens at each time that it is asked; at the last one, and after it, another may own the log."""

    def __init__(self, *happenings: Callable[[], object]) -> None:
        self._happenings = list(happenings)

    def __call__(self) -> None:
        happening = self._happenings.pop(0)
        happening()
        if not self._happenings:
            self._happenings.append(lambda: None)
            raise LogOwnedError("the lease has run out")


# --- what is logged comes back -----------------------------------------------------------------------------------
@pytest.mark.parametrize("durability", ["os", "interval", "always"])
def test_what_is_logged_comes_back(tmp_path: Path, durability: str) -> None:
    path = tmp_path / "deep" / "log"
    log, requests = TokenLog.open(config(path, durability=durability, sync_interval_s=0.01))
    assert (requests, log.clean, log.epoch, log.full, log.path) == ([], True, 1, False, path)
    assert path.stat().st_mode & 0o777 == 0o700
    first, second, third = (log.begin(b"payload %d" % index, lineage=index) for index in range(3))
    log.append([token(first, 0), token(second, 0)])
    log.append([token(first, 1), token(second, 1, FinishReason.STOP)])
    log.end_failed(third, "INTERNAL", "it broke")
    log.delivered(second, "5-1")
    log.end_cancelled(first)
    log.sync()
    assert (log._writer.records, log._writer.synced_records, log._writer.segments) == (8, 8, [])
    assert log._writer.bytes_on_disk == sum(file.stat().st_size for file in path.glob("*.wal"))
    log.close()
    log.close()
    log, requests = TokenLog.open(config(path))
    assert (log.clean, log.epoch) == (True, 2)
    assert [request.payload for request in requests] == [b"payload 0", b"payload 1", b"payload 2"]
    assert [request.lineage for request in requests] == [0, 1, 2]
    assert [request.finish_reason for request in requests] == [FinishReason.CANCELLED, FinishReason.STOP, None]
    assert requests[2].error == ("INTERNAL", "it broke")
    assert (requests[1].delivered, requests[1].stream_entry_id) == (True, "5-1")
    for request, n_tokens in zip(requests, (2, 2, 0), strict=True):
        assert_prefix(request, n_tokens)
    assert log.begin(b"new", 1) == 3
    log.close()


def test_an_unfinished_request_goes_on_after_a_restart(tmp_path: Path) -> None:
    for epoch in range(1, 6):
        log, requests = TokenLog.open(config(tmp_path))
        assert log.epoch == epoch
        handle = requests[0].handle if requests else log.begin(b"p", 1)
        log.append([token(handle, epoch - 1)])
        log.close()
    assert_prefix(reopened(tmp_path)[0], 5)


def test_restarts_without_work_leave_one_segment(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    log.begin(b"p", 1)
    log.close()
    for _ in range(5):
        assert len(reopened(tmp_path)) == 1
    assert len(list(tmp_path.glob("*.wal"))) == 2


def test_misuse_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    first, second = log.begin(b"a", 1), log.begin(b"b", 1)
    log.append([token(first, 0), token(second, 0, FinishReason.LENGTH)])
    size = log._writer.bytes_on_disk
    for tokens in (
        [token(first, 1), token(second, 1)],  # finished
        [token(first, 1), token(first, 3)],  # a gap
        [token(first, 0)],  # again
        [token(first, 1), token(77, 0)],  # never begun
        [token(first, 1), LoggedToken(first, 2, 2**40, 0.0, 0.0, 0, None)],  # does not fit
        [token(first, 1), token(first, 2, keeps=True)],  # kept ids of some tokens only
    ):
        with pytest.raises(InternalError):
            log.append(tokens)
    for call in (log.end_cancelled, log.forget, lambda handle: log.delivered(handle, "1-0")):
        with pytest.raises(InternalError, match="no request"):
            call(77)
    log.append([])
    log.end_cancelled(second)  # it has finished: that end counts
    assert log._writer.bytes_on_disk == size
    log.append([token(first, 1), token(first, 2, FinishReason.STOP)])
    log.close()
    assert not log.full
    for call in (lambda: log.begin(b"", 1), log.compact, lambda: log.forget(first)):
        with pytest.raises(InternalError, match="closed"):
            call()
    found = reopened(tmp_path)
    assert [request.finish_reason for request in found] == [FinishReason.STOP, FinishReason.LENGTH]
    assert_prefix(found[0], 3)


def test_tokens_of_forgotten_requests_are_passed_over(tmp_path: Path) -> None:
    # The engine's step may be under way while the event loop cancels and forgets.
    log, _ = TokenLog.open(config(tmp_path))
    kept, gone = log.begin(b"a", 1), log.begin(b"b", 1)
    log.end_cancelled(gone)
    log.forget(gone)
    log.append([token(gone, 0), token(kept, 0)])
    log.append([token(gone, 1)])
    log.forget(gone)
    log.end_cancelled(gone)
    log.close()
    (request,) = reopened(tmp_path)
    assert request.handle == kept
    assert_prefix(request, 1)


def test_threads_write_at_once(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path, durability="always", segment_bytes=2000, compact_above_bytes=4000))
    errors: list[BaseException] = []

    def write(n_tokens: int) -> None:
        try:
            done = log.begin(b"done", 1)
            log.end_cancelled(done)
            handle = log.begin(b"p", n_tokens)
            for index in range(n_tokens):
                log.append([token(handle, index)])
            log.forget(done)
        except BaseException as error:  # noqa: BLE001 - for the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=write, args=(20 + index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    log.compact()
    log.close()
    found = reopened(tmp_path)
    assert len(found) == 8
    for request in found:
        assert_prefix(request, request.lineage)


# --- who may write -----------------------------------------------------------------------------------------------
def test_one_owner_at_a_time(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    with pytest.raises(LogOwnedError, match=f"process {os.getpid()}"):
        TokenLog.open(config(tmp_path))
    log.close()
    log, _ = TokenLog.open(config(tmp_path), epoch=40)
    assert log.epoch == 40
    log.close()
    for late in (39, 40):
        with pytest.raises(LogOwnedError, match="owner of epoch 40"):
            TokenLog.open(config(tmp_path), epoch=late)
    log, _ = TokenLog.open(config(tmp_path))
    assert log.epoch == 41
    log.close()


def test_a_lease_overrules_the_lock_of_an_earlier_leaseholder_only(tmp_path: Path) -> None:
    plain, _ = TokenLog.open(config(tmp_path))
    with pytest.raises(LogOwnedError, match=f"process {os.getpid()} on"):
        TokenLog.open(config(tmp_path), epoch=2)
    plain.close()
    stopped, _ = TokenLog.open(config(tmp_path), epoch=2)
    with pytest.raises(LogOwnedError, match="with a lease"):
        TokenLog.open(config(tmp_path))
    for epoch in (3, 4):
        successor, _ = TokenLog.open(config(tmp_path), epoch=epoch)
        assert successor.epoch == epoch
        successor.close()
    stopped.close()


def test_a_symlink_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "LOCK").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PreconditionError, match="symlink"):
        TokenLog.open(config(tmp_path))
    assert not (tmp_path / "elsewhere").exists()


def test_the_fence_stops_every_write(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    handle = log.begin(b"p", 1)

    def fence() -> None:
        raise LogOwnedError("gone")

    log.fence = fence
    calls: list[Callable[[], object]] = [
        lambda: log.begin(b"q", 1),
        lambda: log.append([token(handle, 0)]),
        lambda: log.end_cancelled(handle),
        lambda: log.delivered(handle, "1-0"),
        lambda: log.forget(handle),
        log.compact,
    ]
    for call in calls:
        with pytest.raises(LogOwnedError):
            call()
    log.close()
    log, requests = TokenLog.open(config(tmp_path))
    assert not log.clean
    assert [request.payload for request in requests] == [b"p"]
    log.close()


@pytest.mark.parametrize("durability", ["os", "always"])
def test_an_owner_suspended_around_a_write_does_not_say_that_it_is_logged(tmp_path: Path, durability: str) -> None:
    late, _ = TokenLog.open(config(tmp_path, durability=durability), epoch=1)
    handle = late.begin(b"p", 1)
    taken: list[tuple[TokenLog, list[RecoveredRequest]]] = []
    late.fence = Moments(lambda: taken.append(TokenLog.open(config(tmp_path), epoch=2)), lambda: None)
    with pytest.raises(LogOwnedError):
        late.append([token(handle, 0)])
    late.fence = None
    with pytest.raises(LogOwnedError):  # it does not come back: the token may be on the disk
        late.append([token(handle, 0)])
    successor, (request,) = taken[0]
    assert request.tokens == []
    successor.append([token(handle, 0)])
    late.close()
    successor.close()
    assert_prefix(reopened(tmp_path)[0], 1)


@pytest.mark.parametrize("waits", [True, False])
def test_an_owner_suspended_in_a_sync_does_not_say_that_it_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    log, _ = TokenLog.open(config(tmp_path, durability="always" if waits else "os"))
    handle = log.begin(b"p", 1)
    fdatasync, slept = os.fdatasync, threading.Event()

    def sleep(fd: int) -> None:
        fdatasync(fd)
        slept.set()

    def fence() -> None:
        if slept.is_set():
            raise LogOwnedError("the lease has run out")

    monkeypatch.setattr(os, "fdatasync", sleep)
    log.fence = fence
    if waits:
        with pytest.raises(LogOwnedError):
            log.append([token(handle, 0)])
    else:
        log.append([token(handle, 0)])
    log.close()


@pytest.mark.parametrize("moment", ["before it reads", "when it has read", "before its segment", "after its segment"])
def test_a_leaseholder_that_wakes_up_in_its_opening_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Its lease is for epoch 5; while it sleeps another takes the log over with epoch 6."""
    log, _ = TokenLog.open(config(tmp_path))
    handle = log.begin(b"p", 1)
    log.append([token(handle, 0)])
    log.append([token(handle, 1)])
    log._writer.close()  # as kill does
    log._flock.close()
    (file,) = tmp_path.glob("*.wal")
    os.truncate(file, file.stat().st_size - 1)
    owners: list[TokenLog] = []

    def take_over() -> None:
        monkeypatch.undo()
        owner, _ = TokenLog.open(config(tmp_path), epoch=6)
        owner.append([token(handle, 1)])
        owners.append(owner)

    def files_late(path: Path) -> SegmentFiles:
        take_over()
        return SegmentFiles(path)

    def recover_late(identity: bytes, files: SegmentFiles) -> Any:
        found = recover(identity, files)
        take_over()
        return found

    fence = None
    if moment == "before it reads":  # what it reads tells
        monkeypatch.setattr(token_log_module, "SegmentFiles", files_late)
    elif moment == "when it has read":
        monkeypatch.setattr(token_log_module, "recover", recover_late)
        fence = Moments(lambda: None)
    elif moment == "before its segment":
        fence = Moments(take_over, lambda: None)
    else:
        fence = Moments(lambda: None, take_over)
    with pytest.raises(LogOwnedError):
        TokenLog.open(config(tmp_path), epoch=5, fence=fence)
    (owner,) = owners
    owner.append([token(handle, 2)])
    owner.compact()
    owner.append([token(handle, 3)])
    owner.close()
    assert_prefix(reopened(tmp_path)[0], 4)


def test_what_a_late_leaseholder_stumbles_over_is_not_damage(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    log.begin(b"p" * 50, 1)
    log.close()
    (file,) = tmp_path.glob("*.wal")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(LogOwnedError):
        TokenLog.open(config(tmp_path), epoch=5, fence=Moments(lambda: None))
    with pytest.raises(CorruptLogError):
        TokenLog.open(config(tmp_path), epoch=5, fence=lambda: None)


@pytest.mark.usefixtures("unlocked")
def test_what_a_stale_owner_writes_is_ignored(tmp_path: Path) -> None:
    stale, _ = TokenLog.open(config(tmp_path, segment_bytes=500))
    handle = stale.begin(b"p", 1)
    stale.append([token(handle, 0)])
    owner, requests = TokenLog.open(config(tmp_path))
    assert (owner.epoch, owner.clean) == (2, False)
    assert_prefix(requests[0], 1)
    wrong = LoggedToken(handle, 1, -1, 0.0, 0.0, 0, None)
    stale.append([wrong])  # to the old segment
    owner.append([token(handle, 1)])
    for index in range(2, 40):  # to new segments of its old epoch
        stale.append([LoggedToken(handle, index, -1, 0.0, 0.0, 0, None)])
    owner.append([token(handle, 2)])
    assert len(stale._writer.segments) > 1
    owner.close()
    third, requests = TokenLog.open(config(tmp_path))
    assert_prefix(requests[0], 3)
    stale.append([LoggedToken(handle, 40, -1, 0.0, 0.0, 0, None)])
    stale.close()
    third.close()
    assert_prefix(reopened(tmp_path)[0], 3)


@pytest.mark.usefixtures("unlocked")
def test_two_owners_of_one_epoch_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = TokenLog.open(config(tmp_path))
    monkeypatch.setattr(SegmentFiles, "__iter__", lambda self: iter(()))  # it looked before the first one wrote
    with pytest.raises(LogOwnedError, match="epoch 1"):
        TokenLog.open(config(tmp_path))
    first.close()


def test_the_id_outlives_its_file(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    log.close()
    identity = TokenLog.identify(config(tmp_path))
    (tmp_path / "ID").unlink()
    assert log_id(tmp_path) == identity
    (tmp_path / "ID").write_text("wrong")
    with pytest.raises(CorruptLogError, match="ID"):
        TokenLog.open(config(tmp_path))


# --- damage ------------------------------------------------------------------------------------------------------
def small_log(path: Path) -> tuple[bytes, Files, dict[int, int]]:
    """(id, segments, tokens by handle) of a log with several segments, a compaction and a takeover.

    The tokens of odd handles come with the ids that they were drawn from.
    """
    log, _ = TokenLog.open(config(path, segment_bytes=300))
    lengths = {log.begin(b"prompt %d" % index, index): 0 for index in range(4)}

    def step(*handles: int, finish: FinishReason | None = None) -> None:
        log.append([token(handle, lengths[handle], finish, keeps=handle % 2 == 1) for handle in handles])
        for handle in handles:
            lengths[handle] += 1

    step(0, 1, 2, 3)
    step(0, 1)
    log.end_cancelled(3)
    log.forget(3)
    log.compact()
    step(0, 2)
    step(0, finish=FinishReason.STOP)
    log.delivered(0, "5-1")
    log._writer.close()  # as kill does
    log._flock.close()
    log, _ = TokenLog.open(config(path, segment_bytes=300))
    step(1, 2)
    log.end_failed(2, "INTERNAL", "broke")
    for _ in range(3):
        step(1)
    step(1, finish=FinishReason.LENGTH)
    log._writer.close()
    log._flock.close()
    return log_id(path), {file.name: file.read_bytes() for file in path.glob("*.wal")}, lengths


def assert_recovers_a_prefix(identity: bytes, files: Files, lengths: dict[int, int]) -> bool:
    """Whether it recovers; either that, or an error with a place."""
    try:
        recovery = recover(identity, files)
    except CorruptLogError as error:
        return f"{error.metadata['file']} at byte {int(error.metadata['offset'])}" not in str(error)
    for handle, state in recovery.replay.requests.items():
        request = state.recovered(handle)
        assert_prefix(request)
        whole = len(request.tokens) == lengths[handle]
        assert len(request.tokens) <= lengths[handle]
        assert len(request.kept) == (len(request.tokens) if handle % 2 else 0)  # never a token without its ids
        assert (request.payload, request.lineage) == (b"prompt %d" % handle, handle)
        if request.finish_reason is not None:
            ends = {0: FinishReason.STOP, 1: FinishReason.LENGTH, 3: FinishReason.CANCELLED}
            assert whole
            assert request.finish_reason == ends[handle]
        assert request.error in (None, ("INTERNAL", "broke") if handle == 2 else None)
        assert request.stream_entry_id == ("5-1" if request.delivered else "")
    return True


def test_cut_at_every_byte_it_recovers_a_prefix_or_says_where(tmp_path: Path) -> None:
    identity, files, lengths = small_log(tmp_path)
    assert len(files) >= 4
    assert assert_recovers_a_prefix(identity, files, lengths)
    newest = max(files)
    recovered = 0
    for name, data in files.items():
        for size in range(len(data)):
            recovered += assert_recovers_a_prefix(identity, {**files, name: data[:size]}, lengths)
        assert assert_recovers_a_prefix(identity, {k: v for k, v in files.items() if k != name}, lengths) == (
            name == newest
        )
    start = len(files[newest]) - recovered
    assert 0 < start < len(files[newest])  # every cut of the newest one's records is a torn end, and no other cut is


def test_with_every_bit_flipped_it_recovers_a_prefix_or_says_where(tmp_path: Path) -> None:
    identity, files, lengths = small_log(tmp_path)
    outcomes = []
    for name, data in files.items():
        for offset in range(len(data)):
            for bit in range(8):
                flipped = data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]
                outcomes.append(assert_recovers_a_prefix(identity, {**files, name: flipped}, lengths))
    # Flips in the last record pass for a torn end; all the others are found out.
    assert 0 < sum(outcomes) < len(outcomes) / 4


def test_a_torn_end_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    handle = log.begin(b"p", 1)
    log.append([token(handle, 0)])
    log.append([token(handle, 1)])
    log._writer.close()
    log._flock.close()
    (file,) = tmp_path.glob("*.wal")
    os.truncate(file, file.stat().st_size - 1)
    with caplog.at_level(logging.WARNING, "rollout_server"):
        log, (request,) = TokenLog.open(config(tmp_path))
    assert_prefix(request, 1)
    assert "42 bytes of a torn write" in caplog.text
    log.append([token(handle, 1)])
    log.close()
    for _ in range(2):
        assert_prefix(reopened(tmp_path)[0], 2)


def test_corruption_changes_nothing_on_the_disk(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    handle = log.begin(b"p" * 50, 1)
    log.append([token(handle, 0)])
    log.close()
    (file,) = tmp_path.glob("*.wal")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    (tmp_path / "stray.txt").write_text("not ours")
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir() if item.name != "LOCK"}
    for _ in range(2):
        with pytest.raises(CorruptLogError, match=r"at byte 62: .* valid one follows"):
            TokenLog.open(config(tmp_path))
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir() if item.name != "LOCK"} == before


# --- compaction --------------------------------------------------------------------------------------------------
def test_compaction_keeps_what_is_known_and_frees_the_rest(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path, segment_bytes=2000, compact_above_bytes=20_000))
    kept = log.begin(b"kept", 1)
    for index in range(60):
        log.append([token(kept, index)])
    for _ in range(100):
        handle = log.begin(b"x" * 500, 2)
        log.append([token(handle, 0, FinishReason.STOP)])
        log.delivered(handle, "1-0")
        log.forget(handle)
    while (thread := log._compactor) is not None and thread.is_alive():
        thread.join()
    log.append([token(kept, 60)])
    assert log._writer.bytes_on_disk < 45_000
    assert sum(file.stat().st_size for file in tmp_path.glob("*.wal")) == log._writer.bytes_on_disk
    log.compact()
    log.compact()
    assert log._writer.bytes_on_disk < 5000
    log.close()
    (request,) = reopened(tmp_path)
    assert_prefix(request, 61)


def test_kept_ids_survive_restarts_and_compactions_and_count_as_live(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path, segment_bytes=400))
    keeps, plain, gone = (log.begin(b"p", 1) for _ in range(3))
    for index in range(9):
        log.append([token(keeps, index, keeps=True), token(plain, index), token(gone, index, keeps=True)])
    log.forget(gone)
    records = [
        sum(RECORD_HEADER_BYTES + len(payload) for _, payload in request.records(handle))
        for handle, request in recover(log_id(tmp_path), SegmentFiles(tmp_path)).replay.requests.items()
    ]
    assert log._live_bytes == sum(records)
    for _ in range(2):
        log.compact()
        log.append([token(keeps, index := index + 1, keeps=True)])
        log.close()
        log, requests = TokenLog.open(config(tmp_path, segment_bytes=400))
        records[0] += token(keeps, index, keeps=True).snapshot_bytes
        assert log._live_bytes == sum(records)
        assert [(len(request.tokens), len(request.kept)) for request in requests] == [(index + 1, index + 1), (9, 0)]
        for request in requests:
            assert_prefix(request)
    with pytest.raises(InternalError, match="all tokens have kept ids, or none"):
        log.append([token(keeps, index + 1)])
    log.close()


def test_a_torn_step_with_kept_ids_is_drawn_again(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    handle = log.begin(b"p", 1)
    log.append([token(handle, 0, keeps=True)])
    log.append([token(handle, 1, keeps=True), token(handle, 2, keeps=True)])
    log._writer.close()  # as kill does
    log._flock.close()
    (file,) = tmp_path.glob("*.wal")
    os.truncate(file, file.stat().st_size - 1)
    for index in (1, 2):
        log, (request,) = TokenLog.open(config(tmp_path))
        assert_prefix(request, index)
        assert len(request.kept) == index
        log.append([token(handle, index, keeps=True)])
        log.compact()
        log.close()
    (request,) = reopened(tmp_path)
    assert_prefix(request, 3)
    assert len(request.kept) == 3


def test_a_crash_anywhere_in_a_compaction_recovers_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = TokenLog.open(config(tmp_path, segment_bytes=300))
    handles = [log.begin(b"prompt %d" % index, index) for index in range(3)]
    for index in range(4):
        log.append([token(handle, index, keeps=handle == handles[2]) for handle in handles])
    log.forget(handles[1])
    identity = log_id(tmp_path)
    states: list[Files] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            states.append({file.name: file.read_bytes() for file in tmp_path.glob("*.wal")})
            return result

        return call

    monkeypatch.setattr(os, "link", watched(os.link))
    monkeypatch.setattr(os, "unlink", watched(os.unlink))
    log.compact()
    monkeypatch.undo()
    log.close()
    assert len(states) > 8
    for number, files in enumerate(states):
        # A compaction's segments have no name until they are whole, so to cut what is new in this state is damage of a
        # kind that a crash does not do. It must not pass for a prefix, either.
        recovery = recover(identity, files)
        assert list(recovery.replay.requests) == [handles[0], handles[2]]
        for handle, state in recovery.replay.requests.items():
            assert_prefix(state.recovered(handle), 4)
            assert len(state.recovered(handle).kept) == (4 if handle == handles[2] else 0)
        for name in files.keys() - states[number - 1].keys() if number else ():
            for size in range(len(files[name])):
                try:
                    cut = recover(identity, {**files, name: files[name][:size]})
                except CorruptLogError:
                    continue
                found = cut.replay.requests.values()
                assert [(len(state.tokens), len(state.kept)) for state in found] == [(4 * 29, 0), (4 * 29, 4)]


def test_what_a_crash_leaves_of_a_compaction_is_removed(tmp_path: Path) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    log.begin(b"p", 1)
    names = [f"{1:016x}-{9:016x}.wal", f"{1:016x}-{8:016x}.wal.00ff.tmp", "notes.wal", f"{7:016x}-{1:016x}.wal.1.tmp"]
    for name in names[1:]:
        (tmp_path / name).write_bytes(b"x")
    log.close()
    assert len(reopened(tmp_path)) == 1
    left = {item.name for item in tmp_path.iterdir()}
    assert left & set(names) == {"notes.wal", names[3]}


def test_a_compaction_that_fails_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    handle = log.begin(b"p", 1)
    log.append([token(handle, 0)])
    rotate, calls = log._writer.rotate, []

    def full_at_the_last_step(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise LogFullError("full")
        rotate(*args, **kwargs)

    monkeypatch.setattr(log._writer, "rotate", full_at_the_last_step)
    with pytest.raises(LogFullError):
        log.compact()
    assert len(list(tmp_path.glob("*.wal"))) == 2
    log.append([token(handle, 1)])
    log.compact()
    log.append([token(handle, 2)])
    log.close()
    assert_prefix(reopened(tmp_path)[0], 3)


# --- the disk ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("durability", ["always", "interval"])
def test_a_failed_fsync_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str) -> None:
    log, _ = TokenLog.open(config(tmp_path, durability=durability, sync_interval_s=1000.0))
    handle = log.begin(b"p", 1)

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(InternalError, match="I/O error"):  # noqa: PT012 - the first where it waits, else the second
        log.append([token(handle, 0)])
        log.sync()
    monkeypatch.undo()
    for call in (lambda: log.append([token(handle, 1)]), lambda: log.begin(b"q", 1), log.sync, log.compact):
        with pytest.raises(InternalError, match="restart"):
            call()
    log.close()
    log, (request,) = TokenLog.open(config(tmp_path))
    assert not log.clean
    assert_prefix(request, 1)
    log.close()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("fdatasync", OSError(errno.EIO, "it cannot")),
        ("dup", OSError(errno.EMFILE, "it cannot")),
        ("dup", MemoryError("it cannot")),
    ],
)
def test_the_thread_that_syncs_tells_of_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    log, _ = TokenLog.open(config(tmp_path, durability="interval", sync_interval_s=0.01))
    told, threads, done = [], [], threading.Event()

    def broken(fd: int) -> None:
        raise error

    def tell(failure: BaseException) -> None:
        told.append(failure)
        threads.append(threading.current_thread())
        done.set()

    log.on_failed = tell
    monkeypatch.setattr(os, call, broken)
    handle = log.begin(b"p", 1)
    assert done.wait(60)
    monkeypatch.undo()
    with pytest.raises(InternalError, match="it cannot"):
        log.append([token(handle, 0)])
    log.close()
    assert (told, threads) == ([error], [log._syncer])
    log.on_failed = tell  # whoever comes late hears of it, too
    assert told == [error, error]


def test_a_failed_write_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    told: list[BaseException] = []
    log.on_failed = told.append
    handle = log.begin(b"p", 1)
    write = os.write

    def broken(fd: int, data: bytes) -> int:
        write(fd, data[:5])
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(InternalError, match="I/O error"):
        log.append([token(handle, 0)])
    monkeypatch.undo()
    with pytest.raises(InternalError, match="restart"):
        log.append([token(handle, 0)])
    log.close()
    assert [str(error) for error in told] == ["[Errno 5] I/O error"]
    assert_prefix(reopened(tmp_path)[0], 0)


def test_full_neither_waits_nor_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = TokenLog.open(config(tmp_path))
    handle = log.begin(b"p", 1)
    looked, room = threading.Event(), threading.Event()

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no room")

    def fallocate(fd: int, offset: int, n_bytes: int) -> None:
        looked.set()
        if not room.is_set():
            full(fd, b"")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(LogFullError):
            log.append([token(handle, 0)])
    with log._lock:
        assert log.full
    assert looked.wait(60)  # without anybody asking
    assert log.full
    room.set()
    eventually(lambda: not log.full)
    log.append([token(handle, 0)])
    log.close()
    assert_prefix(reopened(tmp_path)[0], 1)


CHILD = """
import os, resource, sys
from pathlib import Path
sys.path[:0] = ["tests/unit"]
from test_token_log import *
path = Path(sys.argv[1])
"""


def run_child(code: str, *arguments: str, wrap: tuple[str, ...] = ()) -> str:
    command = [*wrap, sys.executable, "-c", CHILD + code, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    code = """
log, _ = TokenLog.open(config(path))
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
handle = log.begin(b"p", 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limit[1]))  # Python ignores SIGXFSZ: the write is short, or EFBIG
n_logged = 0
try:
    while True:
        log.append([token(handle, n_logged)])
        n_logged += 1
except LogFullError as error:
    assert error.retry_delay_s > 0
size = max(path.glob("*.wal")).stat().st_size
assert size == log._writer.bytes_on_disk <= 9000
for _ in range(3):
    assert log.full
    with pytest.raises(LogFullError):
        log.append([token(handle, n_logged)])
    with pytest.raises(LogFullError):
        log.begin(b"x" * 200, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
eventually(lambda: not log.full)
log.append([token(handle, n_logged)])
log.close()
print(n_logged + 1)
"""
    n_logged = int(run_child(code, str(tmp_path)))
    assert_prefix(reopened(tmp_path)[0], n_logged)


TMPFS = (
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs -o size=4m none "$0" && exec "$@"',
)


def test_on_a_full_disk_requests_can_still_end(tmp_path: Path) -> None:
    wrap = (*TMPFS, str(tmp_path))
    if shutil.which("unshare") is None or subprocess.run([*wrap, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    code = """
log, _ = TokenLog.open(config(path / "log", segment_bytes=1 << 20))
handles = [log.begin(b"x" * 10000, 1) for _ in range(100)]
kept = log.begin(b"kept", 1)
ballast = path / "ballast"
with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
    while True:
        assert file.write(b"x" * 4096) == 4096
n_logged = 0
with pytest.raises(LogFullError):
    while True:
        log.append([token(kept, n_logged)])
        n_logged += 1
assert log.full
for handle in handles:  # more than the rest of the segment's last page holds
    log.end_failed(handle, "LOG_FULL", "y" * 100)
    log.delivered(handle, "1-0")
    with pytest.raises(LogFullError):
        log.begin(b"x" * 5000, 1)
assert log.full and not (path / "log" / "RESERVE").exists()
with pytest.raises(LogFullError):
    log.append([token(kept, n_logged)])
for handle in handles:
    log.forget(handle)
log.compact()  # into the reserve's room; what it frees is more than that
eventually(lambda: not log.full)
log.append([token(kept, n_logged)])
assert (path / "log" / "RESERVE").stat().st_size == 1 << 20
log.close()
with pytest.raises(OSError), (path / "more").open("wb", buffering=0) as file:
    while True:
        assert file.write(b"x" * 4096) == 4096
log, (request,) = TokenLog.open(config(path / "log"))
assert log.full
assert_prefix(request, n_logged + 1)
with pytest.raises(LogFullError):  # once the segment's page is used up
    for index in range(n_logged + 1, n_logged + 10_000):
        log.append([token(kept, index)])
log.end_cancelled(kept)
ballast.unlink()
eventually(lambda: not log.full)
log.begin(b"p", 1)
log.close()
"""
    run_child(code, str(tmp_path), wrap=wrap)


WRITER = """
log, requests = TokenLog.open(config(path, segment_bytes=3000, compact_above_bytes=9000, durability=sys.argv[2]))
counts = {request.handle: len(request.tokens) for request in requests}
while True:
    if len(counts) < 4:
        handle = log.begin(b"p" * 100, 1)
        counts[handle] = 0
        os.write(1, b"%d %d\\n" % (handle, 0))
    log.append([token(handle, count, keeps=handle % 2 == 1) for handle, count in counts.items()])
    for handle in list(counts):
        counts[handle] += 1
        os.write(1, b"%d %d\\n" % (handle, counts[handle]))
        if counts[handle] % 50 == 49:
            os.write(1, b"%d -1\\n" % handle)
            log.forget(handle)
            del counts[handle]
"""


@pytest.mark.parametrize("durability", ["os", "always"])
def test_killed_at_any_moment_nothing_reported_is_lost(tmp_path: Path, durability: str) -> None:
    rng = random.Random(durability)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos")])}
    reported: dict[int, int] = {}
    for _ in range(3):
        command = [sys.executable, "-c", CHILD + WRITER, str(tmp_path), durability]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(rng.randrange(1, 1500))]
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.readlines()
        assert child.returncode == -signal.SIGKILL
        for line in lines:
            if line.endswith("\n"):
                handle, count = map(int, line.split())
                reported[handle] = count
        found = {request.handle: request for request in reopened(tmp_path)}
        for request in found.values():
            assert_prefix(request)
            assert len(request.kept) == (len(request.tokens) if request.handle % 2 else 0)
        for handle, count in reported.items():
            if count >= 0:
                # The last step may have been logged and not reported: of all requests or of none.
                assert len(found[handle].tokens) - count in (0, 1)
                reported[handle] = len(found[handle].tokens)
        assert found.keys() - reported.keys() <= {max(found, default=0)}
