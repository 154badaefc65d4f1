"""Masks that travel with the tokens: what the engine tells, the log keeps, and a resumed request adds to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from decoding import VALID, make_engine, make_request, model_of
from test_decode_grammar import engine_of, verdict
from tiny_models import tiny_model

from opd_mesh.config.services import TokenLogConfig
from opd_mesh.errors import InvalidInputError
from opd_mesh.rpc.writer import MESSAGE_BYTES
from opd_mesh.trajectory import MAX_KEPT_IDS, SamplingParams, Trajectory
from rollout_server.decode_engine import DecodeEngine
from rollout_server.generation import GenerationRequest, TokenEvent
from rollout_server.request_log import RequestLog, generation_request, states_of
from rollout_server.requests import RequestParams, RequestState
from rollout_server.service import _end_of_piece, _token_batch
from rollout_server.token_log import TokenLog

SAMPLINGS = [
    SamplingParams(seed=1, temperature=1.25, top_k=9, top_p=0.75, max_new_tokens=12, keep_mask=True),
    SamplingParams(seed=2, max_new_tokens=9),
    SamplingParams(seed=3, temperature=0.0, top_k=3, max_new_tokens=7, keep_mask=True),
    SamplingParams(seed=4, temperature=2.0, top_k=300, max_new_tokens=5, keep_mask=True),  # more than there are ids
]


def params_of(index: int) -> RequestParams:
    prompt = make_request(index, length=5 + index).prompt_ids
    return RequestParams(f"r{index}", "run", "d", prompt, SAMPLINGS[index], False, "f")


def deterministic_engine() -> DecodeEngine:
    return make_engine(model=tiny_model("llama", 0), deterministic=True)


class Server:
    """A rollout server's engine, requests and log, without the processes and the wire."""

    def __init__(self, folder: Path) -> None:
        self.token_log, recovered = TokenLog.open(TokenLogConfig(path=folder, durability="os"))
        self.log = RequestLog(self.token_log)
        self.engine = deterministic_engine()
        self.states = {state.params.key: state for state in states_of(recovered)}
        if not self.states:
            new = [RequestState(params_of(index), lineage=1) for index in range(len(SAMPLINGS))]
            self.log.begin(new)
            self.states = {state.params.key: state for state in new}
        for state in self.states.values():
            if state.finish_reason is None:
                self.engine.submit(generation_request(state))

    def run(self, steps: int) -> None:
        """To the end, or for so many steps."""
        while not self.engine.idle and steps:
            for event in self.log.record(self.engine.step(), self.states.get):
                assert event.error is None
                self.states[event.request_id].append(event)
            steps -= 1

    def close(self) -> None:
        self.log.close()
        self.token_log.close()

    @property
    def trajectories(self) -> list[Trajectory]:
        return [state.trajectory() for state in self.states.values()]


def test_an_interrupted_request_tells_the_masks_of_the_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = Server(tmp_path / "whole")
    undisturbed.run(-1)
    undisturbed.close()
    for compacts in (False, True):
        for _ in range(5):
            server = Server(tmp_path / f"interrupted {compacts}")
            server.run(3)
            if compacts:
                server.token_log.compact()
            server.close()
        assert server.engine.idle
        assert server.trajectories == undisturbed.trajectories
    for index, trajectory in enumerate(undisturbed.trajectories):
        trajectory.validate(vocab_size=VALID)
        kept = trajectory.kept_token_ids
        assert len(kept) == (trajectory.num_scored if SAMPLINGS[index].keep_mask else 0)
    first, _, greedy, whole = (trajectory.kept_token_ids for trajectory in undisturbed.trajectories)
    assert 1 < max(map(len, first)) <= 9
    assert greedy == tuple((token,) for token in undisturbed.trajectories[2].scored_token_ids)
    assert set(whole) == {tuple(range(VALID))}


def assert_normalized_over_the_mask(request: GenerationRequest, events: list[TokenEvent]) -> None:
    ids = [*request.prompt_ids, *(event.token_id for event in events)]
    with torch.inference_mode():
        logits_TV = model_of("llama")(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    for place, event in enumerate(events, len(request.prompt_ids) - 1):
        kept = list(event.kept)
        scaled = logits_TV[place, kept] / request.sampling.temperature
        assert float(scaled.log_softmax(-1)[kept.index(event.token_id)]) == pytest.approx(
            event.sampling_logprob, abs=1e-4
        )


def test_the_engine_tells_what_top_k_top_p_and_the_grammar_left() -> None:
    engine = engine_of()
    requests = [
        make_request(0, new=12, temperature=1.4, top_k=20, top_p=0.9, keep_mask=True),
        verdict(1, temperature=1.4, top_k=20, top_p=0.95, keep_mask=True),
        make_request(2, new=12, temperature=1.4, top_k=20, top_p=0.9),
    ]
    for request in requests:
        engine.submit(request)
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    while not engine.idle:
        for event in engine.step():
            events[event.request_id].append(event)
    for request in requests[:2]:
        assert_normalized_over_the_mask(request, events[request.request_id])
    assert any(len(event.kept) == 1 for event in events["r1"])  # the grammar leaves one text
    assert all(event.kept == () for event in events["r2"])


def test_masks_stream_with_their_tokens() -> None:
    state = RequestState(params_of(0), lineage=1)
    for position, kept in enumerate([(3, 5), (5,), (5, 6, 7)]):
        state.append(TokenEvent("r0", position, 5, -0.5, -0.6, 1, kept=kept))
    piece = _token_batch(state, 1, 3)
    assert [list(kept.ids) for kept in piece.kept_token_ids] == [[5], [5, 6, 7]]
    plain = RequestState(params_of(1), lineage=1)
    plain.append(TokenEvent("r1", 0, 5, -0.5, -0.6, 1))
    assert not _token_batch(plain, 0, 1).kept_token_ids


def test_what_is_written_goes_out_in_pieces_that_fit_a_message() -> None:
    state, plain = RequestState(params_of(0), lineage=1), RequestState(params_of(1), lineage=1)
    kept = tuple(range(150_000, 150_000 + MAX_KEPT_IDS))
    for position in range(1000):
        state.append(TokenEvent("r0", position, kept[-1], -0.5, -0.6, 2**63, kept=kept))
        plain.append(TokenEvent("r1", position, kept[-1], -0.5, -0.6, 2**63))
    ends = [0]
    while ends[-1] < 1000:
        ends.append(_end_of_piece(state, ends[-1], 1000))
    sizes = [_token_batch(state, start, end).ByteSize() for start, end in pairwise(ends)]
    assert max(sizes) < 1.01 * MESSAGE_BYTES
    assert len(sizes) < 10
    assert _end_of_piece(plain, 3, 1000) == 1000
    assert _end_of_piece(state, 3, 4) == 4


def test_what_top_k_does_not_bound_is_refused() -> None:
    engine = make_engine()
    assert engine.max_kept_ids == MAX_KEPT_IDS
    for call in (engine.check_request, engine.submit):
        with pytest.raises(InvalidInputError, match="top_k has to bound") as caught:
            call(make_request(0, top_p=0.9, keep_mask=True))
        assert caught.value.field == "sampling.keep_mask"
