"""Prefill in pieces, prompts that answers share, the memory they may take, and the whole schedule at random."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any
from unittest import mock

import pytest
import torch
from decoding import (
    VALID,
    by_request,
    drain,
    make_engine,
    make_request,
    model_of,
    proof_of,
    reference,
    tokens_of,
    written_tokens,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from opd_mesh.errors import ConfigError, InvalidInputError, TooLongError
from opd_mesh.trajectory import SamplingParams
from rollout_server import decode_engine
from rollout_server.backends import BatchedBackend, LastTokenForward, PerRequestBackend
from rollout_server.cache import CacheMode, DynamicLayer, RightAlignedCache
from rollout_server.cache_proof import CacheModeProof, prove_cache_modes
from rollout_server.context_reader import REPLAYED_PER_STEP
from rollout_server.decode_engine import DecodeEngine
from rollout_server.generation import EngineCounters, GenerationRequest, TokenEvent, WrittenToken

CACHED = [CacheMode.BATCHED, CacheMode.PER_REQUEST]
ARCHITECTURES = {"llama": CACHED, "gemma2": CACHED, "gpt2": CACHED, "deepseek_v4": [CacheMode.PER_REQUEST]}
CASES = [(arch, mode) for arch, modes in ARCHITECTURES.items() for mode in modes]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread, by far when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _group(prompt: tuple[int, ...], size: int, new: int = 6) -> list[GenerationRequest]:
    return [GenerationRequest(f"g{i}", prompt, SamplingParams(seed=i, max_new_tokens=new)) for i in range(size)]


def _resumed(request: GenerationRequest, count: int, model: Any = None) -> GenerationRequest:
    """After so many tokens, of policy 0."""
    tokens = reference(model or model_of("llama"), request)[:count]
    return replace(request, written=tuple(WrittenToken(token, -1.0, -1.0, 0) for token in tokens))


def _of_one_prefix(prefix: int, rests: Sequence[int], new: int = 6, *, votes: int = 1) -> list[GenerationRequest]:
    """Prompts that begin with the same tokens and end with so many of their own, ``votes`` answers to each."""
    shared = make_request(0, length=prefix).prompt_ids
    own = [make_request(1 + index, length=length).prompt_ids for index, length in enumerate(rests)]
    return [
        GenerationRequest(
            f"i{index}v{vote}",
            (*shared, *ids),
            SamplingParams(seed=10 * index + vote, max_new_tokens=new),
            shared_prefix_tokens=prefix,
        )
        for index, ids in enumerate(own)
        for vote in range(votes)
    ]


def _run(engine: DecodeEngine, requests: Sequence[GenerationRequest]) -> list[TokenEvent]:
    for request in requests:
        engine.submit(request)
    return drain(engine)


# --- pieces ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("arch", "mode"), CASES)
def test_a_long_prompt_is_read_over_several_steps_beside_decoding(
    arch: str, mode: CacheMode, deterministic: bool
) -> None:
    if deterministic and mode is CacheMode.BATCHED:
        mode = CacheMode.PER_REQUEST
    engine = make_engine(arch, cache_mode=mode, prefill_token_budget=7, deterministic=deterministic)
    short, long = make_request(0, length=6, new=12), make_request(1, length=40, new=5)
    engine.submit(short)
    events = engine.step()
    engine.submit(long)
    for _ in range(5):
        before = engine.counters.prefill_tokens
        stepped = engine.step()
        assert [event.request_id for event in stepped] == ["r0"]
        assert engine.counters.prefill_tokens - before == 7
        events += stepped
    assert {event.request_id for event in engine.step()} == {"r0", "r1"}
    events += drain(engine)
    assert engine.counters.prefill_tokens == 46
    for request in (short, long):
        own = by_request(events)[request.request_id]
        expected = reference(model_of(arch), request)
        assert [event.token_id for event in own] == [expected[event.position] for event in own]


def test_waiting_requests_are_read_in_order_and_within_the_budget() -> None:
    engine = make_engine(prefill_token_budget=12)
    for index, length in enumerate((20, 6, 6, 1)):
        engine.submit(make_request(index, length=length))
    expected = [(set(), 12), ({"r0"}, 24), ({"r0", "r1", "r2", "r3"}, 33)]
    for ids, read in expected:
        assert {event.request_id for event in engine.step()} == ids
        assert engine.counters.prefill_tokens == read


@pytest.fixture
def whole_only_proof(monkeypatch: pytest.MonkeyPatch) -> CacheModeProof:
    """Of a llama that cannot be read in pieces, for one test."""
    call = LastTokenForward.__call__

    def whole_only(self: LastTokenForward, ids_BT: torch.Tensor, **options: Any) -> Any:
        cache = options.get("cache")
        if cache is not None and cache.get_seq_length() and ids_BT.shape[1] > 1:
            raise NotImplementedError("one token at a time")
        return call(self, ids_BT, **options)

    monkeypatch.setattr(LastTokenForward, "__call__", whole_only)
    proof = prove_cache_modes(model_of("llama"), valid_vocab_size=VALID)
    assert proof.fastest is CacheMode.BATCHED
    assert not proof.results[CacheMode.BATCHED].in_pieces
    assert "read whole" in proof.results[CacheMode.BATCHED].reason
    return proof


def test_a_model_that_cannot_read_in_pieces_reads_whole(whole_only_proof: CacheModeProof) -> None:
    engine = make_engine(cache_proof=whole_only_proof, prefill_token_budget=8)
    requests = [make_request(0, length=5), _resumed(make_request(1, length=30, new=12), 4), make_request(2, length=5)]
    for request in requests:
        engine.submit(request)
    assert [len(engine.step()) for _ in range(3)] == [1, 2, 3]
    tokens = tokens_of(drain(engine))
    for request in requests:
        assert tokens[request.request_id] == reference(model_of("llama"), request)[-len(tokens[request.request_id]) :]


# --- shared prompts ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slots", [8, 3])
@pytest.mark.parametrize(("arch", "mode"), [*CASES, ("llama", CacheMode.UNCACHED)])
def test_a_prompt_is_read_once_for_all_its_answers(arch: str, mode: CacheMode, slots: int) -> None:
    engine = make_engine(arch, cache_mode=mode, max_slots=slots, prefill_token_budget=8)
    group = _group(make_request(0, length=19 if mode is not CacheMode.UNCACHED else 8).prompt_ids, 8)
    length = len(group[0].prompt_ids)
    for request in group[:5]:
        engine.submit(request)
    events = engine.step()
    for request in group[5:]:  # a little later
        engine.submit(request)
    tokens = tokens_of(events + drain(engine))
    assert engine.counters.prefill_tokens == length
    assert engine.counters.shared_prefill_tokens == 7 * length
    assert [tokens[request.request_id] for request in group] == [reference(model_of(arch), r) for r in group]


@pytest.mark.parametrize(("arch", "mode"), CASES)
def test_resumed_answers_share_their_prompt_and_decode_nothing_again(arch: str, mode: CacheMode) -> None:
    group = [_resumed(request, 2 + i, model_of(arch)) for i, request in enumerate(_group((5, 9, 2, 7), 3))]
    engine = make_engine(arch, cache_mode=mode)
    for request in group:
        engine.submit(request)
    assert {event.request_id for event in engine.step()} == {"g0", "g1", "g2"}
    counters = engine.counters
    assert (counters.prefill_tokens, counters.shared_prefill_tokens, counters.replayed_tokens) == (4 + 2 + 3 + 4, 8, 0)
    drain(engine)
    assert counters.tokens == sum(6 - len(request.written) for request in group)


@pytest.mark.parametrize("keep", [False, True])
def test_a_swap_empties_the_prompts_whatever_else_is_kept(keep: bool) -> None:
    engine = make_engine(model=tiny_model("llama"), keep_kv_on_update=keep)
    first, second = _group(make_request(0).prompt_ids, 2, new=4)
    engine.submit(first)
    drain(engine)
    engine.swap_policy(engine.prepare_policy(tiny_model("llama", 1).state_dict()), 1)
    engine.submit(second)
    tokens = tokens_of(drain(engine))
    assert engine.counters.prefill_tokens == 10
    assert tokens["g1"] == reference(tiny_model("llama", 1), second)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "deepseek_v4"])
def test_sharing_changes_no_bit_in_deterministic_mode(arch: str) -> None:
    group = [_resumed(r, i, model_of(arch)) for i, r in enumerate(_group(make_request(0, length=11).prompt_ids, 4))]
    alone = {}
    for request in group:
        engine = make_engine(arch, deterministic=True, prefill_token_budget=4, policy_version=1)
        engine.submit(request)
        alone[request.request_id] = drain(engine)
    for order in (group, group[::-1]):
        engine = make_engine(arch, deterministic=True, prefill_token_budget=4, policy_version=1, max_slots=3)
        for request in order:
            engine.submit(request)
        assert by_request(drain(engine)) == alone
        assert engine.counters.shared_prefill_tokens == 3 * 11


def test_a_long_replay_holds_nobody_up_and_changes_no_bit() -> None:
    requests = [make_request(index, length=5, new=90) for index in range(2)]
    engine = make_engine(deterministic=True)
    for request in requests:
        engine.submit(request)
    whole = by_request(drain(engine))
    engine = make_engine(deterministic=True)
    counters = engine.counters
    engine.submit(make_request(9, new=30))
    for request in requests:
        written = written_tokens(whole[request.request_id][:70])
        engine.submit(GenerationRequest(request.request_id, request.prompt_ids, request.sampling, written))
    events = []
    for step in range(1, 6):  # one is done after the other
        before = counters.replayed_tokens
        stepped = engine.step()
        assert "r9" in {event.request_id for event in stepped}
        assert counters.replayed_tokens - before <= REPLAYED_PER_STEP
        assert counters.replayed_tokens == min(step * REPLAYED_PER_STEP, 140)
        assert engine.running == 1 + counters.replayed_tokens // 70
        events += stepped
    grouped = by_request(events + drain(engine))
    for request in requests:
        assert grouped[request.request_id] == whole[request.request_id][70:]


# --- shared prefixes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slots", [64, 5])
@pytest.mark.parametrize(("arch", "mode"), CASES)
def test_a_prefix_is_read_once_for_all_prompts_that_begin_with_it(arch: str, mode: CacheMode, slots: int) -> None:
    requests = _of_one_prefix(19, [1 + index % 7 for index in range(64)], new=2)
    engine = make_engine(arch, cache_mode=mode, max_slots=slots, prefill_token_budget=16)
    for request in requests[:40]:
        engine.submit(request)
    events = [event for _ in range(2) for event in engine.step()]
    for request in requests[40:]:  # a little later
        engine.submit(request)
    tokens = tokens_of(events + drain(engine))
    assert engine.counters.prefill_tokens == 19 + sum(len(request.prompt_ids) - 19 for request in requests)
    assert engine.counters.shared_prefill_tokens == 63 * 19
    assert [tokens[request.request_id] for request in requests] == [reference(model_of(arch), r) for r in requests]
    assert len(engine._prompts) == 1  # no prompt that nobody will ask for again


@pytest.mark.parametrize("slots", [1, 2, 16])
@pytest.mark.parametrize("mode", CACHED)
def test_answers_to_prompts_of_one_prefix_share_those_and_it(mode: CacheMode, slots: int) -> None:
    requests = _of_one_prefix(11, [5, 3, 4], votes=4)
    engine = make_engine(cache_mode=mode, max_slots=slots, prefill_token_budget=8)
    tokens = tokens_of(_run(engine, requests))
    assert engine.counters.prefill_tokens == 11 + 5 + 3 + 4
    assert engine.counters.shared_prefill_tokens == 12 * 11 + 4 * (5 + 3 + 4) - engine.counters.prefill_tokens
    assert [tokens[request.request_id] for request in requests] == [reference(model_of("llama"), r) for r in requests]


def test_a_prompt_may_be_what_others_begin_with() -> None:
    longer = _of_one_prefix(9, [4, 6])
    whole = GenerationRequest("whole", longer[0].prompt_ids[:9], SamplingParams(seed=3, max_new_tokens=4))
    for order in ([whole, *longer], [*longer, whole]):
        engine = make_engine()
        tokens = tokens_of(_run(engine, order))
        assert engine.counters.prefill_tokens == 9 + 4 + 6
        assert [tokens[request.request_id] for request in order] == [reference(model_of("llama"), r) for r in order]


def test_who_cannot_go_on_from_a_prefix_ignores_it(whole_only_proof: CacheModeProof) -> None:
    requests = _of_one_prefix(9, [4, 6], votes=2)
    cases: list[tuple[dict[str, Any], int]] = [
        ({"cache_proof": whole_only_proof}, 2 * 13 + 2 * 15),  # nothing of it can be copied
        ({"cache_mode": CacheMode.UNCACHED}, 13 + 15),
    ]
    for changes, read in cases:
        engine = make_engine(**changes)
        tokens = tokens_of(_run(engine, requests))
        assert engine.counters.prefill_tokens == read
        assert [tokens[r.request_id] for r in requests] == [reference(model_of("llama"), r) for r in requests]


def test_a_prefix_is_shorter_than_its_prompt() -> None:
    engine = make_engine()
    for tokens in (-1, 5, 6):
        with pytest.raises(InvalidInputError) as caught:
            engine.submit(replace(make_request(0, length=5), shared_prefix_tokens=tokens))
        assert caught.value.field == "shared_prefix_tokens"
    engine.check_request(replace(make_request(0, length=5), shared_prefix_tokens=4))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_prefix_is_read_again_under_new_weights(deterministic: bool) -> None:
    requests = _of_one_prefix(9, [4, 6])
    engine = make_engine(model=tiny_model("llama"), deterministic=deterministic)
    _run(engine, requests[:1])
    engine.swap_policy(engine.prepare_policy(tiny_model("llama", 1).state_dict()), 1)
    tokens = tokens_of(_run(engine, requests[1:]))
    assert (engine.counters.prefill_tokens, engine.counters.shared_prefill_tokens) == (13 + 15, 0)
    assert tokens["i1v0"] == reference(tiny_model("llama", 1), requests[1])


def test_who_fails_behind_a_prefix_leaves_it_to_the_others() -> None:
    model, bad = tiny_model("llama"), 77
    requests = _of_one_prefix(9, [4, 6, 5])
    requests[0] = replace(requests[0], prompt_ids=(*requests[0].prompt_ids[:9], bad))
    assert all(bad not in request.prompt_ids for request in requests[1:])

    def fail(_: Any, args: Any, kwargs: Any) -> None:
        if bool((kwargs["input_ids"] == bad).any()):
            raise RuntimeError("no such luck")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    grouped = by_request(_run(make_engine(model=model), requests))
    (failed,) = grouped["i0v0"]
    assert "no such luck" in str(failed.error)
    for request in requests[1:]:
        tokens = [event.token_id for event in grouped[request.request_id]]
        assert tokens == reference(model_of("llama"), request)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "deepseek_v4"])
def test_a_shared_prefix_changes_no_bit_in_deterministic_mode(arch: str) -> None:
    """Alone, in company, resumed behind some tokens of the present weights and of those before, and preempted."""
    model = model_of(arch)
    plain = _of_one_prefix(11, [6, 3], new=10, votes=2)
    requests = [_resumed(request, index % 2, model) for index, request in enumerate(plain)]
    requests.append(replace(requests[-1], request_id="another boundary", shared_prefix_tokens=5))
    requests.append(replace(requests[-1], request_id="none", shared_prefix_tokens=0))
    options: dict[str, Any] = {"deterministic": True, "prefill_token_budget": 4, "policy_version": 1}
    alone = {}
    for request in requests:
        alone |= by_request(_run(make_engine(arch, **options), [request]))
    for order in (requests, requests[::-1]):
        engine = make_engine(arch, **options, max_slots=3)
        assert by_request(_run(engine, order)) == alone
        # The last two are read for themselves: their passes end elsewhere.
        assert engine.counters.shared_prefill_tokens == 3 * 11 + 6 + 3
    resumed = [
        replace(request, written=(*request.written, *written_tokens(alone[request.request_id][: 1 + index])))
        for index, request in enumerate(requests)
    ]
    engine = make_engine(arch, **options, max_slots=6, cache_bytes=70 * proof_of(arch).token_bytes)
    with mock.patch.object(decode_engine, "_HEADROOM_TOKENS", 1):
        grouped = by_request(_run(engine, resumed))
    assert engine.counters.preempted
    assert engine.counters.replayed_tokens
    for index, request in enumerate(requests):
        assert grouped[request.request_id] == alone[request.request_id][1 + index :]


# --- memory ------------------------------------------------------------------------------------------------------
def _measured_bytes(engine: DecodeEngine) -> int:
    """Of the tensors themselves."""
    backend, caches = engine._backend, []
    contexts = [prompt.context for prompt in engine._prompts._prompts.values()]
    contexts += [sequence.context for sequence in engine._waiting.values() if sequence.context is not None]
    tensors: list[torch.Tensor] = []
    if isinstance(backend, BatchedBackend):
        caches.append(backend._cache)
        tensors += [tensor for context in contexts for pair in context.layers if pair for tensor in pair]
    elif isinstance(backend, PerRequestBackend):
        caches += [context.cache for context in [*backend._rows.values(), *contexts]]
    layers = [layer for cache in caches for layer in cache.layers if isinstance(layer, DynamicLayer)]
    tensors += [tensor for layer in layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
    # A slice keeps all of what it is a slice of; two owners may share.
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("mode", CACHED)
def test_the_newest_waits_again_when_memory_runs_out(mode: CacheMode) -> None:
    budget = 130 * proof_of("llama").token_bytes
    engine = make_engine(cache_mode=mode, cache_bytes=budget)
    requests = [make_request(index, length=4, new=60) for index in range(3)]
    for request in requests:
        engine.submit(request)
    events = []
    while not engine.idle:
        events += engine.step()
        assert engine.held_bytes <= budget
        assert _measured_bytes(engine) <= budget
    assert engine.counters.preempted
    assert engine.counters.prefill_tokens < 200  # nobody goes back and forth
    assert [event.request_id for event in events if event.finish_reason] == ["r0", "r1", "r2"]
    for request in requests:
        assert tokens_of(events)[request.request_id] == reference(model_of("llama"), request)


def test_what_alone_could_never_fit_is_refused() -> None:
    engine = make_engine(cache_bytes=20 * proof_of("llama").token_bytes)
    engine.check_request(make_request(0, length=11, new=10))
    for request, field in (
        (make_request(1, length=11, new=11), "sampling.max_new_tokens"),
        (make_request(2, length=21, new=1), "prompt_ids"),
    ):
        with pytest.raises(TooLongError) as caught:
            engine.submit(request)
        assert caught.value.field == field
    for changes in ({"cache_bytes": 0}, {"keep_kv_on_update": True, "deterministic": True}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            make_engine(**changes)


def test_prompts_go_before_anybody_waits() -> None:
    engine = make_engine(cache_bytes=64 * proof_of("llama").token_bytes + 2000, max_slots=1)
    for index in range(3):
        engine.submit(make_request(index, length=20, new=30))
    tokens = tokens_of(drain(engine))
    assert engine.counters.preempted == 0
    for index in range(3):
        assert tokens[f"r{index}"] == reference(model_of("llama"), make_request(index, length=20, new=30))


@pytest.mark.parametrize("mode", CACHED)
def test_a_prefix_goes_before_anybody_waits(mode: CacheMode) -> None:
    token_bytes = proof_of("llama").token_bytes
    requests = _of_one_prefix(20, [3] * 6, new=30)
    kept = []
    for tokens in (54, 80, 150):  # one request; it and the prefix, at first; several
        engine = make_engine(cache_mode=mode, cache_bytes=tokens * token_bytes + 2000)
        for request in requests:
            engine.submit(request)
        events = []
        while not engine.idle:
            events += engine.step()
            assert engine.held_bytes <= tokens * token_bytes + 2000
            assert _measured_bytes(engine) <= tokens * token_bytes + 2000
        kept.append(engine.counters.shared_prefill_tokens)
        for request in requests:
            assert tokens_of(events)[request.request_id] == reference(model_of("llama"), request)
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] == 5 * 20


def test_a_prefix_outlives_the_prompts_that_begin_with_it() -> None:
    votes = sorted(_of_one_prefix(40, [2] * 8, new=2, votes=2), key=lambda request: request.request_id[-1])
    engine = make_engine(cache_mode=CacheMode.PER_REQUEST, cache_bytes=300 * proof_of("llama").token_bytes)
    tokens = tokens_of(_run(engine, votes))  # first votes first: each prompt is kept for its second, while it fits
    assert engine.counters.prefill_tokens <= 40 + 16 * 2
    assert [tokens[request.request_id] for request in votes] == [reference(model_of("llama"), r) for r in votes]


def test_buffers_grow_and_shrink_within_their_bound() -> None:
    cache = RightAlignedCache(1)
    cache.max_cells = 200
    one = torch.zeros(1, 1, 1, 1)
    source = RightAlignedCache.for_pass(1, [_empty()], [60], 60)
    source.inputs(60)
    source.update(one.expand(1, 1, 60, 1), one.expand(1, 1, 60, 1), 0)
    source.commit(60)
    cache.append_rows([source.row(0)])
    cache.append_rows([source.row(0), source.row(0)])
    assert cache.cells <= 200
    for _ in range(6):
        cache.inputs(1)
        cache.update(one.expand(3, 1, 1, 1), one.expand(3, 1, 1, 1), 0)
        cache.commit(1)
    assert cache.cells == 198
    cache.remove_rows([0])
    cache.max_cells = 133
    cache.shrink()
    assert cache.cells == 132
    assert cache._layers[0].keys.shape == (2, 1, 66, 1)


def _empty() -> Any:
    return BatchedBackend(LastTokenForward(model_of("llama")), 1, 1).empty()


# --- all of it at random -----------------------------------------------------------------------------------------
PROMPTS = [tuple(make_request(index, length=length).prompt_ids) for index, length in enumerate((1, 3, 6, 9))]
PREFIX = 4  # of the last two, every other time
PROMPTS[2] = (*PROMPTS[3][:PREFIX], *PROMPTS[2][PREFIX:])
MOST_NEW = 24
SUBMIT = st.tuples(st.just("submit"), st.integers(0, 3), st.integers(9, MOST_NEW))
STEPS = st.tuples(st.just("step"), st.integers(1, 9), st.just(0))
OPERATIONS = st.one_of(
    SUBMIT,
    STEPS,
    SUBMIT,
    STEPS,
    SUBMIT,
    st.tuples(st.just("cancel"), st.integers(1, 8), st.just(0)),
    st.tuples(st.just("swap"), st.integers(0, 1), st.just(0)),
)


@pytest.mark.parametrize("mode", [CacheMode.BATCHED, CacheMode.PER_REQUEST, None])
def test_any_schedule_writes_what_the_plain_loop_writes(mode: CacheMode | None) -> None:
    """``mode`` None: deterministic. What these schedules are there for must not be rare among them."""
    examples: Counter[str] = Counter()

    @settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
    @given(
        operations=st.lists(OPERATIONS, min_size=12, max_size=24),
        budget=st.one_of(st.integers(1, 6), st.integers(7, 40)),
        cells=st.integers(len(PROMPTS[-1]) + MOST_NEW, 40),
        slots=st.integers(3, 4),
        headroom=st.integers(1, 3),
    )
    def check(operations: list[tuple[str, int, int]], budget: int, cells: int, slots: int, headroom: int) -> None:
        # With more headroom these short answers would never outgrow the memory.
        with mock.patch.object(decode_engine, "_HEADROOM_TOKENS", headroom):
            counters = _check_schedule(operations, mode, budget, cells, slots)
        for name in ("tokens", "preempted", "shared_prefill_tokens", "replayed_tokens"):
            examples[name] += getattr(counters, name) > 0

    check()
    least = examples["tokens"] / 5
    assert examples["preempted"] > least, examples
    assert examples["shared_prefill_tokens"] > least, examples
    assert (examples["replayed_tokens"] > least) is (mode is None), examples


def _check_schedule(
    operations: list[tuple[str, int, int]], mode: CacheMode | None, budget: int, cells: int, slots: int
) -> EngineCounters:
    cache_bytes = cells * proof_of("llama").token_bytes
    engine = make_engine(
        model=tiny_model("llama", 0),
        cache_mode=mode,
        deterministic=mode is None,
        prefill_token_budget=budget,
        cache_bytes=cache_bytes,
        max_slots=slots,
    )
    weights = [model_of("llama", seed).state_dict() for seed in (0, 1)]
    requests: dict[str, GenerationRequest] = {}
    submitted = 0
    served = {0: 0}  # policy version → seed of its weights
    events = []

    def step() -> None:
        counters = engine.counters
        before = counters.prefill_tokens + counters.replayed_tokens
        events.extend(engine.step())
        assert counters.prefill_tokens + counters.replayed_tokens - before <= budget
        assert engine.held_bytes <= cache_bytes
        assert _measured_bytes(engine) <= cache_bytes
        assert engine.running <= slots
        # First come, first served: whoever runs came before whoever waits.
        running = max((state.arrival for state in engine._running.values()), default=0)
        assert all(state.arrival > running for state in engine._waiting.values())

    for kind, first, second in operations:
        if kind == "submit":
            params = SamplingParams(seed=first, max_new_tokens=second, temperature=0.0 if second % 3 == 0 else 1.0)
            submitted += 1
            prefix = PREFIX if second % 2 and first >= 2 else 0
            request = GenerationRequest(f"r{submitted}", PROMPTS[first], params, shared_prefix_tokens=prefix)
            requests[request.request_id] = request
            engine.submit(request)
        elif kind == "cancel" and engine.cancel(f"r{first}"):
            del requests[f"r{first}"]
            events[:] = [event for event in events if event.request_id != f"r{first}"]
        elif kind == "swap":
            served[len(served)] = first
            engine.swap_policy(engine.prepare_policy(weights[first]), len(served) - 1)
        elif kind == "step":
            for _ in range(first):
                step()
    while not engine.idle:
        before, oldest = len(events), min([*engine._running.values(), *engine._waiting.values()], key=_arrival)
        for _ in range(oldest.length // budget + 3):  # nobody starves: so many steps give the oldest a token
            step()
        assert any(event.request_id == oldest.request.request_id for event in events[before:])
    written = by_request(events)
    assert written.keys() == requests.keys()
    for request_id, request in requests.items():
        own = written[request_id]
        assert [event.error for event in own] == [None] * request.sampling.max_new_tokens
        start: list[int] = []
        for version, run in groupby(own, key=lambda event: event.policy_version):
            expected = _plain_answer(request, served[version], tuple(start))
            start += [event.token_id for event in run]
            assert start == expected[: len(start)]
    return engine.counters


def _plain_answer(request: GenerationRequest, seed: int, start: tuple[int, ...]) -> list[int]:
    """As long as any, under one name, so that equal ones are written once."""
    sampling = replace(request.sampling, max_new_tokens=MOST_NEW)
    return reference(model_of("llama", seed), GenerationRequest("any", request.prompt_ids, sampling), start)


def _arrival(state: Any) -> int:
    return state.arrival
