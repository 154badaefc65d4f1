"""How weights reach a rollout server: shared memory or the socket, all or what changed, an adapter or what it makes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mesh import mesh, new_trainer, running_valkey, serving_rollouts, tiny_family, tiny_recipe
from opd.v1 import common_pb2
from tiny_models import logits_of, save_tiny_checkpoint, tiny_model, tiny_tokenizer

from opd_mesh import policy_weights
from opd_mesh.clients.rollout import GenerateSpec, RolloutClient
from opd_mesh.config.base import parse_config
from opd_mesh.config.sections import StudentConfig
from opd_mesh.config.services import ChannelConfig, RolloutEngineConfig, RolloutServerConfig
from opd_mesh.errors import CorruptWeightsError, PolicyBaseMismatchError, StalePolicyError
from opd_mesh.models.checkpoint import served_tensors
from opd_mesh.models.tokenizer import tokenizer_fingerprint
from opd_mesh.policy_weights import PolicyWeights
from opd_mesh.torch_tensors import to_numpy
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory
from rollout_server.decode_engine import DecodeEngine
from student_trainer.student import Student

FINGERPRINT = tokenizer_fingerprint(tiny_tokenizer().get_vocab())
PROMPT = [1, 20, 33, 47, 5]


def weights_of(seed: int) -> PolicyWeights:
    model = tiny_model("llama", seed)
    return PolicyWeights.of({name: to_numpy(tensor).copy() for name, tensor in served_tensors(model)})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("student") / "student", "llama", 0)


@asynccontextmanager
async def serving(checkpoint: Path) -> AsyncIterator[RolloutClient]:
    config = RolloutServerConfig(model=checkpoint, engine=RolloutEngineConfig(max_context_tokens=480))
    channel = ChannelConfig(max_attempts=1, timeout_s=20, connect_timeout_s=5)
    async with serving_rollouts(config) as address, RolloutClient(address, channel) as client:
        yield client


async def give(client: RolloutClient, weights: PolicyWeights, version: int, **fields: Any) -> Any:
    policy = common_pb2.Policy(run_id="run", lineage=1, version=version, digest=weights.digest)
    tensors = list(weights.tensors.items())
    return await client.update_policy(
        policy, tensors, tokenizer_fingerprint=FINGERPRINT, timeout_s=20,
        **{"digests": weights.digests, "adapter": weights.adapter, **fields},
    )  # fmt: skip


async def write(client: RolloutClient, name: str) -> Trajectory:
    sampling = SamplingParams(seed=3, max_new_tokens=12)
    return await client.generate(GenerateSpec(name, "run", "math", PROMPT, sampling, FINGERPRINT), timeout_s=20)


async def serves(client: RolloutClient, model: Any, name: str) -> None:
    """Its log-probabilities are those of the model."""
    trajectory = await write(client, name)
    rows = torch.log_softmax(logits_of(model, list(trajectory.token_ids)).double(), dim=-1)
    for position, token, logprob in zip(
        trajectory.predicting_positions, trajectory.scored_token_ids, trajectory.policy_logprobs, strict=True
    ):
        assert float(rows[position, token]) == pytest.approx(logprob, abs=1e-3)


async def test_on_one_machine_nothing_goes_over_the_socket(checkpoint: Path) -> None:
    before = set(policy_weights.SHARED_MEMORY.glob("opd-*"))
    async with serving(checkpoint) as client:
        assert (await give(client, weights_of(1), 1)).swapped
        assert client.wire_bytes == 0
        await serves(client, tiny_model("llama", 1), "a")
        assert not (await give(client, weights_of(1), 1)).swapped  # again: known
        assert (await give(client, weights_of(2), 2)).swapped
        await serves(client, tiny_model("llama", 2), "b")
    assert set(policy_weights.SHARED_MEMORY.glob("opd-*")) <= before


async def test_from_another_machine_it_goes_over_the_socket(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_mesh.clients.rollout.host_id", lambda: "elsewhere")
    weights = weights_of(1)
    async with serving(checkpoint) as client:
        await give(client, weights, 1)
        assert client.wire_bytes == sum(array.nbytes for array in weights.tensors.values())
        await serves(client, tiny_model("llama", 1), "a")


async def test_shared_memory_that_the_server_cannot_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two containers may have one boot id and a /dev/shm each."""
    write_there = policy_weights.SharedTensors.write

    def elsewhere(self: Any, arrays: Any) -> None:
        write_there(self, arrays)
        self._path = self._path.rename(tmp_path / self._path.name)

    monkeypatch.setattr(policy_weights, "SHARED_MEMORY", tmp_path / "none")
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(policy_weights.SharedTensors, "write", elsewhere)
    async with serving(checkpoint) as client:
        assert (await give(client, weights_of(1), 1)).swapped
        assert client.wire_bytes
        await serves(client, tiny_model("llama", 1), "a")


async def test_only_what_changed_is_sent(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_mesh.clients.rollout.host_id", lambda: "elsewhere")
    first = weights_of(1)
    name = "model.layers.1.mlp.up_proj.weight"
    changed = PolicyWeights.of({**first.tensors, name: first.tensors[name] + np.float32(0.5)})
    model = tiny_model("llama", 1)
    with torch.no_grad():
        model.get_parameter(name).add_(0.5)
    async with serving(checkpoint) as client:
        await give(client, first, 1)
        before = client.wire_bytes
        await give(client, changed, 2)
        assert client.wire_bytes - before == first.tensors[name].nbytes
        await serves(client, model, "a")
        # Somebody else gave it another policy meanwhile: then everything is sent again.
        async with RolloutClient(client.address, client.config) as other:
            await give(other, weights_of(3), 3)
        before = client.wire_bytes
        with pytest.raises(StalePolicyError):
            await give(client, changed, 2)
        await give(client, changed, 4)
        assert client.wire_bytes - before >= sum(array.nbytes for array in changed.tensors.values())
        await serves(client, model, "b")


def student(checkpoint: Path) -> Student:
    config = parse_config(StudentConfig, {"path": str(checkpoint), "lora": {"rank": 2}}, source="test")
    learner = Student(config, device="cpu", deterministic=False, seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for _, parameter in learner.trainable():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return learner


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
async def test_of_a_lora_student_the_factors_are_enough(
    tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt2 keeps its weights transposed."""
    monkeypatch.setattr("opd_mesh.clients.rollout.host_id", lambda: "elsewhere")
    checkpoint = save_tiny_checkpoint(tmp_path / "student", arch, 0)
    learner = student(checkpoint)
    weights = learner.policy_weights()
    assert weights.adapter is not None
    assert sum(array.size for array in weights.tensors.values()) == sum(p.numel() for _, p in learner.trainable())
    async with serving(checkpoint) as client:
        for version in (1, 2):  # the second time above the checkpoint again, not above the first
            await give(client, learner.policy_weights(), version)
            await serves(client, learner.model, str(version))
        assert client.wire_bytes < 3 * sum(array.nbytes for array in weights.tensors.values()) + 10_000


async def test_a_server_with_another_checkpoint_takes_merged_weights(tmp_path: Path, checkpoint: Path) -> None:
    learner = student(checkpoint)
    async with serving(save_tiny_checkpoint(tmp_path / "other", "llama", 5)) as client:
        with pytest.raises(PolicyBaseMismatchError, match="send merged weights"):
            await give(client, learner.policy_weights(), 1)
        await give(client, learner.merged_weights(), 1)
        await serves(client, learner.model, "a")


async def test_a_run_of_a_lora_student_goes_on_where_the_checkpoint_is_another(tmp_path: Path) -> None:
    """The trainer falls back by itself: the server has served the whole weights of an earlier run."""
    student_path, teachers = tiny_family(tmp_path, teachers=1)
    recipe = tiny_recipe(student_path, teachers, student={"lora": {"rank": 2}}, run={"steps": 2})
    with running_valkey(tmp_path / "valkey") as redis_url:
        async with mesh(recipe, redis_url) as resolved:
            (address,) = resolved.rollout.peers.addresses
            async with RolloutClient(address) as client:
                await give(client, weights_of(1), 1)
            trainer = await new_trainer(resolved, tmp_path / "run")
            await trainer.run()
            assert trainer.progress.step == 2


async def test_an_altered_policy_leaves_the_old_one_serving(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In shared memory as over the socket."""
    altered = weights_of(2)
    next(iter(altered.tensors.values())).reshape(-1)[0] += 1  # after it was hashed
    async with serving(checkpoint) as client:
        await give(client, weights_of(1), 1)
        for place in ("here", "elsewhere"):
            if place == "elsewhere":
                monkeypatch.setattr("opd_mesh.clients.rollout.host_id", lambda: "elsewhere")
            with pytest.raises(CorruptWeightsError, match="the old policy stays"):
                await give(client, altered, 2)
            assert (await client.get_policy()).policy.version == 1
            await serves(client, tiny_model("llama", 1), place)


@pytest.fixture
def held_preparation(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """(set when a policy begins to be prepared, after the first; to be set for it to go on)."""
    begun, go = threading.Event(), threading.Event()
    prepare, calls = DecodeEngine.prepare_policy, iter(range(100))

    def held(self: DecodeEngine, tensors: Any) -> Any:
        if next(calls):
            begun.set()
            assert go.wait(30)
        return prepare(self, tensors)

    monkeypatch.setattr(DecodeEngine, "prepare_policy", held)
    return begun, go


async def test_decoding_goes_on_while_a_policy_is_prepared(
    checkpoint: Path, held_preparation: tuple[threading.Event, threading.Event]
) -> None:
    """The swap is all that tokens wait for."""
    begun, go = held_preparation
    async with serving(checkpoint) as client:
        await give(client, weights_of(1), 1)
        giving = asyncio.create_task(give(client, weights_of(2), 2))
        assert await asyncio.to_thread(begun.wait, 20)
        short = await write(client, "whole response while the other is held")
        assert set(short.policy_versions) == {1}
        go.set()
        await giving
        await serves(client, tiny_model("llama", 2), "b")


async def test_two_policies_at_once_leave_the_newer_whole(
    checkpoint: Path, held_preparation: tuple[threading.Event, threading.Event]
) -> None:
    begun, go = held_preparation
    async with serving(checkpoint) as client, RolloutClient(client.address, client.config) as other:
        await give(client, weights_of(1), 1)
        older = asyncio.create_task(give(client, weights_of(2), 2))
        assert await asyncio.to_thread(begun.wait, 20)
        newer = asyncio.create_task(give(other, weights_of(3), 3))
        await asyncio.sleep(0.1)
        go.set()
        await asyncio.gather(older, newer)
        assert (await client.get_policy()).policy.version == 3
        await serves(client, tiny_model("llama", 3), "a")
        with pytest.raises(StalePolicyError):
            await give(client, weights_of(2), 2)


async def test_a_cancel_whose_caller_goes_away_is_carried_out(
    checkpoint: Path, held_preparation: tuple[threading.Event, threading.Event]
) -> None:
    async with serving(checkpoint) as client:
        await give(client, weights_of(1), 1)
        spec = GenerateSpec("r", "run", "math", PROMPT, SamplingParams(seed=3, max_new_tokens=400), FINGERPRINT)
        writing = asyncio.create_task(client.generate(spec, timeout_s=20))
        while not (await client.get_policy()).load.running:
            await asyncio.sleep(0.005)
        cancelling = asyncio.create_task(client.cancel("r"))
        await asyncio.sleep(0.002)  # on its way, or there
        cancelling.cancel()
        await asyncio.gather(cancelling, return_exceptions=True)
        await client.cancel("r")  # where it had not arrived
        assert (await writing).finish_reason is FinishReason.CANCELLED
        assert not (await client.get_policy()).load.running
