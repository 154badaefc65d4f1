"""Why interrupted answers are not written anew: short ones survive interruptions more often (DeepSeek-V4, 5.2.3).

Five hundred requests on an engine that dies every so many steps, and the log that a killed process leaves behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model

from opd_mesh.config.services import TokenLogConfig
from opd_mesh.trajectory import SamplingParams
from rollout_server.cache_proof import CacheModeProof, prove_cache_modes
from rollout_server.decode_engine import DecodeEngine
from rollout_server.engine import GenerationRequest, TokenEvent
from rollout_server.request_log import RequestLog, state_of, written_tokens
from rollout_server.requests import RequestParams, RequestState
from rollout_server.token_log import TokenLog

REQUESTS, SLOTS, VOCAB = 500, 16, 131
STEPS_BETWEEN_DEATHS = 25
LONGEST = 120
SAMPLING = SamplingParams(max_new_tokens=LONGEST, stop_token_ids=tuple(range(100, 112)), temperature=1.5)


@cache
def model() -> Any:
    return tiny_model("llama", 0, num_hidden_layers=1)


@cache
def proof() -> CacheModeProof:
    return prove_cache_modes(model(), valid_vocab_size=VOCAB)


def new_engine(*, deterministic: bool) -> DecodeEngine:
    return DecodeEngine(
        model(), policy_version=1, valid_vocab_size=VOCAB, max_slots=SLOTS, max_context_tokens=200,
        deterministic=deterministic, cache_proof=proof(),
    )  # fmt: skip


def params_of(number: int, attempt: int = 0) -> RequestParams:
    sampling = replace(SAMPLING, seed=number + REQUESTS * attempt)
    return RequestParams(f"r{number}", "run", "math", (1, 20 + number % 50), sampling, False, "f")


def run_until_death(engine: DecodeEngine, steps: int | None, requests: RequestLog, states: dict[str, Any]) -> None:
    """So many steps, or to the end of all requests; what is logged reaches the states."""
    while not engine.idle and steps != 0:
        take(requests.record(engine.step(), states.get), states)
        steps = None if steps is None else steps - 1


def take(events: Sequence[TokenEvent], states: dict[str, RequestState]) -> None:
    for event in events:
        assert event.error is None
        states[event.request_id].append(event)


def with_a_log(folder: Path, *, steps_between_deaths: int | None, deterministic: bool = True) -> dict[str, list[int]]:
    """Responses by id; after every death a new engine goes on from a copy of the log as the dead process left it."""
    token_log, _ = TokenLog.open(TokenLogConfig(path=folder / "0", durability="os"))
    requests = RequestLog(token_log)
    states: dict[str, RequestState] = {}
    engine = new_engine(deterministic=deterministic)
    for number in range(REQUESTS):
        params = params_of(number)
        states[params.key] = RequestState(params, lineage=1)
        requests.begin([states[params.key]])
        engine.submit(GenerationRequest(params.key, params.prompt_ids, params.sampling))
    deaths = 0
    while True:
        run_until_death(engine, steps_between_deaths, requests, states)
        if engine.idle:
            break
        deaths += 1
        shutil.copytree(folder / str(deaths - 1), folder / str(deaths))
        token_log.close()
        token_log, recovered = TokenLog.open(TokenLogConfig(path=folder / str(deaths), durability="os"))
        requests = RequestLog(token_log)
        states = {state.params.key: state for state in map(state_of, recovered)}
        assert len(states) == REQUESTS
        engine = new_engine(deterministic=deterministic)
        for key, state in states.items():
            if state.finish_reason is None:
                written = written_tokens(state)
                engine.submit(GenerationRequest(key, state.params.prompt_ids, state.params.sampling, written))
    token_log.close()
    assert (deaths > 5) == (steps_between_deaths is not None)
    return {key: state.tokens for key, state in states.items()}


def from_scratch(*, steps_between_deaths: int) -> dict[str, int]:
    """Lengths by id where an interrupted response is begun anew, with other random numbers."""
    lengths: dict[str, int] = {}
    waiting = {f"r{number}": number for number in range(REQUESTS)}
    attempt = 0
    while waiting:
        engine = new_engine(deterministic=False)
        for number in waiting.values():
            params = params_of(number, attempt)
            engine.submit(GenerationRequest(params.request_id, params.prompt_ids, params.sampling))
        for _ in range(steps_between_deaths):
            for event in engine.step():
                if event.finish_reason is not None:
                    lengths[event.request_id] = event.position + 1
                    del waiting[event.request_id]
        attempt += 1
    return lengths


def mean(lengths: Sequence[int]) -> float:
    return sum(lengths) / len(lengths)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    return with_a_log(tmp_path_factory.mktemp("undisturbed"), steps_between_deaths=None)


def test_begun_anew_answers_become_short(undisturbed: dict[str, list[int]]) -> None:
    """What the log is for: an answer longer than the time between two deaths never survives, and others seldom."""
    wanted = [len(tokens) for tokens in undisturbed.values()]
    found = list(from_scratch(steps_between_deaths=STEPS_BETWEEN_DEATHS).values())
    assert len(found) == REQUESTS
    assert max(wanted) > STEPS_BETWEEN_DEATHS >= max(found)
    assert mean(found) < 0.8 * mean(wanted)


def test_with_the_log_every_answer_is_the_undisturbed_one(undisturbed: dict[str, list[int]], tmp_path: Path) -> None:
    assert with_a_log(tmp_path, steps_between_deaths=STEPS_BETWEEN_DEATHS) == undisturbed


def test_with_the_log_lengths_are_as_undisturbed_when_batched(
    undisturbed: dict[str, list[int]], tmp_path: Path
) -> None:
    """Outside the deterministic mode a rounding may change a token here and there, but not the lengths as a whole."""
    found = with_a_log(tmp_path, steps_between_deaths=STEPS_BETWEEN_DEATHS, deterministic=False)
    same = sum(found[key] == tokens for key, tokens in undisturbed.items())
    assert same > 0.95 * REQUESTS
    assert mean([len(t) for t in found.values()]) == pytest.approx(
        mean([len(t) for t in undisturbed.values()]), rel=0.05
    )
