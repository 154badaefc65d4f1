"""Rubrics between ``opd.v1.Rubric`` and :class:`opd_mesh.config.rubrics.Rubric`."""

from __future__ import annotations

import re
from typing import Any

from opd.v1 import generative_reward_service_pb2 as pb

from opd_mesh.config.base import parse_config
from opd_mesh.config.rubrics import Rubric
from opd_mesh.errors import ConfigError, InvalidInputError

_REASONS = {pb.REASONS_UNSPECIFIED: "brief", pb.REASONS_BRIEF: "brief", pb.REASONS_NONE: "none"}


def rubric_to_proto(rubric: Rubric) -> pb.Rubric:
    """Model → message."""
    message = pb.Rubric(
        name=rubric.name,
        version=rubric.version,
        description=rubric.description,
        reasons=pb.REASONS_BRIEF if rubric.reasons == "brief" else pb.REASONS_NONE,
        max_reason_chars=rubric.max_reason_chars,
        score_alone=rubric.form == "score",
        template=rubric.template or "",
        pairwise_template=rubric.pairwise_template or "",
    )
    for criterion in rubric.criteria:
        message.criteria.add(
            name=criterion.name,
            description=criterion.description,
            scale_min=criterion.scale.min,
            scale_max=criterion.scale.max,
            scale_step=criterion.scale.step,
            anchors=[pb.Anchor(score=point, description=text) for point, text in criterion.anchors.items()],
            weight=criterion.weight,
            hard_requirement=criterion.hard_requirement,
        )
    return message


def rubric_from_proto(message: pb.Rubric, field: str) -> Rubric:
    """Message → model, validated.

    Args:
        field: the message's place in its request, for errors.

    Raises:
        InvalidInputError: naming the field of the message.
    """
    if message.reasons not in _REASONS:
        raise InvalidInputError(f"{message.reasons} is no known way", field=f"{field}.reasons")
    value: dict[str, Any] = {
        "name": message.name,
        "version": message.version or "1",
        "description": message.description,
        "reasons": _REASONS[message.reasons],
        "max_reason_chars": message.max_reason_chars or 300,
        "form": "score" if message.score_alone else "lines",
        "template": message.template or None,
        "pairwise_template": message.pairwise_template or None,
        "criteria": [_criterion(criterion) for criterion in message.criteria],
    }
    for index, criterion in enumerate(message.criteria):
        points = [anchor.score for anchor in criterion.anchors]
        if len(set(points)) < len(points):
            raise InvalidInputError("a point has two anchors", field=f"{field}.criteria[{index}].anchors")
    try:
        return parse_config(Rubric, value, source=f"rubric {message.name!r}")
    except ConfigError as error:
        raise InvalidInputError(error.message, field=f"{field}.{_message_field(error.field or '')}") from error


def _criterion(message: pb.Criterion) -> dict[str, Any]:
    return {
        "name": message.name,
        "description": message.description,
        "scale": {"min": message.scale_min, "max": message.scale_max, "step": message.scale_step or 1.0},
        "anchors": {anchor.score: anchor.description for anchor in message.anchors},
        "weight": message.weight,
        "hard_requirement": message.hard_requirement,
    }


def _message_field(path: str) -> str:
    """``criteria.0.scale.max`` is ``criteria[0].scale_max`` of the message."""
    return re.sub(r"\.(\d+)", r"[\1]", path).replace(".scale.", ".scale_").replace("form", "score_alone")
