"""Several replicas of one teacher: spread, killed, frozen, drained, disagreeing, coming and going."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import yaml
from mesh import QUICK, new_trainer, running_valkey, serving_rollouts, tiny_recipe
from opd.v1 import common_pb2, teacher_service_pb2, teacher_service_pb2_grpc
from tiny_models import save_tiny_checkpoint

from opd_mesh.clients import replica_watch
from opd_mesh.clients.teacher import ScoreRequest, ScoreResult, TeacherClient
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.services import ChannelConfig, RolloutServerConfig
from opd_mesh.errors import (
    HeadMismatchError,
    InternalError,
    InvalidInputError,
    OpdError,
    OverloadedError,
    PreconditionError,
    TeacherUnavailableError,
    TrajectoryError,
    UnavailableError,
    UnknownTeacherError,
)
from opd_mesh.rpc.server import MeshServer
from opd_mesh.rpc.status import status_of
from opd_mesh.tensors import chunks_of, header_of
from opd_mesh.trajectory import Trajectory
from student_trainer.preflight import check_replicas
from student_trainer.teachers import Teachers
from student_trainer.trainer import Trainer

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="freezes processes"),
]
pb = teacher_service_pb2
SERVICE = "opd.v1.TeacherService"
ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 100.0
# As by default, only faster; nothing in here asserts how fast.
QUICKLY = ChannelConfig(
    timeout_s=20.0,
    connect_timeout_s=20.0,
    max_attempts=1,
    health_interval_s=0.1,
    health_timeout_s=10.0,
    circuit_cool_down_s=0.1,
    circuit_max_cool_down_s=0.4,
    resolve_interval_s=0.1,
)


async def until(condition: Callable[[], Any], what: str = "", timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


# --- servers without models --------------------------------------------------------------------------------------
def rows_of(token_ids: Any) -> np.ndarray:
    """What every honest fake answers: a function of the ids."""
    return np.outer(np.asarray(token_ids[1:], np.float32) + 1, np.arange(1, 5, dtype=np.float32))


@dataclass
class Fake(teacher_service_pb2_grpc.TeacherServiceServicer):
    """A teacher server that answers as the test says."""

    teacher_ids: tuple[str, ...] = ("one",)
    answer: Callable[[Any], Awaitable[np.ndarray]] | None = None
    card: dict[str, str] = field(default_factory=dict)
    credits: int = 64
    seen: int = 0
    running: int = 0
    most: int = 0
    address: str = ""
    server: MeshServer | None = None

    def _card(self, teacher_id: str) -> Any:
        card = pb.TeacherCard(
            teacher_id=teacher_id,
            vocab_size=100,
            dtype=common_pb2.D_TYPE_FLOAT32,
            teacher_digest=self.card.get("teacher digest", "weights"),
            tokenizer_fingerprint=self.card.get("tokenizer fingerprint", "tokenizer"),
            head=pb.HeadForm(digest=self.card.get("head digest", "head")),
            signals=[pb.SIGNAL_HIDDEN_STATES],
            limits=pb.TeacherLimits(max_tokens_per_item=4096, max_items_in_flight=self.credits),
        )
        if self.card.get("dtype") == "bfloat16":
            card.dtype = common_pb2.D_TYPE_BFLOAT16
        return card

    async def ListTeachers(self, request: Any, context: Any) -> Any:
        """All cards."""
        return pb.ListTeachersResponse(teachers=[self._card(teacher_id) for teacher_id in self.teacher_ids])

    async def GetTeacher(self, request: Any, context: Any) -> Any:
        """One card."""
        return pb.GetTeacherResponse(teacher=self._card(request.teacher_id))

    async def ScoreTrajectories(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Every item in a task of its own."""
        yield pb.ScoreTrajectoriesResponse(credits=self.credits)
        outbox: asyncio.Queue[Any] = asyncio.Queue()
        tasks: dict[str, asyncio.Task[None]] = {}

        async def receive() -> None:
            async for request in request_iterator:
                if request.WhichOneof("payload") == "cancel_item_id":
                    if request.cancel_item_id in tasks:
                        tasks[request.cancel_item_id].cancel()
                else:
                    tasks[request.item.item_id] = asyncio.create_task(self._one(request.item, outbox))

        receiver = asyncio.create_task(receive())
        try:
            while (response := await outbox.get()) is not None:
                yield response
            raise UnavailableError("the fake broke off")
        finally:
            for task in [receiver, *tasks.values()]:
                task.cancel()

    async def _one(self, item: Any, outbox: asyncio.Queue[Any]) -> None:
        self.seen += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            rows = rows_of(item.token_ids) if self.answer is None else await self.answer(item)
            header = pb.ScoreHeader(
                teacher_id=item.teacher_id,
                teacher_digest=self._card(item.teacher_id).teacher_digest,
                head_digest=self._card(item.teacher_id).head.digest,
                signal=item.signal,
                rows=len(rows),
                tensors=[header_of("hidden_states", rows)],
            )
            outbox.put_nowait(pb.ScoreTrajectoriesResponse(item_id=item.item_id, header=header))
            for chunk in chunks_of([rows]):
                outbox.put_nowait(pb.ScoreTrajectoriesResponse(item_id=item.item_id, chunk=chunk))
            end = pb.ScoreTrajectoriesResponse(item_id=item.item_id)
            end.status.SetInParent()
            outbox.put_nowait(end)
        except OpdError as error:
            outbox.put_nowait(pb.ScoreTrajectoriesResponse(item_id=item.item_id, status=status_of(error)))
        except ConnectionError:
            outbox.put_nowait(None)
        finally:
            self.running -= 1


@asynccontextmanager
async def serving(*fakes: Fake) -> AsyncIterator[list[str]]:
    """Their addresses."""
    async with AsyncExitStack() as stack:
        for fake in fakes:
            await _start(fake)
            stack.push_async_callback(_stop, fake)
        yield [fake.address for fake in fakes]


async def _start(fake: Fake, listen: str = "127.0.0.1:0") -> None:
    fake.server = MeshServer(QUICK, services=[SERVICE])
    teacher_service_pb2_grpc.add_TeacherServiceServicer_to_server(fake, fake.server.grpc)
    fake.address = await fake.server.start(listen)
    await fake.server.set_serving(True)


async def _stop(fake: Fake) -> None:
    assert fake.server is not None
    await fake.server.grpc.stop(None)


def item(length: int = 4, teacher_id: str = "one", timeout_s: float = 30.0) -> ScoreRequest:
    return ScoreRequest(teacher_id, list(range(length)), [(1, length)], "tokenizer", timeout_s=timeout_s)


async def score_all(client: TeacherClient, count: int, **fields: Any) -> None:
    """Every answer is right."""
    results = await asyncio.gather(*(client.score(item(4 + index, **fields)) for index in range(count)))
    for index, result in enumerate(results):
        assert np.array_equal(result.tensors["hidden_states"], rows_of(range(4 + index)))


async def for_ever(_: Any) -> np.ndarray:
    await asyncio.Event().wait()
    raise AssertionError


def raising(error: Exception) -> Callable[[Any], Awaitable[np.ndarray]]:
    async def answer(_: Any) -> np.ndarray:
        raise error

    return answer


async def test_items_are_spread_and_bounded_at_every_replica() -> None:
    async def slowly(request: Any) -> np.ndarray:
        await asyncio.sleep(0.01)
        return rows_of(request.token_ids)

    one, two = Fake(answer=slowly), Fake(answer=slowly, credits=2)
    async with serving(one, two) as addresses, TeacherClient(addresses, QUICKLY.replace(max_in_flight=3)) as client:
        await client.wait_ready()
        await score_all(client, 40)
        assert one.most == 3
        assert two.most <= 3  # before the credits are known, our own bound; what is beyond them waits here
        assert min(one.seen, two.seen) >= 10
        assert one.seen + two.seen == 40
        assert {address: count.items for address, count in client.counts().items()} == {
            one.address: one.seen,
            two.address: two.seen,
        }
        assert client.retries == 0


async def test_a_teacher_of_a_pool_stays_in_one_place_until_it_is_busy() -> None:
    names = tuple(f"t{index}" for index in range(12))
    one, two = Fake(names), Fake(names)
    async with serving(one, two) as addresses, TeacherClient(addresses, QUICKLY.replace(spill_in_flight=4)) as client:
        await client.wait_ready()
        homes = {}
        for name in names:
            before = one.seen
            for _ in range(3):
                await client.score(item(teacher_id=name))
            homes[name] = one.seen - before
        assert set(homes.values()) == {0, 3}  # never divided, and neither has them all
        before = one.seen, two.seen
        await score_all(client, 30, teacher_id="t0")
        assert min(one.seen - before[0], two.seen - before[1]) > 0


@pytest.mark.parametrize(
    "error", [OverloadedError("full", retry_delay_s=9.0), UnavailableError("loading"), InternalError("defect")]
)
async def test_what_another_replica_can_do_is_asked_of_it(error: OpdError) -> None:
    one, two = Fake(answer=raising(error)), Fake()
    async with serving(one, two) as addresses, TeacherClient(addresses, QUICKLY) as client:
        await client.wait_ready()
        await score_all(client, 12)
        counts = client.counts()
        assert two.seen == counts[two.address].items == 12
        assert counts[one.address].failures == one.seen == client.retries == counts[two.address].retries > 0
        await score_all(client, 6)  # it is busy, or has failed three times in a row
        assert one.seen == client.counts()[one.address].failures == 6
        both = Fake(answer=raising(error))
        async with serving(both) as more, TeacherClient([one.address, *more], QUICKLY) as unlucky:
            with pytest.raises(type(error), match=error.message):
                await unlucky.score(item())
            assert both.seen == 1  # once each: when to come again is the caller's to say


async def test_an_error_of_the_item_is_its_own() -> None:
    for error in (TrajectoryError("empty", field="token_ids"), HeadMismatchError("another"), InvalidInputError("no")):
        fakes = Fake(answer=raising(error)), Fake(answer=raising(error))
        async with serving(*fakes) as addresses, TeacherClient(addresses, QUICKLY) as client:
            await client.wait_ready()
            for _ in range(8):
                with pytest.raises(type(error), match=error.message):
                    await client.score(item())
            assert sum(fake.seen for fake in fakes) == 8
            assert client.retries == sum(count.failures for count in client.counts().values()) == 0
            assert client.replicas_of("one") == sorted(addresses)
            for fake in fakes:
                fake.answer = None
            await score_all(client, 4)


async def test_one_missed_deadline_moves_everything_in_flight() -> None:
    """The process lives and answers health checks, its engine does not: one item waits, the others need not."""
    config = QUICKLY.replace(item_timeout_s=0.5, item_timeout_per_token_s=0.0, circuit_cool_down_s=60.0)
    stuck, sound = Fake(answer=for_ever), Fake()
    async with serving(stuck, sound) as addresses, TeacherClient(addresses, config) as client:
        await client.wait_ready()
        short = [asyncio.create_task(client.score(item(4))) for _ in range(6)]
        await until(lambda: stuck.running == 3)
        client.config = config.replace(item_timeout_s=WAIT_S)
        late = [asyncio.create_task(client.score(item(4))) for _ in range(6)]
        await until(lambda: stuck.seen > 3)
        await asyncio.wait_for(asyncio.gather(*short, *late), WAIT_S / 2)
        assert client.counts()[stuck.address].failures == stuck.seen > 3
        assert client.counts()[sound.address].items == 12
        await score_all(client, 6)  # its circuit is open
        assert client.counts()[stuck.address].failures == stuck.seen
        await until(lambda: stuck.running == 0, "the server was told")


async def test_a_broken_connection_moves_what_is_in_flight_and_a_trial_brings_the_replica_back() -> None:
    one, two = Fake(), Fake()
    holding = asyncio.Event()

    async def hold(request: Any) -> np.ndarray:
        await holding.wait()
        raise ConnectionError

    one.answer = hold
    async with serving(one, two) as addresses, TeacherClient(addresses, QUICKLY) as client:
        await client.wait_ready()
        items = [asyncio.create_task(client.score(item())) for _ in range(8)]
        await until(lambda: one.running == 4)
        holding.set()
        await asyncio.gather(*items)
        assert client.counts()[one.address].failures == client.retries == 4
        one.answer = None
        await until(lambda: one.address in client.replicas_of("one"))
        before = one.seen
        while one.seen == before:  # it is tried when its circuit has cooled down
            await score_all(client, 4)


async def test_a_draining_replica_gets_nothing_new_and_is_waited_for() -> None:
    one, two = Fake(), Fake()
    release = asyncio.Event()

    async def hold(request: Any) -> np.ndarray:
        await release.wait()
        return rows_of(request.token_ids)

    one.answer = hold
    async with serving(one, two) as addresses, TeacherClient(addresses, QUICKLY) as client:
        await client.wait_ready()
        held = asyncio.create_task(score_all(client, 6))
        await until(lambda: one.running == 3 and client.counts()[two.address].items == 3)
        assert one.server is not None
        await one.server.set_serving(False)
        await until(lambda: client.replicas_of("one") == [two.address])
        await score_all(client, 6)
        assert (one.seen, two.seen) == (3, 9)
        stopping = asyncio.create_task(one.server.grpc.stop(20))  # the port closes, what is in flight goes on
        await until(lambda: f"{one.address}: unreachable" in client.troubles())
        release.set()
        await held
        assert client.retries == 0
    await stopping


async def test_a_replica_that_is_down_joins_when_it_comes() -> None:
    one, two = Fake(), Fake()
    async with serving(one, two) as addresses:
        await _stop(two)
        async with TeacherClient(addresses, QUICKLY) as client:
            await client.wait_ready()
            assert client.replicas_of("one") == [one.address]
            assert f"{two.address}: unreachable" in client.troubles()
            await score_all(client, 6)
            assert one.seen == 6
            await _start(two, two.address)
            await until(lambda: len(client.replicas_of("one")) == 2)
            await score_all(client, 6)
            assert two.seen == 3
            assert client.retries == 0


async def test_nobody_there() -> None:
    one, two = Fake(), Fake()
    async with serving(one, two) as addresses:
        for fake in (one, two):
            await _stop(fake)
        async with TeacherClient(addresses, QUICKLY) as client:
            with pytest.raises(UnavailableError, match=r"not ready within 0.3 s.*: unreachable, .*: unreachable, "):
                await client.wait_ready(0.3)
            with pytest.raises(UnavailableError, match="no replica of 'one' can be asked"):
                await client.score(item())


async def test_a_teacher_that_no_replica_has() -> None:
    async with serving(Fake(("one", "two")), Fake(("two",))) as addresses, TeacherClient(addresses, QUICKLY) as client:
        for call in (client.score(item(teacher_id="three")), client.get_teacher("three")):
            with pytest.raises(UnknownTeacherError, match=r"no teacher 'three' at .*; served are: one, two"):
                await call
        await score_all(client, 6, teacher_id="one")  # only one of them has it
        assert client.retries == 0


async def test_a_name_is_as_many_replicas_as_it_has_records(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = Fake(), Fake(), Fake()
    async with serving(one, two, three):
        records = [one.address, two.address]

        async def resolve(host: str, port: int) -> list[str]:
            assert (host, port) == ("teachers.mesh.svc", 7001)
            if not records:
                raise OSError("no such name")
            return list(records)

        monkeypatch.setattr(replica_watch, "resolve_records", resolve)
        monkeypatch.setattr(replica_watch, "UNRESOLVED_RETRY_S", 0.05)
        async with TeacherClient(["teachers.mesh.svc:7001"], QUICKLY) as client:
            await client.wait_ready()
            await score_all(client, 6)
            assert (one.seen, two.seen) == (3, 3)
            release = asyncio.Event()

            async def hold(request: Any) -> np.ndarray:
                await release.wait()
                return rows_of(request.token_ids)

            one.answer = hold
            waiting = [asyncio.create_task(client.score(item())) for _ in range(2)]
            await until(lambda: one.running == 1)
            records[:] = [two.address, three.address]
            await until(lambda: set(client.replicas_of("one")) == set(records))
            await score_all(client, 6)
            assert (one.seen, three.seen) == (4, 3)  # no new items; what it has is waited for
            release.set()
            await asyncio.gather(*waiting)
            assert client.retries == 0
            records.clear()  # a headless service has no records while no pod is ready: those known stay
            await until(lambda: "does not resolve" in client.troubles())
            await score_all(client, 4)


@asynccontextmanager
async def named(monkeypatch: pytest.MonkeyPatch, *records: str) -> AsyncIterator[tuple[TeacherClient, list[str]]]:
    """A client of a name, and the name's records, which the test may change."""
    present = list(records)

    async def resolve(host: str, port: int) -> list[str]:
        return list(present)

    monkeypatch.setattr(replica_watch, "resolve_records", resolve)
    monkeypatch.setattr(replica_watch, "UNRESOLVED_RETRY_S", 0.05)
    async with TeacherClient(["teachers.mesh.svc:7001"], QUICKLY) as client:
        await client.wait_ready()
        yield client, present


@dataclass
class Slow(Fake):
    """Says who it is when it is told to."""

    asked: int = 0
    told: asyncio.Event = field(default_factory=asyncio.Event)

    async def GetTeacher(self, request: Any, context: Any) -> Any:
        """One card, later."""
        self.asked += 1
        await self.told.wait()
        return await super().GetTeacher(request, context)


async def test_a_call_under_way_at_a_replica_that_leaves_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Slow(), Fake(answer=for_ever)
    async with serving(one, two), named(monkeypatch, one.address) as (client, records):
        call = asyncio.create_task(client.get_teacher("one"))
        await until(lambda: one.asked)
        score = asyncio.create_task(client.score(item()))
        await until(lambda: one.seen == 1 and score.done())  # an item comes and goes while the call is under way
        records[:] = [two.address]
        await until(lambda: client.replicas_of("one") == [two.address])
        await asyncio.sleep(0.1)
        assert not call.done()
        one.told.set()
        assert (await call).teacher_id == "one"
        await until(lambda: not client._replicas._leaving, "it was closed when the call had ended")
        assert client.name == "teachers.mesh.svc:7001" != client.target
        with pytest.raises(UnavailableError, match=f"{one.address} is no replica of teachers.mesh.svc:7001 any more"):
            await client.score_at(one.address, item())


async def test_closing_ends_what_is_under_way_also_at_a_replica_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Slow(answer=for_ever), Slow(answer=for_ever)
    async with serving(one, two), named(monkeypatch, one.address) as (client, records):
        under_way = [asyncio.create_task(client.score(item())) for _ in range(3)]
        under_way.append(asyncio.create_task(client.get_teacher("one")))
        await until(lambda: one.running == 3 and one.asked)
        records[:] = [two.address]
        await until(lambda: client.replicas_of("one") == [two.address])
        under_way += [asyncio.create_task(client.score(item())), asyncio.create_task(client.get_teacher("one"))]
        await until(lambda: two.running and two.asked)
        waiting = asyncio.create_task(client.get_head("one"))
        left = next(iter(client._replicas._leaving))
        await client.close()
        for result in await asyncio.wait_for(asyncio.gather(*under_way, waiting, return_exceptions=True), WAIT_S):
            assert isinstance(result, OpdError), result
        assert left.stream is None
        assert not client._replicas._leaving
        await until(lambda: not one.running and not two.running, "the servers know")
        with pytest.raises(UnavailableError, match="was closed"):
            await client.get_teacher("one")


async def test_a_head_goes_on_from_another_replica_where_it_broke() -> None:
    data = bytes(range(256)) * 4
    offsets: list[tuple[str, int]] = []

    @dataclass
    class Holder(Fake):
        fails: bool = False

        async def GetHead(self, request: Any, context: Any) -> AsyncIterator[Any]:
            """In chunks of 100 bytes."""
            offsets.append((self.address, request.offset))
            tensor = header_of("weight", np.frombuffer(data, np.float32).reshape(16, 16))
            manifest = pb.HeadManifest(form=pb.HeadForm(digest="head"), tensors=[tensor], total_bytes=len(data))
            yield pb.GetHeadResponse(manifest=manifest)
            for start in range(request.offset, len(data), 100):
                if self.fails and start > 200:
                    await for_ever(None)
                yield pb.GetHeadResponse(chunk=pb.HeadChunk(offset=start, data=data[start : start + 100]))

    one, two = Holder(fails=True), Holder(fails=True)
    async with serving(one, two) as addresses, TeacherClient(addresses, QUICKLY) as client:
        download = asyncio.create_task(client.get_head("one", timeout_s=60))
        await until(lambda: offsets)
        first, second = (one, two) if offsets[0][0] == one.address else (two, one)
        second.fails = False
        await asyncio.sleep(0.1)
        assert first.server is not None
        await first.server.grpc.stop(None)
        head = await asyncio.wait_for(download, WAIT_S)
    assert offsets == [(first.address, 0), (second.address, 300)]
    assert head.tensors["weight"].tobytes() == data


# --- agreement ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["teacher digest", "head digest", "tokenizer fingerprint", "dtype"])
async def test_replicas_of_which_one_is_another_teacher_are_refused(name: str) -> None:
    one, two = Fake(), Fake(card={name: "bfloat16" if name == "dtype" else "other"})
    async with serving(one, two) as addresses:
        teachers = fake_teachers(addresses)
        with pytest.raises(PreconditionError, match=rf"'one' disagree: {name} \w+ against \w+") as caught:
            await teachers.connect()
        assert caught.value.field == "teachers.one.addresses"
        assert set(caught.value.metadata["replicas"].split(", ")) == set(addresses)
        await teachers.close()


def fake_teachers(
    addresses: list[str], names: tuple[str, ...] = ("one",), item_timeout_s: float = 0.5, **sections: Any
) -> Teachers:
    channel = QUICKLY.model_dump(mode="json") | {"item_timeout_s": item_timeout_s}
    nowhere = dict.fromkeys(names, Path("nowhere"))
    recipe = tiny_recipe(Path("nowhere"), nowhere, teacher_channel={"channel": channel}, **sections)
    recipe = recipe.replace(teachers={name: {"addresses": addresses} for name in names})
    return Teachers(recipe, "tokenizer")


async def checked(teachers: Teachers) -> Teachers:
    await teachers.connect()
    await check_replicas(teachers._recipe, teachers)
    return teachers


def off(row: int, by: float) -> Callable[[Any], Awaitable[np.ndarray]]:
    async def answer(request: Any) -> np.ndarray:
        rows = rows_of(request.token_ids)
        rows[row:] *= 1 + by
        return rows

    return answer


@pytest.mark.parametrize(
    ("by", "deterministic", "refused"), [(0.1, False, True), (1e-6, False, False), (1e-6, True, True), (0, True, False)]
)
async def test_replicas_that_say_different_things_are_refused_before_the_first_step(
    by: float, deterministic: bool, refused: bool
) -> None:
    one, two = Fake(), Fake(answer=off(5, by))
    async with serving(one, two) as addresses:
        teachers = fake_teachers(addresses, run={"deterministic": deterministic})
        if refused:
            with pytest.raises(PreconditionError) as caught:
                await checked(teachers)
            error = caught.value
            assert "teacher 'one'" in error.message
            assert all(address in error.message for address in addresses)
            assert "first at position 5 (which predicts token 6)" in error.message
            assert error.metadata["position"] == "5"
        else:
            await checked(teachers)
            assert (one.seen, two.seen) == (1, 1)
        await teachers.close()


async def test_a_replica_that_does_not_score_is_left_out_until_it_does() -> None:
    one, two = Fake(), Fake(answer=for_ever)
    async with serving(one, two) as addresses:
        teachers = await checked(fake_teachers(addresses))
        assert teachers.replicas_of("one") == [one.address]
        two.answer = off(2, 0.1)  # it answers, and wrongly: still nothing for it
        seen = two.seen
        await until(lambda: two.seen > seen)
        await asyncio.sleep(0.05)
        assert teachers.replicas_of("one") == [one.address]
        trajectory = Trajectory("t", "domain_0", (1, 5, 6, 7), ((1, 4),))
        for _ in range(4):
            assert np.array_equal(await teachers.rows(trajectory, "one"), rows_of(trajectory.token_ids))
        assert teachers.replica_counts[two.address].items == 0
        await teachers.close()


async def test_a_newcomer_is_asked_the_same_sequence() -> None:
    one, wrong, right = Fake(), Fake(answer=off(3, 0.1)), Fake()
    async with serving(one, wrong, right) as addresses:
        for fake in (wrong, right):
            await _stop(fake)
        teachers = await checked(fake_teachers(addresses))
        for fake in (wrong, right):
            await _start(fake, fake.address)
        await until(lambda: right.address in teachers.replicas_of("one") and wrong.seen)
        assert wrong.address not in teachers.replicas_of("one")
        assert (wrong.seen, right.seen) == (1, 1)
        await teachers.close()


def overloaded(times: int, delay_s: float) -> Callable[[Any], Awaitable[np.ndarray]]:
    left = [times]

    async def answer(request: Any) -> np.ndarray:
        left[0] -= 1
        if left[0] >= 0:
            raise OverloadedError("full", retry_delay_s=delay_s)
        return rows_of(request.token_ids)

    return answer


async def test_an_overloaded_moment_refuses_no_run() -> None:
    one, two = Fake(answer=overloaded(2, 0.2)), Fake(answer=overloaded(9, 30.0))
    async with serving(one, two) as addresses:
        teachers = await checked(fake_teachers(addresses))
        assert one.seen == 3
        assert (two.seen, teachers.replicas_of("one")) == (1, [one.address])  # it wants to be asked in half a minute
        await teachers.close()


async def test_replicas_that_never_score_refuse_the_run_in_the_end() -> None:
    one, two = Fake(answer=overloaded(99, 0.3)), Fake(answer=overloaded(99, 60.0))
    async with serving(one, two) as addresses:
        teachers = fake_teachers(addresses, teacher_timeout_s=1.0)
        with pytest.raises(
            TeacherUnavailableError, match=r"'one' scores a sequence, asked for 1 s \(.*: full; .*: full"
        ):
            await checked(teachers)
        assert 2 <= one.seen <= 4
        assert two.seen == 1
        await teachers.close()


async def test_replicas_that_cannot_score_refuse_the_run_at_once() -> None:
    fakes = [Fake(answer=raising(InternalError("defect"))) for _ in range(2)]
    async with serving(*fakes) as addresses:
        teachers = fake_teachers(addresses)
        with pytest.raises(TeacherUnavailableError, match="defect"):
            await checked(teachers)
        assert [fake.seen for fake in fakes] == [1, 1]
        await teachers.close()


async def test_a_newcomer_is_asked_although_it_came_before_there_was_anything_to_compare() -> None:
    """It joins while teacher two has a reference and teacher one has none; only of one it says something else."""
    release, late_release = asyncio.Event(), asyncio.Event()
    names = ("one", "two")

    async def hold(request: Any) -> np.ndarray:
        if request.teacher_id == "one":
            await release.wait()
        return rows_of(request.token_ids)

    async def wrong(request: Any) -> np.ndarray:
        if request.teacher_id == "two":
            await late_release.wait()
            return rows_of(request.token_ids)
        return await off(3, 0.1)(request)

    first, second, late = Fake(names, answer=hold), Fake(names, answer=hold), Fake(names, answer=wrong)
    async with serving(first, second, late) as addresses:
        await _stop(late)
        teachers = fake_teachers(addresses, names=("two", "one"), item_timeout_s=WAIT_S)
        await teachers.connect()
        checking = asyncio.create_task(check_replicas(teachers._recipe, teachers))
        await until(lambda: first.running or second.running)
        await _start(late, late.address)
        await until(lambda: late.seen or late.address in teachers.replicas_of("one"))
        release.set()
        await asyncio.sleep(0.2)
        late_release.set()
        with pytest.raises(PreconditionError, match=f"replica {late.address} of teacher 'one' does not say"):
            await checking
        await teachers.close()


async def test_a_run_of_one_address_scores_nothing_beforehand() -> None:
    one = Fake()
    async with serving(one) as addresses:
        teachers = await checked(fake_teachers(addresses))
        assert one.seen == 0
        await teachers.close()


# --- real processes, in mid-run ------------------------------------------------------------------------------------
@dataclass
class Server:
    """A teacher server process."""

    process: subprocess.Popen[bytes]
    ready: Path
    log: Path
    address: str = ""

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.ready.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.address = json.loads(self.ready.read_text())["address"]


def start_server(folder: Path, name: str, model: Path) -> Server:
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({"teachers": {"one": {"path": str(model)}}, "deterministic": True}))
    ready, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [sys.executable, "-m", "teacher_server", "--config", config, "--ready-file", ready]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*map(str, command), "--die-with-parent", str(os.getpid())], cwd=ROOT, stderr=file, stdout=file
        )
    return Server(process, ready, log)


@dataclass
class Ground:
    """What the runs share."""

    servers: dict[str, Server]
    models: dict[str, Path]
    rollout_address: str
    redis_url: str

    def recipe(self, *names: str, **sections: Any) -> Recipe:
        channel = QUICKLY.replace(health_timeout_s=0.5, health_interval_s=0.2).model_dump(mode="json")
        recipe = tiny_recipe(
            self.models["student"],
            {"one": self.models["one"]},
            run={"deterministic": True, "steps": 4},
            batch={"prompts_per_step": 6},
            evaluation={"prompts_per_domain": 0},
            rollout={"peers": {"addresses": [self.rollout_address]}},
            teacher_channel={"channel": channel},
            redis_url=self.redis_url,
            **sections,
        )
        return recipe.replace(teachers={"one": {"addresses": [self.servers[name].address for name in names]}})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny_checkpoint(root / name, "llama", seed) for seed, name in enumerate(("student", "one"))}


@pytest.fixture(scope="module")
def servers(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder = tmp_path_factory.mktemp("servers")
    started = {name: start_server(folder, name, models["one"]) for name in ("first", "second", "third")}
    try:
        for server in started.values():
            server.wait_until_ready()
        yield started
    finally:
        for server in started.values():
            server.process.kill()
            server.process.wait(WAIT_S)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ground(
    models: dict[str, Path], servers: dict[str, Server], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Ground]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        config = RolloutServerConfig(
            model=models["student"], engine={"max_context_tokens": 480}, redis_url=url, deterministic=True
        )
        async with serving_rollouts(config) as rollout:
            yield Ground(servers, models, rollout, url)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def exact(run_dir: Path) -> list[dict[str, Any]]:
    keys = ("step", "loss", "grad_norm", "tokens", "kl/one", "response_length")
    return [{key: line[key] for key in keys} for line in lines_of(run_dir)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    trainer = await new_trainer(ground.recipe("first", "second"), run_dir)
    await trainer.run()
    assert trainer.teachers.retries == 0
    assert all(count.items >= 8 for count in trainer.teachers.replica_counts.values())
    return exact(run_dir)


def as_step_begins_to_be_marked(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, number: int, action: Callable[[], None]
) -> None:
    """Before the first item of step ``number`` is sent."""
    score = TeacherClient.score
    done: list[int] = []

    async def act_and_score(client: TeacherClient, request: ScoreRequest) -> ScoreResult:
        if trainer.progress.step == number - 1 and not done:
            done.append(number)
            action()
        return await score(client, request)

    monkeypatch.setattr(TeacherClient, "score", act_and_score)


class Relay(Fake):
    """Says what another server says, but for the last bits of some rows."""

    upstream: TeacherClient
    seen_card: Any

    def _card(self, teacher_id: str) -> Any:
        return self.seen_card

    async def say(self, request: Any) -> np.ndarray:
        """Rows from 3 on are a little off."""
        spans = [(span.start, span.end) for span in request.scored_spans]
        result = await self.upstream.score(
            ScoreRequest("one", request.token_ids, spans, request.tokenizer_fingerprint, timeout_s=30)
        )
        rows = np.array(result.tensors["hidden_states"])
        rows[3:] *= 1 + 1e-6
        return rows


async def test_a_run_whose_replicas_disagree_does_not_begin(ground: Ground, tmp_path: Path) -> None:
    relay = Relay()
    relay.answer = relay.say
    async with TeacherClient([ground.servers["first"].address], QUICKLY) as relay.upstream:
        relay.seen_card = await relay.upstream.get_teacher("one")
        async with serving(relay) as (address,):
            recipe = ground.recipe("first")
            addresses = [ground.servers["first"].address, address]
            trainer = await new_trainer(recipe.replace(teachers={"one": {"addresses": addresses}}), tmp_path)
            with pytest.raises(
                PreconditionError, match=r"differ first at position 3 .* run.deterministic asks for the same bits"
            ):
                await trainer.run()
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()
    assert not list(tmp_path.glob("checkpoints/*"))


async def test_a_frozen_process_whose_buffers_are_full_holds_nobody_up(ground: Ground) -> None:
    first, frozen = ground.servers["first"], ground.servers["third"]
    config = QUICKLY.replace(health_timeout_s=0.5, max_in_flight=128)
    async with TeacherClient([first.address, frozen.address], config) as client:
        await client.wait_ready()
        card = await client.get_teacher("one")
        ids = [5 + index % 90 for index in range(470)]
        request = ScoreRequest("one", ids, [(460, 470)], card.tokenizer_fingerprint, timeout_s=WAIT_S)
        await client.score(request)
        frozen.send(signal.SIGSTOP)
        try:
            # 60 of some 500 bytes to each, where the connection takes 64 KiB before it blocks; then as many again.
            results = await asyncio.gather(*(client.score(request) for _ in range(250)))
        finally:
            frozen.send(signal.SIGCONT)
        assert len(results) == 250
        assert client.counts()[frozen.address].failures > 60
        await until(lambda: len(client.replicas_of("one")) == 2)


async def test_all_replicas_lost_end_the_run_with_a_checkpoint_and_a_resume_goes_on(
    ground: Ground, undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [ground.servers[name] for name in ("first", "second")]
    trainer = await new_trainer(ground.recipe("first", "second", teacher_timeout_s=2.0), tmp_path)

    def freeze() -> None:
        for server in servers:
            server.send(signal.SIGSTOP)

    as_step_begins_to_be_marked(monkeypatch, trainer, 2, freeze)
    try:
        with pytest.raises(TeacherUnavailableError, match=r"teacher 'one' at .* gave no answer for 2 s") as caught:
            await asyncio.wait_for(trainer.run(), WAIT_S)
    finally:
        for server in servers:
            server.send(signal.SIGCONT)
    for server in servers:
        assert f"{server.address}: unreachable, {server.address} did not answer a health check" in str(caught.value)
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["step-000001"]
    assert json.loads((tmp_path / "summary.json").read_text())["error"] == str(caught.value)
    resumed = await new_trainer(ground.recipe("first", "second"), tmp_path, resume=True)
    await resumed.run()
    assert exact(tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("signum", "victim"),
    [(signal.SIGSTOP, "second"), (signal.SIGTERM, "second"), (signal.SIGKILL, "third")],
    ids=["frozen", "drained", "killed"],
)
async def test_a_replica_lost_in_mid_run_changes_nothing(
    ground: Ground,
    undisturbed: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signum: int,
    victim: str,
) -> None:
    server = ground.servers[victim]
    trainer = await new_trainer(ground.recipe("first", victim), tmp_path)
    as_step_begins_to_be_marked(monkeypatch, trainer, 2, lambda: server.send(signum))
    try:
        await asyncio.wait_for(trainer.run(), WAIT_S)
    finally:
        if signum == signal.SIGSTOP:
            server.send(signal.SIGCONT)
    assert exact(tmp_path) == undisturbed
    counts = trainer.teachers.replica_counts
    assert counts[server.address].items >= 2  # of step 1
    if signum == signal.SIGSTOP:
        assert trainer.teachers.retries >= counts[server.address].failures >= 1
    if signum == signal.SIGTERM:
        assert await asyncio.to_thread(server.process.wait, WAIT_S) == 0
