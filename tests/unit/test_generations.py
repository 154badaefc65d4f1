"""The life of requests above an engine that does as it is told: what cannot be seen through a real one at will."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opd.v1 import rollout_service_pb2

from opd_mesh.config.services import TokenLogConfig
from opd_mesh.errors import InternalError, OpdError, OverloadedError, StreamUnavailableError, UnavailableError
from opd_mesh.policy import PolicyId
from opd_mesh.rpc.writer import MESSAGE_BYTES
from opd_mesh.trajectory import FinishReason, SamplingParams
from rollout_server import delivery as module
from rollout_server.batch_call import ROOM_BYTES, BatchCall
from rollout_server.engine import EngineCounters, GenerationRequest, PreparedPolicy, RolloutEngine, TokenEvent
from rollout_server.generations import Generations
from rollout_server.request_log import states_of
from rollout_server.requests import RequestParams, RequestState
from rollout_server.token_log import TokenLog

POLICY = PolicyId("run", 1, 1, "d")


class Scripted(RolloutEngine):
    """Writes the token 7 for every request in every step, while ``go`` says so."""

    cache_mode = "scripted"
    deterministic = False
    tensor_shapes: Mapping[str, tuple[int, ...]] = {}

    def __init__(self) -> None:
        self.counters = EngineCounters()
        self.requests: dict[str, GenerationRequest] = {}
        self.written: dict[str, int] = {}
        self.refusal: BaseException | None = None
        self.broken: Exception | None = None

    running = property(lambda self: len(self.requests))
    waiting = property(lambda self: 0)

    def check_request(self, request: GenerationRequest) -> None:
        return None

    def submit(self, request: GenerationRequest, kv: Any = None) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests[request.request_id] = request
        self.written[request.request_id] = len(request.written)

    def cancel(self, request_id: str) -> bool:
        return self.requests.pop(request_id, None) is not None

    def step(self) -> list[TokenEvent]:
        if self.broken is not None:
            raise self.broken
        events = []
        for key, request in list(self.requests.items()):
            self.written[key] += 1
            last = self.written[key] == request.sampling.max_new_tokens
            events.append(
                TokenEvent(key, self.written[key] - 1, 7, -0.5, -0.5, 1, FinishReason.LENGTH if last else None)
            )
            if last:
                del self.requests[key]
        return events

    def prepare_policy(self, tensors: Any) -> PreparedPolicy:
        return PreparedPolicy()

    def swap_policy(self, prepared: PreparedPolicy, version: int) -> None:
        return None


class Stream:
    """Takes trajectories when it is there."""

    def __init__(self) -> None:
        self.away = False
        self.taken: list[str] = []
        self.asked: list[int] = []  # entries, call by call

    async def publish_many(self, entries: Sequence[tuple[str, bytes]]) -> list[str]:
        self.asked.append(len(entries))
        if self.away:
            raise StreamUnavailableError("away")
        self.taken += [name for name, _ in entries]
        return [f"entry of {name}" for name, _ in entries]


def params_of(name: str, tokens: int = 4, **fields: Any) -> RequestParams:
    sampling = SamplingParams(max_new_tokens=tokens)
    return replace(RequestParams(name, "run", "d", (1, 2), sampling, False, "f"), **fields)


@asynccontextmanager
async def opened(
    folder: Path, engine: Scripted, stream: Stream | None = None
) -> AsyncIterator[tuple[Generations, list[BaseException]]]:
    token_log, recovered = TokenLog.open(TokenLogConfig(path=folder, durability="os"))
    failures: list[BaseException] = []
    made = Generations(
        engine, token_log=token_log, tokenizer_fingerprint="f", finished_kept=8, max_slots=8, max_waiting=8,
        stream_of=lambda run_id: stream or Stream(), on_failure=failures.append,  # type: ignore[arg-type,return-value]
    )  # fmt: skip
    made.recover(states_of(recovered))
    try:
        yield made, failures
    finally:
        await made.stop()
        token_log.close()


async def ended(state: RequestState) -> None:
    async with asyncio.timeout(20):
        while not state.ended:
            await state.wait_change()


async def go_on(made: Generations) -> None:
    made.refuse(await made.driver.call(lambda: made.submit_recovered({})))


async def test_what_recovery_finds_goes_on_once_there_is_a_policy(tmp_path: Path) -> None:
    engine = Scripted()
    async with opened(tmp_path, engine) as (made, _):
        await made.driver.pause()
        for number in range(6):
            await made.attach(params_of(f"r{number}"), 0, POLICY)
    again = Scripted()
    async with opened(tmp_path, again) as (made, _):
        assert not again.requests
        await go_on(made)
        for number in range(6):
            state = made.table.get(f"r{number}")
            await ended(state)
            assert state.tokens == [7] * 4


async def test_a_server_that_stops_before_they_go_on_loses_none(tmp_path: Path) -> None:
    async with opened(tmp_path, Scripted()) as (made, _):
        await made.driver.pause()
        await made.attach(params_of("r"), 0, POLICY)
    async with opened(tmp_path, Scripted()) as (made, _):
        await made.driver.close()
        with pytest.raises(UnavailableError):
            await go_on(made)
    async with opened(tmp_path, Scripted()) as (made, _):
        state = made.table.get("r")
        assert state.error is None
        await go_on(made)
        await ended(state)
        assert state.tokens == [7] * 4


async def test_one_that_cannot_go_on_fails_alone(tmp_path: Path) -> None:
    async with opened(tmp_path, Scripted()) as (made, _):
        await made.driver.pause()
        await made.attach(params_of("r"), 0, POLICY)
    engine = Scripted()
    engine.refusal = RuntimeError("no")
    async with opened(tmp_path, engine) as (made, failures):
        await go_on(made)
        assert isinstance(made.table.get("r").error, InternalError)
        assert not failures


@pytest.mark.parametrize("refusal", [OverloadedError("full"), RuntimeError("a defect")])
async def test_a_request_that_is_not_admitted_leaves_nothing_behind(tmp_path: Path, refusal: Exception) -> None:
    engine = Scripted()
    engine.refusal = refusal
    async with opened(tmp_path, engine) as (made, _):
        with pytest.raises(type(refusal)):
            await made.attach(params_of("r"), 0, POLICY)
        engine.refusal = None
        state, attached = await made.attach(params_of("r"), 0, POLICY)
        assert not attached
        await ended(state)
    async with opened(tmp_path, Scripted()) as (made, _):
        assert made.table.get("r").tokens == [7] * 4
        assert not made.table.undelivered()


async def test_a_response_that_redis_does_not_take_is_published_when_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_DELIVERY_DELAY_S", 0.01)
    stream = Stream()
    stream.away = True
    async with opened(tmp_path, Scripted(), stream) as (made, _):
        state, _ = await made.attach(params_of("r", publish=True), 0, POLICY)
        await ended(state)
        assert isinstance(state.error, StreamUnavailableError)
        stream.away = False  # nobody asks again
        async with asyncio.timeout(20):
            while not state.delivered:
                await state.wait_change()
        assert state.error is None
        assert stream.taken == ["r"]
    async with opened(tmp_path, Scripted(), stream) as (made, _):
        assert made.table.get("r").stream_entry_id == "entry of r"
    assert stream.taken == ["r"]


async def test_what_redis_does_not_take_is_tried_again_together_and_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FIRST_DELIVERY_DELAY_S", 3600.0)
    stream = Stream()
    stream.away = True
    async with opened(tmp_path, Scripted(), stream) as (made, _):
        states = [(await made.attach(params_of(f"r{number}", publish=True), 0, POLICY))[0] for number in range(5)]
        for state in states:
            await ended(state)
        lines = [record.getMessage() for record in caplog.records if "could not be published" in record.getMessage()]
        assert sum(int(line.split()[0]) for line in lines) == 5
        assert len(lines) == len(stream.asked)
        stream.away, stream.asked = False, []
        await made.attach(params_of("r3", publish=True), 0, POLICY)  # asked for again: all of the run are tried
        async with asyncio.timeout(20):
            while not all(state.delivered for state in states):
                await asyncio.sleep(0.001)
        assert stream.asked == [5]
        assert sorted(stream.taken) == [f"r{number}" for number in range(5)]
        stream.away = True
        late, _ = await made.attach(params_of("late", publish=True), 0, POLICY)
        await ended(late)
        stream.away = False
        await made.attach(params_of("newer", publish=True), 0, POLICY)  # what Redis takes wakes what it did not
        async with asyncio.timeout(20):
            while not late.delivered:
                await asyncio.sleep(0.001)


async def test_free_slots_are_room_beside_max_waiting(tmp_path: Path) -> None:
    token_log, _ = TokenLog.open(TokenLogConfig(path=tmp_path, durability="os"))
    made = Generations(
        Scripted(), token_log=token_log, tokenizer_fingerprint="f", finished_kept=8, max_slots=3, max_waiting=1,
        stream_of=lambda run_id: Stream(), on_failure=lambda error: None,  # type: ignore[arg-type,return-value]
    )  # fmt: skip
    await made.driver.pause()
    told: list[RequestState | OpdError] = []
    await made.begin_many([(params_of(f"r{number}"), told.append) for number in range(6)], POLICY)
    refused = [outcome for outcome in told if isinstance(outcome, RequestState)]
    assert [state.params.request_id for state in refused] == ["r4", "r5"]
    assert all(isinstance(state.error, OverloadedError) for state in refused)
    await made.stop()
    token_log.close()


async def test_a_client_that_does_not_read_is_not_read_on(tmp_path: Path) -> None:
    """What it asks for beyond its credits does not pile up; once it reads, everything is answered."""
    taken: list[int] = []

    async def messages() -> AsyncIterator[rollout_service_pb2.GenerateBatchRequest]:
        for tag in range(100):
            taken.append(tag)
            yield rollout_service_pb2.GenerateBatchRequest(items=[rollout_service_pb2.GenerateBatchItem(tag=tag)])

    async with opened(tmp_path, Scripted()) as (made, _):
        await made.driver.pause()
        names = itertools.count()
        call = BatchCall(
            made, check=lambda request: params_of(f"r{next(names)}"), policy=lambda: POLICY, credits=3,
            idle_timeout_s=3600, max_message_bytes=8 << 20,
        )  # fmt: skip
        async with aclosing(call.answers(messages())) as answers:
            assert (await anext(answers)).credits == 3
            found = [result.tag for result in (await anext(answers)).results]  # refused, and no more is read here
            for _ in range(300):
                await asyncio.sleep(0)
            assert len(taken) <= len(found) + 3 + 1
            await made.driver.resume()
            async for response in answers:
                found += [result.tag for result in response.results]
        assert sorted(found) == list(range(100))


async def test_an_answer_that_fits_no_message_is_refused_and_its_neighbours_are_not(tmp_path: Path) -> None:
    async def messages() -> AsyncIterator[rollout_service_pb2.GenerateBatchRequest]:
        items = [rollout_service_pb2.GenerateBatchItem(tag=tag, return_trajectory=tag % 2 == 0) for tag in range(4)]
        yield rollout_service_pb2.GenerateBatchRequest(items=items)

    async with opened(tmp_path, Scripted()) as (made, _):
        names = itertools.count()
        call = BatchCall(
            made, check=lambda request: params_of(f"r{next(names)}"), policy=lambda: POLICY, credits=9,
            idle_timeout_s=3600, max_message_bytes=ROOM_BYTES + 60,
        )  # fmt: skip
        async with aclosing(call.answers(messages())) as answers:
            found = {result.tag: result async for response in answers for result in response.results}
    assert [bool(found[tag].status.code) for tag in range(4)] == [True, False, True, False]
    assert "publish it and leave it out of the answer" in found[0].status.message
    assert found[1].num_tokens == 4


async def test_answers_share_messages_of_bounded_size(tmp_path: Path) -> None:
    """They ended together, while nobody read."""
    count, prompt = 40, tuple(range(100_000, 130_000))

    async def messages() -> AsyncIterator[rollout_service_pb2.GenerateBatchRequest]:
        items = [rollout_service_pb2.GenerateBatchItem(tag=tag, return_trajectory=True) for tag in range(count)]
        yield rollout_service_pb2.GenerateBatchRequest(items=items)

    async with opened(tmp_path, Scripted()) as (made, _):
        names = itertools.count()
        call = BatchCall(
            made, check=lambda request: replace(params_of(f"r{next(names)}"), prompt_ids=prompt), policy=lambda: POLICY,
            credits=count, idle_timeout_s=3600, max_message_bytes=8 << 20,
        )  # fmt: skip
        found: list[list[int]] = []
        sizes: list[int] = []
        async with aclosing(call.answers(messages())) as answers:
            async for response in answers:
                await asyncio.sleep(0.01)
                found.append([result.tag for result in response.results])
                sizes.append(response.ByteSize())
    assert sorted(tag for tags in found for tag in tags) == list(range(count))
    assert max(sizes) <= MESSAGE_BYTES
    assert max(map(len, found)) > 1


async def test_a_server_that_stops_while_redis_is_away_publishes_when_it_comes_back(tmp_path: Path) -> None:
    stream = Stream()
    stream.away = True
    async with opened(tmp_path, Scripted(), stream) as (made, _):
        state, _ = await made.attach(params_of("r", publish=True), 0, POLICY)
        await ended(state)
    stream.away = False
    async with opened(tmp_path, Scripted(), stream) as (made, _):
        async with asyncio.timeout(20):
            while not made.table.get("r").delivered:
                await asyncio.sleep(0.01)
    assert stream.taken == ["r"]


async def test_requests_of_a_run_that_was_superseded_end(tmp_path: Path) -> None:
    engine = Scripted()
    async with opened(tmp_path, engine, Stream()) as (made, _):
        await made.driver.pause()
        old, _ = await made.attach(params_of("old", tokens=400, publish=True), 0, POLICY)
        mine, _ = await made.attach(params_of("mine", tokens=400), 0, POLICY)  # not for training: its client reads it
        await made.end_outdated(replace(POLICY, lineage=2))
        assert "superseded" in str(old.error)
        assert mine.error is None
        assert list(engine.requests) == [mine.params.key]


async def test_an_engine_that_breaks_leaves_its_requests_in_the_log(tmp_path: Path) -> None:
    engine = Scripted()
    async with opened(tmp_path, engine) as (made, failures):
        await made.driver.pause()
        state, _ = await made.attach(params_of("r"), 0, POLICY)
        engine.broken = RuntimeError("device lost")
        await made.driver.resume()
        await ended(state)
        assert isinstance(state.error, UnavailableError)  # to be asked for again
        assert [str(failure) for failure in failures] == ["device lost"]
    async with opened(tmp_path, Scripted()) as (made, _):
        await go_on(made)
        state = made.table.get("r")
        await ended(state)
        assert state.tokens == [7] * 4
