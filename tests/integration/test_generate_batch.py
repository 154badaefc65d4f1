"""GenerateBatch over real sockets: many responses on one stream, each with an answer or an error of its own."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mesh import QUICK, running_valkey
from opd.v1 import common_pb2, rollout_service_pb2
from rollout_processes import Nursery
from test_rollout_recovery import CHANNEL, begin, config_of, give_policy, policy_giver, spec_of
from test_rollout_server import Served, known, listen, serving, until
from tiny_models import EOS_ID, save_tiny_checkpoint, tiny_model, tiny_tokenizer

from opd_mesh.clients.rollout import GenerateSpec, RolloutClient, _request_of
from opd_mesh.config.services import ChannelConfig, TokenLogConfig
from opd_mesh.convert import trajectory_from_proto
from opd_mesh.errors import (
    DeadlineError,
    InvalidInputError,
    NoPolicyError,
    OverloadedError,
    RequestConflictError,
    RolloutUnavailableError,
    StreamUnavailableError,
    UnavailableError,
)
from opd_mesh.models.checkpoint import served_tensors
from opd_mesh.policy_weights import PolicyWeights
from opd_mesh.rpc.channel import responses_of
from opd_mesh.rpc.status import error_of
from opd_mesh.stream import TrajectoryStream
from opd_mesh.torch_tensors import to_numpy
from opd_mesh.trajectory import FinishReason, SamplingParams
from opd_mesh.valkey import EmbeddedValkey
from rollout_server import delivery
from rollout_server.request_log import RequestLog, params_from_proto, states_of
from rollout_server.requests import RequestState
from rollout_server.token_log import TokenLog

Result = rollout_service_pb2.GenerateBatchResult
SHORT = SamplingParams(seed=1, max_new_tokens=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("student") / "student", "llama", 0)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
async def served(checkpoint: Path) -> AsyncIterator[Served]:
    async with serving(checkpoint, engine={"max_waiting": 2048, "max_slots": 64}) as server:
        await server.push(1, 0)
        yield server


def items_of(specs: Sequence[GenerateSpec], *, trajectories: bool = True, **fields: Any) -> list[Any]:
    items = []
    for tag, spec in enumerate(specs):
        request = _request_of(spec)
        for name, value in fields.items():
            setattr(request, name, value)
        item = rollout_service_pb2.GenerateBatchItem(request=request, tag=tag, return_trajectory=trajectories)
        items.append(item)
    return items


class Call:
    """A stream of the test's own."""

    def __init__(self, client: RolloutClient) -> None:
        self.call = client._stub.GenerateBatch()
        self._responses = responses_of(self.call, client.address)
        self.messages: list[int] = []  # results in each

    async def credits(self) -> int:
        first = await anext(self._responses)
        assert not first.results
        return first.credits

    async def send(self, items: Sequence[Any]) -> None:
        await self.call.write(rollout_service_pb2.GenerateBatchRequest(items=items))

    async def results(self, count: int) -> dict[int, Result]:
        """So many answers, each once, by tag."""
        found: dict[int, Result] = {}
        while len(found) < count:
            response = await anext(self._responses)
            assert not response.credits
            self.messages.append(len(response.results))
            for result in response.results:
                assert result.tag not in found
                found[result.tag] = result
        assert len(found) == count
        return found

    async def end(self) -> list[Any]:
        """Half-close; what else comes."""
        await self.call.done_writing()
        return [response async for response in self._responses]


async def test_the_answers_are_those_of_generate(served: Served) -> None:
    specs = [served.spec(f"b{number}", replace(SHORT, seed=number)) for number in range(9)]
    call = Call(served.client)
    assert await call.credits() == 2048 + 64
    await call.send(items_of(specs[:4]))
    await call.send(items_of(specs)[4:])
    results = await call.results(9)
    assert await call.end() == []
    for tag, spec in enumerate(specs):
        result = results[tag]
        heard = await listen(served, replace(spec, request_id=f"alone{tag}"))
        assert heard.trajectory is not None
        trajectory = trajectory_from_proto(result.trajectory)
        assert trajectory.token_ids == heard.trajectory.token_ids
        assert trajectory.policy_logprobs == pytest.approx(heard.trajectory.policy_logprobs, abs=1e-4)  # another batch
        assert (trajectory.trajectory_id, trajectory.sampling) == (spec.request_id, spec.sampling)
        assert (result.request_id, result.run_id, result.status.code) == (spec.request_id, served.run_id, 0)
        assert (result.num_tokens, result.finish_reason) == (6, common_pb2.FINISH_REASON_LENGTH)
        attached = await listen(served, spec)
        assert attached.attached
        assert attached.trajectory == trajectory


async def test_a_trajectory_comes_where_it_is_asked_for(served: Served) -> None:
    call = Call(served.client)
    await call.credits()
    items = items_of([served.spec("with"), served.spec("without")])
    items[1].return_trajectory = False
    await call.send(items)
    results = await call.results(2)
    assert results[0].HasField("trajectory")
    assert not results[1].HasField("trajectory")
    assert results[1].num_tokens == 12


async def test_bad_items_leave_their_neighbours_alone(served: Served) -> None:
    await listen(served, served.spec("taken", SHORT))
    good = [served.spec(f"good{number}", SHORT) for number in range(3)]
    bad = {
        "prompt_token_ids": served.spec("long", replace(SHORT, max_new_tokens=4000)),
        "sampling": served.spec("taken", replace(SHORT, seed=99)),
        "request_id": replace(served.spec(), request_id=""),
        "tokenizer_fingerprint": served.spec("strange", tokenizer_fingerprint="0" * 64),
        "sampling.temperature": served.spec("hot", replace(SHORT, temperature=-1.0)),
    }
    items = items_of([good[0], *bad.values(), good[1]])
    resumed = items_of([good[2]], from_index=3)[0]
    resumed.tag = 50
    call = Call(served.client)
    await call.credits()
    await call.send([*items, resumed])
    results = await call.results(8)
    assert (results[0].status.code, results[6].status.code) == (0, 0)
    errors = [error_of(results[tag].status) for tag in (1, 2, 3, 4, 5, 50)]
    assert [type(error).__name__ for error in errors] == [
        "TooLongError", "RequestConflictError", "InvalidInputError", "TokenizerMismatchError", "InvalidInputError",
        "InvalidInputError",
    ]  # fmt: skip
    assert errors[1].field == "sampling"
    assert errors[5].field == "from_index"
    for spec in (*bad.values(), good[2]):
        assert spec.request_id == "taken" or known(served, spec.request_id) is None
    await call.send(items_of([good[2]]))  # the stream goes on
    assert (await call.results(1))[0].status.code == 0


VERDICT = SamplingParams(
    max_new_tokens=40, stop_token_ids=(EOS_ID,), grammar=r'start: "score: " /[1-5]/ " because " /[a-z ]{3,9}/ "\n"'
)


async def test_responses_by_a_grammar_beside_others_and_beside_a_grammar_that_does_not_compile(served: Served) -> None:
    verdicts = [served.spec(f"v{number}", replace(VERDICT, seed=number)) for number in range(4)]
    free = [served.spec(f"f{number}", replace(SHORT, seed=number)) for number in range(2)]
    bad = served.spec("bad", replace(VERDICT, grammar="start: nowhere"))
    impossible = served.spec("impossible", replace(VERDICT, grammar='start: "ab" "é"'))
    call = Call(served.client)
    await call.credits()
    await call.send(items_of([*verdicts, bad, *free, impossible]))
    results = await call.results(8)
    for tag, spec in enumerate(verdicts):
        assert results[tag].finish_reason == common_pb2.FINISH_REASON_STOP
        trajectory = trajectory_from_proto(results[tag].trajectory)
        assert trajectory.sampling == spec.sampling  # the mask travels as the grammar
        text = tiny_tokenizer().decode(trajectory.scored_token_ids)
        assert re.fullmatch(r"score: [1-5] because [a-z ]{3,9}\n</s>", text)
        pairs = list(zip(trajectory.sampling_logprobs, trajectory.policy_logprobs, strict=True))
        assert all(sampling >= policy - 1e-5 for sampling, policy in pairs)
        assert sum(sampling - policy for sampling, policy in pairs) > 10
    for tag in (5, 6):
        assert (results[tag].status.code, results[tag].num_tokens) == (0, 6)
    for tag, message in ((4, 'unknown name: "nowhere"'), (7, "at response token 2")):
        error = error_of(results[tag].status)
        assert isinstance(error, InvalidInputError)
        assert error.field == "sampling.grammar"
        assert message in str(error)
    assert known(served, "bad") is None
    with pytest.raises(RequestConflictError):  # the grammar is a parameter like any other
        await listen(served, replace(verdicts[0], sampling=replace(verdicts[0].sampling, grammar="start: /a/")))


async def test_a_prefix_that_many_prompts_share_is_read_once(served: Served) -> None:
    prefix = [5 + index % 90 for index in range(40)]
    specs = [
        served.spec(f"s{n}", SHORT, prompt_token_ids=[*prefix, 10 + n, 7], shared_prefix_tokens=40) for n in range(30)
    ]
    before = await served.load()
    shared = await asyncio.gather(*(served.client.generate(spec) for spec in specs))
    after = await served.load()
    assert after.prefill_tokens - before.prefill_tokens == 40 + 30 * 2
    assert after.shared_prefill_tokens - before.shared_prefill_tokens == 29 * 40
    plain = [replace(spec, request_id=f"plain{n}", shared_prefix_tokens=0) for n, spec in enumerate(specs)]
    for one, other in zip(shared, await asyncio.gather(*map(served.client.generate, plain)), strict=True):
        assert one.token_ids == other.token_ids
        assert one.policy_logprobs == pytest.approx(other.policy_logprobs, abs=1e-4)
    # It is no part of what a request is: who asks again without it, or with another, gets the same response.
    for tokens in (0, 3):
        assert await served.client.generate(replace(specs[0], shared_prefix_tokens=tokens)) == shared[0]
    with pytest.raises(InvalidInputError) as caught:
        await served.client.generate(served.spec("too long", prompt_token_ids=[1, 2, 3], shared_prefix_tokens=3))
    assert caught.value.field == "shared_prefix_tokens"


async def test_a_prefix_is_in_the_log_and_shared_by_what_goes_on_from_there(checkpoint: Path, tmp_path: Path) -> None:
    config = TokenLogConfig(path=tmp_path / "log")
    async with serving(checkpoint) as server:
        prefix = [5 + index % 90 for index in range(40)]
        specs = [
            # The last is as an earlier version wrote them, which knew of no prefixes.
            server.spec(f"s{n}", SHORT, prompt_token_ids=[*prefix, 10 + n, 7], shared_prefix_tokens=40 * (n < 4))
            for n in range(5)
        ]
        token_log, _ = TokenLog.open(config)
        requests = RequestLog(token_log)
        requests.begin([RequestState(params_from_proto(_request_of(spec)), lineage=1) for spec in specs])
        requests.close()
        token_log.close()
        token_log, recovered = TokenLog.open(config)
        token_log.close()
        server.servicer._generations.recover(states_of(recovered))
        await server.push(1, 0)
        assert [(await server.client.write(spec)).num_scored for spec in specs] == [6] * 5
        assert (await server.load()).prefill_tokens == 40 + 4 * 2 + 42


async def test_one_request_asked_for_twice_is_written_once_and_answered_twice(served: Served) -> None:
    engine = served.servicer._generations.engine
    before = engine.counters.tokens
    spec = served.spec("twice", SHORT)
    call, other = Call(served.client), Call(served.client)
    await call.credits()
    await other.credits()
    await call.send(items_of([spec, spec]))
    await other.send(items_of([spec]))
    results = [*(await call.results(2)).values(), *(await other.results(1)).values()]
    assert len({result.trajectory.SerializeToString(deterministic=True) for result in results}) == 1
    assert engine.counters.tokens - before == 6
    await other.send(items_of([spec]))  # it has ended by now
    assert (await other.results(1))[0].trajectory == results[0].trajectory


async def test_a_client_that_goes_away_stops_nothing_and_leaves_no_listener(served: Served) -> None:
    await served.client.pause()
    spec = served.spec("left", SHORT)
    call = Call(served.client)
    await call.credits()
    await call.send(items_of([spec, spec]))
    await until(lambda: known(served, "left") and len(known(served, "left").on_end) == 2)  # type: ignore[union-attr]
    call.call.cancel()
    await until(lambda: not known(served, "left").on_end)  # type: ignore[union-attr]
    await served.client.resume()
    await until(lambda: known(served, "left").ended)  # type: ignore[union-attr]
    assert len((await served.client.generate(spec)).scored_token_ids) == 6


async def test_cancelled_generations_are_answered(served: Served) -> None:
    await served.client.pause()
    writing = [asyncio.create_task(served.client.write(served.spec(f"c{number}", SHORT))) for number in range(3)]
    await until(lambda: known(served, "c2"))
    await served.client.cancel("c1")
    written = await writing[1]
    assert (written.num_scored, written.finish_reason) == (0, FinishReason.CANCELLED)
    await served.client.resume()
    assert [(await writing[index]).num_scored for index in (0, 2)] == [6, 6]


async def test_beyond_the_credits_and_beyond_max_waiting_is_overload(checkpoint: Path) -> None:
    async with serving(checkpoint, engine={"max_slots": 1, "max_waiting": 3}) as small:
        await small.push(1, 0)
        await small.client.pause()
        call, other = Call(small.client), Call(small.client)
        assert await call.credits() == await other.credits() == 4
        await call.send(items_of([small.spec(f"r{number}", SHORT) for number in range(6)]))
        refused = await call.results(2)
        await until(lambda: small.servicer._generations.engine.waiting == 4)
        await other.send(items_of([small.spec("late", SHORT)]))
        refused[9] = (await other.results(1))[0]
        for result in refused.values():
            error = error_of(result.status)
            assert isinstance(error, OverloadedError)
            assert error.retry_delay_s == 2.0
        # Our client waits its turn: it asks for as much as it may at a time.
        writing = [asyncio.create_task(small.client.write(small.spec(f"s{number}", SHORT))) for number in range(20)]
        await small.client.resume()
        assert len(await call.results(4)) == 4
        assert [(await task).num_scored for task in writing] == [6] * 20


async def test_an_idle_stream_ends_and_our_client_opens_another(checkpoint: Path) -> None:
    async with serving(checkpoint, server=QUICK.replace(stream_idle_timeout_s=0.2)) as quick:
        await quick.push(1, 0)
        await quick.client.write(quick.spec("first", SHORT))
        first = quick.client._generating
        assert first is not None
        call = Call(quick.client)
        await call.credits()
        with pytest.raises(DeadlineError, match="GenerateBatch: nothing arrived"):
            await call.results(1)
        await until(lambda: first.broken is not None)
        await quick.client.pause()
        writing = asyncio.create_task(quick.client.write(quick.spec("second", SHORT)))
        await asyncio.sleep(0.7)  # longer than the timeout, but something is owed
        assert not writing.done()
        second = quick.client._generating
        assert second is not first
        await quick.client.resume()
        assert (await writing).num_scored == 6
        assert quick.client._generating is second


async def test_a_thousand_items(served: Served) -> None:
    specs = [
        served.spec(f"k{number}", replace(SHORT, seed=number, max_new_tokens=1 + number % 5)) for number in range(1000)
    ]
    written = await asyncio.gather(*(served.client.write(spec) for spec in specs))
    assert [one.num_scored for one in written] == [1 + number % 5 for number in range(1000)]
    call = Call(served.client)
    await call.credits()
    await call.send(items_of(specs, trajectories=False))  # all have ended: all attach
    results = await call.results(1000)
    assert [results[tag].num_tokens for tag in range(1000)] == [1 + number % 5 for number in range(1000)]
    assert len(call.messages) < 20  # several answers to a message
    for number in (0, 499, 999):
        heard = await listen(served, replace(specs[number], request_id=f"again{number}"))
        assert (await served.client.generate(specs[number])).scored_token_ids == heard.tokens


async def test_a_server_that_stops_answers_what_it_owes(checkpoint: Path) -> None:
    async with serving(checkpoint) as server:
        await server.push(1, 0)
        await server.client.pause()
        call = Call(server.client)
        await call.credits()
        await call.send(items_of([server.spec("unfinished", SHORT)]))
        await until(lambda: known(server, "unfinished"))
        await until(lambda: server.servicer._generations.engine.waiting == 1)
        assert server.server is not None
        server.server.config = QUICK.replace(drain_grace_s=60)  # nothing may need it
        async with asyncio.timeout(30):
            await server.server.drain(server.servicer.close)
        error = error_of((await call.results(1))[0].status)
        assert isinstance(error, UnavailableError)
        with pytest.raises(UnavailableError, match="stopping"):
            await call.results(1)


async def test_without_a_policy_it_says_so_and_our_client_gives_up_in_time(checkpoint: Path) -> None:
    async with serving(checkpoint) as fresh:
        call = Call(fresh.client)
        await call.credits()
        await call.send(items_of([fresh.spec("early", SHORT)]))
        error = error_of((await call.results(1))[0].status)
        assert isinstance(error, NoPolicyError)
        assert error.retry_delay_s
        hasty = ChannelConfig(max_attempts=1, connect_timeout_s=0.6)
        async with RolloutClient(fresh.address, hasty) as client:
            with pytest.raises(RolloutUnavailableError, match=r"was not to be reached for 0\.6 s"):
                await client.write(fresh.spec("early", SHORT))
            with pytest.raises(RolloutUnavailableError, match=r"did not finish request 'early' within 0\.1 s"):
                await client.write(fresh.spec("early", SHORT), timeout_s=0.1)
        patient = asyncio.create_task(fresh.client.write(fresh.spec("early", SHORT)))
        await fresh.push(1, 0)
        assert (await patient).num_scored == 6


async def test_our_client_hears_what_is_wrong_with_one_request(served: Served) -> None:
    specs = [served.spec("fine", SHORT), served.spec("fine2", replace(SHORT, max_new_tokens=4000))]
    fine, bad = await asyncio.gather(*map(served.client.generate, specs), return_exceptions=True)
    assert not isinstance(fine, BaseException)
    assert isinstance(bad, InvalidInputError)
    with pytest.raises(RequestConflictError):
        await served.client.write(served.spec("fine", replace(SHORT, seed=8)))


async def test_a_client_that_gives_a_request_up_gets_it_when_it_asks_again(served: Served) -> None:
    await served.client.pause()
    spec = served.spec("given up", SHORT)
    writing = asyncio.create_task(served.client.generate(spec))
    await until(lambda: known(served, "given up"))
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    again = asyncio.create_task(served.client.generate(spec))
    await served.client.resume()
    assert (await again).num_scored == 6


async def test_a_policy_that_comes_in_the_midst_disturbs_nobody(served: Served) -> None:
    long = SamplingParams(seed=1, max_new_tokens=200)
    await served.client.pause()
    writing = [asyncio.create_task(served.client.generate(served.spec(f"u{number}", long))) for number in range(8)]
    await until(lambda: known(served, "u7"))
    await served.client.resume()
    await until(lambda: len(known(served, "u0").tokens) > 3)  # type: ignore[union-attr]
    await served.push(2, 1)
    for trajectory in await asyncio.gather(*writing):
        assert len(trajectory.scored_token_ids) == 200
        assert sorted(trajectory.policy_versions) == list(trajectory.policy_versions)
        assert set(trajectory.policy_versions) == {1, 2}


async def test_redis_away_in_the_midst_each_is_published_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes while responses finish; who asks again meanwhile is told so, and after its return each is there once."""
    monkeypatch.setattr(delivery, "FIRST_DELIVERY_DELAY_S", 0.05)
    monkeypatch.setattr(delivery, "LAST_DELIVERY_DELAY_S", 0.05)
    valkey = EmbeddedValkey(tmp_path / "valkey", tmp_path / "valkey.log")
    valkey.start()
    try:
        async with serving(checkpoint, redis_url=valkey.url, stream_timeout_s=0.3) as server:
            await server.push(1, 0)
            specs = [replace(server.spec(f"p{number}", SHORT), publish=True) for number in range(12)]
            for spec in specs[:4]:
                await server.client.write(spec)
            os.kill(valkey.pid, signal.SIGSTOP)
            away = await asyncio.gather(*(server.client.write(spec) for spec in specs), return_exceptions=True)
            assert [isinstance(answer, StreamUnavailableError) for answer in away] == [False] * 4 + [True] * 8
            os.kill(valkey.pid, signal.SIGCONT)
            await until(lambda: all(known(server, spec.request_id).delivered for spec in specs))  # type: ignore[union-attr]
            written = await asyncio.gather(*(server.client.write(spec) for spec in specs))
            assert all(answer.stream_entry_id for answer in written)
            stream = TrajectoryStream(valkey.url, server.run_id, consumer="test", timeout_s=10)
            entries = await stream.read(100, 0.1)
            await stream.close()
            assert Counter(entry.trajectory_id for entry in entries) == Counter(spec.request_id for spec in specs)
    finally:
        valkey.stop()


# --- processes that die --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def weights() -> PolicyWeights:
    return PolicyWeights.of({name: to_numpy(tensor) for name, tensor in served_tensors(tiny_model("llama", 1))})


@pytest.mark.parametrize("deterministic", [True, False])
async def test_killed_in_mid_batch_each_is_answered_and_published_once(
    nursery: Nursery, checkpoint: Path, weights: PolicyWeights, tmp_path: Path, redis_url: str, deterministic: bool
) -> None:
    run = f"batch{deterministic}"
    config = config_of(
        checkpoint, tmp_path / "log", redis_url=redis_url, deterministic=deterministic, log={"lease_s": 0.6}
    )
    killing = begin(nursery, config, tmp_path / "server")
    specs = [replace(spec_of(number, tokens=30, run=run), publish=number % 2 == 0) for number in range(24)]
    chance = random.Random(3)
    async with RolloutClient(killing.address, CHANNEL) as client, RolloutClient(killing.address, CHANNEL) as giver:
        giving = asyncio.create_task(policy_giver(giver, weights, run))
        work = [client.write(spec) if spec.publish else client.generate(spec) for spec in specs]
        writing: asyncio.Future[list[Any]] = asyncio.gather(*work)
        for signum in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
            await until(lambda: killing.server.is_ready(), 60)
            await asyncio.sleep(chance.random() * 0.3)
            assert not writing.done()
            await asyncio.to_thread(killing.again, signum)
            await asyncio.to_thread(killing.ready)
        answers = await writing
        giving.cancel()
        wanted = [spec.sampling.max_new_tokens for spec in specs]
        assert [answer.num_scored for answer in answers] == wanted
        stream = TrajectoryStream(redis_url, run, consumer="test", timeout_s=10)
        entries = await stream.read(100, 0.1)
        await stream.close()
        published = [spec.request_id for spec in specs if spec.publish]
        assert Counter(entry.trajectory_id for entry in entries) == Counter(published)
        if deterministic:  # as an undisturbed server writes them
            undisturbed = begin(nursery, config_of(checkpoint, tmp_path / "other"), tmp_path / "undisturbed")
            async with RolloutClient(undisturbed.address, CHANNEL) as other:
                await give_policy(other, weights, run=run)
                for spec, answer in zip(specs, answers, strict=True):
                    if not spec.publish:
                        assert await other.generate(spec) == answer
