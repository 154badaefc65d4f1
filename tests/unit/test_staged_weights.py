"""New weights beside the old ones, exchanged by pointer; and keys and values that another process takes over."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoding import (
    by_request,
    drain,
    fresh_model,
    make_engine,
    make_request,
    model_of,
    reference,
    tokens_of,
    written_tokens,
)
from tiny_models import tiny_model
from torch import Tensor, nn

from opd_mesh.errors import CorruptWeightsError
from opd_mesh.models.checkpoint import served_tensors
from rollout_server.cache import CacheMode
from rollout_server.engine import PreparedPolicy
from rollout_server.generation import GenerationRequest
from rollout_server.staged_weights import WeightHomes, exchange_weights, stage_weights


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- weights -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "deepseek_v4"])
def test_a_prepared_policy_changes_nothing_until_it_is_swapped_in(arch: str) -> None:
    old, new = tiny_model(arch, 0), tiny_model(arch, 1)
    engine = make_engine(arch, model=old)
    before = {name: tensor.clone() for name, tensor in served_tensors(old)}
    first, second = make_request(0), make_request(1)
    engine.submit(first)
    events = engine.step()
    prepared = engine.prepare_policy({name: tensor.clone() for name, tensor in served_tensors(new)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in served_tensors(old))
    events += engine.step()
    engine.swap_policy(prepared, 1)
    engine.submit(second)
    events += drain(engine)
    # Parameters, persistent buffers and what is tied to them; the shapes of a policy are as they were.
    wanted = dict(served_tensors(new))
    assert {name: tuple(tensor.shape) for name, tensor in wanted.items()} == engine.tensor_shapes
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in served_tensors(old))
    assert tokens_of(events)["r0"] == reference(new, first, start=reference(model_of(arch), first)[:2])
    assert tokens_of(events)["r1"] == reference(new, second)


def test_storage_that_fits_is_kept_and_the_old_is_freed() -> None:
    model = fresh_model()
    engine = make_engine(model=model)
    engine.submit(make_request(0))
    engine.step()
    name, parameter = "model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj.weight
    given = torch.randn(parameter.shape)
    old = weakref.ref(parameter.data.untyped_storage())
    engine.swap_policy(engine.prepare_policy({name: given}), 1)
    assert parameter.data_ptr() == given.data_ptr()
    assert old() is None
    wanted = fresh_model()
    wanted.model.layers[0].mlp.up_proj.weight.data = given.clone()  # the others are as they were, packed ones too
    engine.submit(make_request(1))
    assert tokens_of(drain(engine))["r1"] == reference(wanted, make_request(1))


def test_tied_weights_stay_tied() -> None:
    model = tiny_model("gemma2")
    engine = make_engine("gemma2", model=model)
    new = tiny_model("gemma2", 1)
    engine.swap_policy(engine.prepare_policy({"model.embed_tokens.weight": new.lm_head.weight.double()}), 1)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, new.lm_head.weight)


class _Meanwhile(dict[str, Tensor]):
    """Weights during whose reading something happens."""

    happens: Callable[[], None]

    def items(self) -> Any:
        for name, tensor in super().items():
            self.happens()
            yield name, tensor


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_an_update_is_prepared_while_another_is_swapped_in(arch: str) -> None:
    model = tiny_model(arch)
    engine = make_engine(arch, model=model)
    other = engine.prepare_policy(tiny_model(arch, 1).state_dict())
    again = engine.prepare_policy(tiny_model(arch, 2).state_dict())
    policies = [other, again]

    def swap() -> None:
        engine.swap_policy(policies[0], 1)
        policies.reverse()

    given = _Meanwhile(tiny_model(arch, 3).state_dict())
    given.happens = swap
    engine.swap_policy(engine.prepare_policy(given), 2)
    wanted = dict(served_tensors(tiny_model(arch, 3)))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in served_tensors(model))
    if arch == "gemma2":
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_tied_pair_of_objects_is_not_split_by_half_an_exchange() -> None:
    model = fresh_model()
    embedding, head = model.model.embed_tokens, model.lm_head
    head.weight = nn.Parameter(embedding.weight.detach())
    homes = WeightHomes(model)
    half = torch.randn_like(embedding.weight)
    embedding.weight.data = half  # another thread is between the two
    given = torch.randn_like(half)
    staged = stage_weights(homes, {"lm_head.weight": given})
    head.weight.data = half
    exchange_weights(staged, None)
    assert embedding.weight.data_ptr() == head.weight.data_ptr() == given.data_ptr()


def test_weights_beyond_the_dtype_served_are_refused() -> None:
    homes = WeightHomes(fresh_model().half())
    name = "model.norm.weight"
    weight = torch.ones(homes.shapes[name])
    stage_weights(homes, {name: 6e4 * weight})
    with pytest.raises(CorruptWeightsError, match=r"float16") as caught:
        stage_weights(homes, {name: 1e6 * weight})
    assert caught.value.field == f"tensors[{name}]"


def test_keys_and_values_may_outlive_their_weights() -> None:
    """Those of requests that have written tokens, and no others."""
    engine = make_engine(model=fresh_model(), keep_kv_on_update=True, max_slots=2, prefill_token_budget=8)
    for index, length in enumerate((4, 20)):
        engine.submit(make_request(index, length=length))
    events = engine.step()  # the second is half read
    engine.swap_policy(engine.prepare_policy(tiny_model("llama", 1).state_dict()), 3)
    assert (engine.running, engine.waiting) == (1, 1)
    assert engine.counters.prefill_tokens == 8
    grouped = by_request(events + drain(engine))
    assert [event.policy_version for event in grouped["r0"]] == [0] + [3] * 9
    assert engine.counters.prefill_tokens == 8 + 20
    new = make_request(1, length=20)
    assert [event.token_id for event in grouped["r1"]] == reference(tiny_model("llama", 1), new)


def test_only_what_this_engine_prepared_is_swapped_in() -> None:
    with pytest.raises(TypeError, match="prepared"):
        make_engine().swap_policy(PreparedPolicy(), 1)


# --- keys and values for another process ----------------------------------------------------------------------------
KV_CASES = [
    ("llama", CacheMode.BATCHED, False),
    ("llama", CacheMode.PER_REQUEST, False),
    ("llama", CacheMode.PER_REQUEST, True),
    ("gpt2", CacheMode.PER_REQUEST, True),
    ("gemma2", CacheMode.BATCHED, False),
]


@pytest.mark.parametrize(("arch", "mode", "deterministic"), KV_CASES)
def test_an_exported_request_goes_on_without_a_pass(arch: str, mode: CacheMode, deterministic: bool) -> None:
    requests = [make_request(0, length=9, new=12), make_request(1, length=4, new=12)]
    first = make_engine(arch, cache_mode=mode, deterministic=deterministic, prefill_token_budget=5)
    for request in requests:
        first.submit(request)
    events = [event for _ in range(6) for event in first.step()]
    saved = {request.request_id: first.export_kv(request.request_id) for request in requests}
    rest = by_request(drain(first))
    second = make_engine(arch, cache_mode=mode, deterministic=deterministic, prefill_token_budget=5)
    for request in requests:
        so_far = written_tokens(by_request(events)[request.request_id])
        kv = saved[request.request_id]
        assert kv is not None
        assert {tensor.shape[1] for tensor in kv.values()} == {len(request.prompt_ids) + len(so_far) - 1}
        second.submit(GenerationRequest(request.request_id, request.prompt_ids, request.sampling, so_far), kv)
    resumed = by_request(drain(second))
    assert second.counters.prefill_tokens == second.counters.replayed_tokens == 0
    if deterministic:
        assert resumed == rest  # to the last bit
    else:
        assert {key: [e.token_id for e in own] for key, own in resumed.items()} == {
            key: [e.token_id for e in own] for key, own in rest.items()
        }


def test_keys_and_values_that_do_not_fit_are_not_used() -> None:
    request = make_request(0, length=6, new=8)
    first = make_engine()
    first.submit(request)
    written = written_tokens(first.step() + first.step())
    good = first.export_kv("r0")
    assert good is not None
    resumed = GenerationRequest("r0", request.prompt_ids, request.sampling, written)
    keys = "layer1.keys"
    bad = [
        {name: tensor for name, tensor in good.items() if name != keys},
        good | {keys: good[keys][:, :-1]},
        good | {keys: good[keys].double()},
        good | {"layer2.keys": good[keys]},
    ]
    for kv in (*bad, good):
        engine = make_engine()
        engine.submit(resumed, kv)
        assert tokens_of(drain(engine))["r0"] == reference(model_of("llama"), request)[2:]
        assert engine.counters.prefill_tokens == (0 if kv is good else 8)
    # They were made under other weights.
    engine = make_engine(model=fresh_model())
    engine.submit(resumed, good)
    engine.swap_policy(engine.prepare_policy(tiny_model("llama", 1).state_dict()), 1)
    start = [token.token_id for token in written]
    assert start + tokens_of(drain(engine))["r0"] == reference(tiny_model("llama", 1), request, start=start)


@pytest.mark.parametrize(
    ("arch", "mode"),
    [("deepseek_v4", CacheMode.PER_REQUEST), ("gemma2", CacheMode.PER_REQUEST), ("llama", CacheMode.UNCACHED)],
)
def test_other_caches_are_not_exported(arch: str, mode: CacheMode) -> None:
    engine = make_engine(arch, cache_mode=mode)
    engine.submit(make_request(0))
    assert engine.export_kv("r0") is None  # it waits
    engine.step()
    assert engine.export_kv("r0") is None
