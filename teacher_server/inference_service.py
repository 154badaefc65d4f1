"""``inference.GRPCInferenceService``: teachers for clients of the Open Inference Protocol (KServe, Triton).

A teacher is a model of version "1": token ids in, logits, hidden states or log-probabilities out, one sequence a
request, one message an answer. ``docs/clients.md`` shows how to call it.

Letters: N tokens of the sequence, R rows of an answer, V vocabulary, d hidden size.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import numpy as np
from opd.inference import grpc_service_pb2 as pb
from opd.inference import grpc_service_pb2_grpc

import opd_mesh
from opd_mesh.errors import (
    DeadlineError,
    InvalidInputError,
    NotFoundError,
    SignalNotOfferedError,
    TokenizerMismatchError,
    TooLongError,
    UnknownTeacherError,
)
from opd_mesh.rpc.server import MeshServer
from opd_mesh.tensors import DTYPES, byte_view, dtype_code
from teacher_server.catalogue import Catalogue
from teacher_server.engine import EngineFacts, ScoreJob, Signal

SERVICE = "inference.GRPCInferenceService"
SERVER_NAME = "opd_mesh"
VERSION = "1"
INPUT = "input_ids"
# Outputs bear the names that the engines give to their tensors.
OUTPUTS = {"logits": Signal.LOGITS, "hidden_states": Signal.HIDDEN_STATES, "logprobs": Signal.TOKEN_LOGPROBS}
DATATYPES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
DTYPES_BACK = {datatype: dtype for dtype, datatype in DATATYPES.items()}
# Of the ids: how they look in bytes, and which field of `contents` has them.
ID_DATATYPES: dict[str, tuple[np.dtype, str]] = {
    "INT64": (np.dtype("<i8"), "int64_contents"),
    "INT32": (np.dtype("<i4"), "int_contents"),
}
PARAMETERS = ("position_start", "position_end", "dtype", "tokenizer_fingerprint", "timeout")
# A hint about Python's types that some clients add to everything; it changes nothing on the wire.
IGNORED_PARAMETERS = ("content_type",)
# Tag and length of one element of raw_output_contents, at most.
TENSOR_FRAME_BYTES = 8

Context: TypeAlias = grpc.aio.ServicerContext
Parameters: TypeAlias = Mapping[str, pb.InferParameter]


@dataclass(frozen=True, slots=True)
class AskedOutput:
    """One output of a request, checked. ``shape`` is [R, ...], or [1, R, ...] where the input had a batch of one."""

    name: str
    job: ScoreJob
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its tensor."""
        return math.prod(self.shape) * DTYPES[dtype_code(self.job.dtype)].itemsize


class InferenceServicer(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """Not ready until the catalogue has been given its engines.

    Args:
        is_serving: what the server's health says, so that both kinds of probe see the same.
    """

    def __init__(self, catalogue: Catalogue, is_serving: Callable[[], bool]) -> None:
        self.catalogue = catalogue
        self._is_serving = is_serving
        self._config = catalogue.config

    # --- health and metadata -----------------------------------------------------------------------------------
    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """True."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """False while teachers are loaded, and from the beginning of a drain on."""
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """False for a teacher or version that is not here, as Triton does."""
        if not self._ready():
            return pb.ModelReadyResponse(ready=False)
        try:
            self._facts(request.name, request.version)
        except NotFoundError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Name and version; no extension of the protocol."""
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=opd_mesh.__version__)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Inputs and outputs, in the dtypes that are sent where none is asked for."""
        facts = self._facts(request.name, request.version, "name", "version")
        response = pb.ModelMetadataResponse(name=request.name, versions=[VERSION], platform=SERVER_NAME)
        response.inputs.add(name=INPUT, datatype="INT64", shape=[-1])
        for name, signal in OUTPUTS.items():
            if signal in facts.signals:
                datatype = DATATYPES[signal.own_dtype(facts.dtype)]
                response.outputs.add(name=name, datatype=datatype, shape=[-1, *_row_shape(signal, facts)])
        return response

    def _ready(self) -> bool:
        return self.catalogue.ready and self._is_serving()

    def _facts(
        self, name: str, version: str, name_field: str = "model_name", version_field: str = "model_version"
    ) -> EngineFacts:
        """Raises UnavailableError while loading, UnknownTeacherError, NotFoundError."""
        try:
            facts = self.catalogue.get(name).engine.facts
        except UnknownTeacherError as error:
            raise UnknownTeacherError(error.message, field=name_field) from None
        if version not in ("", VERSION):
            raise NotFoundError(f"teacher {name!r} has version {VERSION!r} alone, not {version!r}", field=version_field)
        return facts

    # --- inference ---------------------------------------------------------------------------------------------
    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """One sequence, marked. A call that is cancelled, or whose deadline passes, leaves the queue.

        Several outputs are computed one after the other, a forward pass each.

        Raises:
            InvalidInputError, TooLongError, UnknownTeacherError, NotFoundError, TokenizerMismatchError,
            SignalNotOfferedError: naming the field.
            DeadlineError, OverloadedError, UnavailableError: not now.
        """
        facts = self._facts(request.model_name, request.model_version)
        limit = self._config.teachers[request.model_name].max_tokens_per_item
        asked = asked_outputs(request, facts, max_tokens=limit)
        response = _answer_without_data(request, facts, asked)
        _check_fits(response, asked, self._config.server.max_message_bytes)
        timeout_s = self._timeout_s(request.parameters, context.time_remaining())
        try:
            async with asyncio.timeout(timeout_s):
                for output in asked:
                    tensors = await self.catalogue.score(request.model_name, output.job)
                    response.raw_output_contents.append(bytes(byte_view(tensors[output.name])))
        except TimeoutError:
            raise DeadlineError(f"not computed within {timeout_s:g} s") from None
        return response

    def _timeout_s(self, parameters: Parameters, remaining_s: float | None) -> float:
        """The call's deadline and the parameter ``timeout`` (microseconds), whichever is sooner; none: the default."""
        asked_us = _integer(parameters, "timeout")
        if asked_us is not None and asked_us < 0:
            raise InvalidInputError(f"{asked_us} microseconds", field="parameters.timeout")
        bounds = [remaining_s] if remaining_s is not None else []
        if asked_us:  # 0: without bound, in this protocol
            bounds.append(asked_us / 1e6)
        return min(bounds, default=self._config.default_item_timeout_s)


def add_inference_service(server: MeshServer, catalogue: Catalogue) -> None:
    """Register the service; ``server`` names :data:`SERVICE` among its services, for health and reflection."""
    servicer = InferenceServicer(catalogue, lambda: server.serving)
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server.grpc)


# --- what a request asks for ---------------------------------------------------------------------------------------
def asked_outputs(request: pb.ModelInferRequest, facts: EngineFacts, *, max_tokens: int) -> list[AskedOutput]:
    """The jobs of a request, in the order of its outputs; none named: the logits.

    Row r of an output is the model's at position ``position_start`` + r, and speaks of the token after it.

    Raises:
        InvalidInputError, TooLongError, TokenizerMismatchError, SignalNotOfferedError: naming the field.
    """
    _check_known(request.parameters, PARAMETERS, "parameters")
    fingerprint = _text(request.parameters, "tokenizer_fingerprint")
    if fingerprint not in (None, facts.tokenizer_fingerprint):
        raise TokenizerMismatchError(
            f"the ids come from tokenizer {fingerprint[:16]}…, but teacher {request.model_name!r} has "
            f"{facts.tokenizer_fingerprint[:16]}…",
            field="parameters.tokenizer_fingerprint",
            metadata={"teacher_id": request.model_name, "teacher_fingerprint": facts.tokenizer_fingerprint},
        )
    token_ids, batch_shape = token_ids_of(request, vocab_size=facts.vocab_size, max_tokens=max_tokens)
    wanted = list(request.outputs) or [pb.ModelInferRequest.InferRequestedOutputTensor(name="logits")]
    if len({output.name for output in wanted}) != len(wanted):
        raise InvalidInputError("an output is named twice", field="outputs")
    asked = []
    for index, output in enumerate(wanted):
        field = f"outputs[{index}]"
        _check_known(output.parameters, ("dtype",), f"{field}.parameters")
        signal = _offered_signal(output.name, facts, request.model_name, f"{field}.name")
        positions = _positions(request.parameters, len(token_ids), output.name)
        dtype = _dtype(output.parameters, f"{field}.") or _dtype(request.parameters) or signal.own_dtype(facts.dtype)
        job = ScoreJob(token_ids, positions, signal, dtype)
        asked.append(AskedOutput(output.name, job, (*batch_shape, len(positions), *_row_shape(signal, facts))))
    return asked


def token_ids_of(
    request: pb.ModelInferRequest, *, vocab_size: int, max_tokens: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids [N], shape of the batch: () or (1,)) of the one input.

    Raises:
        InvalidInputError: naming the field.
        TooLongError: more than ``max_tokens`` ids.
    """
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
        names = ", ".join(repr(given.name) for given in request.inputs) or "none"
        raise InvalidInputError(f"expected one input, {INPUT!r}; got {names}", field="inputs")
    (given,) = request.inputs
    field = "inputs[0]"
    _check_known(given.parameters, (), f"{field}.parameters")
    if given.datatype not in ID_DATATYPES:
        raise InvalidInputError(
            f"{given.datatype!r}; {INPUT} is {' or '.join(ID_DATATYPES)}", field=f"{field}.datatype"
        )
    shape = list(given.shape)
    if len(shape) not in (1, 2) or shape[:-1] not in ([], [1]):
        raise InvalidInputError(
            f"{shape}; expected [N] or [1, N]. One sequence a request: send several requests at once, and the server "
            "batches them, whatever their lengths",
            field=f"{field}.shape",
        )
    num_tokens = shape[-1]
    if num_tokens < 1:
        raise InvalidInputError(f"{shape}; at least one token is needed", field=f"{field}.shape")
    if num_tokens > max_tokens:
        raise TooLongError(f"{num_tokens} tokens, but at most {max_tokens} are accepted", field=f"{field}.shape")
    ids_N = _ids(request, given, num_tokens)
    outside = np.flatnonzero((ids_N < 0) | (ids_N >= vocab_size))
    if outside.size:
        raise InvalidInputError(
            f"token id {ids_N[outside[0]]} at position {outside[0]} is outside the vocabulary of {vocab_size}",
            field=INPUT,
        )
    return tuple(ids_N.tolist()), tuple(shape[:-1])


def _ids(request: pb.ModelInferRequest, given: pb.ModelInferRequest.InferInputTensor, num_tokens: int) -> np.ndarray:
    """[N] of the datatype announced, from the raw bytes or the typed contents."""
    dtype, contents_field = ID_DATATYPES[given.datatype]
    filled = [descriptor.name for descriptor, _ in given.contents.ListFields()]
    raw = request.raw_input_contents
    if raw:
        if filled:
            raise InvalidInputError(
                "raw_input_contents and inputs[0].contents exclude each other", field="raw_input_contents"
            )
        if len(raw) != len(request.inputs):
            raise InvalidInputError(f"{len(raw)} elements for {len(request.inputs)} inputs", field="raw_input_contents")
        data = raw[0]  # one copy; reading the field again would be another
        expected = num_tokens * dtype.itemsize
        if len(data) != expected:
            raise InvalidInputError(
                f"{len(data)} bytes, but shape {list(given.shape)} of {given.datatype} has {expected}",
                field="raw_input_contents[0]",
            )
        return np.frombuffer(data, dtype)
    if filled not in ([], [contents_field]):
        raise InvalidInputError(
            f"{given.datatype} belongs into {contents_field}, got {', '.join(filled)}", field="inputs[0].contents"
        )
    values = getattr(given.contents, contents_field)
    if len(values) != num_tokens:
        raise InvalidInputError(
            f"{len(values)} values in {contents_field} and no raw_input_contents, but shape {list(given.shape)} has "
            f"{num_tokens}",
            field="inputs[0].contents",
        )
    return np.array(list(values), dtype)


def _offered_signal(name: str, facts: EngineFacts, teacher_id: str, field: str) -> Signal:
    signal = OUTPUTS.get(name)
    offered = ", ".join(name for name, signal in OUTPUTS.items() if signal in facts.signals)
    if signal is None:
        raise InvalidInputError(f"no output {name!r}; there are {offered}", field=field)
    if signal not in facts.signals:
        raise SignalNotOfferedError(
            f"teacher {teacher_id!r} offers {offered}, not {name}. {facts.note}".strip(), field=field
        )
    return signal


def _positions(parameters: Parameters, num_tokens: int, name: str) -> tuple[int, ...]:
    """[R] the positions asked for; of log-probabilities the last has none, for no token follows it."""
    last = num_tokens - 1 if OUTPUTS[name] is Signal.TOKEN_LOGPROBS else num_tokens
    start = _integer(parameters, "position_start") or 0
    end = _integer(parameters, "position_end")
    end = last if end is None else end
    if not 0 <= start < end <= last:
        raise InvalidInputError(
            f"[{start}, {end}) is no range within the {last} positions of {num_tokens} tokens that have {name}",
            field="parameters.position_start, parameters.position_end",
        )
    return tuple(range(start, end))


def _row_shape(signal: Signal, facts: EngineFacts) -> tuple[int, ...]:
    """Of one row of an output."""
    match signal:
        case Signal.LOGITS:
            return (facts.vocab_size,)
        case Signal.HIDDEN_STATES:
            return (facts.hidden_size,)
        case _:
            return ()


# --- parameters ----------------------------------------------------------------------------------------------------
def _check_known(parameters: Parameters, known: Iterable[str], field: str) -> None:
    """A misspelt parameter would silently give other rows, or another dtype, than the caller believes."""
    for name in parameters:
        if name not in (*known, *IGNORED_PARAMETERS):
            raise InvalidInputError(
                f"no parameter {name!r} here; known are {', '.join(known) or 'none'}", field=f"{field}.{name}"
            )


def _integer(parameters: Parameters, name: str) -> int | None:
    if name not in parameters:
        return None
    choice = parameters[name].WhichOneof("parameter_choice")
    if choice not in ("int64_param", "uint64_param"):
        raise InvalidInputError(f"expected an int64_param, got {choice}", field=f"parameters.{name}")
    return int(getattr(parameters[name], choice))


def _text(parameters: Parameters, name: str, prefix: str = "") -> str | None:
    if name not in parameters:
        return None
    choice = parameters[name].WhichOneof("parameter_choice")
    if choice != "string_param":
        raise InvalidInputError(f"expected a string_param, got {choice}", field=f"{prefix}parameters.{name}")
    return parameters[name].string_param


def _dtype(parameters: Parameters, prefix: str = "") -> str | None:
    datatype = _text(parameters, "dtype", prefix)
    if datatype is None:
        return None
    if datatype not in DTYPES_BACK:
        raise InvalidInputError(f"{datatype!r}; expected {', '.join(DTYPES_BACK)}", field=f"{prefix}parameters.dtype")
    return DTYPES_BACK[datatype]


# --- the answer ----------------------------------------------------------------------------------------------------
def _answer_without_data(
    request: pb.ModelInferRequest, facts: EngineFacts, asked: Iterable[AskedOutput]
) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
    response.parameters["teacher_digest"].string_param = facts.teacher_digest
    response.parameters["tokenizer_fingerprint"].string_param = facts.tokenizer_fingerprint
    if facts.head is not None:
        response.parameters["head_digest"].string_param = facts.head.digest
    for output in asked:
        response.outputs.add(name=output.name, datatype=DATATYPES[output.job.dtype], shape=output.shape)
    return response


def _check_fits(response: pb.ModelInferResponse, asked: Iterable[AskedOutput], limit: int) -> None:
    """Before anything is computed. Raises :class:`TooLongError` that says how many rows fit."""
    asked = list(asked)
    frame = response.ByteSize() + TENSOR_FRAME_BYTES * len(asked)
    needed = sum(output.num_bytes for output in asked)
    if frame + needed <= limit:
        return
    rows = max(len(output.job.predicting_positions) for output in asked)
    row_bytes = sum(output.num_bytes // len(output.job.predicting_positions) for output in asked)
    fitting = max(0, limit - frame) // row_bytes
    raise TooLongError(
        f"the answer has {rows} rows and {needed} bytes, but a message holds {limit}: {fitting} rows fit. Ask for "
        "fewer with position_start and position_end, or for a narrower dtype; opd.v1.TeacherService streams any size",
        field="outputs",
    )
