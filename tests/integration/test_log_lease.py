"""The lease of a token log on a real Valkey: who owns it, when it is lost, and what a late owner can still do."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from mesh import running_valkey
from redis.asyncio import Redis

import rollout_server.log_folder as log_folder_module
import rollout_server.log_lease as log_lease_module
import rollout_server.token_log as token_log_module
from opd_mesh.config.services import TokenLogConfig
from opd_mesh.errors import ConfigError, InternalError, LogOwnedError, StreamUnavailableError
from opd_mesh.valkey import EmbeddedValkey
from rollout_server.log_folder import FolderLock, log_id
from rollout_server.log_format import segment_name
from rollout_server.log_lease import LogLease
from rollout_server.log_recovery import recover
from rollout_server.owned_log import OwnedLog
from rollout_server.token_log import LoggedToken, TokenLog

NewLease = Callable[..., LogLease]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
async def new_lease(url: str, tmp_path: Path) -> AsyncIterator[NewLease]:
    """Leases of one log, released in the end."""
    identity, made = os.urandom(16), []

    def new(lease_s: float = 60.0, at: str = url, timeout_s: float = 5.0) -> LogLease:
        lease = LogLease(at, identity, TokenLogConfig(path=tmp_path, lease_s=lease_s), timeout_s=timeout_s)
        made.append(lease)
        return lease

    yield new
    for lease in made:
        await lease.release()


class Clock:
    """The lease's clock, which a test moves: nothing here waits for real seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        now_s = log_lease_module._now_s
        monkeypatch.setattr(log_lease_module, "_now_s", lambda: now_s() + self.ahead_s)


async def test_one_owner_at_a_time_and_epochs_grow(new_lease: NewLease) -> None:
    first, second = new_lease(), new_lease()
    with pytest.raises(LogOwnedError, match="has run out"):
        first.check()
    assert await first.acquire() == 1
    first.check()
    with pytest.raises(LogOwnedError, match=first.owner) as caught:
        await second.acquire()
    assert caught.value.metadata == {"owner": first.owner}
    assert 0 < (caught.value.retry_delay_s or 0) <= 60
    await first.release()
    with pytest.raises(LogOwnedError):
        first.check()
    assert await second.acquire() == 2
    await first.release()  # not its own any more
    second.check()
    with pytest.raises(LogOwnedError):
        await first.acquire()


async def test_epochs_are_later_than_any_in_the_folder(new_lease: NewLease, tmp_path: Path, url: str) -> None:
    first, second = new_lease(), new_lease()
    (tmp_path / segment_name(7, 3)).touch()
    assert await first.acquire() == 8
    (tmp_path / segment_name(8, 0)).touch()
    async with Redis.from_url(url) as redis:
        await redis.delete(*first._keys)  # it lost its data
    assert await second.acquire() == 9


async def test_a_waiting_server_has_it_as_soon_as_it_is_released(url: str, tmp_path: Path) -> None:
    config = TokenLogConfig(path=tmp_path, lease_s=600.0)
    first = await OwnedLog.take(config, url, timeout_s=5.0)
    waiting = asyncio.create_task(OwnedLog.take(config, url, timeout_s=5.0))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    first.log.begin(b"p", 1)
    await first.release()
    second = await waiting
    assert (first.log.epoch, second.log.epoch) == (1, 2)
    assert [request.payload for request in second.take_recovered()] == [b"p"]
    assert second.take_recovered() == []
    await second.release()


# --- on one machine ----------------------------------------------------------------------------------------------
OWNER = """
import asyncio, sys, time
from pathlib import Path
from opd_mesh.config.services import TokenLogConfig
from rollout_server.owned_log import OwnedLog
async def main():
    config = TokenLogConfig(path=Path(sys.argv[1]), lease_s=float(sys.argv[3]))
    owned = await OwnedLog.take(config, sys.argv[2], timeout_s=5.0)
    owned.log.begin(b"p", 1)
    print(owned.log.epoch, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


@contextmanager
def owner_process(path: Path, url: str, lease_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the log, with one request in it."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "protos")])}
    command = [sys.executable, "-c", OWNER, str(path), url, str(lease_s)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"1\n"
            yield owner
        finally:
            owner.kill()


async def test_the_lease_of_an_owner_that_was_killed_here_is_not_waited_for(url: str, tmp_path: Path) -> None:
    config = TokenLogConfig(path=tmp_path, lease_s=10.0)
    with owner_process(tmp_path, url, lease_s=86_400.0) as owner:
        waiting = asyncio.create_task(OwnedLog.take(config, url, timeout_s=5.0))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        owner.kill()
        owned = await asyncio.wait_for(waiting, 60)
    assert owned.log.epoch == 2
    assert [request.payload for request in owned.take_recovered()] == [b"p"]
    await owned.release()


async def test_the_lease_of_an_owner_that_is_stopped_here_is_waited_for(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TokenLogConfig(path=tmp_path, lease_s=3.0)
    with owner_process(tmp_path, url, lease_s=3.0) as owner:
        owner.send_signal(signal.SIGSTOP)
        owned = await asyncio.wait_for(OwnedLog.take(config, url, timeout_s=5.0), 60)
        assert owned.log.epoch == 2
        assert "its lease runs out in" in caplog.text
        assert f"locked by process {owner.pid}, with a lease, whose lease has run out: taken over" in caplog.text
        owner.kill()
        owner.wait()
        # The flock is free now, and who takes it must not take the lease of one that goes without.
        flock = FolderLock(tmp_path, leased=True)
        assert flock.held
        other = LogLease(url, log_id(tmp_path), config)
        with pytest.raises(LogOwnedError, match=owned.lease.owner if owned.lease else ""):
            await other.acquire(flock)
        flock.close()
        await other.release()
    await owned.release()


async def test_only_the_flock_proves_that_an_owner_is_dead(new_lease: NewLease, tmp_path: Path) -> None:
    first, second = new_lease(), new_lease()
    flock = FolderLock(tmp_path, leased=True)
    assert await first.acquire(flock) == 1
    without = FolderLock(tmp_path, leased=True)
    assert (without.held, without.place) == (False, "")
    for other in (without, None):
        with pytest.raises(LogOwnedError, match=first.owner):
            await second.acquire(other)
    without.close()
    flock.close()  # as its end does
    flock = FolderLock(tmp_path, leased=True)
    assert await second.acquire(flock) == 2
    flock.close()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    flock = FolderLock(elsewhere, leased=True)  # another machine's, or another file's
    with pytest.raises(LogOwnedError, match=second.owner):
        await first.acquire(flock)
    flock.close()


async def test_a_machine_that_does_not_tell_its_boot_waits(
    new_lease: NewLease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_folder_module, "BOOT_ID", tmp_path / "none")
    first, second = new_lease(), new_lease()
    for lease in (first, second):
        flock = FolderLock(tmp_path, leased=True)
        assert (flock.held, flock.place) == (True, "")
        if lease is first:
            await lease.acquire(flock)
        else:
            with pytest.raises(LogOwnedError):
                await lease.acquire(flock)
        flock.close()


# --- losing it ---------------------------------------------------------------------------------------------------
async def test_an_owner_that_is_late_in_its_opening_stands_by(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it reads the log its lease runs out, and another takes it; it has it again when that one goes."""
    clock = Clock(monkeypatch)
    config = TokenLogConfig(path=tmp_path, lease_s=60.0)
    successor: list[tuple[LogLease, TokenLog]] = []
    loop = asyncio.get_running_loop()

    async def take_over() -> None:
        lease = LogLease(url, log_id(tmp_path), config)
        async with Redis.from_url(url) as redis:
            await redis.delete(lease._keys[0])  # as time does
        clock.ahead_s += 61.0
        token_log, _ = TokenLog.open(config, epoch=await lease.acquire(), fence=lease.check)
        successor.append((lease, token_log))

    def recover_late(*args: Any) -> Any:
        found = recover(*args)
        monkeypatch.setattr(token_log_module, "recover", recover)
        asyncio.run_coroutine_threadsafe(take_over(), loop).result(60)
        return found

    monkeypatch.setattr(token_log_module, "recover", recover_late)
    late = asyncio.create_task(OwnedLog.take(config, url, timeout_s=5.0))
    async with asyncio.timeout(60):
        while not successor:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert not late.done()
    (lease, token_log) = successor[0]
    token_log.begin(b"p", 1)
    token_log.close()
    await lease.release()
    owned = await asyncio.wait_for(late, 60)
    assert (token_log.epoch, owned.log.epoch) == (2, 3)
    assert [request.payload for request in owned.take_recovered()] == [b"p"]
    await owned.release()


@pytest.mark.parametrize("durability", ["always", "interval"])
async def test_a_log_that_fails_tells_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    config = TokenLogConfig(path=tmp_path, durability=durability, sync_interval_s=0.01)
    owned = await OwnedLog.take(config, None, timeout_s=5.0)
    told: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    owned.when_lost(told.set_result)
    error = OSError(errno.EIO, "I/O error")

    def broken(fd: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with suppress(InternalError):  # where it waits
            await asyncio.to_thread(owned.log.begin, b"p", 1)
        assert await asyncio.wait_for(told, 60) is error
    await owned.release()


async def test_redis_that_is_away_at_the_start_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TokenLogConfig(path=tmp_path / "log")
    with EmbeddedValkey(tmp_path / "data", tmp_path / "log.txt") as valkey:
        assert valkey.pid is not None
        os.kill(valkey.pid, signal.SIGSTOP)
        try:
            taking = asyncio.create_task(OwnedLog.take(config, valkey.url, timeout_s=0.2))
            async with asyncio.timeout(60):
                while "waiting for the log: Redis at" not in caplog.text:
                    await asyncio.sleep(0.01)
            assert not taking.done()
        finally:
            os.kill(valkey.pid, signal.SIGCONT)
        owned = await asyncio.wait_for(taking, 60)
        await owned.release()


async def test_a_lease_is_renewed_for_as_long_as_it_is_held(new_lease: NewLease) -> None:
    first, second = new_lease(lease_s=9.0), new_lease()
    await first.acquire()
    valid_until_s = first._valid_until_s
    async with asyncio.timeout(60):
        while first._valid_until_s == valid_until_s:
            await asyncio.sleep(0.05)
    with pytest.raises(LogOwnedError):
        await second.acquire()
    first.check()
    assert not first.lost.is_set()


async def test_asking_again_gives_the_same_epoch(new_lease: NewLease) -> None:
    lease = new_lease()  # as after an answer that was lost
    assert [(await lease._ask("acquire", lease.owner, 60_000, 0, ""))[1] for _ in range(2)] == [[1, 1]] * 2
    assert (await lease._ask("acquire", lease.owner, 60_000, 1, ""))[1] == [1, 2]  # the folder has seen that one


async def test_an_owner_that_slept_fails_its_next_write(
    new_lease: NewLease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    config = TokenLogConfig(path=tmp_path)
    lease, successor = new_lease(), new_lease()
    log, _ = TokenLog.open(config, epoch=await lease.acquire(), fence=lease.check)
    handle = log.begin(b"p", 1)
    clock.ahead_s = 61.0
    token = LoggedToken(handle, 0, 1, 0.0, 0.0, 1, None)
    with pytest.raises(LogOwnedError, match="has run out"):
        await asyncio.to_thread(log.append, [token])
    await asyncio.wait_for(lease.lost.wait(), 10)
    clock.ahead_s = 0.0
    with pytest.raises(LogOwnedError):  # it does not come back
        lease.check()
    await lease._link.redis.delete(lease._keys[0])  # as time would
    taken, requests = TokenLog.open(config, epoch=await successor.acquire())
    assert taken.epoch == 2
    assert [request.tokens for request in requests] == [[]]
    taken.close()
    log.close()


async def test_a_lease_that_another_took_is_lost(new_lease: NewLease, url: str) -> None:
    lease = new_lease(lease_s=1.0)
    await lease.acquire()
    async with Redis.from_url(url) as redis:
        await redis.set(lease._keys[0], "another", px=60_000)
        await asyncio.wait_for(lease.lost.wait(), 30)
        with pytest.raises(LogOwnedError):
            lease.check()
        await lease.release()
        assert await redis.get(lease._keys[0]) == b"another"
        await redis.delete(lease._keys[0])


async def test_a_lease_that_was_taken_and_given_back_is_not_renewed(new_lease: NewLease, url: str) -> None:
    lease, other = new_lease(), new_lease()
    await lease.acquire()
    async with Redis.from_url(url) as redis:
        await redis.delete(lease._keys[0])
        assert (await lease._ask("renew", lease.owner, 60_000, 1))[1] == 1  # nobody came meanwhile
        await redis.delete(lease._keys[0])
        assert await other.acquire() == 2
        await other.release()
        assert (await lease._ask("renew", lease.owner, 60_000, 1))[1] == 0
        await redis.delete(*lease._keys)  # emptied, and nobody has come since
        assert (await lease._ask("renew", lease.owner, 60_000, 1))[1] == 1
        assert await redis.get(lease._keys[1]) == b"1"


async def test_redis_may_be_away_for_less_than_the_lease(new_lease: NewLease, tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "data", tmp_path / "log.txt") as valkey:
        lease = new_lease(lease_s=12.0, at=valkey.url, timeout_s=0.5)
        await lease.acquire()
        valid_until_s = lease._valid_until_s
        assert valkey.pid is not None
        os.kill(valkey.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(6)  # a renewal is due after 4
            lease.check()
            assert lease._valid_until_s == valid_until_s
        finally:
            os.kill(valkey.pid, signal.SIGCONT)
        async with asyncio.timeout(30):
            while lease._valid_until_s == valid_until_s:
                await asyncio.sleep(0.05)
        lease.check()
        assert not lease.lost.is_set()
        await lease.release()


async def test_redis_away_for_longer_loses_the_lease(new_lease: NewLease, tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "data", tmp_path / "log.txt") as valkey:
        lease = new_lease(lease_s=1.0, at=valkey.url, timeout_s=0.3)
        await lease.acquire()
    await asyncio.wait_for(lease.lost.wait(), 30)
    with pytest.raises(LogOwnedError):
        lease.check()
    with pytest.raises(StreamUnavailableError):
        await new_lease(at=valkey.url, timeout_s=0.3).acquire()


def test_a_url_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        LogLease("http://nowhere", bytes(16), TokenLogConfig(path=tmp_path))
