"""Proof, on load, that another engine's tokens bear the log-probabilities of the checkpoint's model."""

from __future__ import annotations

import time
from typing import Any

import torch

from opd_mesh.errors import InternalError
from opd_mesh.trajectory import SamplingParams
from rollout_server.engine import GenerationRequest, RolloutEngine, TokenEvent

PROOF_TIMEOUT_S = 300.0
# Nats, between vLLM's kernels and transformers on the CPU. Coarse: it finds a wrong row, mask or weight, not rounding.
PROOF_TOLERANCES = {"float32": 0.05, "bfloat16": 0.5, "float16": 0.5}


@torch.inference_mode()
def prove_logprobs(
    engine: RolloutEngine, model: Any, *, valid_vocab_size: int, max_context_tokens: int, tolerance: float
) -> float:
    """Greedy and sampled tokens bear the log-probabilities that transformers computes over the valid vocabulary.

    Returns the largest difference, in nats.

    Raises:
        InternalError: it is more than the tolerance, or the engine does not answer.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(16, max_context_tokens - 1)
    prompt = tuple(torch.randint(valid_vocab_size, (length,), generator=generator).tolist())
    written: dict[str, list[TokenEvent]] = {"greedy": [], "sampled": []}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        sampling = SamplingParams(temperature=temperature, max_new_tokens=min(4, max_context_tokens - length))
        engine.submit(GenerationRequest(name, prompt, sampling))
    deadline = time.monotonic() + PROOF_TIMEOUT_S
    while not engine.idle:
        for event in engine.step():
            if event.error is not None:
                raise InternalError(f"vLLM does not answer a probe: {event.error}") from event.error
            written[event.request_id].append(event)
        if time.monotonic() > deadline:
            raise InternalError(f"vLLM did not answer a probe within {PROOF_TIMEOUT_S:.0f} s")
    worst = 0.0
    for events in written.values():
        ids = [event.token_id for event in events]
        logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, length - 1 : -1]
        logprobs = logits[:, :valid_vocab_size].float().log_softmax(-1)
        ours = logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0]
        worst = max(worst, float((ours - torch.tensor([event.policy_logprob for event in events])).abs().max()))
    if not worst <= tolerance:  # refuses NaN, too
        raise InternalError(
            f"vLLM's log-probabilities differ from the model's by {worst:.2g} nats, more than {tolerance}; use "
            "engine: transformers"
        )
    return worst
