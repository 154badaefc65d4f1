"""The trajectory stream over a real Valkey: what is promised when things go wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from opd_mesh.errors import (
    InvalidInputError,
    OverloadedError,
    RequestConflictError,
    StreamUnavailableError,
    TooLongError,
)
from opd_mesh.stream import MAX_PAYLOAD_BYTES, PAGE, TrajectoryStream
from opd_mesh.valkey import EmbeddedValkey

OpenStream = Callable[..., TrajectoryStream]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """One server for all tests that do it no harm; each test has a run id of its own."""
    folder = tmp_path_factory.mktemp("valkey")
    with EmbeddedValkey(folder / "data", folder / "log") as server:
        yield server


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A server to be ill-treated."""
    with EmbeddedValkey(tmp_path / "data", tmp_path / "log") as server:
        yield server


@pytest.fixture
async def opened() -> AsyncIterator[OpenStream]:
    """Opens streams of one run and closes them in the end."""
    run_id, streams = uuid.uuid4().hex[:8], []

    def open_stream(server: EmbeddedValkey, **settings: object) -> TrajectoryStream:
        streams.append(TrajectoryStream(server.url, run_id, **{"timeout_s": 5.0, **settings}))  # type: ignore[arg-type]
        return streams[-1]

    yield open_stream
    for stream in streams:
        await stream.close()


async def crash(stream: TrajectoryStream) -> None:
    """End a consumer as SIGKILL would: no goodbye, the lease runs out by itself."""
    if stream._heartbeat is not None:
        stream._heartbeat.cancel()
        stream._heartbeat = None
    await stream._link.redis.aclose()


def restart_the_dead(server: EmbeddedValkey) -> None:
    """Wait for a killed server to be gone (until then ``start`` sees one that runs), and start it again."""
    deadline = time.monotonic() + 5.0
    while server.running and time.monotonic() < deadline:
        time.sleep(0.01)
    server.start()


async def fill(stream: TrajectoryStream, count: int, start: int = 0) -> list[str]:
    return [await stream.publish(f"t{index}", f"payload {index}".encode()) for index in range(start, start + count)]


async def test_entries_come_in_order_with_their_bytes(shared: EmbeddedValkey, opened: OpenStream) -> None:
    publisher, trainer = opened(shared), opened(shared)
    payload = bytes(range(256)) * 100
    await publisher.publish("t0", payload)
    await publisher.publish("t1", b"")
    first = await trainer.read(10, 0)
    assert [(entry.trajectory_id, entry.payload, entry.deliveries) for entry in first] == [
        ("t0", payload, 1),
        ("t1", b"", 1),
    ]
    assert await trainer.read(10, 0) == []  # handed out once
    assert (await trainer.length(), await trainer.pending()) == (2, 2)
    assert await trainer.acknowledge(entry.entry_id for entry in first) == 2
    assert (await trainer.length(), await trainer.pending()) == (0, 0)
    assert await trainer.acknowledge(entry.entry_id for entry in first) == 0


async def test_a_waiting_read_wakes_up_and_an_idle_one_ends(shared: EmbeddedValkey, opened: OpenStream) -> None:
    publisher, trainer = opened(shared), opened(shared)
    waiting = asyncio.create_task(trainer.read(5, 10.0))
    await asyncio.sleep(0.1)
    await publisher.publish("t", b"x")
    assert [entry.trajectory_id for entry in await asyncio.wait_for(waiting, 2.0)] == ["t"]
    began = time.monotonic()
    assert await trainer.read(5, 0.3) == []
    assert 0.25 < time.monotonic() - began < 2.0


async def test_publishing_twice_adds_once_until_acknowledged(shared: EmbeddedValkey, opened: OpenStream) -> None:
    stream = opened(shared)
    entry_id = await stream.publish("t", b"same")
    assert await stream.publish("t", b"same") == entry_id
    with pytest.raises(RequestConflictError, match="'t' is already in the stream with other contents"):
        await stream.publish("t", b"other")
    assert await stream.length() == 1
    (entry,) = await stream.read(5, 0)
    assert await stream.publish("t", b"same") == entry_id  # delivered, but not yet safe: still the same entry
    await stream.acknowledge([entry.entry_id])
    assert await stream._link.redis.hlen(stream._ids_key) == 0  # the guard is as bounded as the stream
    assert await stream.publish("t", b"same") != entry_id


async def test_many_are_published_at_once_each_with_its_own_outcome(shared: EmbeddedValkey, opened: OpenStream) -> None:
    stream = opened(shared)
    first = await stream.publish("known", b"one")
    entries = [(f"t{number}", b"x" * number) for number in range(2 * PAGE + 3)]
    huge = b"y" * (MAX_PAYLOAD_BYTES + 1)
    odd = [("known", b"one"), ("known", b"other"), ("", b"nameless"), ("huge", huge), ("t1", b"x")]
    outcomes = await stream.publish_many([*entries, *odd])
    assert [type(outcome) for outcome in outcomes[-5:]] == [
        str, RequestConflictError, InvalidInputError, TooLongError, str,
    ]  # fmt: skip
    assert outcomes[-5] == first
    assert outcomes[-1] == outcomes[1]
    assert await stream.publish_many(entries) == outcomes[:-5]  # safe to repeat
    assert await stream.length() == len(entries) + 1
    read = [entry for _ in range(3) for entry in await stream.read(PAGE, 1.0)]
    assert [(entry.trajectory_id, entry.payload) for entry in read[1:]] == entries[: len(read) - 1]
    assert await stream.publish_many([]) == []


async def test_a_crash_before_the_acknowledgement_delivers_again(shared: EmbeddedValkey, opened: OpenStream) -> None:
    trainer = opened(shared)
    await fill(trainer, 4)
    read = await trainer.read(3, 0)
    await trainer.acknowledge([read[0].entry_id])
    await crash(trainer)
    restarted = opened(shared)  # the same consumer name: at once, before anything new, and in small portions too
    again = await restarted.read(1, 0) + await restarted.read(1, 0)
    assert [(entry.trajectory_id, entry.deliveries) for entry in again] == [("t1", 2), ("t2", 2)]
    assert again[0].payload == b"payload 1"
    assert [(entry.trajectory_id, entry.deliveries) for entry in await restarted.read(5, 0)] == [("t3", 1)]
    assert await restarted.read(5, 0) == []


async def test_a_cancelled_read_loses_nothing(shared: EmbeddedValkey, opened: OpenStream) -> None:
    publisher, trainer = opened(shared), opened(shared)
    got: list[str] = []
    for index in range(30):
        reading = asyncio.create_task(trainer.read(5, 5.0))
        await asyncio.sleep(0.001 * (index % 5))
        publishing = asyncio.create_task(publisher.publish(f"t{index}", b"x"))
        await asyncio.sleep(0.0005 * (index % 7))
        reading.cancel()
        outcome = (await asyncio.gather(reading, return_exceptions=True))[0]
        got += [entry.trajectory_id for entry in outcome] if isinstance(outcome, list) else []
        await publishing
    while entries := await trainer.read(7, 0):
        got += [entry.trajectory_id for entry in entries]
    assert sorted(got) == sorted(f"t{index}" for index in range(30))


async def test_more_pending_than_a_page_come_back_complete(shared: EmbeddedValkey, opened: OpenStream) -> None:
    trainer, count = opened(shared), 2 * PAGE + 10
    await asyncio.gather(*(trainer.publish(f"t{index}", b"x") for index in range(count)))
    assert len(await trainer.read(count, 0)) == count
    await crash(trainer)
    restarted = opened(shared)
    got = []
    while entries := await restarted.read(100, 0):
        got += entries
    assert len({entry.trajectory_id for entry in got}) == len(got) == count
    assert await restarted.acknowledge(entry.entry_id for entry in got) == count
    assert await restarted.length() == 0


async def test_two_consumers_share_and_the_living_inherit(shared: EmbeddedValkey, opened: OpenStream) -> None:
    one, two = (opened(shared, consumer=name, lease_s=0.6) for name in ("one", "two"))
    await fill(one, 6)
    share_one, share_two = await one.read(3, 0), await two.read(3, 0)
    ids = [entry.trajectory_id for entry in share_one + share_two]
    assert sorted(ids) == [f"t{index}" for index in range(6)]
    # Both hold their entries for longer than a lease, as between two checkpoints: nobody takes from the living.
    assert await two.read(6, 1.0) == []
    await crash(one)
    inherited = await two.read(6, 3.0)
    assert [(entry.trajectory_id, entry.deliveries) for entry in inherited] == [("t0", 2), ("t1", 2), ("t2", 2)]
    assert await two.acknowledge(entry.entry_id for entry in share_two + inherited) == 6
    assert await two.length() == 0


async def test_a_closed_consumer_hands_over_at_once(shared: EmbeddedValkey, opened: OpenStream) -> None:
    one = opened(shared, consumer="one", lease_s=60.0)
    await fill(one, 2)
    assert len(await one.read(5, 0)) == 2
    await one.close()
    assert len(await opened(shared, consumer="two").read(5, 0)) == 2


async def test_what_is_never_acknowledged_becomes_a_dead_letter(shared: EmbeddedValkey, opened: OpenStream) -> None:
    await fill(opened(shared), 1)
    for delivery in (1, 2, 3):
        trainer = opened(shared, max_deliveries=3)
        (entry,) = await trainer.read(5, 0)
        assert entry.deliveries == delivery
        await crash(trainer)
    trainer = opened(shared, max_deliveries=3)
    assert await trainer.read(5, 0) == []
    (letter,) = await trainer.dead_letters()
    assert (letter.trajectory_id, letter.payload, letter.deliveries) == ("t0", b"payload 0", 3)
    assert "delivered 3 times" in letter.reason
    assert (await trainer.length(), await trainer.pending()) == (0, 0)
    assert await trainer.requeue_dead_letters() == 1
    assert [(entry.trajectory_id, entry.deliveries) for entry in await trainer.read(5, 0)] == [("t0", 1)]
    assert await trainer.dead_letters() == []


async def test_the_trainer_can_set_an_entry_aside(shared: EmbeddedValkey, opened: OpenStream) -> None:
    trainer = opened(shared)
    await fill(trainer, 2)
    bad, good = await trainer.read(5, 0)
    assert await trainer.dead_letter(bad.entry_id, "not a trajectory")
    assert not await trainer.dead_letter(bad.entry_id, "not a trajectory")
    assert [letter.reason for letter in await trainer.dead_letters()] == ["not a trajectory"]
    assert await trainer.acknowledge([bad.entry_id, good.entry_id]) == 1


async def test_foreign_and_deleted_entries_do_no_harm(shared: EmbeddedValkey, opened: OpenStream) -> None:
    trainer = opened(shared)
    await trainer._link.redis.xadd(trainer.stream_key, {"stray": "entry"})
    ids = await fill(trainer, 2)
    assert [entry.trajectory_id for entry in await trainer.read(5, 0)] == ["t0", "t1"]
    assert ["malformed" in letter.reason for letter in await trainer.dead_letters()] == [True]
    await trainer._link.redis.xdel(trainer.stream_key, ids[0])
    await crash(trainer)
    restarted = opened(shared)
    assert [entry.trajectory_id for entry in await restarted.read(5, 0)] == ["t1"]
    assert await restarted.pending() == 1


async def test_trimming_spares_everything_not_acknowledged(shared: EmbeddedValkey, opened: OpenStream) -> None:
    trainer = opened(shared)
    await fill(trainer, 8)
    read = await trainer.read(5, 0)
    await trainer.acknowledge([read[0].entry_id, read[1].entry_id, read[3].entry_id])
    assert await trainer.length() == 6  # t2 is pending, so t3 stays behind it although it is done
    await trainer.acknowledge([read[2].entry_id])
    assert await trainer.length() == 4
    await trainer.acknowledge([read[4].entry_id])
    assert await trainer.length() == 3  # only what nobody has read yet
    assert [entry.trajectory_id for entry in await trainer.read(9, 0)] == ["t5", "t6", "t7"]


async def test_trimming_waits_for_the_slowest_group(shared: EmbeddedValkey, opened: OpenStream) -> None:
    trainer, auditor = opened(shared), opened(shared, group="audit", consumer="auditor")
    await fill(trainer, 3)
    assert await auditor.pending() == 0  # creates the group, reads nothing
    await trainer.acknowledge(entry.entry_id for entry in await trainer.read(5, 0))
    assert await trainer.length() == 3
    seen = await auditor.read(5, 0)
    assert len(seen) == 3
    await auditor.acknowledge(entry.entry_id for entry in seen)
    assert await trainer.length() == 0


async def test_a_full_server_refuses_the_publisher_not_the_reader(own: EmbeddedValkey, opened: OpenStream) -> None:
    stream, admin = opened(own, max_deliveries=1), Redis.from_url(own.url)
    await fill(stream, 40)
    await stream.read(5, 0)
    await crash(stream)
    await admin.config_set("maxmemory", "1mb")
    with pytest.raises(OverloadedError, match="full") as caught:
        await stream.publish("late", bytes(100_000))
    assert caught.value.retry_delay_s
    trainer = opened(own, max_deliveries=1)
    entries = await trainer.read(50, 0)  # dead letters move and new entries come, full or not
    assert (len(await trainer.dead_letters()), len(entries)) == (5, 35)
    assert await trainer.acknowledge(entry.entry_id for entry in entries) == 35
    assert await trainer.length() == 0
    await admin.config_set("maxmemory", "0")
    assert await trainer.publish("late", bytes(100_000))
    await admin.aclose()


async def test_a_restarted_server_still_has_every_entry(own: EmbeddedValkey, opened: OpenStream) -> None:
    stream = opened(own)
    await fill(stream, 5)
    read = await stream.read(3, 0)
    await stream.acknowledge([read[0].entry_id])
    os.kill(own.pid, signal.SIGKILL)
    await asyncio.to_thread(restart_the_dead, own)
    # The same object goes on: it neither loses its place nor is given twice what it holds.
    assert [entry.trajectory_id for entry in await stream.read(5, 0)] == ["t3", "t4"]
    await stream.publish("t1", b"payload 1")  # the guard was kept too
    assert (await stream.length(), await stream.pending()) == (4, 4)
    assert await stream.acknowledge([read[1].entry_id, read[2].entry_id]) == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_lost_server_is_an_error_in_bounded_time(
    own: EmbeddedValkey, opened: OpenStream, how: signal.Signals
) -> None:
    stream = opened(own, timeout_s=1.0)
    await fill(stream, 2)
    await stream.read(1, 0)
    waiting = asyncio.create_task(stream.read(5, 30.0) if how == signal.SIGSTOP else stream.pending())
    os.kill(own.pid, how)
    began = time.monotonic()
    calls = [stream.publish("t9", b"x"), stream.read(5, 0.2), stream.acknowledge(["1-1"]), stream.length()]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - began < 2.5
    for outcome in outcomes:
        assert isinstance(outcome, StreamUnavailableError)
        assert own.url in str(outcome)
        assert "restart the server" in str(outcome)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    if how == signal.SIGSTOP:
        os.kill(own.pid, signal.SIGCONT)
    else:
        await asyncio.to_thread(restart_the_dead, own)
    got = []
    while entries := await stream.read(5, 0.2):
        got += [entry.trajectory_id for entry in entries]
    assert "t1" in got
    assert "t0" not in got


async def test_a_flushed_server_is_survived(own: EmbeddedValkey, opened: OpenStream) -> None:
    stream = opened(own)
    await fill(stream, 1)
    await stream.read(1, 0)
    await stream._link.redis.flushall()
    assert await stream.pending() == 0
    await fill(stream, 1, start=7)
    assert [entry.trajectory_id for entry in await stream.read(5, 0.5)] == ["t7"]


async def test_wrong_credentials_are_said_without_the_password(own: EmbeddedValkey) -> None:
    admin = Redis.from_url(own.url)
    await admin.config_set("requirepass", "right")
    await admin.aclose()
    stream = TrajectoryStream(own.url.replace("://", "://:wrong@"), "run", timeout_s=3.0)
    with pytest.raises(StreamUnavailableError, match="credentials") as caught:
        await stream.length()
    assert "wrong@" not in str(caught.value)
    await stream.close()
