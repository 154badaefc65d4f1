"""The decode engine against the plainest loop there is: one lone uncached forward pass per token, same sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoding import (
    VALID,
    by_request,
    drain,
    fresh_model,
    make_engine,
    make_request,
    model_of,
    proof_of,
    reference,
    tokens_of,
    written_tokens,
)
from tiny_models import tiny_model

from opd_mesh.errors import (
    ConfigError,
    CorruptWeightsError,
    DivergedError,
    InternalError,
    InvalidInputError,
    OpdError,
    RequestConflictError,
    TooLongError,
)
from opd_mesh.trajectory import FinishReason, SamplingParams
from rollout_server.cache import CacheMode, RightAlignedCache
from rollout_server.cache_proof import prove_cache_modes
from rollout_server.decode_engine import DecodeEngine
from rollout_server.generation import GenerationRequest, TokenEvent, WrittenToken


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread, by far when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_ORDER = list(CacheMode)  # fastest first


# --- every architecture, every mode ----------------------------------------------------------------------------
MODES = {
    "llama": CacheMode.BATCHED,
    "qwen3": CacheMode.BATCHED,
    "gemma2": CacheMode.BATCHED,
    "gpt2": CacheMode.BATCHED,
    "deepseek_v4": CacheMode.PER_REQUEST,
    "deepseek_v4_ties": CacheMode.UNCACHED,
}


@pytest.mark.parametrize("arch", MODES)
def test_the_proof_finds_the_fastest_right_mode(arch: str) -> None:
    proof = proof_of(arch)
    assert proof.fastest is MODES[arch], proof.results
    assert proof.fastest_deterministic is (
        CacheMode.UNCACHED if MODES[arch] is CacheMode.UNCACHED else CacheMode.PER_REQUEST
    )
    for mode, result in proof.results.items():
        assert result.reason
        assert result.allowed == (_ORDER.index(mode) >= _ORDER.index(proof.fastest))


def test_the_proof_refuses_a_batch_that_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    unmasked = RightAlignedCache.inputs
    monkeypatch.setattr(RightAlignedCache, "inputs", lambda self, queries: (None, unmasked(self, queries)[1]))
    proof = prove_cache_modes(model_of("llama"), valid_vocab_size=VALID)
    assert proof.fastest is CacheMode.PER_REQUEST
    assert "differs" in proof.results[CacheMode.BATCHED].reason
    with pytest.raises(ConfigError, match="cache_mode"):
        DecodeEngine(
            model_of("llama"),
            policy_version=0,
            valid_vocab_size=VALID,
            max_context_tokens=9,
            cache_mode=CacheMode.BATCHED,
            cache_proof=proof,
        )


@pytest.mark.parametrize(
    ("arch", "mode"), [(arch, mode) for arch, fastest in MODES.items() for mode in _ORDER[_ORDER.index(fastest) :]]
)
def test_tokens_equal_the_plain_loop(arch: str, mode: CacheMode) -> None:
    requests = [
        make_request(0, length=3, new=12),
        make_request(1, length=11, new=4, top_p=0.9),
        make_request(2, length=1, new=14, temperature=0.7, top_k=20),
        make_request(3, length=30, new=6),  # longer than what runs when it is admitted
        make_request(4, length=2, new=9, temperature=0.0),
    ]
    engine = make_engine(arch, cache_mode=mode, max_slots=3)
    events = []
    for request in requests:
        engine.submit(request)
        events += engine.step()
        assert engine.running <= 3
    events += drain(engine)
    for request in requests:
        own = by_request(events)[request.request_id]
        assert [event.token_id for event in own] == reference(model_of(arch), request)
        assert [event.position for event in own] == list(range(request.sampling.max_new_tokens))
        assert [event.finish_reason for event in own] == [None] * (len(own) - 1) + [FinishReason.LENGTH]
        assert all(event.policy_version == 0 and event.error is None for event in own)
    assert engine.counters.tokens == sum(request.sampling.max_new_tokens for request in requests)


def test_logprobs_are_those_of_one_pass_over_the_whole_text() -> None:
    requests = [make_request(0, length=4, new=8, temperature=0.8), make_request(1, length=9, new=8)]
    engine = make_engine()
    for request in requests:
        engine.submit(request)
    grouped = by_request(drain(engine))
    for request in requests:
        own = grouped[request.request_id]
        ids = [*request.prompt_ids, *(event.token_id for event in own)]
        with torch.inference_mode():
            logits_RV = model_of("llama")(input_ids=torch.tensor([ids])).logits[0, len(request.prompt_ids) - 1 : -1]
        for row, event in zip(logits_RV[:, :VALID].double(), own, strict=True):
            policy = float(row.log_softmax(-1)[event.token_id])
            sampling = float((row / request.sampling.temperature).log_softmax(-1)[event.token_id])
            assert event.policy_logprob == pytest.approx(policy, abs=1e-4)
            assert event.sampling_logprob == pytest.approx(sampling, abs=1e-4)


def test_long_answers_grow_and_slide_the_cache() -> None:
    engine = make_engine(max_slots=2)
    requests = [make_request(0, length=5, new=150), *(make_request(index, length=3, new=40) for index in range(1, 5))]
    for request in requests:
        engine.submit(request)
    tokens = tokens_of(drain(engine))
    for request in requests:
        assert tokens[request.request_id] == reference(model_of("llama"), request)


# --- slots, budget, stopping, cancelling -----------------------------------------------------------------------
def test_a_stop_token_ends_a_response_and_its_slot_is_filled_in_the_same_step() -> None:
    free = reference(model_of("llama"), make_request(0))
    last = next(index for index in range(2, 10) if free[index] not in free[:index])
    stop = free[last]
    first, second = make_request(0, stop_token_ids=(stop, 3)), make_request(1)
    engine = make_engine(max_slots=1)
    engine.submit(first)
    engine.submit(second)
    for _ in range(last):
        assert [event.request_id for event in engine.step()] == ["r0"]
        assert (engine.running, engine.waiting) == (1, 1)
    events = engine.step()
    assert [(event.request_id, event.token_id, event.finish_reason) for event in events] == [
        ("r0", stop, FinishReason.STOP),
        ("r1", reference(model_of("llama"), second)[0], None),
    ]


def _record_shapes(model: Any) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []

    def record(_: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(record, with_kwargs=True)
    return shapes


def test_contexts_of_like_length_are_prefilled_together() -> None:
    model = fresh_model()
    shapes, engine = _record_shapes(model), make_engine(model=model)
    requests = [make_request(index, length=length, new=1) for index, length in enumerate((9, 40, 8, 10))]
    for request in requests:
        engine.submit(request)
    tokens = tokens_of(engine.step())
    assert shapes == [(3, 10), (1, 40)]
    assert [tokens[request.request_id] for request in requests] == [reference(model_of("llama"), r) for r in requests]


def test_answers_to_one_prompt_share_its_prefill() -> None:
    model = fresh_model()
    shapes, engine = _record_shapes(model), make_engine(model=model)
    prompt = make_request(0).prompt_ids
    group = [GenerationRequest(f"g{i}", prompt, SamplingParams(seed=i, max_new_tokens=6)) for i in range(4)]
    for request in group:
        engine.submit(request)
    tokens = tokens_of(drain(engine))
    assert shapes == [(1, 5)] + [(4, 1)] * 5
    assert [tokens[request.request_id] for request in group] == [reference(model_of("llama"), r) for r in group]


def test_prompts_of_one_prefix_share_its_prefill() -> None:
    model = fresh_model()
    shapes, engine = _record_shapes(model), make_engine(model=model)
    prefix = make_request(0, length=7).prompt_ids
    prompts = [(*prefix, *make_request(index, length=3).prompt_ids) for index in (1, 2, 3)]
    sampling = SamplingParams(seed=1, max_new_tokens=4)
    requests = [GenerationRequest(f"p{i}", ids, sampling, (), 7) for i, ids in enumerate([*prompts, prompts[0]])]
    for request in requests:
        engine.submit(request)
    tokens = tokens_of(drain(engine))
    assert shapes == [(1, 7), (3, 3)] + [(4, 1)] * 3
    assert [tokens[request.request_id] for request in requests] == [reference(model_of("llama"), r) for r in requests]


@pytest.mark.parametrize("mode", list(CacheMode))
def test_cancel_frees_the_slot_and_leaves_the_others(mode: CacheMode) -> None:
    engine = make_engine(cache_mode=mode, max_slots=2)
    requests = [make_request(index, length=4 + 7 * index) for index in range(4)]
    for request in requests:
        engine.submit(request)
    events = engine.step()
    assert engine.cancel("r0")  # running
    assert engine.cancel("r2")  # waiting
    assert not engine.cancel("r2")
    assert not engine.cancel("nobody")
    events += drain(engine)
    tokens = tokens_of(events)
    assert tokens["r0"] == reference(model_of("llama"), requests[0])[:1]
    assert "r2" not in tokens
    for index in (1, 3):
        assert tokens[f"r{index}"] == reference(model_of("llama"), requests[index])
    engine.submit(requests[0])  # the id is free again
    assert tokens_of(drain(engine))["r0"] == reference(model_of("llama"), requests[0])


# --- a new policy in the middle --------------------------------------------------------------------------------
@pytest.mark.parametrize("deterministic", [False, True])
def test_swap_in_the_middle(deterministic: bool) -> None:
    new = tiny_model("llama", 1)
    engine = make_engine(model=fresh_model(), deterministic=deterministic, max_slots=2)
    requests = [make_request(0, length=4), make_request(1, length=9), make_request(2, length=6)]
    for request in requests:
        engine.submit(request)
    events = [event for _ in range(3) for event in engine.step()]
    engine.swap_policy(engine.prepare_policy(new.state_dict()), 7)
    assert (engine.policy_version, engine.running, engine.waiting) == (7, 0, 3)
    after = drain(engine)
    assert [event.request_id for event in after[:2]] == ["r0", "r1"]  # those that ran go first
    assert {event.policy_version for event in events} == {0}
    assert {event.policy_version for event in after} == {7}
    tokens = tokens_of(events + after)
    for request in requests:
        old = tokens_of(events).get(request.request_id, [])
        assert old == reference(model_of("llama"), request)[: len(old)]
        assert tokens[request.request_id] == reference(new, request, start=old)
        assert tokens[request.request_id] != reference(model_of("llama"), request)


def test_a_policy_that_does_not_fit_changes_nothing() -> None:
    model = fresh_model()
    engine = make_engine(model=model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, name = next(iter(before)), "model.norm.weight"
    good = torch.full_like(before[first], 0.5)
    cases: list[tuple[dict[str, torch.Tensor], type[OpdError], str]] = [
        ({first: good, "no.such": torch.zeros(1)}, InvalidInputError, "no.such"),
        ({first: good, name: torch.zeros(3)}, InvalidInputError, name),
        ({first: good, name: torch.full_like(before[name], math.nan)}, CorruptWeightsError, name),
    ]
    for tensors, error, field in cases:
        with pytest.raises(error, match=field):
            engine.prepare_policy(tensors)
    assert engine.policy_version == 0
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    engine.swap_policy(engine.prepare_policy({first: good.double()}), 1)  # a part of the weights, in another dtype
    assert torch.equal(model.state_dict()[first], good)


def test_tied_weights_must_agree() -> None:
    model = model_of("gemma2")
    weight = model.lm_head.weight.detach()
    assert weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tensors = {"model.embed_tokens.weight": weight, "lm_head.weight": weight + 1}
    with pytest.raises(InvalidInputError, match="tied"):
        make_engine("gemma2").prepare_policy(tensors)


# --- resuming and determinism ----------------------------------------------------------------------------------
def test_resumed_requests_go_on_without_sampling_again() -> None:
    request = make_request(0, new=12)
    whole = reference(model_of("llama"), request)
    for cut in (1, 5, 11):
        written = tuple(WrittenToken(token, -1.0, -1.0, 0) for token in whole[:cut])
        engine = make_engine()
        engine.submit(GenerationRequest("r0", request.prompt_ids, request.sampling, written))
        events = drain(engine)
        assert [event.token_id for event in events] == whole[cut:]
        assert [event.position for event in events] == list(range(cut, 12))
        assert engine.counters.prefill_tokens == 5 + cut
        assert engine.counters.tokens == 12 - cut


def test_deterministic_events_do_not_depend_on_the_batch_or_on_order() -> None:
    requests = [make_request(index, length=3 + 5 * index) for index in range(4)]
    alone = {}
    for request in requests:
        engine = make_engine(deterministic=True)
        engine.submit(request)
        alone[request.request_id] = drain(engine)
    for order, slots in ((requests, 4), (requests[::-1], 2)):
        engine = make_engine(deterministic=True, max_slots=slots)
        events = []
        for request in order:
            engine.submit(request)
            events += engine.step()
        assert by_request(events + drain(engine)) == alone  # log-probabilities to the last bit


@pytest.mark.parametrize("prefix", [0, 4])
def test_deterministic_resume_repeats_the_calls_of_the_uninterrupted_run(prefix: int) -> None:
    old, new = model_of("llama"), tiny_model("llama", 1)

    def run(request: GenerationRequest, swap_at: int | None) -> list[TokenEvent]:
        """From wherever the request stands; the swap comes after ``swap_at`` tokens, unless it came before."""
        resumed_after = swap_at is None or len(request.written) > swap_at
        engine = make_engine(model=tiny_model("llama", 1 if resumed_after else 0), deterministic=True)
        engine._policy_version = 1 if resumed_after else 0
        engine.submit(request)
        events: list[TokenEvent] = []
        while not engine.idle:
            if not resumed_after and len(request.written) + len(events) == swap_at:
                engine.swap_policy(engine.prepare_policy(new.state_dict()), 1)
            events += engine.step()
        return events

    request = replace(make_request(3, length=6, new=12), shared_prefix_tokens=prefix)
    whole = run(request, swap_at=4)
    assert [event.policy_version for event in whole] == [0] * 4 + [1] * 8
    assert [event.token_id for event in whole[:4]] == reference(old, request)[:4]
    for cut in range(1, 12):
        resumed = replace(request, written=written_tokens(whole[:cut]))
        assert run(resumed, swap_at=4) == whole[cut:]


# --- what fails, fails alone -----------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", list(CacheMode))
def test_nan_logits_end_one_request_and_poison_nobody(mode: CacheMode) -> None:
    model, bad = fresh_model(), 77
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = math.nan
    engine = make_engine(model=model, cache_mode=mode, max_slots=3)
    requests = [make_request(0, length=4, new=14), make_request(1, length=9, new=6), make_request(2, length=25, new=8)]
    assert all(bad not in request.prompt_ids for request in requests)
    engine.submit(requests[0])
    engine.submit(requests[1])
    events = engine.step()
    # Its keys and values are NaN and stand where those of the next request will.
    engine.submit(GenerationRequest("bad", (*range(20), bad), SamplingParams(max_new_tokens=5)))
    events += engine.step()
    engine.submit(requests[2])
    events += drain(engine)
    (failed,) = by_request(events)["bad"]
    assert isinstance(failed.error, DivergedError)
    assert (failed.position, failed.token_id, failed.finish_reason) == (0, -1, None)
    for request in requests:
        assert tokens_of(events)[request.request_id] == reference(model_of("llama"), request)


def test_a_pass_that_raises_fails_only_the_guilty() -> None:
    model, bad = fresh_model(), 77
    passes = []

    def fail(_: Any, args: Any, kwargs: Any) -> None:
        ids_BT = kwargs["input_ids"]
        passes.append(ids_BT.shape)
        if bool((ids_BT == bad).any()) and ids_BT.shape[1] > 1:
            raise RuntimeError("no such luck")
        if len(passes) == 8 or len(passes) == 9:
            raise RuntimeError("now and then")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    engine = make_engine(model=model)
    requests = [make_request(index, length=5) for index in range(3)]
    for request in requests[:2]:
        engine.submit(request)
    engine.submit(GenerationRequest("bad", (1, bad, 2, 3, 4), SamplingParams()))
    engine.submit(requests[2])
    events = drain(engine)
    (failed,) = by_request(events)["bad"]
    assert isinstance(failed.error, InternalError)
    assert "no such luck" in str(failed.error)
    for request in requests:
        assert tokens_of(events)[request.request_id] == reference(model_of("llama"), request)


@pytest.mark.parametrize("mode", list(CacheMode))
@pytest.mark.parametrize("running", [0, 2])
def test_a_broken_device_is_raised_and_blames_no_request(mode: CacheMode, running: int) -> None:
    model = fresh_model()
    engine = make_engine(model=model, cache_mode=mode)
    for index in range(running):
        engine.submit(make_request(index))
    events = engine.step()
    assert len(events) == running

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model.register_forward_pre_hook(fail)
    engine.submit(make_request(7))
    for _ in range(2):
        with pytest.raises(InternalError, match=r"cannot run any more.*CUDA error"):
            engine.step()
    assert engine.running + engine.waiting == running + 1


def test_a_device_that_breaks_while_a_request_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model()
    engine = make_engine(model=model)

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error")

    def lose_the_device(*_: Any) -> None:
        model.register_forward_pre_hook(fail)
        fail()

    monkeypatch.setattr(RightAlignedCache, "append_rows", lose_the_device)
    engine.submit(make_request(0))
    with pytest.raises(InternalError, match="cannot run any more"):
        engine.step()


def test_who_cannot_join_together_joins_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    append_rows = RightAlignedCache.append_rows
    sizes: list[int] = []

    def scarce(self: RightAlignedCache, contexts: Any) -> list[int]:
        sizes.append(len(contexts))
        if len(contexts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if contexts[0].length >= 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return append_rows(self, contexts)

    monkeypatch.setattr(RightAlignedCache, "append_rows", scarce)
    engine = make_engine()
    requests = [make_request(index, length=30 if index == 1 else 5) for index in range(3)]
    for request in requests:
        engine.submit(request)
    events = by_request(drain(engine))
    assert sizes[0] == 3
    assert isinstance(events["r1"][0].error, InternalError)
    for index in (0, 2):
        tokens = [event.token_id for event in events[f"r{index}"]]
        assert tokens == reference(model_of("llama"), requests[index])


def test_a_context_for_which_there_is_no_memory_fails_alone() -> None:
    """Even where there is none for a probe: others may end, or be smaller."""
    model = fresh_model()

    def fail(_: Any, args: Any, kwargs: Any) -> None:
        if not kwargs["use_cache"] or kwargs["input_ids"].shape[1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    engine = make_engine(model=model)
    engine.submit(make_request(0))
    engine.submit(make_request(1, length=40))
    grouped = by_request(drain(engine))
    (failed,) = grouped["r1"]
    assert "out of memory" in str(failed.error)
    assert [event.token_id for event in grouped["r0"]] == reference(model_of("llama"), make_request(0))


def test_a_cache_left_half_moved_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out between two layers."""
    move, failures = RightAlignedCache._move, []

    def fail_once(self: RightAlignedCache, capacity_rows: int, capacity: int, to_end: int) -> None:
        if self.num_rows and not failures:
            self._layers[0].keys.fill_(7.0)
            failures.append(to_end)
            raise RuntimeError("out of memory")
        move(self, capacity_rows, capacity, to_end)

    monkeypatch.setattr(RightAlignedCache, "_move", fail_once)
    engine, events = make_engine(), []
    requests = [make_request(0, length=4), make_request(1, length=12)]
    for request in requests:
        engine.submit(request)
        events += engine.step()
    grouped = by_request(events + drain(engine))
    assert failures
    assert [event.token_id for event in grouped["r0"]] == reference(model_of("llama"), requests[0])
    assert [str(event.error).endswith("out of memory") for event in grouped["r1"]] == [True]


def test_what_submit_refuses() -> None:
    engine = make_engine(max_context_tokens=20)
    engine.submit(make_request(0))
    done = tuple(WrittenToken(5, -1.0, -1.0, 0) for _ in range(10))
    cases: list[tuple[GenerationRequest, type[OpdError], str]] = [
        (make_request(0), RequestConflictError, "request_id"),
        (GenerationRequest("", (1,)), InvalidInputError, "request_id"),
        (GenerationRequest("a", ()), InvalidInputError, "prompt_ids"),
        (GenerationRequest("a", (1, VALID), SamplingParams(max_new_tokens=1)), InvalidInputError, "prompt_ids[1]"),
        (GenerationRequest("a", (-1,), SamplingParams(max_new_tokens=1)), InvalidInputError, "prompt_ids[0]"),
        (make_request(1, temperature=-1.0), InvalidInputError, "sampling.temperature"),
        (make_request(1, length=20), TooLongError, "prompt_ids"),
        (make_request(1, length=10, new=11), TooLongError, "sampling.max_new_tokens"),
        (GenerationRequest("a", (1,), SamplingParams(max_new_tokens=10), done), InvalidInputError, "written"),
        (
            GenerationRequest("a", (1,), SamplingParams(max_new_tokens=19, stop_token_ids=(5,)), done),
            InvalidInputError,
            "written",
        ),
    ]
    for request, error, field in cases:
        with pytest.raises(error) as caught:
            engine.submit(request)
        assert caught.value.field == field
    assert (engine.running, engine.waiting) == (0, 1)


def test_deterministic_mode_refuses_a_shared_batch() -> None:
    with pytest.raises(ConfigError, match="cache_mode"):
        make_engine(deterministic=True, cache_mode=CacheMode.BATCHED)
