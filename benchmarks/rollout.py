"""What the decode engine writes in a second, against plain loops over the same model.

``vs_bare_loop``: a batch of equal prompts' lengths and equal answers, decoded by the engine and by a bare loop over
transformers' own DynamicCache, which draws with softmax and multinomial and keeps no log-probabilities, as the engine
does. ``vs_static_generate``: a queue of answers of mixed length (geometric with mean 64, cut at 256), in the engine's
slots and by ``model.generate`` in static batches of as many, each of which runs to its longest member. Both count the
tokens that were asked for. ``group_prefill_tokens_per_prompt_token``: prompt tokens read for eight answers to each
prompt, against the prompts' tokens; 1.0 is each prompt once. ``wal_vs_none``: with a token log on the disk (durability
``interval``) against none. ``redecoded_tokens``: that are drawn again when 64 half-written answers are recovered.

Everything runs in one process in turn, over two copies of one checkpoint (the engine lays its weights out anew); each
figure is a median over rounds of ratios within one round, engine over the other, tokens per second; larger is better;
of several batch sizes the smallest median, with each of them beside it.
Refuses to report unless the greedy tokens of engine and bare loop agree.

    python benchmarks/rollout.py                     # one JSON object on stdout
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from servers import say

MODEL = Path(".cache/smollm2/smollm2-135m-instruct")
PROMPT_TOKENS, EQUAL_NEW_TOKENS = 64, 48
MEAN_NEW_TOKENS, MOST_NEW_TOKENS = 64, 256
GROUP = 8
GATE_PROMPTS, GATE_NEW_TOKENS = 4, 24
LOGGED_BATCH, LOGGED_NEW_TOKENS, RECOVERED_NEW_TOKENS = 16, 64, 12


# --- the decode engine -------------------------------------------------------------------------------------------
def make_prompts(count: int, chance: random.Random, vocab_size: int) -> list[tuple[int, ...]]:
    """Token ids, of equal length."""
    return [tuple(chance.randrange(vocab_size) for _ in range(PROMPT_TOKENS)) for _ in range(count)]


def mixed_lengths(count: int, chance: random.Random) -> list[int]:
    """Geometric with mean 64, from 1 to 256."""
    lengths = []
    for _ in range(count):
        length = 1
        while length < MOST_NEW_TOKENS and chance.random() > 1 / MEAN_NEW_TOKENS:
            length += 1
        lengths.append(length)
    return lengths


def run_engine(
    engine: Any, prompts: Sequence[tuple[int, ...]], lengths: Sequence[int], temperature: float = 1.0
) -> tuple[float, list[list[int]]]:
    """(seconds, tokens of each answer)."""
    from opd_mesh.trajectory import SamplingParams
    from rollout_server.generation import GenerationRequest

    started = time.monotonic()
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        params = SamplingParams(seed=index, max_new_tokens=length, temperature=temperature)
        engine.submit(GenerationRequest(str(index), prompt, params))
    answers: list[list[int]] = [[] for _ in prompts]
    while not engine.idle:
        for event in engine.step():
            if event.error is not None:
                sys.exit(f"the engine failed: {event.error}")
            answers[int(event.request_id)].append(event.token_id)
    return time.monotonic() - started, answers


def run_bare_loop(
    model: Any, prompts: Sequence[tuple[int, ...]], new_tokens: int, temperature: float = 1.0
) -> tuple[float, list[list[int]]]:
    """(seconds, tokens of each answer)."""
    import torch
    from transformers import DynamicCache

    started = time.monotonic()
    ids, cache, columns = torch.tensor(prompts), DynamicCache(config=model.config), []
    with torch.inference_mode():
        for _ in range(new_tokens):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            if temperature == 0:
                ids = logits.argmax(dim=-1, keepdim=True)
            else:
                ids = torch.multinomial(torch.softmax(logits, dim=-1), 1)
            columns.append(ids)
    answers: list[list[int]] = torch.cat(columns, dim=1).tolist()
    return time.monotonic() - started, answers


def run_generate(model: Any, prompts: Sequence[tuple[int, ...]], lengths: Sequence[int], batch: int) -> float:
    """Seconds of static batches, in the order given."""
    import torch

    started = time.monotonic()
    for start in range(0, len(prompts), batch):
        longest = max(lengths[start : start + batch])
        ids = torch.tensor(prompts[start : start + batch])
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            min_new_tokens=longest,
            max_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
        )
    return time.monotonic() - started


def interval(ratios: Sequence[float]) -> dict[str, Any]:
    """The median, and the smallest and the largest of all rounds."""
    return {
        "median": round(statistics.median(ratios), 3),
        "interval": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": len(ratios),
    }


def smallest_median(ratios: dict[int, list[float]]) -> float:
    """Of the batch sizes, the one that does worst."""
    return round(min(statistics.median(values) for values in ratios.values()), 3)


def check_greedy_tokens(engine: Any, model: Any, vocab_size: int) -> None:
    """Ends the program where engine and bare loop disagree."""
    prompts = make_prompts(GATE_PROMPTS, random.Random(1), vocab_size)
    _, found = run_engine(engine, prompts, [GATE_NEW_TOKENS] * GATE_PROMPTS, temperature=0.0)
    for prompt, tokens in zip(prompts, found, strict=True):
        _, (wanted,) = run_bare_loop(model, [prompt], GATE_NEW_TOKENS, temperature=0.0)
        if tokens != wanted:
            sys.exit("engine and bare loop write different tokens: nothing was measured")


def group_prefill(engine: Any, vocab_size: int) -> float:
    """Prompt tokens read per prompt token, for eight answers to each of five prompts."""
    prompts = make_prompts(5, random.Random(2), vocab_size)
    before = engine.counters.prefill_tokens
    run_engine(engine, [prompt for prompt in prompts for _ in range(GROUP)], [4] * GROUP * len(prompts))
    return float((engine.counters.prefill_tokens - before) / sum(len(prompt) for prompt in prompts))


def decode_engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about the engine on its own."""
    import torch

    from opd_mesh.models.checkpoint import load_causal_lm
    from rollout_server.decode_engine import DecodeEngine

    torch.set_num_threads(arguments.threads)
    model, plain = (load_causal_lm(MODEL).model for _ in range(2))
    vocab_size = model.config.vocab_size
    options = {"policy_version": 0, "valid_vocab_size": vocab_size, "max_context_tokens": 1024}
    engine = DecodeEngine(model, max_slots=max(arguments.batches), **options)
    check_greedy_tokens(engine, plain, vocab_size)
    say("the greedy tokens agree")
    bare: dict[int, list[float]] = {batch: [] for batch in arguments.batches}
    static: dict[int, list[float]] = {batch: [] for batch in arguments.batches}
    speeds: dict[str, list[float]] = {}
    chance = random.Random(0)
    for number in range(1, arguments.rounds + 1):
        for batch in arguments.batches:
            engine = DecodeEngine(model, max_slots=batch, cache_proof=engine.cache_proof, **options)
            # Other prompts than those that are timed, which it must not know already. The first step packs.
            run_engine(engine, make_prompts(batch, chance, vocab_size), [4] * batch)
            run_bare_loop(plain, make_prompts(batch, chance, vocab_size), 4)
            prompts = make_prompts(batch, chance, vocab_size)
            tokens = batch * EQUAL_NEW_TOKENS
            engine_s, _ = run_engine(engine, prompts, [EQUAL_NEW_TOKENS] * batch)
            bare_s, _ = run_bare_loop(plain, prompts, EQUAL_NEW_TOKENS)
            mixed = make_prompts(arguments.answers_per_slot * batch, chance, vocab_size)
            lengths = mixed_lengths(len(mixed), chance)
            engine_mixed_s, _ = run_engine(engine, mixed, lengths)
            generate_s = run_generate(plain, mixed, lengths, batch)
            bare[batch].append(bare_s / engine_s)
            static[batch].append(generate_s / engine_mixed_s)
            for name, count, seconds in (
                ("engine", tokens, engine_s),
                ("bare_loop", tokens, bare_s),
                ("engine_mixed", sum(lengths), engine_mixed_s),
                ("static_generate", sum(lengths), generate_s),
            ):
                speeds.setdefault(f"{name}_batch_{batch}", []).append(count / seconds)
            say(f"round {number}, batch {batch}: bare {bare[batch][-1]:.2f}, static {static[batch][-1]:.2f}")
    return {
        "vs_bare_loop": smallest_median(bare),
        "vs_static_generate": smallest_median(static),
        "vs_bare_loop_by_batch": {str(batch): interval(ratios) for batch, ratios in bare.items()},
        "vs_static_generate_by_batch": {str(batch): interval(ratios) for batch, ratios in static.items()},
        "group_prefill_tokens_per_prompt_token": group_prefill(engine, vocab_size),
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        "load_average": round(os.getloadavg()[0], 2),
    }


# --- the token log -----------------------------------------------------------------------------------------------
def token_log(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the log costs, and what recovery does again: see ``rollout_log.py``."""
    import torch
    from rollout_log import RECOVERED, redecoded_tokens, wal_vs_none

    from opd_mesh.models.checkpoint import load_causal_lm
    from rollout_server.decode_engine import DecodeEngine

    torch.set_num_threads(arguments.threads)
    model = load_causal_lm(MODEL).model
    vocab_size = model.config.vocab_size
    options = {"policy_version": 0, "valid_vocab_size": vocab_size, "max_context_tokens": 1024}
    engine = DecodeEngine(model, max_slots=LOGGED_BATCH, **options)
    prompts = make_prompts(LOGGED_BATCH, random.Random(3), vocab_size)
    run_engine(engine, prompts, [2] * LOGGED_BATCH)  # packs, and reads the prompts, which then are shared
    result = wal_vs_none(engine, prompts, [LOGGED_NEW_TOKENS] * LOGGED_BATCH)

    def engine_of_a_new_process() -> DecodeEngine:
        return DecodeEngine(model, max_slots=RECOVERED, cache_proof=engine.cache_proof, **options)

    return result | redecoded_tokens(engine_of_a_new_process, prompts, RECOVERED_NEW_TOKENS)


# --- all sections ------------------------------------------------------------------------------------------------
SECTIONS = {"decode_engine": decode_engine, "token_log": token_log}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--answers-per-slot", type=int, default=3, help="of mixed length, in the queue")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(SECTIONS))
    arguments = parser.parse_args()
    if not MODEL.exists():
        sys.exit(f"{MODEL} is missing: make demo-models")
    result: dict[str, Any] = {}
    for name, measure in SECTIONS.items():
        if arguments.only in (None, name):
            result |= measure(arguments)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
