from google.rpc import status_pb2 as _status_pb2
from opd.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetPolicyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("policy", "tokenizer_fingerprint", "load", "limits", "cache_mode", "host_id", "base_digest")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CACHE_MODE_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    policy: _common_pb2.Policy
    tokenizer_fingerprint: str
    load: RolloutLoad
    limits: RolloutLimits
    cache_mode: str
    host_id: str
    base_digest: str
    def __init__(self, policy: _Optional[_Union[_common_pb2.Policy, _Mapping]] = ..., tokenizer_fingerprint: _Optional[str] = ..., load: _Optional[_Union[RolloutLoad, _Mapping]] = ..., limits: _Optional[_Union[RolloutLimits, _Mapping]] = ..., cache_mode: _Optional[str] = ..., host_id: _Optional[str] = ..., base_digest: _Optional[str] = ...) -> None: ...

class RolloutLoad(_message.Message):
    __slots__ = ("running", "waiting", "paused", "tokens_generated", "busy_s", "idle_s", "log_full", "prefill_tokens", "shared_prefill_tokens", "replayed_tokens", "preempted")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_GENERATED_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    LOG_FULL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHARED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    paused: bool
    tokens_generated: int
    busy_s: float
    idle_s: float
    log_full: bool
    prefill_tokens: int
    shared_prefill_tokens: int
    replayed_tokens: int
    preempted: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., paused: _Optional[bool] = ..., tokens_generated: _Optional[int] = ..., busy_s: _Optional[float] = ..., idle_s: _Optional[float] = ..., log_full: _Optional[bool] = ..., prefill_tokens: _Optional[int] = ..., shared_prefill_tokens: _Optional[int] = ..., replayed_tokens: _Optional[int] = ..., preempted: _Optional[int] = ...) -> None: ...

class RolloutLimits(_message.Message):
    __slots__ = ("max_context_tokens", "max_slots", "max_waiting", "grammars", "max_kept_ids")
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    GRAMMARS_FIELD_NUMBER: _ClassVar[int]
    MAX_KEPT_IDS_FIELD_NUMBER: _ClassVar[int]
    max_context_tokens: int
    max_slots: int
    max_waiting: int
    grammars: bool
    max_kept_ids: int
    def __init__(self, max_context_tokens: _Optional[int] = ..., max_slots: _Optional[int] = ..., max_waiting: _Optional[int] = ..., grammars: _Optional[bool] = ..., max_kept_ids: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "run_id", "domain", "prompt_token_ids", "sampling", "from_index", "publish", "tokenizer_fingerprint", "last_seen", "shared_prefix_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    FROM_INDEX_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    SHARED_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    domain: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    from_index: int
    publish: bool
    tokenizer_fingerprint: str
    last_seen: SeenToken
    shared_prefix_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ..., domain: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., from_index: _Optional[int] = ..., publish: _Optional[bool] = ..., tokenizer_fingerprint: _Optional[str] = ..., last_seen: _Optional[_Union[SeenToken, _Mapping]] = ..., shared_prefix_tokens: _Optional[int] = ...) -> None: ...

class SeenToken(_message.Message):
    __slots__ = ("token_id", "policy_logprob", "policy_version")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    policy_logprob: float
    policy_version: int
    def __init__(self, token_id: _Optional[int] = ..., policy_logprob: _Optional[float] = ..., policy_version: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "tokens", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: GenerationStarted
    tokens: TokenBatch
    finished: GenerationFinished
    def __init__(self, started: _Optional[_Union[GenerationStarted, _Mapping]] = ..., tokens: _Optional[_Union[TokenBatch, _Mapping]] = ..., finished: _Optional[_Union[GenerationFinished, _Mapping]] = ...) -> None: ...

class GenerationStarted(_message.Message):
    __slots__ = ("attached", "policy")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    attached: bool
    policy: _common_pb2.Policy
    def __init__(self, attached: _Optional[bool] = ..., policy: _Optional[_Union[_common_pb2.Policy, _Mapping]] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("first_index", "token_ids", "sampling_logprobs", "policy_logprobs", "policy_versions", "kept_token_ids")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    POLICY_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling_logprobs: _containers.RepeatedScalarFieldContainer[float]
    policy_logprobs: _containers.RepeatedScalarFieldContainer[float]
    policy_versions: _containers.RepeatedScalarFieldContainer[int]
    kept_token_ids: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenIds]
    def __init__(self, first_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling_logprobs: _Optional[_Iterable[float]] = ..., policy_logprobs: _Optional[_Iterable[float]] = ..., policy_versions: _Optional[_Iterable[int]] = ..., kept_token_ids: _Optional[_Iterable[_Union[_common_pb2.TokenIds, _Mapping]]] = ...) -> None: ...

class GenerationFinished(_message.Message):
    __slots__ = ("trajectory", "stream_entry_id")
    TRAJECTORY_FIELD_NUMBER: _ClassVar[int]
    STREAM_ENTRY_ID_FIELD_NUMBER: _ClassVar[int]
    trajectory: _common_pb2.Trajectory
    stream_entry_id: str
    def __init__(self, trajectory: _Optional[_Union[_common_pb2.Trajectory, _Mapping]] = ..., stream_entry_id: _Optional[str] = ...) -> None: ...

class GenerateBatchRequest(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[GenerateBatchItem]
    def __init__(self, items: _Optional[_Iterable[_Union[GenerateBatchItem, _Mapping]]] = ...) -> None: ...

class GenerateBatchItem(_message.Message):
    __slots__ = ("request", "tag", "return_trajectory")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    RETURN_TRAJECTORY_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    tag: int
    return_trajectory: bool
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., tag: _Optional[int] = ..., return_trajectory: _Optional[bool] = ...) -> None: ...

class GenerateBatchResponse(_message.Message):
    __slots__ = ("credits", "results")
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    credits: int
    results: _containers.RepeatedCompositeFieldContainer[GenerateBatchResult]
    def __init__(self, credits: _Optional[int] = ..., results: _Optional[_Iterable[_Union[GenerateBatchResult, _Mapping]]] = ...) -> None: ...

class GenerateBatchResult(_message.Message):
    __slots__ = ("request_id", "run_id", "tag", "status", "num_tokens", "finish_reason", "stream_entry_id", "trajectory")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STREAM_ENTRY_ID_FIELD_NUMBER: _ClassVar[int]
    TRAJECTORY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    tag: int
    status: _status_pb2.Status
    num_tokens: int
    finish_reason: _common_pb2.FinishReason
    stream_entry_id: str
    trajectory: _common_pb2.Trajectory
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ..., tag: _Optional[int] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., num_tokens: _Optional[int] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., stream_entry_id: _Optional[str] = ..., trajectory: _Optional[_Union[_common_pb2.Trajectory, _Mapping]] = ...) -> None: ...

class CancelGenerationRequest(_message.Message):
    __slots__ = ("request_id", "run_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ...) -> None: ...

class CancelGenerationResponse(_message.Message):
    __slots__ = ("cancelled", "tokens_written")
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    cancelled: bool
    tokens_written: int
    def __init__(self, cancelled: _Optional[bool] = ..., tokens_written: _Optional[int] = ...) -> None: ...

class UpdatePolicyRequest(_message.Message):
    __slots__ = ("manifest", "chunk")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    manifest: PolicyManifest
    chunk: _common_pb2.TensorChunk
    def __init__(self, manifest: _Optional[_Union[PolicyManifest, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class PolicyManifest(_message.Message):
    __slots__ = ("policy", "tensors", "tokenizer_fingerprint", "tensor_digests", "base", "adapter", "shared_memory")
    class TensorDigestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TENSOR_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    policy: _common_pb2.Policy
    tensors: _containers.RepeatedCompositeFieldContainer[_common_pb2.TensorHeader]
    tokenizer_fingerprint: str
    tensor_digests: _containers.ScalarMap[str, str]
    base: _common_pb2.Policy
    adapter: LoraAdapter
    shared_memory: SharedMemory
    def __init__(self, policy: _Optional[_Union[_common_pb2.Policy, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_common_pb2.TensorHeader, _Mapping]]] = ..., tokenizer_fingerprint: _Optional[str] = ..., tensor_digests: _Optional[_Mapping[str, str]] = ..., base: _Optional[_Union[_common_pb2.Policy, _Mapping]] = ..., adapter: _Optional[_Union[LoraAdapter, _Mapping]] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ...) -> None: ...

class LoraAdapter(_message.Message):
    __slots__ = ("base_digest", "scaling", "transposed")
    class ScalingEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    TRANSPOSED_FIELD_NUMBER: _ClassVar[int]
    base_digest: str
    scaling: _containers.ScalarMap[str, float]
    transposed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, base_digest: _Optional[str] = ..., scaling: _Optional[_Mapping[str, float]] = ..., transposed: _Optional[_Iterable[str]] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("name", "byte_size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTE_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    byte_size: int
    def __init__(self, name: _Optional[str] = ..., byte_size: _Optional[int] = ...) -> None: ...

class UpdatePolicyResponse(_message.Message):
    __slots__ = ("policy", "swapped", "pause_s", "prefilled_again")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_FIELD_NUMBER: _ClassVar[int]
    PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_AGAIN_FIELD_NUMBER: _ClassVar[int]
    policy: _common_pb2.Policy
    swapped: bool
    pause_s: float
    prefilled_again: int
    def __init__(self, policy: _Optional[_Union[_common_pb2.Policy, _Mapping]] = ..., swapped: _Optional[bool] = ..., pause_s: _Optional[float] = ..., prefilled_again: _Optional[int] = ...) -> None: ...

class PauseGenerationRequest(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class PauseGenerationResponse(_message.Message):
    __slots__ = ("load",)
    LOAD_FIELD_NUMBER: _ClassVar[int]
    load: RolloutLoad
    def __init__(self, load: _Optional[_Union[RolloutLoad, _Mapping]] = ...) -> None: ...

class ResumeGenerationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeGenerationResponse(_message.Message):
    __slots__ = ("load",)
    LOAD_FIELD_NUMBER: _ClassVar[int]
    load: RolloutLoad
    def __init__(self, load: _Optional[_Union[RolloutLoad, _Mapping]] = ...) -> None: ...
