"""Who sends the weights, who changes them, and what becomes of it when either fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from opd_mesh.errors import OpdError, UnavailableError
from opd_mesh.policy import PolicyId
from student_trainer import policy_feed
from student_trainer.policy_feed import PolicyFeed


class FakeServers:
    """Records every push; ``gate`` holds pushes up, ``error`` fails them, ``lost`` names who has lost the policy."""

    def __init__(self) -> None:
        self.version = 0
        self.pushes: list[tuple[int, list[str] | None]] = []
        self.in_progress = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.lost: list[Any] = []
        self.outstanding = 1
        self.looked_at: list[list[str] | None] = []
        self.watch = self
        self.state = SimpleNamespace(policy=None)
        self.failures: list[Exception] = []

    async def push(self, clients: Sequence[Any] | None) -> float:
        self.in_progress += 1
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
        finally:
            self.in_progress -= 1
        names = None if clients is None else [client.address for client in clients]
        self.pushes.append((self.version, names))
        self.lost = [] if clients is None else [client for client in self.lost if client not in clients]
        if clients is None:
            self.state.policy = PolicyId("run", 1, self.version, "digest")
        return 0.25

    async def lacking(self, policy: PolicyId, clients: Sequence[Any] | None = None) -> list[Any]:
        self.looked_at.append(None if clients is None else [client.address for client in clients])
        await asyncio.sleep(0)
        return [client for client in self.lost if clients is None or client in clients]


@pytest.fixture
def servers() -> FakeServers:
    return FakeServers()


@pytest.fixture
async def feed(servers: FakeServers, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PolicyFeed]:
    monkeypatch.setattr(policy_feed, "WATCH_INTERVAL_S", 0.01)
    feed = PolicyFeed(
        servers.push,
        servers,  # type: ignore[arg-type]
        servers.state,  # type: ignore[arg-type]
        on_failure=servers.failures.append,
    )
    yield feed
    await feed.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def nothing() -> None: ...


async def test_weights_are_not_changed_while_they_are_sent(servers: FakeServers, feed: PolicyFeed) -> None:
    told: list[int] = []
    await feed.give()
    servers.gate.clear()
    servers.version = 1
    feed.give_ahead(lambda: told.append(feed.served_version))
    await until(lambda: servers.in_progress)

    async def change() -> None:
        async with feed.changing_weights():
            assert not servers.in_progress
            servers.version = 2

    changing = asyncio.create_task(change())
    await asyncio.sleep(0.02)
    assert servers.version == 1
    assert told == []
    servers.gate.set()
    await changing
    assert servers.pushes == [(0, None), (1, None)]
    assert told == [1]
    assert feed.swap_s == 0.25
    assert feed.weights_are_whole


async def test_nothing_is_sent_after_a_change_that_failed(servers: FakeServers, feed: PolicyFeed) -> None:
    await feed.give()
    with pytest.raises(RuntimeError, match="in the middle"):
        async with feed.changing_weights():
            raise RuntimeError("in the middle")
    assert not feed.weights_are_whole
    await feed.give()
    servers.lost = [SimpleNamespace(address="one")]
    feed.watch()
    await asyncio.sleep(0.1)
    assert servers.pushes == [(0, None)]


async def test_a_push_that_failed_is_told_to_who_needs_it(servers: FakeServers, feed: PolicyFeed) -> None:
    await feed.give()
    servers.error = UnavailableError("gone")
    feed.give_ahead(nothing)
    with pytest.raises(UnavailableError, match="gone"):
        async with feed.changing_weights():
            pytest.fail("the weights must not change")
    assert feed.weights_are_whole  # as they were: they may become a checkpoint


async def test_a_push_that_failed_and_is_not_needed_is_logged(
    servers: FakeServers, feed: PolicyFeed, caplog: pytest.LogCaptureFixture
) -> None:
    await feed.give()
    servers.error = UnavailableError("gone")
    feed.give_ahead(nothing)
    await asyncio.sleep(0.02)
    feed.drop()
    with caplog.at_level(logging.WARNING, "student_trainer"):
        await feed.close()
    assert "gone" in caplog.text
    await feed.given()  # nothing is on its way any more


async def test_who_waits_for_a_policy_that_is_dropped_goes_on(servers: FakeServers, feed: PolicyFeed) -> None:
    await feed.give()
    servers.gate.clear()
    feed.give_ahead(nothing)
    waiting = asyncio.create_task(feed.given())
    await until(lambda: servers.in_progress)
    feed.drop()
    await asyncio.wait_for(waiting, 10)
    assert not servers.in_progress
    feed.give_ahead(nothing)  # and nothing is begun anew
    await feed.given()
    assert servers.pushes == [(0, None)]


async def test_who_is_cancelled_while_it_waits_for_a_policy_is_cancelled(
    servers: FakeServers, feed: PolicyFeed
) -> None:
    servers.gate.clear()
    feed.give_ahead(nothing)
    waiting = asyncio.create_task(feed.given())
    await until(lambda: servers.in_progress)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_drop_lets_go_of_the_weights_that_the_watch_is_sending(servers: FakeServers, feed: PolicyFeed) -> None:
    await feed.give()
    servers.gate.clear()
    servers.lost = [SimpleNamespace(address="one")]
    feed.watch()
    await until(lambda: servers.in_progress)
    feed.drop()
    async with asyncio.timeout(10), feed.changing_weights():
        assert not servers.in_progress


async def test_only_who_has_lost_the_policy_is_given_it_again(servers: FakeServers, feed: PolicyFeed) -> None:
    await feed.give()
    servers.lost = [SimpleNamespace(address="two")]
    feed.watch()
    await until(lambda: len(servers.pushes) > 1)
    assert servers.pushes == [(0, None), (0, ["two"])]
    assert feed.swap_s == 0.25
    assert servers.looked_at[-1] == ["two"] or servers.looked_at[-2] == ["two"]
    servers.outstanding = 0
    servers.lost = [SimpleNamespace(address="one")]
    await asyncio.sleep(0.1)
    assert len(servers.pushes) == 2  # nobody waits for it


async def test_a_policy_that_was_on_its_way_is_not_given_twice(servers: FakeServers, feed: PolicyFeed) -> None:
    await feed.give()
    servers.gate.clear()
    servers.version = 1
    feed.give_ahead(nothing)
    await until(lambda: servers.in_progress)
    servers.lost = [SimpleNamespace(address="one")]
    feed.watch()
    await until(lambda: None in servers.looked_at)
    servers.gate.set()
    await feed.given()
    await until(lambda: servers.looked_at[-1] is None and len(servers.looked_at) > 2)
    assert servers.pushes == [(0, None), (1, None)]


async def test_a_server_that_cannot_be_given_the_policy_is_tried_less_and_less_often(
    servers: FakeServers, feed: PolicyFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        if seconds:
            waits.append(round(seconds, 6))
        await sleep(0)

    await feed.give()
    servers.lost = [SimpleNamespace(address="one")]
    servers.error = OpdError("refused")
    monkeypatch.setattr(policy_feed, "WATCH_BACKOFF_S", 0.05)
    monkeypatch.setattr(policy_feed.asyncio, "sleep", noted)
    feed.watch()
    async with asyncio.timeout(10):
        while len(waits) < 6:
            await sleep(0)
        assert waits[:6] == [0.01, 0.02, 0.04, 0.05, 0.05, 0.05]
        servers.error = None
        while 0.01 not in waits[6:]:
            await sleep(0)
    assert servers.failures == []


async def test_a_defect_in_the_watch_is_not_kept_quiet(servers: FakeServers, feed: PolicyFeed) -> None:
    await feed.give()
    servers.lost = [SimpleNamespace(address="one")]
    servers.error = RuntimeError("a defect")
    feed.watch()
    await until(lambda: servers.failures)
    assert servers.failures == [servers.error]
