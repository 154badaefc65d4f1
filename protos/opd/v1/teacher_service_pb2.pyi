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

class Signal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIGNAL_UNSPECIFIED: _ClassVar[Signal]
    SIGNAL_HIDDEN_STATES: _ClassVar[Signal]
    SIGNAL_LOGITS: _ClassVar[Signal]
    SIGNAL_TOP_K_LOGPROBS: _ClassVar[Signal]
    SIGNAL_TOKEN_LOGPROBS: _ClassVar[Signal]
SIGNAL_UNSPECIFIED: Signal
SIGNAL_HIDDEN_STATES: Signal
SIGNAL_LOGITS: Signal
SIGNAL_TOP_K_LOGPROBS: Signal
SIGNAL_TOKEN_LOGPROBS: Signal

class HeadForm(_message.Message):
    __slots__ = ("digest", "padded_vocab_size", "vocab_size", "hidden_size", "dtype", "has_bias", "logit_scale", "soft_cap", "final_norm_applied")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PADDED_VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HAS_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SCALE_FIELD_NUMBER: _ClassVar[int]
    SOFT_CAP_FIELD_NUMBER: _ClassVar[int]
    FINAL_NORM_APPLIED_FIELD_NUMBER: _ClassVar[int]
    digest: str
    padded_vocab_size: int
    vocab_size: int
    hidden_size: int
    dtype: _common_pb2.DType
    has_bias: bool
    logit_scale: float
    soft_cap: float
    final_norm_applied: bool
    def __init__(self, digest: _Optional[str] = ..., padded_vocab_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[_Union[_common_pb2.DType, str]] = ..., has_bias: _Optional[bool] = ..., logit_scale: _Optional[float] = ..., soft_cap: _Optional[float] = ..., final_norm_applied: _Optional[bool] = ...) -> None: ...

class TeacherCard(_message.Message):
    __slots__ = ("teacher_id", "domains", "model_type", "vocab_size", "hidden_size", "dtype", "tokenizer_fingerprint", "teacher_digest", "head", "signals", "note", "limits", "head_error", "batch_layout", "tokenizer_roles", "engine")
    TEACHER_ID_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TEACHER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    HEAD_ERROR_FIELD_NUMBER: _ClassVar[int]
    BATCH_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_ROLES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    teacher_id: str
    domains: _containers.RepeatedScalarFieldContainer[str]
    model_type: str
    vocab_size: int
    hidden_size: int
    dtype: _common_pb2.DType
    tokenizer_fingerprint: str
    teacher_digest: str
    head: HeadForm
    signals: _containers.RepeatedScalarFieldContainer[Signal]
    note: str
    limits: TeacherLimits
    head_error: float
    batch_layout: str
    tokenizer_roles: TokenizerRoles
    engine: str
    def __init__(self, teacher_id: _Optional[str] = ..., domains: _Optional[_Iterable[str]] = ..., model_type: _Optional[str] = ..., vocab_size: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[_Union[_common_pb2.DType, str]] = ..., tokenizer_fingerprint: _Optional[str] = ..., teacher_digest: _Optional[str] = ..., head: _Optional[_Union[HeadForm, _Mapping]] = ..., signals: _Optional[_Iterable[_Union[Signal, str]]] = ..., note: _Optional[str] = ..., limits: _Optional[_Union[TeacherLimits, _Mapping]] = ..., head_error: _Optional[float] = ..., batch_layout: _Optional[str] = ..., tokenizer_roles: _Optional[_Union[TokenizerRoles, _Mapping]] = ..., engine: _Optional[str] = ...) -> None: ...

class TokenizerRoles(_message.Message):
    __slots__ = ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template_digest")
    BOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    PAD_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    chat_template_digest: str
    def __init__(self, bos_token_id: _Optional[int] = ..., eos_token_id: _Optional[int] = ..., pad_token_id: _Optional[int] = ..., chat_template_digest: _Optional[str] = ...) -> None: ...

class TeacherLimits(_message.Message):
    __slots__ = ("max_tokens_per_item", "max_items_in_flight", "max_top_k")
    MAX_TOKENS_PER_ITEM_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEMS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    max_tokens_per_item: int
    max_items_in_flight: int
    max_top_k: int
    def __init__(self, max_tokens_per_item: _Optional[int] = ..., max_items_in_flight: _Optional[int] = ..., max_top_k: _Optional[int] = ...) -> None: ...

class ListTeachersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTeachersResponse(_message.Message):
    __slots__ = ("teachers",)
    TEACHERS_FIELD_NUMBER: _ClassVar[int]
    teachers: _containers.RepeatedCompositeFieldContainer[TeacherCard]
    def __init__(self, teachers: _Optional[_Iterable[_Union[TeacherCard, _Mapping]]] = ...) -> None: ...

class GetTeacherRequest(_message.Message):
    __slots__ = ("teacher_id", "include_vocabulary")
    TEACHER_ID_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    teacher_id: str
    include_vocabulary: bool
    def __init__(self, teacher_id: _Optional[str] = ..., include_vocabulary: _Optional[bool] = ...) -> None: ...

class GetTeacherResponse(_message.Message):
    __slots__ = ("teacher", "vocabulary")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    teacher: TeacherCard
    vocabulary: _containers.RepeatedCompositeFieldContainer[VocabularyEntry]
    def __init__(self, teacher: _Optional[_Union[TeacherCard, _Mapping]] = ..., vocabulary: _Optional[_Iterable[_Union[VocabularyEntry, _Mapping]]] = ...) -> None: ...

class VocabularyEntry(_message.Message):
    __slots__ = ("token", "id")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    id: int
    def __init__(self, token: _Optional[bytes] = ..., id: _Optional[int] = ...) -> None: ...

class GetHeadRequest(_message.Message):
    __slots__ = ("teacher_id", "digest", "offset")
    TEACHER_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    teacher_id: str
    digest: str
    offset: int
    def __init__(self, teacher_id: _Optional[str] = ..., digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class GetHeadResponse(_message.Message):
    __slots__ = ("manifest", "chunk")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    manifest: HeadManifest
    chunk: HeadChunk
    def __init__(self, manifest: _Optional[_Union[HeadManifest, _Mapping]] = ..., chunk: _Optional[_Union[HeadChunk, _Mapping]] = ...) -> None: ...

class HeadManifest(_message.Message):
    __slots__ = ("form", "tensors", "total_bytes")
    FORM_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    form: HeadForm
    tensors: _containers.RepeatedCompositeFieldContainer[_common_pb2.TensorHeader]
    total_bytes: int
    def __init__(self, form: _Optional[_Union[HeadForm, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_common_pb2.TensorHeader, _Mapping]]] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class HeadChunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ScoreTrajectoriesRequest(_message.Message):
    __slots__ = ("item", "cancel_item_id", "items")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    CANCEL_ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    item: ScoreItem
    cancel_item_id: str
    items: ScoreItems
    def __init__(self, item: _Optional[_Union[ScoreItem, _Mapping]] = ..., cancel_item_id: _Optional[str] = ..., items: _Optional[_Union[ScoreItems, _Mapping]] = ...) -> None: ...

class ScoreItems(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    def __init__(self, items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ...) -> None: ...

class ScoreItem(_message.Message):
    __slots__ = ("item_id", "teacher_id", "token_ids", "scored_spans", "signal", "dtype", "timeout", "tokenizer_fingerprint", "expected_teacher_digest", "expected_head_digest", "top_k", "candidate_token_ids")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    TEACHER_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORED_SPANS_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TEACHER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_HEAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    teacher_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    scored_spans: _containers.RepeatedCompositeFieldContainer[_common_pb2.Span]
    signal: Signal
    dtype: _common_pb2.DType
    timeout: _duration_pb2.Duration
    tokenizer_fingerprint: str
    expected_teacher_digest: str
    expected_head_digest: str
    top_k: int
    candidate_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, item_id: _Optional[str] = ..., teacher_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., scored_spans: _Optional[_Iterable[_Union[_common_pb2.Span, _Mapping]]] = ..., signal: _Optional[_Union[Signal, str]] = ..., dtype: _Optional[_Union[_common_pb2.DType, str]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., tokenizer_fingerprint: _Optional[str] = ..., expected_teacher_digest: _Optional[str] = ..., expected_head_digest: _Optional[str] = ..., top_k: _Optional[int] = ..., candidate_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ScoreTrajectoriesResponse(_message.Message):
    __slots__ = ("item_id", "credits", "header", "chunk", "status", "answers", "takes_many")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    TAKES_MANY_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    credits: int
    header: ScoreHeader
    chunk: _common_pb2.TensorChunk
    status: _status_pb2.Status
    answers: ScoreAnswers
    takes_many: bool
    def __init__(self, item_id: _Optional[str] = ..., credits: _Optional[int] = ..., header: _Optional[_Union[ScoreHeader, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.TensorChunk, _Mapping]] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., answers: _Optional[_Union[ScoreAnswers, _Mapping]] = ..., takes_many: _Optional[bool] = ...) -> None: ...

class ScoreAnswers(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[ScoreAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[ScoreAnswer, _Mapping]]] = ...) -> None: ...

class ScoreAnswer(_message.Message):
    __slots__ = ("item_id", "header", "chunks", "status")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    header: ScoreHeader
    chunks: _containers.RepeatedCompositeFieldContainer[_common_pb2.TensorChunk]
    status: _status_pb2.Status
    def __init__(self, item_id: _Optional[str] = ..., header: _Optional[_Union[ScoreHeader, _Mapping]] = ..., chunks: _Optional[_Iterable[_Union[_common_pb2.TensorChunk, _Mapping]]] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class ScoreHeader(_message.Message):
    __slots__ = ("teacher_id", "teacher_digest", "head_digest", "signal", "rows", "tensors")
    TEACHER_ID_FIELD_NUMBER: _ClassVar[int]
    TEACHER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    teacher_id: str
    teacher_digest: str
    head_digest: str
    signal: Signal
    rows: int
    tensors: _containers.RepeatedCompositeFieldContainer[_common_pb2.TensorHeader]
    def __init__(self, teacher_id: _Optional[str] = ..., teacher_digest: _Optional[str] = ..., head_digest: _Optional[str] = ..., signal: _Optional[_Union[Signal, str]] = ..., rows: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[_common_pb2.TensorHeader, _Mapping]]] = ...) -> None: ...
