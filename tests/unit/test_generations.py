"""The life of requests above an engine that does as it is told: what cannot be seen through a real one at will."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd_mesh.config.services import TokenLogConfig
from opd_mesh.errors import InternalError, OverloadedError, StreamUnavailableError, UnavailableError
from opd_mesh.policy import PolicyId
from opd_mesh.trajectory import FinishReason, SamplingParams
from rollout_server import generations as module
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

    async def publish_many(self, entries: Sequence[tuple[str, bytes]]) -> list[str]:
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
        engine, token_log=token_log, tokenizer_fingerprint="f", finished_kept=8, max_waiting=8,
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
