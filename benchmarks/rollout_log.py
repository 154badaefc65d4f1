"""What the token log costs: tokens per second with it against without, and what recovery makes the engine do again.

Part of ``benchmarks/rollout.py``. The same engine writes the same responses in pairs, once into a log on the disk and
once into none, in turn; the ratio is taken within a pair, so that what the neighbours do to the machine falls on both.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from servers import say

PAIRS = 10
RECOVERED = 64
Engine = Any  # rollout_server.decode_engine.DecodeEngine; torch is imported late


def _states(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Any]:
    from opd_mesh.trajectory import SamplingParams
    from rollout_server.requests import RequestParams, RequestState

    return [
        RequestState(
            RequestParams(
                f"r{number}", "bench", "d", tuple(prompt), SamplingParams(number, max_new_tokens=length), False, "f"
            ),
            lineage=1,
        )
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def _write(engine: Engine, requests: Any, states: list[Any], *, steps: int | None = None) -> tuple[float, int]:
    """(seconds, tokens) of writing them all, or for so many steps; as the server's thread does it."""
    from rollout_server.engine import GenerationRequest
    from rollout_server.request_log import written_tokens

    by_key = {state.params.key: state for state in states}
    started, tokens = time.perf_counter(), 0
    for state in states:
        if state.handle < 0:
            requests.begin(state)
        params = state.params
        engine.submit(GenerationRequest(params.key, params.prompt_ids, params.sampling, written_tokens(state)))
    while not engine.idle and steps != 0:
        for event in requests.record(engine.step(), by_key.get):
            by_key[event.request_id].append(event)
            tokens += 1
        steps = None if steps is None else steps - 1
    return time.perf_counter() - started, tokens


def wal_vs_none(engine: Engine, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> dict[str, Any]:
    """Median of the ratios of tokens per second, log (durability ``interval``) over none, and their quartiles."""
    from opd_mesh.config.services import TokenLogConfig
    from rollout_server.request_log import RequestLog, state_of
    from rollout_server.token_log import TokenLog

    folder = Path(tempfile.mkdtemp(prefix="opd-log-", dir="."))
    ratios, append_us = [], []
    try:
        for pair in range(PAIRS):
            rates: dict[str, float] = {}
            for kind in ("log", "none") if pair % 2 else ("none", "log"):
                states = _states(prompts, lengths)
                if kind == "none":
                    seconds, tokens = _write(engine, RequestLog(None), states)
                else:
                    config = TokenLogConfig(path=folder / str(pair))
                    token_log, _ = TokenLog.open(config)
                    spent = _timed(token_log)
                    seconds, tokens = _write(engine, RequestLog(token_log), states)
                    append_us.append(1e6 * spent[0] / max(1, spent[1]))
                    token_log.close()
                    token_log, recovered = TokenLog.open(config)
                    token_log.close()
                    if [state_of(request).tokens for request in recovered] != [state.tokens for state in states]:
                        raise SystemExit("the log does not hold what was written; no figure is given")
                if tokens != sum(lengths):
                    raise SystemExit(f"{tokens} tokens were written, {sum(lengths)} were asked for")
                rates[kind] = tokens / seconds
            ratios.append(rates["log"] / rates["none"])
            say(f"  pair {pair}: {rates['log']:.0f} against {rates['none']:.0f} tokens/s")
    finally:
        shutil.rmtree(folder)
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "wal_vs_none": statistics.median(ratios),
        "wal_vs_none_interval": [low, high],
        "wal_vs_none_pairs": len(ratios),
        "wal_append_us": statistics.median(append_us),
    }


def _timed(token_log: Any) -> list[float]:
    """[seconds, calls] of ``append`` from now on."""
    spent = [0.0, 0]
    append: Callable[[Any], None] = token_log.append

    def timed(tokens: Any) -> None:
        started = time.perf_counter()
        append(tokens)
        spent[0] += time.perf_counter() - started
        spent[1] += 1

    token_log.append = timed
    return spent


def redecoded_tokens(
    make_engine: Callable[[], Engine], prompts: Sequence[Sequence[int]], length: int
) -> dict[str, Any]:
    """What it costs to go on with 64 half-written responses: their prefill, and no token decoded twice.

    Args:
        make_engine: with a slot for each of them; one is killed, another goes on.
    """
    from opd_mesh.config.services import TokenLogConfig
    from rollout_server.request_log import RequestLog, state_of
    from rollout_server.token_log import TokenLog

    folder = Path(tempfile.mkdtemp(prefix="opd-log-", dir="."))
    try:
        config = TokenLogConfig(path=folder / "log", durability="os")
        token_log, _ = TokenLog.open(config)
        states = _states([prompts[number % len(prompts)] for number in range(RECOVERED)], [length] * RECOVERED)
        _write(make_engine(), RequestLog(token_log), states, steps=length // 2)
        token_log.close()
        token_log, recovered = TokenLog.open(config)
        again = [state_of(request) for request in recovered]
        unfinished = [state for state in again if state.finish_reason is None]
        written = {state.params.key: len(state.tokens) for state in again}
        engine = make_engine()
        _write(engine, RequestLog(token_log), unfinished)
        token_log.close()
        counters = engine.counters
        for state in again:
            if len(state.tokens) != length:
                raise SystemExit(f"{state.params.request_id} has {len(state.tokens)} tokens, {length} were asked for")
        wanted = sum(length - written[state.params.key] for state in unfinished)
        return {
            "redecoded_tokens": counters.replayed_tokens + counters.tokens - wanted,
            "recovered_requests": len(unfinished),
            "recovered_tokens": sum(written[state.params.key] for state in unfinished),
            "recovery_prefill_tokens": counters.prefill_tokens,
        }
    finally:
        shutil.rmtree(folder)
