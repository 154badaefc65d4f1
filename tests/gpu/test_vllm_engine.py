"""The vLLM engine with the real package on a real GPU, against transformers on the same checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import logits_of, save_tiny_checkpoint, tiny_model

from opd_mesh.config.base import parse_config
from opd_mesh.config.services import RolloutEngineConfig
from opd_mesh.models.checkpoint import load_causal_lm, served_tensors
from opd_mesh.trajectory import FinishReason, SamplingParams
from rollout_server.engine import GenerationRequest, TokenEvent
from rollout_server.generation import WrittenToken
from rollout_server.vllm_engine import VllmEngine

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1200),
]

# Widths that vLLM's attention kernels know, and a padded vocabulary.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
VALID, PADDED = 131, 160
PROMPTS = {"a": tuple(range(4, 60)), "b": (5, 9, 12, 40, 41), "c": tuple(range(100, 20, -1))}
TOLERANCE = 0.3  # nats, root mean square: this model amplifies what bfloat16 rounds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student")
    return save_tiny_checkpoint(path, "llama", 0, vocab_size=PADDED, tokenizer_vocab_size=VALID, **SIZES)


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    """By policy version."""
    return {seed: tiny_model("llama", seed, vocab_size=PADDED, **SIZES) for seed in (0, 1)}


@pytest.fixture
def engine(folder: Path) -> Iterator[VllmEngine]:
    value = {
        "engine": "vllm",
        "dtype": "bfloat16",
        "max_slots": 8,
        "max_context_tokens": 256,
        "cache_bytes": "256MiB",
        "vllm": {"enforce_eager": True},
    }
    engine = VllmEngine(
        load_causal_lm(folder, dtype=torch.bfloat16),
        settings=parse_config(RolloutEngineConfig, value, source="test"),
        policy_version=0,
        valid_vocab_size=VALID,
    )
    yield engine
    engine.close()


def request(name: str, prompt: Sequence[int], written: Sequence[int] = (), **sampling: Any) -> GenerationRequest:
    tokens = tuple(WrittenToken(token, -1.0, -1.0, 0) for token in written)
    return GenerationRequest(name, tuple(prompt), SamplingParams(**{"max_new_tokens": 32, **sampling}), tokens)


def run(engine: VllmEngine, until_tokens: int | None = None) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    deadline = time.monotonic() + 120
    while not engine.idle and (until_tokens is None or sum(map(len, events.values())) < until_tokens):
        for event in engine.step():
            assert event.error is None
            events.setdefault(event.request_id, []).append(event)
        assert time.monotonic() < deadline
    return events


def assert_drawn_from(models: dict[int, Any], prompt: Sequence[int], events: Sequence[TokenEvent]) -> None:
    """Every token bears the log-probability of the model whose version it has."""
    ids = [event.token_id for event in events]
    assert max(ids) < VALID
    assert [event.position for event in events] == list(range(len(ids)))
    errors = []
    for event in events:
        context = [*prompt, *ids[: event.position]]
        logprobs = logits_of(models[event.policy_version], context)[-1, :VALID].log_softmax(-1)
        errors.append(event.policy_logprob - float(logprobs[event.token_id]))
    assert float(torch.tensor(errors).square().mean().sqrt()) < TOLERANCE


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers(engine: VllmEngine, models: dict[int, Any], temperature: float) -> None:
    for name, prompt in PROMPTS.items():
        engine.submit(request(name, prompt, temperature=temperature, seed=len(prompt)))
    for name, events in run(engine).items():
        assert events[-1].finish_reason is FinishReason.LENGTH
        assert len(events) == 32
        assert_drawn_from(models, PROMPTS[name], events)


def test_stop_tokens_resumption_and_cancellation(engine: VllmEngine) -> None:
    engine.submit(request("a", PROMPTS["a"], seed=3))
    whole = [event.token_id for event in run(engine)["a"]]
    engine.submit(request("b", PROMPTS["a"], seed=3, stop_token_ids=(whole[9],)))
    stopped = run(engine)["b"]
    assert stopped[-1].finish_reason is FinishReason.STOP
    assert stopped[-1].token_id == whole[9]
    engine.submit(request("c", PROMPTS["a"], whole[:20], seed=3))
    assert [event.position for event in run(engine)["c"]] == list(range(20, 32))
    engine.submit(request("d", PROMPTS["b"], max_new_tokens=200))
    run(engine, until_tokens=3)
    assert engine.cancel("d")
    assert engine.idle


def test_a_swap_between_two_tokens(engine: VllmEngine, models: dict[int, Any]) -> None:
    policy = engine.prepare_policy(dict(served_tensors(models[1])))
    for name, prompt in PROMPTS.items():
        engine.submit(request(name, prompt, max_new_tokens=150, seed=len(prompt)))
    before = run(engine, until_tokens=30)
    engine.swap_policy(policy, 1)
    after = run(engine)
    for name, prompt in PROMPTS.items():
        events = before.get(name, []) + after[name]
        assert len(events) == 150
        versions = [event.policy_version for event in events]
        assert versions == sorted(versions)
        assert set(versions) == {0, 1}
        assert_drawn_from(models, prompt, events)


def test_weights_that_are_left_out_stay(engine: VllmEngine, models: dict[int, Any]) -> None:
    tensors = dict(served_tensors(models[1]))
    kept = "model.layers.0.self_attn.q_proj.weight"
    del tensors[kept]
    engine.swap_policy(engine.prepare_policy(tensors), 1)
    mixed = tiny_model("llama", 1, vocab_size=PADDED, **SIZES)
    with torch.no_grad():
        mixed.get_parameter(kept).copy_(models[0].get_parameter(kept))
    engine.submit(request("a", PROMPTS["a"]))
    assert_drawn_from({1: mixed}, PROMPTS["a"], run(engine)["a"])
