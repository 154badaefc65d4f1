"""The decode engine's tests: tiny engines, requests, and the plainest loop there is, one uncached pass per token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tiny_models import tiny_model

from opd_mesh.sampling import sample_tokens
from opd_mesh.trajectory import SamplingParams
from rollout_server.cache_proof import CacheModeProof, prove_cache_modes
from rollout_server.decode_engine import DecodeEngine
from rollout_server.generation import GenerationRequest, TokenEvent, WrittenToken

VALID = 125  # six ids of padding, whose logits are as large as any


@cache
def model_of(arch: str, seed: int = 0) -> Any:
    if arch == "deepseek_v4_ties":
        # With two indexer heads most scores are zero, and which of the equal blocks it keeps depends on how many
        # there are: a pass over a prefix differs from one over the whole text, and so does every cache.
        return tiny_model("deepseek_v4", seed, index_n_heads=2)
    return tiny_model(arch, seed)


@cache
def proof_of(arch: str) -> CacheModeProof:
    return prove_cache_modes(model_of(arch), valid_vocab_size=VALID)


def make_engine(arch: str = "llama", model: Any = None, **changes: Any) -> DecodeEngine:
    options = {"policy_version": 0, "valid_vocab_size": VALID, "max_slots": 4, "max_context_tokens": 300} | changes
    if "cache_proof" not in options:
        options["cache_proof"] = proof_of(arch)
    return DecodeEngine(model or model_of(arch), **options)


def fresh_model(seed: int = 0) -> Any:
    """A llama that a test may spoil."""
    return tiny_model("llama", seed)


def make_request(index: int, length: int = 5, new: int = 10, **changes: Any) -> GenerationRequest:
    ids = torch.randint(VALID, (length,), generator=torch.Generator().manual_seed(index)).tolist()
    params = {"seed": 100 + index, "max_new_tokens": new} | changes
    return GenerationRequest(f"r{index}", tuple(ids), SamplingParams(**params))


def reference(model: Any, request: GenerationRequest, start: Sequence[int] = ()) -> list[int]:
    """The whole response, ``start`` included."""
    return list(_plain_loop(model, request, tuple(start)))


@cache
@torch.inference_mode()
def _plain_loop(model: Any, request: GenerationRequest, start: tuple[int, ...]) -> tuple[int, ...]:
    tokens, sampling = list(start), request.sampling
    while len(tokens) < sampling.max_new_tokens and (not tokens or tokens[-1] not in sampling.stop_token_ids):
        logits_TV = model(input_ids=torch.tensor([[*request.prompt_ids, *tokens]]), use_cache=False).logits[0]
        tokens.append(int(sample_tokens(logits_TV[-1:], [sampling], [len(tokens)], VALID).token_ids_B[0]))
    return tuple(tokens)


def drain(engine: DecodeEngine) -> list[TokenEvent]:
    events = []
    while not engine.idle:
        events += engine.step()
    assert engine.step() == []
    return events


def by_request(events: Sequence[TokenEvent]) -> dict[str, list[TokenEvent]]:
    grouped: dict[str, list[TokenEvent]] = {}
    for event in events:
        grouped.setdefault(event.request_id, []).append(event)
    return grouped


def tokens_of(events: Sequence[TokenEvent]) -> dict[str, list[int]]:
    return {key: [event.token_id for event in own] for key, own in by_request(events).items()}


def written_tokens(events: Sequence[TokenEvent]) -> tuple[WrittenToken, ...]:
    return tuple(
        WrittenToken(event.token_id, event.sampling_logprob, event.policy_logprob, event.policy_version)
        for event in events
    )
