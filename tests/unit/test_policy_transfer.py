"""Weights on their way to a rollout server: digests, differences, adapters, shared memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opd.v1 import rollout_service_pb2

from opd_mesh import policy_weights
from opd_mesh.convert import policy_to_proto
from opd_mesh.errors import (
    CorruptWeightsError,
    InvalidInputError,
    PolicyBaseMismatchError,
    PreconditionError,
)
from opd_mesh.policy import PolicyId
from opd_mesh.policy_weights import (
    LoraFactors,
    PolicyWeights,
    SharedTensors,
    host_id,
    policy_digest,
    read_shared,
    tensor_digest,
    tensor_digests,
)
from opd_mesh.tensors import header_of
from opd_mesh.torch_tensors import from_numpy
from rollout_server.policy_transfer import ServedWeights

Arrays = dict[str, np.ndarray]
BASE = "b" * 64


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_weights(seed: int = 0) -> Arrays:
    return {
        "embed.weight": random(7, 4, seed=seed),
        "up.weight": random(6, 4, seed=seed + 1),
        "conv.weight": random(4, 6, seed=seed + 2),
    }


def manifest_of(
    weights: PolicyWeights, policy: PolicyId, sent: Arrays | None = None, base: PolicyId | None = None
) -> Any:
    sent = dict(weights.tensors) if sent is None else sent
    return rollout_service_pb2.PolicyManifest(
        policy=policy_to_proto(policy),
        tensors=[header_of(name, array) for name, array in sent.items()],
        tensor_digests=weights.digests,
        base=policy_to_proto(base) if base else None,
        adapter=weights.adapter.to_proto() if weights.adapter else None,
    )


def named(weights: PolicyWeights, version: int = 1) -> PolicyId:
    return PolicyId("run", 1, version, weights.digest)


def fresh(*, adapters: bool = True) -> ServedWeights:
    base = {name: from_numpy(array) for name, array in model_weights().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    return ServedWeights(shapes, base if adapters else None, BASE if adapters else "")


def take(served: ServedWeights, weights: PolicyWeights, version: int, **fields: Any) -> dict[str, torch.Tensor]:
    """As the server does: check, verify, accept."""
    policy = named(weights, version)
    manifest = manifest_of(weights, policy, **fields)
    served.check(manifest, policy)
    sent = {header.name: weights.tensors[header.name] for header in manifest.tensors}
    tensors = served.tensors_of(manifest, policy, sent)
    served.accept(manifest, policy)
    return tensors


# --- digests -------------------------------------------------------------------------------------------------------
def test_a_tensors_digest_is_of_name_dtype_shape_and_bytes() -> None:
    """Known answer: part of the protocol."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert tensor_digest("a", array) == "1b9a8e143e97c1e2439da6ce2792a34305f6551d95b6a4b34cc08c05492c3980"
    others = [
        ("b", array), ("a", array.reshape(3, 2)), ("a", array.astype(np.float16)), ("a", array + 1),
        ("a", array.astype(ml_dtypes.bfloat16)),
    ]  # fmt: skip
    digests = {tensor_digest(name, other) for name, other in others}
    assert len(digests) == len(others)
    assert tensor_digest("a", array) not in digests
    assert tensor_digest("a", np.asfortranarray(array)) == tensor_digest("a", array)  # values count, not their places


def test_a_policys_digest_does_not_depend_on_the_order() -> None:
    """Known answer: part of the protocol."""
    digests = {"a": "0" * 64, "b": "1" * 64}
    known = "712beea9d585ee361785e10674d10a67ebd0ae39574b3d935c2da0fcafb2b7ff"
    assert policy_digest(digests) == policy_digest(dict(reversed(digests.items()))) == known
    weights = model_weights()
    factors = LoraFactors(BASE, {"up": 2.0})
    variants = [None, factors, LoraFactors("c" * 64, {"up": 2.0}), LoraFactors(BASE, {"up": 2.5}),
                LoraFactors(BASE, {"up": 2.0}, frozenset({"up"}))]  # fmt: skip
    assert len({policy_digest(tensor_digests(weights), adapter) for adapter in variants}) == len(variants)


# --- whole, and what changed ----------------------------------------------------------------------------------------
def test_only_what_changed_is_needed() -> None:
    served = fresh()
    first = PolicyWeights.of(model_weights(1))
    assert take(served, first, 1).keys() == first.tensors.keys()
    changed = PolicyWeights.of({**first.tensors, "up.weight": random(6, 4, seed=9)})
    sent = {"up.weight": changed.tensors["up.weight"]}
    tensors = take(served, changed, 2, sent=sent, base=named(first))
    assert tensors.keys() == sent.keys()
    assert torch.equal(tensors["up.weight"], from_numpy(sent["up.weight"]))
    assert served.policy == named(changed, 2)


def test_a_change_of_another_policy_is_refused() -> None:
    served = fresh()
    first, second = PolicyWeights.of(model_weights(1)), PolicyWeights.of(model_weights(2))
    changed = PolicyWeights.of({**first.tensors, "up.weight": random(6, 4, seed=9)})
    sent = {"up.weight": changed.tensors["up.weight"]}
    for base in (first, second):
        with pytest.raises(PolicyBaseMismatchError, match="send all tensors"):
            take(served, changed, 2, sent=sent, base=named(base))
        if base is first:
            take(served, second, 1)
    # Named rightly, but what is left out is not as it is here.
    with pytest.raises(PolicyBaseMismatchError, match="not as in the policy") as caught:
        take(served, changed, 2, sent=sent, base=named(second))
    assert caught.value.field in ("tensors[embed.weight]", "tensors[conv.weight]")
    with pytest.raises(InvalidInputError, match="a policy holds every parameter"):
        take(served, changed, 2, sent=sent)  # without saying of what
    assert served.policy == named(second)


def broken(name: str) -> tuple[Any, PolicyId]:
    weights = PolicyWeights.of(model_weights(1))
    policy = named(weights)
    manifest = manifest_of(weights, policy)
    match name:
        case "digest":
            policy = PolicyId("run", 1, 1, "0" * 64)
        case "unknown":
            more = PolicyWeights.of({**weights.tensors, "x.weight": random(2)})
            manifest, policy = manifest_of(more, named(more)), named(more)
        case "missing":
            fewer = PolicyWeights.of({"up.weight": weights.tensors["up.weight"]})
            manifest, policy = manifest_of(fewer, named(fewer)), named(fewer)
        case "shape":
            other = PolicyWeights.of({**weights.tensors, "up.weight": random(4, 6)})
            manifest, policy = manifest_of(other, named(other)), named(other)
        case "unannounced":
            manifest.tensors.append(header_of("x.weight", random(2)))
    return manifest, policy


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("digest", "manifest.policy.digest"),
        ("unknown", "tensors[x.weight]"),
        ("missing", "manifest.tensors"),
        ("shape", "tensors[up.weight]"),
        ("unannounced", "tensor_digests[x.weight]"),
    ],
)
def test_a_manifest_that_cannot_be(name: str, field: str) -> None:
    manifest, policy = broken(name)
    with pytest.raises(InvalidInputError) as caught:
        fresh().check(manifest, policy)
    assert caught.value.field == field


@given(place=st.integers(0, 6 * 4 * 4 - 1), bit=st.integers(0, 7))
def test_one_altered_bit_is_noticed(place: int, bit: int) -> None:
    served = fresh()
    weights = PolicyWeights.of(model_weights(1))
    policy = named(weights)
    manifest = manifest_of(weights, policy)
    altered = {name: array.copy() for name, array in weights.tensors.items()}
    altered["up.weight"].reshape(-1).view(np.uint8)[place] ^= 1 << bit
    with pytest.raises(CorruptWeightsError, match="the old policy stays") as caught:
        served.tensors_of(manifest, policy, altered)
    assert caught.value.field == "tensors[up.weight]"


# --- adapters -------------------------------------------------------------------------------------------------------
def adapter_policy(seed: int = 0, modules: tuple[str, ...] = ("up", "conv"), **fields: Any) -> PolicyWeights:
    shapes = {"up": (6, 4), "conv": (6, 4)}  # conv is stored transposed
    tensors: Arrays = {}
    for index, module in enumerate(modules):
        out, inner = shapes[module]
        tensors[f"{module}.lora_A"] = random(2, inner, seed=seed + 10 + index)
        tensors[f"{module}.lora_B"] = random(out, 2, seed=seed + 20 + index)
    factors = LoraFactors(BASE, dict.fromkeys(modules, 0.5), frozenset({"conv"} & set(modules)))
    return PolicyWeights.of(tensors | fields.pop("tensors", {}), fields.pop("factors", factors))


def test_an_adapter_changes_the_checkpoint() -> None:
    served = fresh()
    for seed in (0, 1):  # the second replaces the first, it is not added to it
        weights = adapter_policy(seed)
        tensors = take(served, weights, 1 + seed)
        base = {name: from_numpy(array) for name, array in model_weights().items()}
        factor = {name: from_numpy(array) for name, array in weights.tensors.items()}
        torch.testing.assert_close(
            tensors["up.weight"], base["up.weight"] + 0.5 * factor["up.lora_B"] @ factor["up.lora_A"]
        )
        torch.testing.assert_close(
            tensors["conv.weight"], base["conv.weight"] + (0.5 * factor["conv.lora_B"] @ factor["conv.lora_A"]).T
        )
        assert tensors.keys() == {"up.weight", "conv.weight"}
    # A later adapter leaves a module alone: that is the checkpoint's again.
    tensors = take(served, adapter_policy(2, modules=("up",)), 3)
    assert torch.equal(tensors["conv.weight"], from_numpy(model_weights()["conv.weight"]))


def test_a_server_without_the_checkpoint_takes_no_adapter() -> None:
    other = adapter_policy(factors=LoraFactors("c" * 64, {"up": 0.5, "conv": 0.5}))
    for served, weights in ((fresh(adapters=False), adapter_policy()), (fresh(), other)):
        with pytest.raises(PolicyBaseMismatchError, match="send merged weights"):
            take(served, weights, 1)
    served = fresh()
    take(served, PolicyWeights.of(model_weights(1)), 1)  # whole: from now on the checkpoint is not kept
    with pytest.raises(PolicyBaseMismatchError, match="no checkpoint's weights are kept"):
        take(served, adapter_policy(), 2)


@pytest.mark.parametrize(
    ("weights", "field"),
    [
        (adapter_policy(tensors={"x.lora_A": random(2, 4)}), "tensors[x.lora_A]"),
        (adapter_policy(tensors={"up.lora_A": random(3, 4)}), "adapter[up]"),
        (adapter_policy(factors=LoraFactors(BASE, {"up": 1.0, "conv": 1.0})), "adapter[conv]"),  # not transposed
        (adapter_policy(factors=LoraFactors(BASE, {"up": 1.0, "gone": 1.0})), "manifest.tensors"),
        (
            adapter_policy(
                tensors={"gone.lora_A": random(2, 4), "gone.lora_B": random(6, 2)},
                factors=LoraFactors(BASE, {"up": 1.0, "gone": 1.0}),
            ),
            "adapter[gone]",
        ),
    ],
)
def test_an_adapter_that_does_not_fit(weights: PolicyWeights, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        take(fresh(), weights, 1)
    assert caught.value.field == field


# --- shared memory --------------------------------------------------------------------------------------------------
@pytest.fixture
def shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(policy_weights, "SHARED_MEMORY", tmp_path)
    return tmp_path


def test_what_one_writes_the_other_reads(shared_folder: Path) -> None:
    arrays = [
        random(5, 3),
        np.zeros((0, 4), np.float32),
        random(7).astype(ml_dtypes.bfloat16),
        np.asfortranarray(random(4, 6)),
    ]
    found = [np.empty(array.shape, array.dtype) for array in arrays]
    with SharedTensors() as memory:
        memory.write(arrays)
        (path,) = shared_folder.iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        read_shared(memory.message, found)
    for array, copy in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert not list(shared_folder.iterdir())


def test_nothing_stays_behind_where_there_is_no_room(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"), SharedTensors() as memory:
        memory.write([random(4)])
    assert not list(shared_folder.iterdir())


@pytest.mark.parametrize("name", ["../secret", "opd-" + "g" * 32, "", "opd-" + "0" * 31])
def test_no_other_file_is_read(shared_folder: Path, name: str) -> None:
    with pytest.raises(PreconditionError, match="not a name of ours"):
        read_shared(rollout_service_pb2.SharedMemory(name=name, byte_size=64), [np.empty(4, np.float32)])


def test_links_are_not_followed(shared_folder: Path) -> None:
    (shared_folder / "file").write_bytes(bytes(64))
    name = "opd-" + "0" * 32
    (shared_folder / name).symlink_to(shared_folder / "file")
    with pytest.raises(PreconditionError, match="cannot be read"):
        read_shared(rollout_service_pb2.SharedMemory(name=name, byte_size=64), [np.empty(4, np.float32)])


def test_a_pipe_does_not_hold_the_server_up(shared_folder: Path) -> None:
    name = "opd-" + "0" * 32
    os.mkfifo(shared_folder / name)
    with pytest.raises(PreconditionError, match="is no file"):
        read_shared(rollout_service_pb2.SharedMemory(name=name, byte_size=64), [np.empty(4, np.float32)])


def test_what_a_killed_process_left_behind_is_removed_and_nothing_else(shared_folder: Path) -> None:
    orphan, other = shared_folder / ("opd-" + "0" * 32), shared_folder / "opd-notes"
    for path in (orphan, other):
        path.write_bytes(bytes(64))
    with SharedTensors() as first:
        first.write([random(4)])
        with SharedTensors() as second:
            second.write([random(4)])
            names = {path.name for path in shared_folder.iterdir()}
            assert names == {first.message.name, second.message.name, "opd-notes"}
    assert [path.name for path in shared_folder.iterdir()] == ["opd-notes"]


@pytest.mark.parametrize(("size", "announced"), [(64, 128), (128, 64), (128, 128), (0, 64)])
def test_too_little_or_too_much_is_refused(shared_folder: Path, size: int, announced: int) -> None:
    name = "opd-" + "1" * 32
    (shared_folder / name).write_bytes(bytes(size))
    with pytest.raises(CorruptWeightsError, match="the old policy stays"):
        read_shared(rollout_service_pb2.SharedMemory(name=name, byte_size=announced), [np.empty(4, np.float32)])


def test_the_machine_is_named_by_a_digest() -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert len(host_id()) == 64
    assert boot_id not in host_id()
