"""Between the protobuf messages and the dataclasses of trajectories and policies, and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf import json_format
from opd.v1 import common_pb2

from opd_mesh.errors import TrajectoryError
from opd_mesh.policy import PolicyId
from opd_mesh.trajectory import FinishReason, SamplingParams, Trajectory

_FINISH = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
}
_FINISH_BACK = {code: reason for reason, code in _FINISH.items()}


def sampling_to_proto(sampling: SamplingParams) -> common_pb2.SamplingParams:
    """Dataclass → message."""
    return common_pb2.SamplingParams(
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_new_tokens,
        stop_token_ids=sampling.stop_token_ids,
        grammar=sampling.grammar,
        keep_mask=sampling.keep_mask,
    )


def sampling_from_proto(message: common_pb2.SamplingParams) -> SamplingParams:
    """Message → dataclass, validated."""
    sampling = SamplingParams(
        seed=message.seed,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        top_k=message.top_k,
        max_new_tokens=message.max_new_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        grammar=message.grammar,
        keep_mask=message.keep_mask,
    )
    sampling.validate()
    return sampling


def finish_reason_to_proto(reason: FinishReason | None) -> common_pb2.FinishReason:
    """Enum → enum; of a response that has none, unspecified."""
    return common_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH[reason]


def finish_reason_from_proto(code: common_pb2.FinishReason) -> FinishReason:
    """Enum → enum; what is unknown here ended somehow."""
    return _FINISH_BACK.get(code, FinishReason.STOP)


def kept_to_proto(kept: Iterable[Sequence[int]]) -> list[common_pb2.TokenIds]:
    """The ids that each token was drawn from → messages."""
    return [common_pb2.TokenIds(ids=ids) for ids in kept]


def trajectory_to_proto(trajectory: Trajectory) -> common_pb2.Trajectory:
    """Dataclass → message."""
    return common_pb2.Trajectory(
        trajectory_id=trajectory.trajectory_id,
        domain=trajectory.domain,
        token_ids=trajectory.token_ids,
        scored_spans=[common_pb2.Span(start=start, end=end) for start, end in trajectory.scored_spans],
        sampling_logprobs=trajectory.sampling_logprobs,
        policy_logprobs=trajectory.policy_logprobs,
        policy_versions=trajectory.policy_versions,
        sampling=sampling_to_proto(trajectory.sampling),
        finish_reason=_FINISH[trajectory.finish_reason],
        run_id=trajectory.run_id,
        lineage=trajectory.lineage,
        kept_token_ids=kept_to_proto(trajectory.kept_token_ids),
    )


def trajectory_from_proto(message: common_pb2.Trajectory) -> Trajectory:
    """Message → dataclass. The caller validates against its own limits."""
    sampling = message.sampling
    return Trajectory(
        trajectory_id=message.trajectory_id,
        domain=message.domain,
        token_ids=tuple(message.token_ids),
        scored_spans=tuple((span.start, span.end) for span in message.scored_spans),
        sampling_logprobs=tuple(message.sampling_logprobs),
        policy_logprobs=tuple(message.policy_logprobs),
        policy_versions=tuple(message.policy_versions),
        sampling=sampling_from_proto(sampling) if sampling.max_new_tokens else SamplingParams(),
        finish_reason=finish_reason_from_proto(message.finish_reason),
        run_id=message.run_id,
        lineage=message.lineage,
        kept_token_ids=tuple(tuple(kept.ids) for kept in message.kept_token_ids),
    )


def trajectory_to_json(trajectory: Trajectory) -> dict[str, Any]:
    """One line of a trajectories file: the message of ``opd.v1.Trajectory`` in protobuf's JSON, snake case."""
    return json_format.MessageToDict(trajectory_to_proto(trajectory), preserving_proto_field_name=True)


def trajectory_from_json(value: dict[str, Any]) -> Trajectory:
    """The inverse of :func:`trajectory_to_json`. Raises :class:`TrajectoryError` naming what is wrong."""
    try:
        message = json_format.ParseDict(value, common_pb2.Trajectory())
    except json_format.ParseError as error:
        raise TrajectoryError(str(error), field="trajectory") from error
    return trajectory_from_proto(message)


def policy_to_proto(policy: PolicyId) -> common_pb2.Policy:
    """Dataclass → message."""
    return common_pb2.Policy(run_id=policy.run_id, lineage=policy.lineage, version=policy.version, digest=policy.digest)


def policy_from_proto(message: common_pb2.Policy) -> PolicyId:
    """Message → dataclass."""
    return PolicyId(message.run_id, message.lineage, message.version, message.digest)
