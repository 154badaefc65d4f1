import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.rpc import status_pb2 as _status_pb2
from opd.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Rubric(_message.Message):
    __slots__ = ("name", "version", "criteria")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CRITERIA_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    criteria: _containers.RepeatedCompositeFieldContainer[Criterion]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., criteria: _Optional[_Iterable[_Union[Criterion, _Mapping]]] = ...) -> None: ...

class Criterion(_message.Message):
    __slots__ = ("name", "description", "scale_min", "scale_max", "anchors", "weight", "hard_requirement")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SCALE_MIN_FIELD_NUMBER: _ClassVar[int]
    SCALE_MAX_FIELD_NUMBER: _ClassVar[int]
    ANCHORS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    HARD_REQUIREMENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    scale_min: float
    scale_max: float
    anchors: _containers.RepeatedCompositeFieldContainer[Anchor]
    weight: float
    hard_requirement: bool
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., scale_min: _Optional[float] = ..., scale_max: _Optional[float] = ..., anchors: _Optional[_Iterable[_Union[Anchor, _Mapping]]] = ..., weight: _Optional[float] = ..., hard_requirement: _Optional[bool] = ...) -> None: ...

class Anchor(_message.Message):
    __slots__ = ("score", "description")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    score: float
    description: str
    def __init__(self, score: _Optional[float] = ..., description: _Optional[str] = ...) -> None: ...

class JudgeItem(_message.Message):
    __slots__ = ("prompt", "answers", "rubric_name", "rubric_inline", "reference", "samples", "sampling", "timeout")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    RUBRIC_NAME_FIELD_NUMBER: _ClassVar[int]
    RUBRIC_INLINE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    answers: _containers.RepeatedScalarFieldContainer[str]
    rubric_name: str
    rubric_inline: Rubric
    reference: str
    samples: int
    sampling: _common_pb2.SamplingParams
    timeout: _duration_pb2.Duration
    def __init__(self, prompt: _Optional[str] = ..., answers: _Optional[_Iterable[str]] = ..., rubric_name: _Optional[str] = ..., rubric_inline: _Optional[_Union[Rubric, _Mapping]] = ..., reference: _Optional[str] = ..., samples: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("criteria", "score", "score_variance", "agreement", "samples_parsed", "samples_asked")
    CRITERIA_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SCORE_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PARSED_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_ASKED_FIELD_NUMBER: _ClassVar[int]
    criteria: _containers.RepeatedCompositeFieldContainer[CriterionScore]
    score: float
    score_variance: float
    agreement: float
    samples_parsed: int
    samples_asked: int
    def __init__(self, criteria: _Optional[_Iterable[_Union[CriterionScore, _Mapping]]] = ..., score: _Optional[float] = ..., score_variance: _Optional[float] = ..., agreement: _Optional[float] = ..., samples_parsed: _Optional[int] = ..., samples_asked: _Optional[int] = ...) -> None: ...

class CriterionScore(_message.Message):
    __slots__ = ("name", "score", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    score: float
    reason: str
    def __init__(self, name: _Optional[str] = ..., score: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class JudgeRequest(_message.Message):
    __slots__ = ("item",)
    ITEM_FIELD_NUMBER: _ClassVar[int]
    item: JudgeItem
    def __init__(self, item: _Optional[_Union[JudgeItem, _Mapping]] = ...) -> None: ...

class JudgeResponse(_message.Message):
    __slots__ = ("verdicts", "judge", "rubric_digest")
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    JUDGE_FIELD_NUMBER: _ClassVar[int]
    RUBRIC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedCompositeFieldContainer[Verdict]
    judge: _common_pb2.Policy
    rubric_digest: str
    def __init__(self, verdicts: _Optional[_Iterable[_Union[Verdict, _Mapping]]] = ..., judge: _Optional[_Union[_common_pb2.Policy, _Mapping]] = ..., rubric_digest: _Optional[str] = ...) -> None: ...

class JudgeBatchRequest(_message.Message):
    __slots__ = ("item", "cancel_item_id")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    CANCEL_ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    item: JudgeBatchItem
    cancel_item_id: str
    def __init__(self, item: _Optional[_Union[JudgeBatchItem, _Mapping]] = ..., cancel_item_id: _Optional[str] = ...) -> None: ...

class JudgeBatchItem(_message.Message):
    __slots__ = ("item_id", "item")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    item: JudgeItem
    def __init__(self, item_id: _Optional[str] = ..., item: _Optional[_Union[JudgeItem, _Mapping]] = ...) -> None: ...

class JudgeBatchResponse(_message.Message):
    __slots__ = ("item_id", "credits", "judgement", "status")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    JUDGEMENT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    credits: int
    judgement: JudgeResponse
    status: _status_pb2.Status
    def __init__(self, item_id: _Optional[str] = ..., credits: _Optional[int] = ..., judgement: _Optional[_Union[JudgeResponse, _Mapping]] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...
