"""Trajectories: alignment, what is malformed, and the three forms (dataclass, message, JSON)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opd.v1 import common_pb2

from opd_mesh.convert import (
    sampling_from_proto,
    sampling_to_proto,
    trajectory_from_json,
    trajectory_from_proto,
    trajectory_to_json,
    trajectory_to_proto,
)
from opd_mesh.errors import InvalidInputError, TooLongError, TrajectoryError
from opd_mesh.seeds import derive_seed
from opd_mesh.trajectory import MAX_KEPT_IDS, UINT64_MAX, FinishReason, SamplingParams, Trajectory

PLAIN = Trajectory("t-1", "sums", token_ids=(5, 6, 7, 8, 9, 10), scored_spans=((2, 4), (5, 6)))


FLOATS = st.floats(-1e4, 0, width=32)
PLAIN_SAMPLING = st.builds(
    SamplingParams,
    seed=st.integers(0, UINT64_MAX),
    temperature=st.floats(0, 100, width=32),
    top_p=st.floats(2**-20, 1, width=32),
    top_k=st.integers(0, 2**31 - 1),
    max_new_tokens=st.integers(1, 2**31 - 1),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    grammar=st.text(max_size=30),
)
SAMPLING = PLAIN_SAMPLING | st.builds(
    lambda sampling, top_k: dataclasses.replace(sampling, top_k=top_k, keep_mask=True),
    PLAIN_SAMPLING,
    st.integers(1, MAX_KEPT_IDS),
)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    token_ids = tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=20)))
    cuts = sorted(draw(st.sets(st.integers(1, len(token_ids)), min_size=2, max_size=6)))
    spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    rows = sum(end - start for start, end in spans)

    def per_token(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(values, min_size=rows, max_size=rows) | st.just([])))

    scored = [token for start, end in spans for token in token_ids[start:end]]
    others = st.lists(st.integers(0, 2**31 - 1), max_size=4)
    kept = [tuple(sorted({token, *draw(others)})) for token in scored] if draw(st.booleans()) else []
    return Trajectory(
        trajectory_id=draw(st.text(min_size=1, max_size=12)),
        domain=draw(st.text(max_size=8)),
        token_ids=token_ids,
        scored_spans=spans,
        sampling_logprobs=per_token(FLOATS),
        policy_logprobs=per_token(FLOATS),
        policy_versions=per_token(st.integers(0, UINT64_MAX)),
        sampling=draw(SAMPLING),
        finish_reason=draw(st.sampled_from(FinishReason)),
        run_id=draw(st.text(max_size=8)),
        lineage=draw(st.integers(0, UINT64_MAX)),
        kept_token_ids=tuple(kept),
    )


@given(trajectories())
def test_message_and_json_lose_nothing(trajectory: Trajectory) -> None:
    trajectory.validate()
    message = common_pb2.Trajectory.FromString(trajectory_to_proto(trajectory).SerializeToString())
    assert trajectory_from_proto(message) == trajectory
    assert trajectory_from_json(trajectory_to_json(trajectory)) == trajectory


def test_rows_speak_of_scored_tokens_in_order_of_position() -> None:
    assert PLAIN.num_scored == 3
    assert PLAIN.scored_positions == [2, 3, 5]
    assert PLAIN.scored_token_ids == [7, 8, 10]
    assert PLAIN.predicting_positions == [1, 2, 4]  # the distribution that predicts t comes from t - 1


def changed(**fields: Any) -> Trajectory:
    return dataclasses.replace(PLAIN, **fields)


@pytest.mark.parametrize(
    ("bad", "field", "message"),
    [
        (changed(trajectory_id=""), "trajectory_id", "must not be empty"),
        (changed(scored_spans=()), "scored_spans", "the response is empty"),
        (changed(token_ids=(), scored_spans=()), "scored_spans", "the response is empty"),
        (changed(scored_spans=((0, 2),)), "scored_spans[0]", "the first token has no prediction"),
        (changed(scored_spans=((2, 2),)), "scored_spans[0]", "is empty"),
        (changed(scored_spans=((4, 2),)), "scored_spans[0]", "is empty"),
        (changed(scored_spans=((2, 7),)), "scored_spans[0]", "ends at 7, beyond the 6 token_ids"),
        (changed(scored_spans=((2, 4), (3, 5))), "scored_spans[1]", "overlaps"),
        (changed(scored_spans=((4, 5), (1, 2))), "scored_spans[1]", "precedes"),
        (changed(sampling_logprobs=(-1.0,)), "sampling_logprobs", "1 values for 3 scored tokens"),
        (changed(policy_logprobs=(-1.0,) * 6), "policy_logprobs", "6 values for 3"),
        (changed(policy_versions=(1, 2)), "policy_versions", "2 values for 3"),
        (changed(kept_token_ids=((7,), (8,))), "kept_token_ids", "2 values for 3"),
        (changed(kept_token_ids=((7,), (), (10,))), "kept_token_ids[1]", "scored token 8 is not among the ids"),
        (changed(kept_token_ids=((7,), (8,), (9, 11))), "kept_token_ids[2]", "scored token 10 is not among"),
        (changed(kept_token_ids=((7, 6), (8,), (10,))), "kept_token_ids[0]", "not in ascending order"),
        (changed(kept_token_ids=((7, 7), (8,), (10,))), "kept_token_ids[0]", "not in ascending order, each once"),
        (changed(kept_token_ids=((-1, 7), (8,), (10,))), "kept_token_ids[0]", "token id -1 is negative"),
        (changed(kept_token_ids=((7,), (8,), (10, 100))), "kept_token_ids[2]", "token id 100 is outside"),
        (changed(token_ids=(5, 6, -7, 8, 9, 10)), "token_ids", "token id -7 is negative"),
        (changed(token_ids=(5, 6, 7, 100, 9, 10)), "token_ids", "token id 100 at position 3 is outside"),
    ],
)
def test_malformed_trajectories_are_refused_by_field(bad: Trajectory, field: str, message: str) -> None:
    with pytest.raises(TrajectoryError) as caught:
        bad.validate(vocab_size=100)
    assert caught.value.field == field
    assert message in caught.value.message


def test_limits_are_inclusive() -> None:
    PLAIN.validate(vocab_size=11, max_tokens=6)
    with pytest.raises(TooLongError, match="6 tokens, but at most 5"):
        PLAIN.validate(max_tokens=5)
    with pytest.raises(TrajectoryError, match="token id 10 at position 5 is outside the vocabulary of 10"):
        PLAIN.validate(vocab_size=10)
    changed(scored_spans=((1, 6),), policy_versions=(3,) * 5).validate(vocab_size=11, max_tokens=6)
    changed(scored_spans=((2, 4), (4, 6))).validate()  # touching is not overlapping


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", UINT64_MAX + 1),
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("max_new_tokens", 0),
    ],
)
def test_sampling_out_of_range_is_refused_by_field(field: str, value: float) -> None:
    with pytest.raises(InvalidInputError) as caught:
        dataclasses.replace(SamplingParams(), **{field: value}).validate()
    assert caught.value.field == f"sampling.{field}"


@pytest.mark.parametrize(("top_k", "taken"), [(0, False), (1, True), (MAX_KEPT_IDS, True), (MAX_KEPT_IDS + 1, False)])
def test_a_mask_is_told_only_where_top_k_bounds_it(top_k: int, taken: bool) -> None:
    sampling = SamplingParams(top_k=top_k, top_p=0.9, keep_mask=True)
    assert sampling_to_proto(sampling).keep_mask
    if taken:
        sampling.validate()
        return
    with pytest.raises(InvalidInputError, match="set it from 1 to 1024") as caught:
        sampling.validate()
    assert caught.value.field == "sampling.keep_mask"


def test_the_message_is_validated_on_arrival_and_unset_top_p_is_off() -> None:
    message = sampling_to_proto(SamplingParams())
    message.ClearField("top_p")
    assert sampling_from_proto(message).top_p == 1.0
    assert "grammar" not in sampling_to_proto(SamplingParams()).SerializeToString().decode("latin-1")
    before = sampling_from_proto(message)  # as of a log that was written before there were grammars and masks
    assert (before.grammar, before.keep_mask) == ("", False)
    message.temperature = -1
    with pytest.raises(InvalidInputError, match="temperature"):
        sampling_from_proto(message)


@pytest.mark.parametrize(
    "value",
    [
        {"trajectory": "t"},
        {"trajectory_id": "t", "token_ids": "5 6"},
        {"trajectory_id": "t", "token_ids": [2**31]},
        {"trajectory_id": "t", "token_ids": [1.5]},
        {"trajectory_id": "t", "scored_spans": [{"start": -1, "end": 2}]},
        {"trajectory_id": "t", "finish_reason": "BORED"},
    ],
)
def test_json_that_is_no_trajectory(value: dict[str, Any]) -> None:
    with pytest.raises(TrajectoryError):
        trajectory_from_json(value)


def test_seeds_are_fixed_for_ever_and_keys_do_not_run_together() -> None:
    assert derive_seed(7, "train", 3) == 14856904190370832013
    assert derive_seed(1, 2, 3) != derive_seed(1, 23)
    assert derive_seed(12, 3) != derive_seed(1, 23)
    assert len({derive_seed(seed, name, index) for seed in range(9) for name in "ab" for index in range(9)}) == 162
    assert 0 <= derive_seed(0) <= UINT64_MAX
