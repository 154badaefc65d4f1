"""The rollout server over real sockets: streams, re-attachment, policies, publication, and what goes wrong."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mesh import QUICK
from opd.v1 import (
    common_pb2,
    rollout_service_pb2,
    rollout_service_pb2_grpc,
)
from tiny_models import logits_of, save_tiny_checkpoint, tiny_model, tiny_tokenizer

from opd_mesh.clients.rollout import GenerateSpec, RolloutClient
from opd_mesh.config.services import ChannelConfig, RolloutEngineConfig, RolloutServerConfig
from opd_mesh.convert import trajectory_from_proto
from opd_mesh.errors import (
    CorruptWeightsError,
    InvalidInputError,
    OpdError,
    OverloadedError,
    PreconditionError,
    RequestConflictError,
    RequestNotFoundError,
    StalePolicyError,
    StreamUnavailableError,
    TokenizerMismatchError,
    TooLongError,
    UnavailableError,
)
from opd_mesh.models.checkpoint import served_tensors, state_digest
from opd_mesh.models.tokenizer import tokenizer_fingerprint
from opd_mesh.rpc.server import MeshServer
from opd_mesh.rpc.status import error_of_rpc
from opd_mesh.stream import TrajectoryStream
from opd_mesh.tensors import chunks_of, header_of
from opd_mesh.torch_tensors import from_numpy, to_numpy
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory
from opd_mesh.valkey import EmbeddedValkey
from rollout_server.engines import build_engine
from rollout_server.requests import RequestState
from rollout_server.service import RolloutServicer

pytestmark = pytest.mark.asyncio(loop_scope="module")

SERVICE = "opd.v1.RolloutService"
ONE_ATTEMPT = ChannelConfig(max_attempts=1, timeout_s=20)
FINGERPRINT = tokenizer_fingerprint(tiny_tokenizer().get_vocab())
PROMPT = (1, 20, 33, 47, 5)
LONG = SamplingParams(seed=5, max_new_tokens=400)
Weights = list[tuple[str, np.ndarray]]


def weights_of(seed: int) -> Weights:
    model = tiny_model("llama", seed)
    return [(name, to_numpy(tensor).copy()) for name, tensor in served_tensors(model)]


def digest_of(weights: Weights) -> str:
    return state_digest((name, from_numpy(array)) for name, array in weights)


@dataclass
class Served:
    """A rollout server in this process, and its insides."""

    address: str
    servicer: RolloutServicer
    client: RolloutClient
    run_id: str = "run"
    server: MeshServer | None = None
    failures: list[BaseException] = field(default_factory=list)

    def policy(self, version: int, weights: Weights, *, lineage: int = 1, **fields: Any) -> common_pb2.Policy:
        values = {"run_id": self.run_id, "lineage": lineage, "version": version, "digest": digest_of(weights)}
        return common_pb2.Policy(**{**values, **fields})

    async def push(self, version: int, seed: int, *, lineage: int = 1) -> Any:
        weights = weights_of(seed)
        policy = self.policy(version, weights, lineage=lineage)
        return await self.client.update_policy(policy, weights, tokenizer_fingerprint=FINGERPRINT, timeout_s=20)

    def spec(
        self, request_id: str | None = None, sampling: SamplingParams | None = None, **fields: Any
    ) -> GenerateSpec:
        sampling = sampling or SamplingParams(seed=3, max_new_tokens=12)
        spec = GenerateSpec(request_id or uuid.uuid4().hex, self.run_id, "math", PROMPT, sampling, FINGERPRINT)
        return replace(spec, **fields)

    async def load(self) -> Any:
        return (await self.client.get_policy()).load


def known(served: Served, request_id: str) -> RequestState | None:
    try:
        return served.servicer._generations.table.get(request_id)
    except RequestNotFoundError:
        return None


async def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            value = condition()
            if await value if asyncio.iscoroutine(value) else value:
                return
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("student") / "student", "llama", 0)


@asynccontextmanager
async def serving(checkpoint: Path, redis_url: str | None = None, **fields: Any) -> AsyncIterator[Served]:
    engine_fields = {"max_context_tokens": 480, "max_slots": 4} | fields.pop("engine", {})
    config = RolloutServerConfig(model=checkpoint, engine=RolloutEngineConfig(**engine_fields), **fields)
    server = MeshServer(QUICK, services=[SERVICE])
    failures: list[BaseException] = []
    servicer = RolloutServicer(config, redis_url=redis_url, on_serving=server.set_serving, on_failure=failures.append)
    rollout_service_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server.grpc)
    address = await server.start("127.0.0.1:0")
    loaded = await asyncio.to_thread(build_engine, config)
    servicer.install(loaded)
    async with RolloutClient(address, ONE_ATTEMPT) as client:
        try:
            yield Served(address, servicer, client, server=server, failures=failures)
        finally:
            await server.drain(servicer.close)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    folder = tmp_path_factory.mktemp("valkey")
    with EmbeddedValkey(folder / "data", folder / "log") as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(checkpoint: Path, valkey: EmbeddedValkey) -> AsyncIterator[Served]:
    async with serving(checkpoint, valkey.url) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def served(shared: Served) -> AsyncIterator[Served]:
    """The shared server, holding policy 5 of a run of the test's own, with nothing to do."""
    mine = replace(shared, run_id=uuid.uuid4().hex[:8])
    await mine.push(5, 0)
    yield mine
    await mine.client.resume()
    for state in mine.servicer._generations.table.undelivered():
        await mine.client.cancel(state.params.request_id)
    await until(lambda: mine.servicer._generations.driver.engine.idle)


@pytest.fixture
def slow(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Steps that take long enough to act between two of them."""
    engine = served.servicer._generations.driver.engine
    step = engine.step

    def slow_step() -> Any:
        time.sleep(0.004)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)
    return served


@dataclass
class Heard:
    """What one Generate call said."""

    attached: bool | None = None
    tokens: list[int] | None = None
    kept: list[list[int]] = field(default_factory=list)
    first_index: int | None = None
    trajectory: Trajectory | None = None
    entry_id: str = ""
    policy: Any = None


async def listen(served: Served, spec: GenerateSpec, from_index: int = 0) -> Heard:
    """Follow a call to its end; the order of messages and the indices are checked on the way."""
    heard = Heard(tokens=[])
    assert heard.tokens is not None
    async for response in served.client.stream(spec, from_index=from_index):
        kind = response.WhichOneof("payload")
        assert heard.trajectory is None, "nothing comes after `finished`"
        if kind == "started":
            assert heard.attached is None
            heard.attached, heard.policy = response.started.attached, response.started.policy
        elif kind == "tokens":
            assert heard.attached is not None, "`started` comes first"
            batch = response.tokens
            heard.first_index = batch.first_index if heard.first_index is None else heard.first_index
            assert batch.first_index == from_index + len(heard.tokens)
            lists = (batch.sampling_logprobs, batch.policy_logprobs, batch.policy_versions)
            assert all(len(values) == len(batch.token_ids) for values in lists)
            heard.tokens += batch.token_ids
            assert len(batch.kept_token_ids) == (len(batch.token_ids) if spec.sampling.keep_mask else 0)
            heard.kept += [list(kept.ids) for kept in batch.kept_token_ids]
        else:
            heard.trajectory = trajectory_from_proto(response.finished.trajectory)
            heard.entry_id = response.finished.stream_entry_id
    return heard


# --- before there is a policy --------------------------------------------------------------------------------------
async def test_a_server_serves_once_it_holds_a_policy(checkpoint: Path) -> None:
    async with serving(checkpoint) as fresh:
        health = health_pb2_grpc.HealthStub(fresh.client._channel)

        async def status() -> int:
            return (await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=20)).status

        await fresh.client.wait_ready()
        assert await status() == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(UnavailableError, match="NOT_SERVING"):
            await fresh.client.wait_ready(0.2, with_policy=True)
        answer = await fresh.client.get_policy()
        assert not answer.HasField("policy")
        assert answer.tokenizer_fingerprint == FINGERPRINT
        assert (answer.limits.max_context_tokens, answer.limits.max_slots, answer.limits.max_waiting) == (480, 4, 1024)
        assert answer.limits.grammars
        assert answer.limits.max_kept_ids == 1024
        assert answer.cache_mode == "batched"
        with pytest.raises(UnavailableError, match="no policy has been given") as caught:
            await listen(fresh, fresh.spec())
        assert caught.value.retry_delay_s

        assert (await fresh.push(7, 3)).swapped
        await fresh.client.wait_ready(20, with_policy=True)
        assert await status() == health_pb2.HealthCheckResponse.SERVING
        assert (await fresh.client.get_policy()).policy == fresh.policy(7, weights_of(3))
        heard = await listen(fresh, fresh.spec())
        assert heard.trajectory is not None
        assert set(heard.trajectory.policy_versions) == {7}
        with pytest.raises(PreconditionError, match="no Redis") as refused:
            await listen(fresh, fresh.spec(publish=True))
        assert refused.value.field == "publish"


async def test_while_the_model_loads_everything_is_unavailable(checkpoint: Path) -> None:
    server = MeshServer(QUICK, services=[SERVICE])
    servicer = RolloutServicer(RolloutServerConfig(model=checkpoint), redis_url=None, on_serving=server.set_serving)
    rollout_service_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server.grpc)
    address = await server.start("127.0.0.1:0")
    async with RolloutClient(address, ONE_ATTEMPT.replace(connect_timeout_s=0.2)) as client:
        loading = Served(address, servicer, client)
        for call in (
            client.get_policy(), client.pause(), client.resume(), listen(loading, loading.spec()), loading.push(1, 0),
        ):  # fmt: skip
            with pytest.raises(UnavailableError, match="still being loaded"):
                await call
    await server.drain(servicer.close)


# --- what is written -----------------------------------------------------------------------------------------------
def kept_logprobs(logits_V: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """log p of every token under the sampling distribution, by sorting; −inf where it is cut off."""
    logprobs = torch.log_softmax(logits_V.double() / sampling.temperature, dim=-1)
    order = logprobs.argsort(descending=True)[: sampling.top_k or None]
    if sampling.top_p < 1:  # of what top-k has left
        mass = logprobs[order].softmax(0).cumsum(0)
        order = order[: int((mass < sampling.top_p).sum()) + 1]
    cut = torch.full_like(logprobs, -torch.inf)
    cut[order] = logprobs[order]
    return torch.log_softmax(cut, dim=-1)


def check_logprobs(trajectory: Trajectory, model: Any, rows: slice = slice(None)) -> None:
    logits = logits_of(model, list(trajectory.token_ids))
    positions = list(zip(trajectory.predicting_positions, trajectory.scored_token_ids, strict=True))[rows]
    sampling, policy = trajectory.sampling_logprobs[rows], trajectory.policy_logprobs[rows]
    for (position, token), sampled, model_logprob in zip(positions, sampling, policy, strict=True):
        assert float(kept_logprobs(logits[position], trajectory.sampling)[token]) == pytest.approx(sampled, abs=1e-4)
        assert float(torch.log_softmax(logits[position].double(), dim=-1)[token]) == pytest.approx(
            model_logprob, abs=1e-4
        )


SAMPLINGS = {
    "plain": SamplingParams(seed=11, max_new_tokens=24),
    "hot": SamplingParams(seed=12, temperature=2.5, max_new_tokens=24),
    "top_p": SamplingParams(seed=13, temperature=1.5, top_p=0.8, max_new_tokens=24),
    "top_k": SamplingParams(seed=14, temperature=3.0, top_k=5, max_new_tokens=24),
    "both": SamplingParams(seed=15, temperature=3.0, top_k=9, top_p=0.7, max_new_tokens=24),
    "kept": SamplingParams(seed=16, temperature=3.0, top_k=9, top_p=0.7, max_new_tokens=24, keep_mask=True),
}


async def test_tokens_stream_and_their_logprobs_are_the_models(served: Served) -> None:
    """All at once, so that they share batches and caches."""
    model = tiny_model("llama", 0)
    specs = [served.spec(name, sampling, domain=name) for name, sampling in SAMPLINGS.items()]
    answers = await asyncio.gather(*(listen(served, spec) for spec in specs))
    for spec, heard in zip(specs, answers, strict=True):
        trajectory = heard.trajectory
        assert trajectory is not None
        assert heard.attached is False
        assert heard.tokens == trajectory.scored_token_ids
        assert trajectory.token_ids == (*PROMPT, *heard.tokens)
        assert trajectory.scored_spans == ((5, 29),)
        assert (trajectory.trajectory_id, trajectory.domain) == (spec.request_id, spec.domain)
        assert (trajectory.run_id, trajectory.lineage) == (served.run_id, 1)
        assert trajectory.finish_reason is FinishReason.LENGTH
        assert trajectory.policy_versions == (5,) * 24
        given = replace(trajectory.sampling, temperature=spec.sampling.temperature, top_p=spec.sampling.top_p)
        assert given == spec.sampling  # temperature and top_p travel as 32-bit floats
        assert heard.entry_id == ""
        check_logprobs(trajectory, model)
        assert [list(ids) for ids in trajectory.kept_token_ids] == heard.kept
        trajectory.validate(vocab_size=131)
    assert len({tuple(heard.tokens or ()) for heard in answers}) == len(answers)


async def test_a_stop_token_ends_the_response_and_belongs_to_it(served: Served) -> None:
    whole = await listen(served, served.spec(sampling=SamplingParams(seed=3, max_new_tokens=20)))
    assert whole.tokens is not None
    stop = whole.tokens[4]
    heard = await listen(
        served, served.spec(sampling=SamplingParams(seed=3, max_new_tokens=20, stop_token_ids=(stop,)))
    )
    assert heard.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert heard.trajectory is not None
    assert heard.trajectory.finish_reason is FinishReason.STOP


async def test_padding_ids_are_never_written(tmp_path: Path) -> None:
    """The model of 140 rows would love to: its padding rows have the largest logits."""
    path = save_tiny_checkpoint(tmp_path / "padded", "llama", 1, vocab_size=140, tokenizer_vocab_size=131)
    async with serving(path) as padded:
        model = tiny_model("llama", 1, vocab_size=140)
        with torch.no_grad():
            model.get_output_embeddings().weight[131:] *= 20
        weights = [(name, to_numpy(tensor).copy()) for name, tensor in served_tensors(model)]
        await padded.client.update_policy(padded.policy(1, weights), weights, tokenizer_fingerprint=FINGERPRINT)
        heard = await listen(padded, padded.spec(sampling=SamplingParams(seed=1, max_new_tokens=64)))
        assert heard.tokens is not None
        assert max(heard.tokens) < 131
        assert heard.trajectory is not None
        logits = logits_of(model, list(heard.trajectory.token_ids))
        assert any(int(row.argmax()) >= 131 for row in logits)
        row, token = heard.trajectory.predicting_positions[0], heard.tokens[0]
        wanted = float(torch.log_softmax(logits[row, :131], dim=-1)[token])
        assert heard.trajectory.policy_logprobs[0] == pytest.approx(wanted, abs=1e-4)


# --- attaching again -----------------------------------------------------------------------------------------------
async def test_attaching_again_gives_exactly_the_unseen_tokens(slow: Served) -> None:
    spec = slow.spec(sampling=replace(LONG, max_new_tokens=60))
    first = slow.client.stream(spec)
    seen: list[int] = []
    async for response in first:
        if response.WhichOneof("payload") == "tokens":
            seen += response.tokens.token_ids
            if len(seen) >= 7:
                break
    await first.aclose()  # type: ignore[attr-defined]
    assert not slow.servicer._generations.table.get(spec.request_id).ended
    middle = await listen(slow, spec, from_index=len(seen))
    assert middle.attached is True
    assert middle.first_index == len(seen)
    assert middle.trajectory is not None
    assert [*seen, *(middle.tokens or ())] == middle.trajectory.scored_token_ids
    assert middle.trajectory.num_scored == 60
    for start in (0, 31, 60):
        after = await listen(slow, spec, from_index=start)
        assert after.attached is True
        assert after.tokens == middle.trajectory.scored_token_ids[start:]
        assert after.trajectory == middle.trajectory
    with pytest.raises(InvalidInputError, match="61 is beyond the 60 tokens") as caught:
        await listen(slow, spec, from_index=61)
    assert caught.value.field == "from_index"


async def test_two_listeners_hear_the_same(slow: Served) -> None:
    spec = slow.spec(sampling=replace(LONG, max_new_tokens=40))
    one, two = await asyncio.gather(listen(slow, spec), listen(slow, spec))
    assert one.tokens == two.tokens
    assert len(one.tokens or ()) == 40
    assert {one.attached, two.attached} == {False, True}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("domain", {"domain": "code"}),
        ("prompt_ids", {"prompt_token_ids": (1, 2)}),
        ("sampling", {"sampling": SamplingParams(seed=4, max_new_tokens=12)}),
        ("publish", {"publish": True}),
    ],
)
async def test_an_id_with_other_parameters_is_a_conflict(served: Served, name: str, changes: dict[str, Any]) -> None:
    spec = served.spec()
    before = await listen(served, spec)
    with pytest.raises(RequestConflictError, match=name) as caught:
        await listen(served, replace(spec, **changes))
    assert caught.value.field == name
    assert (await listen(served, spec)).trajectory == before.trajectory


async def test_two_runs_may_use_one_id(slow: Served) -> None:
    """An id is unique in its run: the next run on this server counts from 1 again."""
    first = slow.spec("l0001-s000001-p0000", sampling=replace(LONG, max_new_tokens=30))
    second = replace(first, run_id="the next run", prompt_token_ids=(1, 9))
    one, two = await asyncio.gather(listen(slow, first), listen(slow, second))
    assert one.tokens != two.tokens
    assert (one.attached, two.attached) == (False, False)
    for spec, heard in ((first, one), (second, two)):
        assert (await listen(slow, spec)).trajectory == heard.trajectory
        assert heard.trajectory is not None
        assert heard.trajectory.run_id == spec.run_id
        assert heard.trajectory.trajectory_id == "l0001-s000001-p0000"
    with pytest.raises(InvalidInputError, match="2 runs have a request") as caught:
        await slow.client.cancel(first.request_id)
    assert caught.value.field == "run_id"
    answer = await slow.client.cancel(first.request_id, run_id=first.run_id)
    assert (answer.cancelled, answer.tokens_written) == (False, 30)


async def test_a_client_that_goes_away_does_not_stop_the_generation(slow: Served) -> None:
    sampling = replace(LONG, max_new_tokens=50)
    undisturbed = await listen(slow, slow.spec(sampling=sampling))
    spec = slow.spec(sampling=sampling)
    call = slow.client._stub.Generate(_request(spec))
    await call.read()
    call.cancel()
    state = slow.servicer._generations.table.get(spec.request_id)
    assert not state.ended
    await until(lambda: state.ended)
    assert (await listen(slow, spec)).tokens == undisturbed.tokens


def _request(spec: GenerateSpec, **fields: Any) -> rollout_service_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(
        seed=spec.sampling.seed, temperature=spec.sampling.temperature, max_new_tokens=spec.sampling.max_new_tokens
    )
    return rollout_service_pb2.GenerateRequest(
        **{
            "request_id": spec.request_id,
            "run_id": spec.run_id,
            "domain": spec.domain,
            "prompt_token_ids": spec.prompt_token_ids,
            "sampling": sampling,
            "tokenizer_fingerprint": spec.tokenizer_fingerprint,
            **fields,
        }
    )


@asynccontextmanager
async def busy_engine(served: Served) -> AsyncIterator[threading.Event]:
    """The engine's thread is held until the event is set, as a long step would hold it."""
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go.wait(60)

    holding = asyncio.create_task(served.servicer._generations.driver.call(hold))
    await until(held.is_set)
    try:
        yield go
    finally:
        go.set()
        await holding


async def test_a_client_that_goes_away_before_the_engine_took_its_request(served: Served) -> None:
    spec = served.spec()
    undisturbed = await listen(served, replace(spec, request_id=uuid.uuid4().hex))
    async with busy_engine(served) as go:
        call = served.client._stub.Generate(_request(spec))
        await until(lambda: known(served, spec.request_id) is not None)
        call.cancel()
        paused = served.client._stub.PauseGeneration(rollout_service_pb2.PauseGenerationRequest())
        await until(lambda: served.servicer._generations.driver._commands.qsize() == 2)
        paused.cancel()
        await until(lambda: call.done() and paused.done())
        await asyncio.sleep(0.05)  # let the server hear of it
        go.set()
    assert not (await served.load()).paused  # what its caller gave up before it began is not done
    heard = await asyncio.wait_for(listen(served, spec), 20)
    assert heard.attached is True
    assert heard.tokens == undisturbed.tokens


# --- cancel, pause -------------------------------------------------------------------------------------------------
async def test_cancelling_frees_the_slot_and_keeps_the_tokens(slow: Served) -> None:
    spec = slow.spec(sampling=LONG)
    listening = asyncio.create_task(listen(slow, spec))
    await until(lambda: _written(slow, spec) >= 5)
    answer = await slow.client.cancel(spec.request_id)
    heard = await listening
    assert answer.cancelled
    assert 5 <= answer.tokens_written < 400
    assert heard.trajectory is not None
    assert heard.trajectory.finish_reason is FinishReason.CANCELLED
    assert heard.tokens == heard.trajectory.scored_token_ids
    assert len(heard.tokens) == answer.tokens_written
    load = await slow.load()
    assert (load.running, load.waiting) == (0, 0)
    again = await slow.client.cancel(spec.request_id)
    assert (again.cancelled, again.tokens_written) == (False, answer.tokens_written)
    assert (await listen(slow, spec, from_index=3)).tokens == heard.tokens[3:]
    with pytest.raises(RequestNotFoundError, match="no request 'nobody' here") as caught:
        await slow.client.cancel("nobody")
    assert caught.value.field == "request_id"
    finished = slow.spec()
    await listen(slow, finished)
    assert not (await slow.client.cancel(finished.request_id)).cancelled


def _written(served: Served, spec: GenerateSpec) -> int:
    state = known(served, spec.request_id)
    return 0 if state is None else len(state.tokens)


async def test_a_request_cancelled_before_its_first_token_has_no_span(served: Served) -> None:
    await served.client.pause()
    spec = served.spec()
    listening = asyncio.create_task(listen(served, spec))
    await until(lambda: known(served, spec.request_id) is not None)
    assert (await served.client.cancel(spec.request_id)).tokens_written == 0
    heard = await listening
    assert heard.trajectory is not None
    assert heard.trajectory.scored_spans == ()
    assert heard.trajectory.token_ids == PROMPT


async def test_no_token_is_written_while_paused(slow: Served) -> None:
    running = slow.spec(sampling=replace(LONG, max_new_tokens=80))
    listening = asyncio.create_task(listen(slow, running))
    await until(lambda: _written(slow, running) >= 3)
    load = (await slow.client.pause("look")).load
    assert load.paused
    assert (await slow.client.pause()).load.tokens_generated == load.tokens_generated
    waiting = slow.spec(sampling=SamplingParams(seed=9, max_new_tokens=5))
    accepted = asyncio.create_task(listen(slow, waiting))
    await until(lambda: slow.servicer._generations.driver.engine.waiting == 1)
    await asyncio.sleep(0.1)  # time for 25 steps
    load_later = await slow.load()
    assert load_later.tokens_generated == load.tokens_generated
    assert (load_later.running, load_later.waiting, load_later.paused) == (1, 1, True)
    assert not accepted.done()
    resumed = await slow.client.resume()
    assert not resumed.load.paused
    await slow.client.resume()
    assert len((await listening).tokens or ()) == 80
    assert len((await accepted).tokens or ()) == 5


# --- policies ------------------------------------------------------------------------------------------------------
async def test_new_weights_are_swapped_in_between_two_tokens(slow: Served) -> None:
    spec = slow.spec(sampling=replace(LONG, max_new_tokens=90, temperature=1.7))
    listening = asyncio.create_task(listen(slow, spec))
    for version, seed in ((6, 1), (9, 2)):
        have = _written(slow, spec)
        await until(lambda have=have: _written(slow, spec) >= have + 10)  # type: ignore[misc]
        answer = await slow.push(version, seed)
        assert answer.swapped
        assert answer.policy.version == version
        assert answer.prefilled_again == 1
        assert answer.pause_s > 0
    heard = await listening
    trajectory = heard.trajectory
    assert trajectory is not None
    versions = list(trajectory.policy_versions)
    assert versions == sorted(versions)
    assert set(versions) == {5, 6, 9}
    assert heard.policy.version == 5
    for version, seed in ((5, 0), (6, 1), (9, 2)):
        start, count = versions.index(version), versions.count(version)
        check_logprobs(trajectory, tiny_model("llama", seed), slice(start, start + count))
        with pytest.raises(AssertionError):  # and under no other weights
            check_logprobs(trajectory, tiny_model("llama", seed + 7), slice(start, start + count))


async def test_the_order_of_policies(served: Served) -> None:
    """Served: run, lineage 1, version 5."""
    assert not (await served.push(5, 0)).swapped  # the same again
    with pytest.raises(RequestConflictError, match="served already, with other weights"):
        await served.push(5, 1)
    with pytest.raises(StalePolicyError, match="older than") as caught:
        await served.push(4, 1)
    assert caught.value.field == "policy"
    assert (await served.client.get_policy()).policy == served.policy(5, weights_of(0))
    assert (await served.push(2, 1, lineage=2)).swapped  # the run was resumed from an older checkpoint
    with pytest.raises(StalePolicyError):
        await served.push(6, 0, lineage=1)  # the trainer of before the resume is still about
    assert (await served.client.get_policy()).policy == served.policy(2, weights_of(1), lineage=2)
    heard = await listen(served, served.spec())
    assert heard.trajectory is not None
    assert heard.trajectory.lineage == 2
    check_logprobs(heard.trajectory, tiny_model("llama", 1))
    other = replace(served, run_id="another run")
    assert (await other.push(0, 2)).swapped


async def send_policy(
    served: Served, policy: common_pb2.Policy, weights: Weights, *, fingerprint: str = FINGERPRINT,
    change_headers: Callable[[list[common_pb2.TensorHeader]], Any] = lambda headers: None,
    change_messages: Callable[[list[Any]], list[Any]] = lambda messages: messages,
) -> Any:  # fmt: skip
    headers = [header_of(name, array) for name, array in weights]
    change_headers(headers)
    manifest = rollout_service_pb2.PolicyManifest(policy=policy, tensors=headers, tokenizer_fingerprint=fingerprint)
    Update = rollout_service_pb2.UpdatePolicyRequest
    messages = [Update(manifest=manifest)]
    messages += [Update(chunk=chunk) for chunk in chunks_of([array for _, array in weights], chunk_bytes=4096)]
    changed = change_messages(messages)
    source = changed if isinstance(changed, AsyncIterator) else iter(changed)
    try:
        return await served.client._stub.UpdatePolicy(source, timeout=20)
    except grpc.aio.AioRpcError as error:
        raise error_of_rpc(error, target="rollout") from None


def _with_nan(weights: Weights) -> Weights:
    weights[3][1].reshape(-1)[2] = np.nan
    return weights


def _flip(messages: list[Any]) -> list[Any]:
    data = bytearray(messages[5].chunk.data)
    data[10] ^= 1
    messages[5].chunk.data = bytes(data)
    return messages


def _huge(headers: list[common_pb2.TensorHeader]) -> None:
    headers[0].shape[:] = [1 << 19, 1 << 19]
    headers[0].byte_size = 1 << 40


def _misfit(headers: list[common_pb2.TensorHeader]) -> None:
    headers[0].byte_size -= 4


BAD_POLICIES: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], type[OpdError], str]] = {
    "truncated": (list, {"change_messages": lambda m: m[:-1]}, CorruptWeightsError, "truncated: .* bytes arrived"),
    "no bytes": (list, {"change_messages": lambda m: m[:1]}, CorruptWeightsError, "truncated: 0 of"),
    "altered": (list, {"change_messages": _flip}, CorruptWeightsError, "hash to .* the old policy stays"),
    "a gap": (list, {"change_messages": lambda m: m[:3] + m[4:]}, CorruptWeightsError, "chunk at offset"),
    "NaN": (_with_nan, {}, CorruptWeightsError, "NaN"),
    "missing": (lambda w: w[:4] + w[5:], {}, InvalidInputError, "is missing"),
    "none": (lambda w: [], {}, InvalidInputError, "is missing"),
    "unknown name": (lambda w: [*w, ("ghost", np.zeros(3, np.float32))], {}, InvalidInputError, "no weight of that"),
    "twice": (lambda w: [*w, w[0]], {}, CorruptWeightsError, "same name"),
    "shape": (lambda w: [(w[0][0], w[0][1].T.copy()), *w[1:]], {}, InvalidInputError, "shape .48, 131., the model has"),
    "bytes for the shape": (list, {"change_headers": _misfit}, CorruptWeightsError, "needs .* bytes, but byte_size"),
    "a terabyte": (list, {"change_headers": _huge}, InvalidInputError, "shape .524288, 524288."),
    "tokenizer": (list, {"fingerprint": "a" * 64}, TokenizerMismatchError, "aaaaaaaaaaaaaaaa"),
    "no tokenizer": (list, {"fingerprint": ""}, TokenizerMismatchError, "the policy's tokenizer"),
    "no manifest": (list, {"change_messages": lambda m: m[1:]}, InvalidInputError, "must be the manifest"),
    "nothing": (list, {"change_messages": lambda m: []}, InvalidInputError, "must be the manifest"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_POLICIES)
async def test_a_bad_policy_leaves_the_old_one_serving(served: Served, case: str) -> None:
    change, options, error, message = BAD_POLICIES[case]
    spec = served.spec()
    before = await listen(served, spec)
    weights = change(weights_of(1))
    digest = digest_of([*dict(weights).items()])
    with pytest.raises(error, match=message):
        await send_policy(served, served.policy(6, weights_of(1), digest=digest), weights, **options)
    assert (await served.client.get_policy()).policy == served.policy(5, weights_of(0))
    after = await listen(served, replace(spec, request_id=uuid.uuid4().hex))
    assert after.tokens == before.tokens
    assert after.trajectory is not None
    check_logprobs(after.trajectory, tiny_model("llama", 0))
    assert (await served.push(6, 1)).swapped  # a good one is still taken


@pytest.mark.parametrize("missing", ["run_id", "digest"])
async def test_a_policy_must_be_named(served: Served, missing: str) -> None:
    with pytest.raises(InvalidInputError, match="run_id and digest are required"):
        await send_policy(served, served.policy(6, weights_of(1), **{missing: ""}), weights_of(1))


async def test_a_client_that_goes_away_in_an_update(served: Served) -> None:
    """In the middle of the bytes: the old policy stays. When all is sent: name and weights change together."""
    weights = weights_of(1)
    sent = asyncio.Event()

    def endless(messages: list[Any]) -> Any:
        async def parts() -> AsyncIterator[Any]:
            for message in messages[:4]:
                yield message
            sent.set()
            await asyncio.sleep(60)

        return parts()

    half = asyncio.create_task(send_policy(served, served.policy(6, weights), weights, change_messages=endless))
    await until(sent.is_set)
    half.cancel()
    await asyncio.gather(half, return_exceptions=True)
    assert (await served.client.get_policy()).policy.version == 5

    async with busy_engine(served) as go:
        whole = asyncio.create_task(served.push(7, 1))
        await until(lambda: served.servicer._generations.driver._commands.qsize() == 1)
        whole.cancel()
        await asyncio.gather(whole, return_exceptions=True)
        await asyncio.sleep(0.05)  # let the server hear of it
        go.set()
    await until(lambda: served.servicer._generations.driver.engine.policy_version == 7)
    assert (await served.client.get_policy()).policy == served.policy(7, weights)
    heard = await listen(served, served.spec())
    assert heard.trajectory is not None
    check_logprobs(heard.trajectory, tiny_model("llama", 1))


async def _consume(responses: Any, seen: list[int] | None = None) -> None:
    try:
        async for response in responses:
            if seen is not None:
                seen += response.tokens.token_ids
    except grpc.aio.AioRpcError as status:
        raise error_of_rpc(status, target="rollout") from None


# --- bad requests --------------------------------------------------------------------------------------------------
BAD_REQUESTS: dict[str, tuple[dict[str, Any], type[OpdError], str, str]] = {
    "tokenizer": ({"tokenizer_fingerprint": "a" * 64}, TokenizerMismatchError, "tokenizer_fingerprint", "aaaaaaaaaaaa"),
    "no tokenizer": ({"tokenizer_fingerprint": ""}, TokenizerMismatchError, "tokenizer_fingerprint", "none given"),
    "empty prompt": ({"prompt_token_ids": []}, InvalidInputError, "prompt_token_ids", "the prompt is empty"),
    "outside": ({"prompt_token_ids": [5, 131]}, InvalidInputError, "prompt_token_ids", r"\[0, 131\)"),
    "negative": ({"prompt_token_ids": [5, -1]}, InvalidInputError, "prompt_token_ids", r"\[0, 131\)"),
    "long prompt": ({"prompt_token_ids": [5] * 480}, TooLongError, "prompt_ids", "480 prompt tokens and 12 new"),
    "long answer": (
        {"sampling": common_pb2.SamplingParams(max_new_tokens=476)}, TooLongError, "sampling.max_new_tokens", "476 new",
    ),
    "no id": ({"request_id": ""}, InvalidInputError, "request_id", "must not be empty"),
    "no sampling": ({"sampling": None}, InvalidInputError, "sampling.max_new_tokens", "at least 1"),
    "temperature": (
        {"sampling": common_pb2.SamplingParams(max_new_tokens=4, temperature=float("nan"))},
        InvalidInputError, "sampling.temperature", "from 0 to 100",
    ),
    "top_p": (
        {"sampling": common_pb2.SamplingParams(max_new_tokens=4, top_p=1.5)},
        InvalidInputError, "sampling.top_p", "at most 1",
    ),
    "keep_mask": (
        {"sampling": common_pb2.SamplingParams(max_new_tokens=4, top_p=0.9, keep_mask=True)},
        InvalidInputError, "sampling.keep_mask", "set it from 1 to 1024",
    ),
    "grammar": (
        {"sampling": common_pb2.SamplingParams(max_new_tokens=4, stop_token_ids=[2], grammar="start: nowhere")},
        InvalidInputError, "sampling.grammar", 'unknown name: "nowhere"',
    ),
    "long grammar": (
        {"sampling": common_pb2.SamplingParams(max_new_tokens=4, stop_token_ids=[2], grammar="x" * 65_537)},
        InvalidInputError, "sampling.grammar", "at most 65536",
    ),
    "grammar without an end": (
        {"sampling": common_pb2.SamplingParams(max_new_tokens=4, grammar="start: /a/")},
        InvalidInputError, "sampling.stop_token_ids", "ends with a stop token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_a_bad_request_is_told_what_is_wrong(served: Served, case: str) -> None:
    changes, error, name, message = BAD_REQUESTS[case]
    request = _request(served.spec(), **changes)
    with pytest.raises(error, match=message) as caught:
        await _consume(served.client._stub.Generate(request))
    assert caught.value.field == name
    assert known(served, request.request_id) is None  # the id can be used rightly
    assert len((await listen(served, served.spec(request.request_id or "x" + uuid.uuid4().hex))).tokens or ()) == 12


async def test_overload_is_refused_with_a_delay(checkpoint: Path) -> None:
    async with serving(checkpoint, engine={"max_slots": 1, "max_waiting": 2}) as small:
        await small.push(1, 0)
        await small.client.pause()
        specs = [small.spec(f"r{number}") for number in range(12)]
        tasks = [asyncio.create_task(listen(small, spec)) for spec in specs]
        await until(lambda: sum(task.done() for task in tasks) == 9)
        refused = [task.exception() for task in tasks if task.done()]
        assert all(isinstance(error, OverloadedError) and error.retry_delay_s == 2.0 for error in refused)
        await small.client.resume()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(answer, Heard) for answer in done) == 3  # one has the slot that is free
        for spec in specs:  # a refused request left nothing behind
            heard = await listen(small, spec)
            assert len(heard.tokens or ()) == 12


# --- publication ---------------------------------------------------------------------------------------------------
async def entries_of(url: str, run_id: str) -> list[Trajectory]:
    stream = TrajectoryStream(url, run_id, timeout_s=5)
    try:
        entries = await stream.read(100, 0)
        return [trajectory_from_proto(common_pb2.Trajectory.FromString(entry.payload)) for entry in entries]
    finally:
        await stream.close()


async def test_a_finished_trajectory_is_published_before_finished_is_said(
    served: Served, valkey: EmbeddedValkey
) -> None:
    spec = served.spec("published", publish=True)
    heard = await listen(served, spec)
    assert heard.entry_id
    assert (await listen(served, spec)).entry_id == heard.entry_id  # attaching does not publish again
    await listen(served, served.spec("not published"))
    assert await entries_of(valkey.url, served.run_id) == [heard.trajectory]


async def test_redis_gone_keeps_the_trajectory_until_it_is_back(checkpoint: Path, tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "data", tmp_path / "log") as own:
        async with serving(checkpoint, own.url, stream_timeout_s=0.4) as server:
            await server.push(1, 0)
            own.stop()
            spec = server.spec("kept", publish=True)
            seen: list[int] = []
            with pytest.raises(StreamUnavailableError, match="did not answer publish"):
                await _consume(server.client.stream(spec), seen)
            assert len(seen) == 12  # the tokens were streamed
            heard = await listen(server, server.spec("unpublished"))  # who asks for no stream is served
            assert heard.tokens == seen
            with pytest.raises(StreamUnavailableError):  # and still no Redis
                await listen(server, spec, from_index=12)
            own.start()
            heard = await listen(server, spec, from_index=12)
            assert (heard.attached, heard.tokens) == (True, [])
            assert heard.trajectory is not None
            assert heard.trajectory.scored_token_ids == seen
            assert heard.entry_id
            assert await entries_of(own.url, server.run_id) == [heard.trajectory]


async def test_our_client_says_that_redis_is_gone_and_may_ask_again(checkpoint: Path, tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "data", tmp_path / "log") as own:
        async with serving(checkpoint, own.url, stream_timeout_s=0.3) as server:
            await server.push(1, 0)
            own.stop()
            spec = server.spec("patient", publish=True)
            with pytest.raises(StreamUnavailableError, match="did not answer publish"):
                await server.client.generate(spec, timeout_s=30)
            own.start()
            trajectory = await server.client.generate(spec, timeout_s=30)
            assert await entries_of(own.url, server.run_id) == [trajectory]


async def test_our_client_attaches_again_where_the_stream_breaks(slow: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = replace(LONG, max_new_tokens=40)
    undisturbed = await listen(slow, slow.spec(sampling=sampling))
    monkeypatch.setattr("opd_mesh.clients.rollout.REATTACH_DELAY_S", 0.01)
    asked: list[list[str]] = []
    generate = RolloutServicer.GenerateBatch

    async def breaking(self: RolloutServicer, requests: Any, context: Any) -> AsyncIterator[Any]:
        names: list[str] = []
        asked.append(names)

        async def heard() -> AsyncIterator[Any]:
            async for request in requests:
                names.extend(item.request.request_id for item in request.items)
                yield request
                if len(asked) < 4:
                    raise UnavailableError("the network broke")

        async for response in generate(self, heard(), context):
            yield response

    specs = [slow.spec(sampling=sampling), slow.spec(sampling=replace(sampling, seed=6))]
    async with slow_copy(slow, breaking) as address, RolloutClient(address, ONE_ATTEMPT) as client:
        trajectory, other = await asyncio.gather(*(client.generate(spec, timeout_s=30) for spec in specs))
    assert trajectory.scored_token_ids == undisturbed.tokens
    assert other.trajectory_id == specs[1].request_id
    assert asked == [[spec.request_id for spec in specs]] * 4  # together, each time


@asynccontextmanager
async def slow_copy(served: Served, generate: Any) -> AsyncIterator[str]:
    """A second door to the same servicer, with another GenerateBatch."""

    class Door(rollout_service_pb2_grpc.RolloutServiceServicer):
        def GenerateBatch(self, request_iterator: Any, context: Any) -> Any:
            return generate(served.servicer, request_iterator, context)

    server = MeshServer(QUICK, services=[SERVICE])
    rollout_service_pb2_grpc.add_RolloutServiceServicer_to_server(Door(), server.grpc)
    address = await server.start("127.0.0.1:0")
    try:
        yield address
    finally:
        await server.drain()


# --- the end -------------------------------------------------------------------------------------------------------
async def test_a_server_that_stops_tells_its_listeners(checkpoint: Path) -> None:
    async with serving(checkpoint) as server:
        await server.push(1, 0)
        await server.client.pause()
        waiting = asyncio.create_task(listen(server, server.spec()))
        await until(lambda: server.servicer._generations.driver.engine.waiting == 1)
        assert server.server is not None
        server.server.config = QUICK.replace(drain_grace_s=60)  # nothing may need it
        async with asyncio.timeout(30):
            await server.server.drain(server.servicer.close)
        with pytest.raises(UnavailableError):
            await waiting
        with pytest.raises(UnavailableError, match="decode loop has ended"):
            await asyncio.wait_for(server.servicer._generations.driver.pause(), 20)


async def test_a_decode_loop_that_dies_is_told_to_everybody(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(checkpoint) as server:
        await server.push(1, 0)
        await server.client.pause()
        waiting = asyncio.create_task(listen(server, server.spec()))
        await until(lambda: server.servicer._generations.driver.engine.waiting == 1)

        def broken() -> Any:
            raise ZeroDivisionError("a defect")

        monkeypatch.setattr(server.servicer._generations.driver.engine, "step", broken)
        await server.client.resume()
        with pytest.raises(OpdError, match="the decode loop failed: ZeroDivisionError"):
            await waiting
        assert isinstance(server.failures.pop(), ZeroDivisionError)  # the process is to end
        with pytest.raises(UnavailableError, match="decode loop has ended"):
            await listen(server, server.spec())
