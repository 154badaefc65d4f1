"""The decode engine under grammars, against one uncached pass per token with the same masks; interrupted, failed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
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
    reference,
    tokens_of,
    written_tokens,
)
from tiny_models import EOS_ID, tiny_model, tiny_tokenizer

from opd_mesh.errors import InvalidInputError
from opd_mesh.grammar import GrammarMatcher, Grammars, TokenVocabulary
from opd_mesh.sampling import sample_tokens
from opd_mesh.trajectory import FinishReason, SamplingParams
from rollout_server.cache import CacheMode
from rollout_server.generation import GenerationRequest, TokenEvent
from rollout_server.request_log import params_from_proto, params_to_bytes, rollout_service_pb2
from rollout_server.requests import RequestParams

VERDICT = r'start: "score: " /[1-5]/ " because " /[a-z ]{4,12}/ "\n"'
LONG = r'start: "score: " /[1-5]/ " because " /[a-z ]{60,64}/ "\n"'
WORDS = r"start: /[a-c]{2,3}/ (/ / /[a-c]{2,3}/){1,2}"


@cache
def vocabulary() -> TokenVocabulary:
    return TokenVocabulary.of(tiny_tokenizer(), VALID)


def engine_of(model: Any = None, **changes: Any) -> Any:
    return make_engine(model=model, **{"grammars": Grammars(vocabulary()), **changes})


def verdict(index: int, grammar: str = VERDICT, **changes: Any) -> GenerationRequest:
    return make_request(index, **{"new": 40, "grammar": grammar, "stop_token_ids": (EOS_ID,), **changes})


def text_of(tokens: Sequence[int]) -> str:
    return str(tiny_tokenizer().decode(list(tokens)))


@torch.inference_mode()
def plain_loop(model: Any, request: GenerationRequest, start: Sequence[int] = ()) -> list[tuple[int, float, float]]:
    """(token, sampling and policy log-probability): one lone uncached pass a token; ``start`` is given."""
    sampling, written = request.sampling, []
    matcher = Grammars(vocabulary()).matcher(sampling.grammar, sampling.stop_token_ids)
    ids = [*request.prompt_ids]
    for token in start:
        matcher.advance(token)
        ids.append(token)
    while len(ids) - len(request.prompt_ids) < sampling.max_new_tokens and ids[-1] not in sampling.stop_token_ids:
        logits_V = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        position = len(ids) - len(request.prompt_ids)
        sampled = sample_tokens(logits_V[None], [sampling], [position], VALID, [matcher.allowed()])
        token = int(sampled.token_ids_B[0])
        allowed_V = torch.from_numpy(matcher.allowed().copy())
        own_V = logits_V[:VALID].double()
        drawn = (own_V.masked_fill(~allowed_V, -torch.inf) / sampling.temperature).log_softmax(-1)
        written.append((token, float(drawn[token]), float(own_V.log_softmax(-1)[token])))
        matcher.advance(token)
        ids.append(token)
    return written


@pytest.mark.parametrize("mode", list(CacheMode))
def test_tokens_and_both_logprobs_equal_the_plain_loop(mode: CacheMode) -> None:
    """Beside responses without a grammar, which do not notice."""
    requests = [
        verdict(0),
        make_request(1, length=9, new=12),
        verdict(2, WORDS, length=12, temperature=0.6),
        verdict(3, length=3),
        make_request(4, new=8, top_p=0.8),
    ]
    engine = engine_of(cache_mode=mode, max_slots=3)
    for request in requests:
        engine.submit(request)
    grouped = by_request(drain(engine))
    for request in requests:
        own = grouped[request.request_id]
        if not request.sampling.grammar:
            assert [event.token_id for event in own] == reference(model_of("llama"), request)
            continue
        wanted = plain_loop(model_of("llama"), request)
        assert [event.token_id for event in own] == [token for token, _, _ in wanted]
        for event, (_, sampling, policy) in zip(own, wanted, strict=True):
            assert event.sampling_logprob == pytest.approx(sampling, abs=1e-4)
            assert event.policy_logprob == pytest.approx(policy, abs=1e-4)
        assert own[-1].finish_reason is FinishReason.STOP
        assert own[-1].token_id == EOS_ID
        # What was forced was drawn for certain, however unlikely the model finds it.
        forced = [event for event in own if event.sampling_logprob == 0]
        assert (len(forced) >= 16) == (request.sampling.grammar == VERDICT)
        assert not forced or min(event.policy_logprob for event in forced) < -5


def test_a_response_that_is_cut_off_has_the_length_for_its_end() -> None:
    engine = engine_of()
    engine.submit(verdict(0, new=9))
    events = drain(engine)
    assert text_of([event.token_id for event in events])[:7] == "score: "
    assert [event.finish_reason for event in events] == [None] * 8 + [FinishReason.LENGTH]


# --- interrupted -----------------------------------------------------------------------------------------------
def test_resumed_requests_go_on_where_they_were() -> None:
    request = verdict(0, WORDS)
    whole = [token for token, _, _ in plain_loop(model_of("llama"), request)]
    first = engine_of()
    first.submit(request)
    events = drain(first)
    assert [event.token_id for event in events] == whole
    for cut in range(1, len(whole)):
        engine = engine_of()  # another process: nothing is compiled yet
        engine.submit(GenerationRequest("r0", request.prompt_ids, request.sampling, written_tokens(events[:cut])))
        assert tokens_of(drain(engine))["r0"] == whole[cut:]


def test_deterministic_resume_repeats_the_uninterrupted_run_to_the_bit() -> None:
    new = tiny_model("llama", 1)

    def run(request: GenerationRequest, swap_at: int | None) -> list[TokenEvent]:
        """From wherever the request stands; the swap comes after ``swap_at`` tokens, unless it came before."""
        swapped = swap_at is None or len(request.written) > swap_at
        engine = engine_of(tiny_model("llama", 1 if swapped else 0), deterministic=True)
        engine._policy_version = 1 if swapped else 0
        engine.submit(request)
        events: list[TokenEvent] = []
        while not engine.idle:
            if not swapped and len(request.written) + len(events) == swap_at:
                engine.swap_policy(engine.prepare_policy(new.state_dict()), 1)
            events += engine.step()
        return events

    request = verdict(3, WORDS)
    whole = run(request, swap_at=4)
    assert {event.policy_version for event in whole} == {0, 1}
    assert whole[-1].token_id == EOS_ID
    for cut in range(1, len(whole)):
        resumed = GenerationRequest("r3", request.prompt_ids, request.sampling, written_tokens(whole[:cut]))
        assert run(resumed, swap_at=4) == whole[cut:]


class Counting(Grammars):
    """Counts the matchers that were made."""

    made = 0

    def matcher(self, grammar: str, stop_token_ids: Sequence[int]) -> GrammarMatcher:
        self.made += 1
        return super().matcher(grammar, stop_token_ids)


def test_a_swap_and_a_lack_of_memory_keep_the_place_in_the_grammar() -> None:
    new, grammars = tiny_model("llama", 1), Counting(vocabulary())
    token_bytes = engine_of().cache_proof.token_bytes
    engine = engine_of(fresh_model(), grammars=grammars, cache_bytes=110 * token_bytes)
    requests = [verdict(index, LONG, length=4, new=100) for index in range(3)]
    for request in requests:
        engine.submit(request)
    events = [event for _ in range(9) for event in engine.step()]
    engine.swap_policy(engine.prepare_policy(new.state_dict()), 7)
    events += drain(engine)
    assert engine.counters.preempted
    assert grammars.made == len(requests)
    for request in requests:
        own = by_request(events)[request.request_id]
        old = [event.token_id for event in own if event.policy_version == 0]
        assert old == [token for token, _, _ in plain_loop(model_of("llama"), request)][: len(old)]
        assert [event.token_id for event in own][len(old) :] == [token for token, _, _ in plain_loop(new, request, old)]


# --- refused, and failed -----------------------------------------------------------------------------------------
def test_what_submit_refuses() -> None:
    engine = engine_of()
    other = written_tokens([TokenEvent("r0", 0, 50, -1.0, -1.0, 0)])
    base = verdict(0)
    cases = [
        (engine, verdict(0, "start: nowhere"), "sampling.grammar", "nowhere"),
        (engine, verdict(0, "start: /[/"), "sampling.grammar", "invalid regex"),
        (engine, verdict(0, stop_token_ids=()), "sampling.stop_token_ids", "ends with a stop token"),
        (engine, verdict(0, stop_token_ids=(VALID,)), "sampling.stop_token_ids", "ends with a stop token"),
        (engine, verdict(0, "x" * 70_000), "sampling.grammar", "at most 65536"),
        (engine, GenerationRequest("r0", base.prompt_ids, base.sampling, other), "sampling.grammar", "token 50"),
        (engine_of(grammars=None), base, "sampling.grammar", "none are taken"),
    ]
    for refusing, request, field, message in cases:
        for call in (refusing.check_request, refusing.submit):
            with pytest.raises(InvalidInputError, match=message) as caught:
                call(request)
            assert caught.value.field == field
        assert refusing.idle
    assert engine.takes_grammars
    assert not engine_of(grammars=None).takes_grammars


def test_a_grammar_that_wants_what_no_token_says_fails_alone() -> None:
    engine = engine_of()
    requests = [verdict(0), verdict(1, 'start: "ab" "é"'), make_request(2)]
    for request in requests:
        engine.submit(request)
    grouped = by_request(drain(engine))
    *written, failed = grouped["r1"]
    assert text_of([event.token_id for event in written]) == "ab"
    assert isinstance(failed.error, InvalidInputError)
    assert (failed.position, failed.error.field) == (2, "sampling.grammar")
    assert [event.token_id for event in grouped["r0"]] == [t for t, _, _ in plain_loop(model_of("llama"), requests[0])]
    assert [event.token_id for event in grouped["r2"]] == reference(model_of("llama"), requests[2])


# --- the log -----------------------------------------------------------------------------------------------------
def test_the_log_keeps_the_grammar_and_reads_what_was_written_before_there_were_any() -> None:
    sampling = SamplingParams(seed=3, stop_token_ids=(2,), grammar=VERDICT)
    params = RequestParams("a", "run", "d", (1, 2), sampling, False, "f")
    message = rollout_service_pb2.GenerateRequest.FromString(params_to_bytes(params))
    assert params_from_proto(message) == params
    # Of a server without the field: the bytes of one that is empty.
    old = bytes.fromhex("0a01611203" + b"run".hex() + "1a0164220201022a0e0803150000803f1d0000803f2820" + "420166")
    read = params_from_proto(rollout_service_pb2.GenerateRequest.FromString(old))
    assert read == RequestParams("a", "run", "d", (1, 2), SamplingParams(seed=3), False, "f")
    assert params_to_bytes(read) == old


def test_an_answer_is_as_good_as_its_mask() -> None:
    """Every id that was not allowed had no chance: over many seeds all of the choices come, and no other."""
    engine = engine_of(max_slots=32)
    for seed in range(32):
        request = verdict(0, 'start: "A" | "B" | "C"', seed=seed, temperature=20.0)
        engine.submit(GenerationRequest(f"s{seed}", request.prompt_ids, request.sampling))
    texts = {text_of(tokens) for tokens in tokens_of(drain(engine)).values()}
    assert texts == {"A</s>", "B</s>", "C</s>"}
    assert np.flatnonzero(vocabulary().ordinary_V).size == VALID - 4
