import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.rpc import status_pb2 as _status_pb2
from opd.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reasons(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASONS_UNSPECIFIED: _ClassVar[Reasons]
    REASONS_BRIEF: _ClassVar[Reasons]
    REASONS_NONE: _ClassVar[Reasons]

class JudgeMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JUDGE_MODE_UNSPECIFIED: _ClassVar[JudgeMode]
    JUDGE_MODE_POINTWISE: _ClassVar[JudgeMode]
    JUDGE_MODE_PAIRWISE: _ClassVar[JudgeMode]
REASONS_UNSPECIFIED: Reasons
REASONS_BRIEF: Reasons
REASONS_NONE: Reasons
JUDGE_MODE_UNSPECIFIED: JudgeMode
JUDGE_MODE_POINTWISE: JudgeMode
JUDGE_MODE_PAIRWISE: JudgeMode

class Rubric(_message.Message):
    __slots__ = ("name", "version", "criteria", "description", "reasons", "max_reason_chars", "score_alone", "template", "pairwise_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CRITERIA_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    MAX_REASON_CHARS_FIELD_NUMBER: _ClassVar[int]
    SCORE_ALONE_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    PAIRWISE_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    criteria: _containers.RepeatedCompositeFieldContainer[Criterion]
    description: str
    reasons: Reasons
    max_reason_chars: int
    score_alone: bool
    template: str
    pairwise_template: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., criteria: _Optional[_Iterable[_Union[Criterion, _Mapping]]] = ..., description: _Optional[str] = ..., reasons: _Optional[_Union[Reasons, str]] = ..., max_reason_chars: _Optional[int] = ..., score_alone: _Optional[bool] = ..., template: _Optional[str] = ..., pairwise_template: _Optional[str] = ...) -> None: ...

class Criterion(_message.Message):
    __slots__ = ("name", "description", "scale_min", "scale_max", "anchors", "weight", "hard_requirement", "scale_step")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SCALE_MIN_FIELD_NUMBER: _ClassVar[int]
    SCALE_MAX_FIELD_NUMBER: _ClassVar[int]
    ANCHORS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    HARD_REQUIREMENT_FIELD_NUMBER: _ClassVar[int]
    SCALE_STEP_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    scale_min: float
    scale_max: float
    anchors: _containers.RepeatedCompositeFieldContainer[Anchor]
    weight: float
    hard_requirement: bool
    scale_step: float
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., scale_min: _Optional[float] = ..., scale_max: _Optional[float] = ..., anchors: _Optional[_Iterable[_Union[Anchor, _Mapping]]] = ..., weight: _Optional[float] = ..., hard_requirement: _Optional[bool] = ..., scale_step: _Optional[float] = ...) -> None: ...

class Anchor(_message.Message):
    __slots__ = ("score", "description")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    score: float
    description: str
    def __init__(self, score: _Optional[float] = ..., description: _Optional[str] = ...) -> None: ...

class JudgeItem(_message.Message):
    __slots__ = ("prompt", "answers", "rubric_name", "rubric_inline", "reference", "samples", "sampling", "timeout", "mode")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    RUBRIC_NAME_FIELD_NUMBER: _ClassVar[int]
    RUBRIC_INLINE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    answers: _containers.RepeatedScalarFieldContainer[str]
    rubric_name: str
    rubric_inline: Rubric
    reference: str
    samples: int
    sampling: _common_pb2.SamplingParams
    timeout: _duration_pb2.Duration
    mode: JudgeMode
    def __init__(self, prompt: _Optional[str] = ..., answers: _Optional[_Iterable[str]] = ..., rubric_name: _Optional[str] = ..., rubric_inline: _Optional[_Union[Rubric, _Mapping]] = ..., reference: _Optional[str] = ..., samples: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., mode: _Optional[_Union[JudgeMode, str]] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("criteria", "score", "score_variance", "agreement", "samples_parsed", "samples_asked", "samples_repaired", "failure")
    CRITERIA_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SCORE_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PARSED_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_ASKED_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_REPAIRED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    criteria: _containers.RepeatedCompositeFieldContainer[CriterionScore]
    score: float
    score_variance: float
    agreement: float
    samples_parsed: int
    samples_asked: int
    samples_repaired: int
    failure: str
    def __init__(self, criteria: _Optional[_Iterable[_Union[CriterionScore, _Mapping]]] = ..., score: _Optional[float] = ..., score_variance: _Optional[float] = ..., agreement: _Optional[float] = ..., samples_parsed: _Optional[int] = ..., samples_asked: _Optional[int] = ..., samples_repaired: _Optional[int] = ..., failure: _Optional[str] = ...) -> None: ...

class CriterionScore(_message.Message):
    __slots__ = ("name", "score", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    score: float
    reason: str
    def __init__(self, name: _Optional[str] = ..., score: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("answer_index", "swapped", "text", "score", "failure", "request_id")
    ANSWER_INDEX_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    answer_index: int
    swapped: bool
    text: str
    score: float
    failure: str
    request_id: str
    def __init__(self, answer_index: _Optional[int] = ..., swapped: _Optional[bool] = ..., text: _Optional[str] = ..., score: _Optional[float] = ..., failure: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class JudgeRequest(_message.Message):
    __slots__ = ("item",)
    ITEM_FIELD_NUMBER: _ClassVar[int]
    item: JudgeItem
    def __init__(self, item: _Optional[_Union[JudgeItem, _Mapping]] = ...) -> None: ...

class JudgeResponse(_message.Message):
    __slots__ = ("verdicts", "judge", "rubric_digest", "votes", "cached")
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    JUDGE_FIELD_NUMBER: _ClassVar[int]
    RUBRIC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VOTES_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedCompositeFieldContainer[Verdict]
    judge: _common_pb2.Policy
    rubric_digest: str
    votes: _containers.RepeatedCompositeFieldContainer[Vote]
    cached: bool
    def __init__(self, verdicts: _Optional[_Iterable[_Union[Verdict, _Mapping]]] = ..., judge: _Optional[_Union[_common_pb2.Policy, _Mapping]] = ..., rubric_digest: _Optional[str] = ..., votes: _Optional[_Iterable[_Union[Vote, _Mapping]]] = ..., cached: _Optional[bool] = ...) -> None: ...

class GetJudgeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetJudgeResponse(_message.Message):
    __slots__ = ("policy", "tokenizer_fingerprint", "rubrics", "constrained", "items_judged", "items_cached", "votes", "votes_unparsed", "inline_templates")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RUBRICS_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINED_FIELD_NUMBER: _ClassVar[int]
    ITEMS_JUDGED_FIELD_NUMBER: _ClassVar[int]
    ITEMS_CACHED_FIELD_NUMBER: _ClassVar[int]
    VOTES_FIELD_NUMBER: _ClassVar[int]
    VOTES_UNPARSED_FIELD_NUMBER: _ClassVar[int]
    INLINE_TEMPLATES_FIELD_NUMBER: _ClassVar[int]
    policy: _common_pb2.Policy
    tokenizer_fingerprint: str
    rubrics: _containers.RepeatedCompositeFieldContainer[RubricName]
    constrained: bool
    items_judged: int
    items_cached: int
    votes: int
    votes_unparsed: int
    inline_templates: bool
    def __init__(self, policy: _Optional[_Union[_common_pb2.Policy, _Mapping]] = ..., tokenizer_fingerprint: _Optional[str] = ..., rubrics: _Optional[_Iterable[_Union[RubricName, _Mapping]]] = ..., constrained: _Optional[bool] = ..., items_judged: _Optional[int] = ..., items_cached: _Optional[int] = ..., votes: _Optional[int] = ..., votes_unparsed: _Optional[int] = ..., inline_templates: _Optional[bool] = ...) -> None: ...

class RubricName(_message.Message):
    __slots__ = ("name", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

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
