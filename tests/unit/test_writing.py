"""The trainer's side of generation without servers: what is awaited, what is acknowledged, who is given the policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mesh import tiny_recipe

from opd_mesh.clients.rollout import Written
from opd_mesh.convert import trajectory_to_proto
from opd_mesh.errors import (
    OverloadedError,
    PolicyBaseMismatchError,
    RequestConflictError,
    RolloutUnavailableError,
    StreamUnavailableError,
    TrajectoryError,
)
from opd_mesh.policy import PolicyId
from opd_mesh.policy_weights import LoraFactors, PolicyWeights
from opd_mesh.stream import StreamEntry
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory
from student_trainer.checkpoint import TrainerState
from student_trainer.pipeline import Pipeline
from student_trainer.rollouts import Rollouts
from student_trainer.tasks import Grader, Prompt
from student_trainer.writing import Arrival, Writing

PROMPT = Prompt("domain_0", 0, (1, 2))
SAMPLING = SamplingParams()
POLICY = PolicyId("run", 1, 3, "digest")


def response(name: str = "l0001-s000001-p0000", **changes: Any) -> Trajectory:
    written = Trajectory(
        name, "domain_0", (1, 2, 3), ((1, 3),), sampling_logprobs=(-1.0, -2.0), policy_versions=(0, 0), lineage=1
    )
    return replace(written, **changes)


async def answer(trajectory: Trajectory | Exception) -> Trajectory:
    if isinstance(trajectory, Exception):
        raise trajectory
    return trajectory


class FakeStream:
    """Entries to be read, what was acknowledged, what was set aside."""

    stream_key = "stream"

    def __init__(self) -> None:
        self.entries: list[StreamEntry] = []
        self.acknowledged: list[str] = []
        self.dead: list[str] = []
        self.error: Exception | None = None
        self.meanwhile: Any = None

    def add(self, trajectory: Trajectory) -> None:
        name = f"{len(self.entries)}-0"
        payload = trajectory_to_proto(trajectory).SerializeToString()
        self.entries.append(StreamEntry(name, trajectory.trajectory_id, payload))

    async def read(self, max_count: int, block_s: float) -> list[StreamEntry]:
        await asyncio.sleep(0.01)
        entries, self.entries = self.entries, []
        return entries

    async def acknowledge(self, entry_ids: list[str]) -> None:
        await asyncio.sleep(0)
        if self.meanwhile is not None:
            self.meanwhile()
        if self.error is not None:
            raise self.error
        self.acknowledged += entry_ids

    async def dead_letter(self, entry_id: str, reason: str) -> None:
        self.dead.append(reason)

    async def close(self) -> None: ...


class FakeClient:
    """A rollout server that takes an adapter or does not; ``gate`` holds a push up, ``error`` fails it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.takes_adapters = True
        self.given: list[str] = []  # "adapter" or "merged"
        self.time_outs: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def update_policy(self, policy: Any, tensors: Any, *, adapter: Any, **_: Any) -> Any:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if adapter is not None and not self.takes_adapters:
            raise PolicyBaseMismatchError("another checkpoint")
        self.given.append("merged" if adapter is None else "adapter")
        return SimpleNamespace(pause_s=0.1 * len(self.given))

    async def generate(self, spec: Any, *, timeout_s: float) -> Trajectory:
        self.time_outs.append(timeout_s)
        return response(spec.request_id)

    async def write(self, spec: Any, *, timeout_s: float) -> Written:
        trajectory = await self.generate(spec, timeout_s=timeout_s)
        return Written(trajectory.num_scored, trajectory.finish_reason, "")

    async def close(self) -> None: ...


async def new_rollouts(tmp_path: Path, **sections: Any) -> tuple[Rollouts, FakeStream, list[FakeClient]]:
    recipe = tiny_recipe(tmp_path, {"one": tmp_path}, redis_url="redis://127.0.0.1:1", **sections)
    peers = recipe.rollout.peers.replace(addresses=["one:1", "two:1"])
    recipe = recipe.replace(rollout=recipe.rollout.replace(peers=peers))
    rollouts = Rollouts(recipe, run_id="run", tokenizer_fingerprint="print", eos_token_id=2, vocab_size=64)
    for client in rollouts._clients:
        await client.close()
    await rollouts.stream.close()
    stream, clients = FakeStream(), [FakeClient("one:1"), FakeClient("two:1")]
    rollouts._stream, rollouts._clients = stream, clients  # type: ignore[assignment]
    return rollouts, stream, clients


@pytest.fixture
async def fakes(tmp_path: Path) -> AsyncIterator[tuple[Rollouts, FakeStream, list[FakeClient]]]:
    fakes = await new_rollouts(tmp_path, redis_timeout_s=0.2)
    yield fakes
    await fakes[0].close()


# --- one step's responses ------------------------------------------------------------------------------------------
async def test_a_response_that_will_never_come_is_told_like_an_arrival() -> None:
    told: list[int] = []
    writing = Writing(lambda: told.append(len(writing.wanted)))
    cancelled = response("a", token_ids=(1,), scored_spans=(), finish_reason=FinishReason.CANCELLED)
    writing.ask("a", None, answer(cancelled))  # type: ignore[arg-type]
    await asyncio.wait_for(writing.wait(), 10)
    assert told == [0]


async def test_an_error_counts_only_where_something_is_missing() -> None:
    late = StreamUnavailableError("gone")
    writing = Writing(lambda: None)
    writing.ask("a", None, answer(response("a")))  # type: ignore[arg-type]
    writing.take(Arrival(response("a"), "0-0"))
    writing.fail(late)
    await writing.wait()
    writing = Writing(lambda: None)
    writing.ask("a", None, answer(response("a")))  # type: ignore[arg-type]
    writing.fail(late)
    with pytest.raises(StreamUnavailableError):
        await writing.wait()


async def test_other_entries_do_not_put_off_what_is_overdue(fakes: tuple[Rollouts, FakeStream, Any]) -> None:
    rollouts, stream, _ = fakes
    writing = rollouts.write([rollouts.spec("wanted", PROMPT, SAMPLING, publish=True)], lambda: None)

    async def others() -> None:
        for number in range(1000):
            stream.add(response(f"outside-{number}"))
            await asyncio.sleep(0.01)

    adding = asyncio.create_task(others())
    with pytest.raises(StreamUnavailableError, match="published but do not arrive"):
        await asyncio.wait_for(writing.wait(), 5)
    adding.cancel()


@pytest.mark.parametrize("bound", [0, 3])
async def test_a_request_may_queue_behind_those_of_earlier_steps(tmp_path: Path, bound: int) -> None:
    rollouts, stream, clients = await new_rollouts(tmp_path, max_staleness=bound, rollout={"timeout_s": 10.0})
    name = "l0001-s000001-p0000"
    writing = rollouts.write([rollouts.spec(name, PROMPT, SAMPLING, publish=True)], lambda: None)
    stream.add(response(name))
    await asyncio.wait_for(writing.wait(), 10)
    assert clients[0].time_outs == [10.0 * (1 + bound)]
    await rollouts.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 5.0])
async def test_log_probabilities_that_are_none_do_not_reach_the_update(tmp_path: Path, value: float) -> None:
    rollouts, stream, _ = await new_rollouts(tmp_path, objective={"importance": {}}, redis_timeout_s=0.2)
    bad = response("outside", sampling_logprobs=(-1.0, value))
    with pytest.raises(TrajectoryError) as refused:
        await rollouts.submit(bad)
    assert refused.value.field == "sampling_logprobs"
    own = "l0001-s000001-p0000"
    writing = rollouts.write([rollouts.spec(own, PROMPT, SAMPLING, publish=True)], lambda: None)
    stream.add(bad)
    stream.add(response("fine", sampling_logprobs=(0.0005, -3.0)))
    stream.add(response(own, sampling_logprobs=(value, -1.0)))
    with pytest.raises(TrajectoryError, match=f"response {own} is unusable") as error:
        await asyncio.wait_for(writing.wait(), 10)
    assert error.value.field == "sampling_logprobs"
    assert len(stream.dead) == 2
    assert [arrival.trajectory.trajectory_id for arrival in rollouts.external] == ["fine"]
    await rollouts.close()


@pytest.mark.parametrize("logprobs", [(), (float("nan"), -1.0)])
async def test_a_policy_gradient_takes_no_response_without_the_log_probabilities_of_who_wrote_it(
    tmp_path: Path, logprobs: tuple[float, ...]
) -> None:
    sections: dict[str, Any] = {
        "objective": {"name": "grpo"},
        "batch": {"responses_per_prompt": 2},
        "domains": {"domain_0": {"reasoning_gym": {"task": "chain_sum"}, "verifier": {"name": "reasoning_gym"}}},
    }
    rollouts, stream, _ = await new_rollouts(tmp_path, teachers={}, redis_timeout_s=0.2, **sections)
    own = "l0001-s000001-p0000"
    writing = rollouts.write([rollouts.spec(own, PROMPT, SAMPLING, publish=True)], lambda: None)
    stream.add(response(own, sampling_logprobs=logprobs))
    with pytest.raises(TrajectoryError, match=f"response {own} is unusable") as error:
        await asyncio.wait_for(writing.wait(), 10)
    assert error.value.field == "sampling_logprobs"
    await rollouts.close()


# --- acknowledging -------------------------------------------------------------------------------------------------
async def test_what_is_discarded_while_others_are_acknowledged_is_not_forgotten(
    fakes: tuple[Rollouts, FakeStream, Any],
) -> None:
    rollouts, stream, _ = fakes
    rollouts.discarded += ["1-0"]
    stream.meanwhile = lambda: rollouts.discarded.append("9-0")
    await rollouts.acknowledge(["2-0"])
    assert stream.acknowledged == ["2-0", "1-0"]
    stream.meanwhile, stream.error = None, StreamUnavailableError("gone")
    with pytest.raises(StreamUnavailableError):
        await rollouts.acknowledge(["3-0"])
    stream.error = None
    await rollouts.acknowledge([])
    assert sorted(stream.acknowledged) == ["1-0", "2-0", "3-0", "9-0"]
    assert rollouts.discarded == []


# --- policies ------------------------------------------------------------------------------------------------------
def weights(adapter: bool) -> PolicyWeights:
    return PolicyWeights.of({"w": np.ones(2, np.float32)}, LoraFactors("base", {}) if adapter else None)


async def test_a_push_ends_when_nobody_reads_the_weights_any_more(
    fakes: tuple[Rollouts, Any, list[FakeClient]],
) -> None:
    rollouts, _, (one, two) = fakes
    one.error = OverloadedError("refused")
    two.gate.clear()
    pushing = asyncio.create_task(rollouts.push_policy(POLICY, weights(False), merged=lambda: weights(False)))
    await asyncio.sleep(0.05)
    assert not pushing.done()
    two.gate.set()
    with pytest.raises(OverloadedError, match="refused"):
        await pushing
    assert two.given == ["merged"]


async def test_a_server_that_took_merged_weights_is_not_offered_the_adapter_again(
    fakes: tuple[Rollouts, Any, list[FakeClient]],
) -> None:
    rollouts, _, (one, two) = fakes
    two.takes_adapters = False
    await rollouts.push_policy(POLICY, weights(True), merged=lambda: weights(False))
    two.takes_adapters = True  # it was restarted
    pause_s = await rollouts.push_policy(
        POLICY,
        weights(True),
        merged=lambda: weights(False),
        clients=[two],  # type: ignore[list-item]
    )
    assert (one.given, two.given) == (["adapter"], ["merged", "merged"])
    assert pause_s == pytest.approx(0.2)


# --- steps ---------------------------------------------------------------------------------------------------------
class FakeDomain:
    name = "domain_0"
    config = SimpleNamespace(share=1.0)

    def prompt(self, index: int) -> Prompt:
        return Prompt("domain_0", index, (1, 2, index + 3))


class FakeRollouts:
    """Writes nothing by itself."""

    def __init__(self) -> None:
        self.writings: list[Writing] = []
        self.discarded: list[str] = []

    def sampling(self, *_: Any) -> SamplingParams:
        return SAMPLING

    def spec(self, request_id: str, *_: Any, publish: bool) -> str:
        return request_id

    def write(self, specs: list[str], on_arrival: Any) -> Writing:
        writing = Writing(on_arrival)
        writing.wanted.update(specs)
        self.writings.append(writing)
        return writing

    async def abandon(self, writings: list[Writing]) -> None: ...


def new_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Any, bound: int
) -> tuple[Pipeline, FakeRollouts]:
    monkeypatch.setattr(
        "student_trainer.pipeline.next_prompts",
        lambda domains, count, cursors, drawn: ([domains[0].prompt(number) for number in range(count)], cursors, drawn),
    )
    recipe = tiny_recipe(tmp_path, {"one": tmp_path}, max_staleness=bound, run={"steps": 50})
    rollouts, marks = FakeRollouts(), SimpleNamespace(is_full=False, when_all_admitted=lambda tell: None)
    pipeline = Pipeline(recipe, rollouts, SimpleNamespace(ask=ask), marks)  # type: ignore[arg-type]
    pipeline.start([FakeDomain()], TrainerState(), Grader([]))  # type: ignore[list-item]
    return pipeline, rollouts


def arrive(writing: Writing) -> None:
    for name in sorted(writing.wanted):
        writing.take(Arrival(response(name), name))


async def test_marks_that_cannot_be_asked_for_fail_their_step_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(trajectory: Trajectory, _: Any) -> str:
        if "-s000002-" in trajectory.trajectory_id:
            raise RequestConflictError("no such teacher")
        return trajectory.trajectory_id

    pipeline, rollouts = new_pipeline(tmp_path, monkeypatch, ask, 1)
    pipeline.submit(0)
    await asyncio.sleep(0.01)
    first, second = rollouts.writings
    arrive(second)
    arrive(first)
    assert len((await pipeline.take(1)).samples) == 4
    with pytest.raises(RequestConflictError, match="no such teacher"):
        await pipeline.take(2)


async def test_many_steps_are_asked_for_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, rollouts = new_pipeline(tmp_path, monkeypatch, lambda *_: None, 20)
    pipeline.submit(0)
    assert pipeline.written == 1
    await asyncio.sleep(0)
    assert pipeline.written == 2
    pipeline.submit(1)  # meanwhile: no step twice
    await asyncio.sleep(0.05)
    assert pipeline.written == len(rollouts.writings) == 22
    pipeline.submit(20)
    await pipeline.close()
    written = pipeline.written
    await asyncio.sleep(0.01)
    assert pipeline.written == written  # nothing is begun behind the end


async def test_a_request_that_failed_is_raised_when_its_step_has_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, rollouts = new_pipeline(tmp_path, monkeypatch, lambda *_: "sample", 1)
    pipeline.submit(0)
    await asyncio.sleep(0.01)
    rollouts.writings[1].fail(RolloutUnavailableError("gone"))
    arrive(rollouts.writings[0])
    await pipeline.take(1)
    with pytest.raises(RolloutUnavailableError):
        await pipeline.take(2)
