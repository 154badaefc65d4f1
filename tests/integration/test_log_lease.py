"""The lease of a token log on a real Valkey: who owns it, when it is lost, and what a late owner can still do."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from mesh import running_valkey
from redis.asyncio import Redis

import rollout_server.log_lease as log_lease_module
from opd_mesh.config.services import TokenLogConfig
from opd_mesh.errors import ConfigError, LogOwnedError, StreamUnavailableError
from opd_mesh.valkey import EmbeddedValkey
from rollout_server.log_lease import LogLease
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
    with pytest.raises(LogOwnedError):
        await second.acquire(0.3)
    await first.release()
    with pytest.raises(LogOwnedError):
        first.check()
    assert await second.acquire() == 2
    await first.release()  # not its own any more
    second.check()
    with pytest.raises(LogOwnedError):
        await first.acquire()


async def test_a_waiting_server_has_it_as_soon_as_it_is_released(new_lease: NewLease) -> None:
    first, second = new_lease(), new_lease()
    await first.acquire()
    waiting = asyncio.create_task(second.acquire(60.0))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await first.release()
    assert await waiting == 2


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
    assert [(await lease._ask("acquire", lease.owner, 60_000))[1][1] for _ in range(2)] == [1, b"1"]


async def test_an_owner_that_slept_fails_its_next_write(
    new_lease: NewLease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    config = TokenLogConfig(path=tmp_path)
    lease, successor = new_lease(), new_lease()
    log, _ = TokenLog.open(config, min_epoch=await lease.acquire() + 5)
    log.fence = lease.check
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
    taken, requests = TokenLog.open(config, min_epoch=await successor.acquire())
    assert taken.epoch == 7  # of the folder; the counter in Redis is behind
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
