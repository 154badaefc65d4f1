"""Rollout servers that are killed, stopped and taken over while they write: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import os
import random
import re
import resource
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from mesh import running_valkey
from opd.v1 import common_pb2, rollout_service_pb2
from rollout_processes import Nursery, Server
from tiny_models import EOS_ID, save_tiny_checkpoint, tiny_model, tiny_tokenizer

from opd_mesh.clients.rollout import GenerateSpec, RolloutClient
from opd_mesh.config.services import ChannelConfig
from opd_mesh.convert import trajectory_from_proto
from opd_mesh.errors import BeyondLogError, LogFullError, OpdError, OverloadedError, UnavailableError
from opd_mesh.models.checkpoint import served_tensors
from opd_mesh.models.tokenizer import tokenizer_fingerprint
from opd_mesh.policy_weights import PolicyWeights
from opd_mesh.stream import TrajectoryStream
from opd_mesh.torch_tensors import to_numpy
from opd_mesh.trajectory import SamplingParams, Trajectory

FINGERPRINT = tokenizer_fingerprint(tiny_tokenizer().get_vocab())
CHANNEL = ChannelConfig(max_attempts=1, timeout_s=20, connect_timeout_s=30)
PATIENCE_S = 60.0
KILL_RUNS = int(os.environ.get("OPD_KILL_RUNS", "3"))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("student") / "student", "llama", 0)


@pytest.fixture(scope="module")
def weights() -> PolicyWeights:
    return PolicyWeights.of({name: to_numpy(tensor) for name, tensor in served_tensors(tiny_model("llama", 1))})


def config_of(checkpoint: Path, folder: Path, *, deterministic: bool = True, **fields: Any) -> dict[str, Any]:
    engine = {"max_context_tokens": 480, "max_slots": 4, "threads": 1} | fields.pop("engine", {})
    log_fields = {"path": str(folder), "durability": "os"} | fields.pop("log", {})
    server = {"drain_propagation_s": 0.0, "drain_grace_s": 2.0}
    return {
        "model": str(checkpoint), "engine": engine, "log": log_fields, "deterministic": deterministic, "server": server,
    } | fields  # fmt: skip


def spec_of(number: int, *, tokens: int = 48, run: str = "run", seed: int = 0) -> GenerateSpec:
    """Prompts of several lengths; some share one."""
    prompt = [1, 20, 33 + number % 3, *range(40, 42 + number % 5)]
    sampling = SamplingParams(seed=1000 * seed + number, max_new_tokens=tokens + 7 * (number % 4))
    return GenerateSpec(f"r{number}", run, "math", prompt, sampling, FINGERPRINT)


def by_grammar(spec: GenerateSpec) -> GenerateSpec:
    """The same, of lower-case letters and full stops by turns, longer than it may get."""
    sampling = replace(spec.sampling, grammar='start: (/[a-z]{3}/ "."){60}', stop_token_ids=(EOS_ID,))
    return replace(spec, sampling=sampling)


def truncated(spec: GenerateSpec) -> GenerateSpec:
    """The same, cut to some ids, which are told."""
    return replace(spec, sampling=replace(spec.sampling, temperature=2.0, top_k=20, top_p=0.875, keep_mask=True))


async def give_policy(client: RolloutClient, weights: PolicyWeights, version: int = 1, run: str = "run") -> None:
    policy = common_pb2.Policy(run_id=run, lineage=1, version=version, digest=weights.digest)
    await client.update_policy(
        policy, list(weights.tensors.items()), tokenizer_fingerprint=FINGERPRINT, digests=weights.digests
    )


@dataclass
class Reader:
    """A client that keeps every token it was ever given, and asks for what it lacks."""

    spec: GenerateSpec
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    kept: list[tuple[int, ...]] = field(default_factory=list)
    trajectory: Trajectory | None = None
    calls: int = 0
    beyond: int = 0

    async def read(self, address: str) -> None:
        """To the end, over as many servers as it takes."""
        async with asyncio.timeout(PATIENCE_S), RolloutClient(address, CHANNEL) as client:
            while self.trajectory is None:
                self.calls += 1
                try:
                    async for response in client.stream(self.spec, from_index=len(self.tokens), last_seen=self.last()):
                        self.take(response)
                except BeyondLogError as error:
                    self.beyond += 1
                    for column in (self.tokens, self.logprobs, self.versions, self.kept):
                        del column[int(error.metadata["written"]) :]
                except (UnavailableError, OverloadedError):
                    await asyncio.sleep(0.02)

    def last(self) -> rollout_service_pb2.SeenToken | None:
        if not self.tokens:
            return None
        return rollout_service_pb2.SeenToken(
            token_id=self.tokens[-1], policy_logprob=self.logprobs[-1], policy_version=self.versions[-1]
        )

    def take(self, response: Any) -> None:
        kind = response.WhichOneof("payload")
        if kind == "tokens":
            # The next token, always: none again, none left out.
            assert response.tokens.first_index == len(self.tokens)
            self.tokens += response.tokens.token_ids
            self.logprobs += response.tokens.policy_logprobs
            self.versions += response.tokens.policy_versions
            self.kept += (tuple(kept.ids) for kept in response.tokens.kept_token_ids)
        elif kind == "finished":
            self.trajectory = trajectory_from_proto(response.finished.trajectory)
            assert self.trajectory.scored_token_ids == self.tokens
            assert list(self.trajectory.policy_logprobs) == pytest.approx(self.logprobs, abs=1e-4)
            assert list(self.trajectory.policy_versions) == self.versions
            assert list(self.trajectory.kept_token_ids) == self.kept
            assert bool(self.kept) == self.spec.sampling.keep_mask
            self.trajectory.validate()


async def policy_giver(client: RolloutClient, weights: PolicyWeights, run: str) -> None:
    """As a trainer does: a server without a policy is given the present one."""
    while True:
        with suppress(OpdError):
            if not (await client.get_policy()).HasField("policy"):
                await give_policy(client, weights, run=run)
        await asyncio.sleep(0.02)


@dataclass
class Killing:
    """One address, whose server is killed again and again."""

    nursery: Nursery
    config: dict[str, Any]
    folder: Path
    server: Server
    address: str
    deaths: int = 0

    def again(self, signum: int) -> None:
        """End the server and start it again; does not wait for its model."""
        self.revive()
        self.server.signal(signum)
        self.server.wait()
        self.deaths += 1
        self.server = self.nursery.start(self.config, self.folder, self.address)

    def revive(self) -> None:
        """A client's own port may be the one that the server had; then it ends at once, and only then."""
        while not self.server.alive():
            assert "cannot listen" in self.server.log.read_text(), self.server.log.read_text()
            self.server = self.nursery.start(self.config, self.folder, self.address)

    def ready(self) -> None:
        """Until it listens again, with its model and its log."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.server.is_ready():
            self.revive()
            assert time.monotonic() < deadline, self.server.log.read_text()
            time.sleep(0.005)


def begin(nursery: Nursery, config: dict[str, Any], folder: Path) -> Killing:
    server = nursery.start(config, folder)
    return Killing(nursery, config, folder, server, server.address())


async def write_with_kills(
    killing: Killing,
    weights: PolicyWeights,
    specs: list[GenerateSpec],
    chance: random.Random | None,
    *,
    kills: int = 2,
    run: str = "run",
) -> list[Reader]:
    """All responses, while the server is killed whenever so many tokens have come; None: never."""
    readers = [Reader(spec) for spec in specs]
    total = sum(spec.sampling.max_new_tokens for spec in specs)
    async with RolloutClient(killing.address, CHANNEL) as client:
        giver = asyncio.create_task(policy_giver(client, weights, run))
        reading = asyncio.gather(*(reader.read(killing.address) for reader in readers))
        try:
            marks = sorted(chance.randrange(total) for _ in range(kills)) if chance else []
            for mark in marks:
                while sum(len(reader.tokens) for reader in readers) < mark and not reading.done():
                    killing.revive()
                    await asyncio.sleep(0.001)
                assert chance is not None
                await asyncio.sleep(chance.random() * 0.01)  # anywhere in a step, or in what follows it
                # Killed, or told to go: also while it recovers, and while it is given its policy.
                await asyncio.to_thread(killing.again, chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
            while not reading.done():
                killing.revive()
                await asyncio.wait({reading}, timeout=0.1)
            await reading
        finally:
            giver.cancel()
            reading.cancel()
            await asyncio.gather(giver, reading, return_exceptions=True)
    return readers


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "batched"])
async def test_killed_anywhere(
    nursery: Nursery, checkpoint: Path, weights: PolicyWeights, tmp_path: Path, deterministic: bool
) -> None:
    """Seeded; `make test-kill` does a hundred. Every request finishes, no token comes twice; in deterministic mode they
    are those of a server that nobody killed."""
    manners = (by_grammar, lambda spec: spec, truncated)
    specs = [manners[number % 3](spec_of(number)) for number in range(8)]
    config = config_of(checkpoint, tmp_path / "calm", deterministic=deterministic)
    calm = await write_with_kills(begin(nursery, config, tmp_path / "calm-server"), weights, specs, None)
    for seed in range(KILL_RUNS):
        folder = tmp_path / f"run-{seed}"
        config = config_of(checkpoint, folder / "log", deterministic=deterministic)
        killing = begin(nursery, config, folder / "server")
        readers = await write_with_kills(killing, weights, specs, random.Random(seed))
        assert killing.deaths == 2
        for reader, undisturbed in zip(readers, calm, strict=True):
            assert len(reader.tokens) == reader.spec.sampling.max_new_tokens
            assert not reader.beyond  # the process died, not the machine
            if reader.spec.sampling.grammar:
                text = tiny_tokenizer().decode(reader.tokens)
                assert re.fullmatch(r"([a-z]{3}\.)*[a-z]{0,3}", text)
            if deterministic:
                assert reader.tokens == undisturbed.tokens, f"seed {seed}, {reader.spec.request_id}"
                assert reader.trajectory == undisturbed.trajectory  # to the bit, log-probabilities included
        killing.server.kill()


@pytest.mark.parametrize("save_kv", [False, True])
async def test_stopped_between_two_tokens_and_started_again(
    nursery: Nursery, checkpoint: Path, weights: PolicyWeights, tmp_path: Path, save_kv: bool
) -> None:
    """SIGTERM saves; with keys and values on the disk nothing is read again either."""
    specs = [spec_of(number, tokens=300) for number in range(3)]
    calm = await write_with_kills(
        begin(nursery, config_of(checkpoint, tmp_path / "calm"), tmp_path / "calm-server"), weights, specs, None
    )
    config = config_of(checkpoint, tmp_path / "log", log={"save_kv": save_kv})
    killing = begin(nursery, config, tmp_path / "server")
    readers = [Reader(spec) for spec in specs]
    async with RolloutClient(killing.address, CHANNEL) as client:
        await give_policy(client, weights)
        reading = asyncio.gather(*(reader.read(killing.address) for reader in readers))
        while min(len(reader.tokens) for reader in readers) < 20:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(killing.again, signal.SIGTERM)
        saved = list((tmp_path / "log" / "kv").glob("*.safetensors"))
        assert len(saved) == (3 if save_kv else 0)
        await asyncio.to_thread(killing.ready)
        await give_policy(client, weights)
        assert not list((tmp_path / "log").glob("kv/*"))
        await reading
        load = (await client.get_policy()).load
        assert (load.prefill_tokens == 0) == save_kv
        assert (load.replayed_tokens == 0) == save_kv
    for reader, undisturbed in zip(readers, calm, strict=True):
        assert reader.calls > 1
        assert reader.trajectory == undisturbed.trajectory


async def test_what_is_logged_is_served_before_there_is_a_policy(
    nursery: Nursery, checkpoint: Path, weights: PolicyWeights, tmp_path: Path
) -> None:
    config = config_of(checkpoint, tmp_path / "log")
    killing = begin(nursery, config, tmp_path / "server")
    done, half = Reader(spec_of(0, tokens=5)), Reader(spec_of(1, tokens=400))
    async with RolloutClient(killing.address, CHANNEL) as client:
        await give_policy(client, weights)
        await done.read(killing.address)
        reading = asyncio.create_task(half.read(killing.address))
        while len(half.tokens) < 10:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(killing.again, signal.SIGKILL)
        await asyncio.to_thread(killing.ready)
        again = Reader(done.spec)
        await again.read(killing.address)  # finished: as it was
        assert again.trajectory == done.trajectory
        seen = len(half.tokens)
        await asyncio.sleep(0.2)
        assert seen <= len(half.tokens) < 400  # what was logged, not more
        with pytest.raises(UnavailableError, match="no policy"):
            async for _ in client.stream(spec_of(2)):
                pass
        await give_policy(client, weights)
        await reading
    assert len(half.tokens) == half.spec.sampling.max_new_tokens


async def cut_last_records(log: Path, num_bytes: int) -> None:
    newest = max(log.glob("*.wal"))
    with newest.open("r+b") as file:
        file.truncate(newest.stat().st_size - num_bytes)


@pytest.mark.parametrize("case", ["deterministic", "batched", "other weights"])
async def test_a_client_that_has_seen_more_than_the_log(
    nursery: Nursery, checkpoint: Path, weights: PolicyWeights, tmp_path: Path, case: str
) -> None:
    """The machine died, and with it the newest tokens: told so, or written again where they are the same."""
    config = config_of(checkpoint, tmp_path / "log", deterministic=case != "batched")
    killing = begin(nursery, config, tmp_path / "server")
    reader = Reader(spec_of(0, tokens=400))
    async with RolloutClient(killing.address, CHANNEL) as client:
        await give_policy(client, weights)
        reading = asyncio.create_task(reader.read(killing.address))
        while len(reader.tokens) < 60:
            await asyncio.sleep(0.001)
        await client.pause()
        while len(reader.tokens) < (await client.get_policy()).load.tokens_generated:
            await asyncio.sleep(0.01)
        killing.server.kill()
        seen = list(reader.tokens)
        await cut_last_records(tmp_path / "log", 900)
        killing.server = nursery.start(config, tmp_path / "server", killing.address)
        await asyncio.to_thread(killing.ready)
        await give_policy(client, weights, version=2 if case == "other weights" else 1)
        await reading
    # Where what was lost is written again as it was there is nothing to be told; its versions tell other weights apart.
    assert reader.beyond in {"deterministic": (0,), "batched": (0, 1), "other weights": (1,)}[case]
    assert len(reader.tokens) == reader.spec.sampling.max_new_tokens
    if case == "deterministic":
        assert reader.tokens[: len(seen)] == seen


async def test_a_full_disk_stops_what_is_new_and_nothing_else(
    nursery: Nursery, checkpoint: Path, weights: PolicyWeights, tmp_path: Path
) -> None:
    """A limit on the size of files is what a full disk is: EFBIG in the place of ENOSPC, and it can be lifted."""
    log = tmp_path / "log"
    killing = begin(nursery, config_of(checkpoint, log), tmp_path / "server")
    done, half = Reader(spec_of(0, tokens=5)), Reader(spec_of(1, tokens=400))
    async with RolloutClient(killing.address, CHANNEL) as client:

        async def full() -> bool:
            return bool((await client.get_policy()).load.log_full)

        await give_policy(client, weights)
        await done.read(killing.address)
        size = max(log.glob("*.wal")).stat().st_size
        resource.prlimit(killing.server.pid, resource.RLIMIT_FSIZE, (size + 3000, resource.RLIM_INFINITY))
        reading = asyncio.create_task(half.read(killing.address))
        while not await full():
            await asyncio.sleep(0.01)
        seen = len(half.tokens)
        assert seen > 0
        again = Reader(done.spec)
        await again.read(killing.address)  # what is logged is served
        assert again.trajectory == done.trajectory
        with pytest.raises(LogFullError) as caught:
            async for _ in client.stream(spec_of(2)):
                pass
        assert caught.value.retry_delay_s
        assert (await client.get_policy()).load.running == 1
        assert len(half.tokens) == seen  # nothing that is not in the log
        resource.prlimit(killing.server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await reading
        assert not await full()
        await Reader(spec_of(2)).read(killing.address)
    assert len(half.tokens) == half.spec.sampling.max_new_tokens


# --- another server ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


async def test_every_response_is_published_once_whenever_the_server_dies(
    nursery: Nursery, checkpoint: Path, weights: PolicyWeights, tmp_path: Path, redis_url: str
) -> None:
    """Also between publishing and noting that it was."""
    run = "published"
    config = config_of(checkpoint, tmp_path / "log", redis_url=redis_url, log={"lease_s": 0.6})
    killing = begin(nursery, config, tmp_path / "server")
    specs = [replace(spec_of(number, tokens=20, run=run), publish=True) for number in range(12)]
    readers = await write_with_kills(killing, weights, specs, random.Random(5), kills=3, run=run)
    stream = TrajectoryStream(redis_url, run, consumer="test", timeout_s=10)
    entries = await stream.read(100, 0.1)
    await stream.close()
    assert sorted(entry.trajectory_id for entry in entries) == sorted(spec.request_id for spec in specs)
    payloads = {entry.trajectory_id: common_pb2.Trajectory.FromString(entry.payload) for entry in entries}
    for reader in readers:
        assert trajectory_from_proto(payloads[reader.spec.request_id]) == reader.trajectory


@pytest.fixture
async def standby(
    nursery: Nursery, checkpoint: Path, weights: PolicyWeights, tmp_path: Path, redis_url: str
) -> AsyncIterator[tuple[Killing, Server, list[Reader], asyncio.Future[Any]]]:
    """An owner in the middle of its work, and a server that waits for its log."""
    config = config_of(checkpoint, tmp_path / "log", redis_url=redis_url, log={"lease_s": 1.0})
    owner = begin(nursery, config, tmp_path / "owner")
    readers = [Reader(spec_of(number, tokens=300)) for number in range(3)]
    async with RolloutClient(owner.address, CHANNEL) as client:
        await give_policy(client, weights)
    reading = asyncio.gather(*(reader.read(owner.address) for reader in readers))
    while min(len(reader.tokens) for reader in readers) < 20:
        await asyncio.sleep(0.001)
    waiting = nursery.start(config, tmp_path / "standby")
    try:
        yield owner, waiting, readers, reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def test_an_owner_that_wakes_up_late_is_ignored(
    standby: tuple[Killing, Server, list[Reader], asyncio.Future[Any]], weights: PolicyWeights
) -> None:
    """Frozen, its lease runs out, another takes the log over and finishes. Awake again, it ends and changes nothing."""
    owner, waiting, readers, reading = standby
    owner.server.signal(signal.SIGSTOP)
    try:
        address = await asyncio.to_thread(waiting.address)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        async with RolloutClient(address, CHANNEL) as client:
            await give_policy(client, weights)
            for reader in readers:
                await reader.read(address)
    finally:
        owner.server.signal(signal.SIGCONT)
    await asyncio.to_thread(owner.server.wait)
    assert "another server may own it" in owner.server.log.read_text()
    for reader in readers:
        again = Reader(reader.spec)
        await again.read(address)
        assert again.trajectory == reader.trajectory


async def test_a_server_that_stands_by_takes_over_when_the_owner_goes(
    standby: tuple[Killing, Server, list[Reader], asyncio.Future[Any]], weights: PolicyWeights
) -> None:
    owner, waiting, readers, reading = standby
    owner.server.signal(signal.SIGTERM)
    await asyncio.to_thread(owner.server.wait)
    address = await asyncio.to_thread(waiting.address)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    async with RolloutClient(address, CHANNEL) as client:
        await give_policy(client, weights)
        for reader in readers:
            await reader.read(address)
    assert all(len(reader.tokens) == reader.spec.sampling.max_new_tokens for reader in readers)
