"""One open ``ScoreTrajectories`` call: many items in flight, each with its own deadline, answer and error."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.protobuf import duration_pb2
from google.rpc import status_pb2
from opd.v1 import common_pb2, teacher_service_pb2

from opd_mesh.chunk_codec import RawChunk, decode_response
from opd_mesh.errors import DeadlineError, InternalError, OpdError, TensorDecodeError, UnavailableError
from opd_mesh.rpc.status import error_of, error_of_rpc
from opd_mesh.rpc.writer import MESSAGE_BYTES, write_when_woken
from opd_mesh.tensors import Chunk, TensorAssembler, dtype_code


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One sequence to be marked by one teacher; see ``ScoreItem`` in the proto."""

    teacher_id: str
    token_ids: Sequence[int]
    scored_spans: Sequence[tuple[int, int]]
    tokenizer_fingerprint: str
    signal: teacher_service_pb2.Signal = teacher_service_pb2.SIGNAL_HIDDEN_STATES
    dtype: str | None = None  # None: the teacher's own
    timeout_s: float = 120.0  # all attempts together
    expected_teacher_digest: str = ""
    expected_head_digest: str = ""
    top_k: int = 0
    candidate_token_ids: Sequence[int] = ()  # [R · top_k]


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """A teacher's answer: tensors by name, R rows each (DESIGN §4, alignment)."""

    teacher_id: str
    teacher_digest: str
    head_digest: str
    tensors: dict[str, np.ndarray]
    wire_bytes: int  # of the messages received for this item


@dataclass(slots=True)
class _Pending:
    item: teacher_service_pb2.ScoreItem
    future: asyncio.Future[ScoreResult]
    header: teacher_service_pb2.ScoreHeader | None = None
    assembler: TensorAssembler | None = None
    wire_bytes: int = 0


@dataclass(slots=True)
class WireCount:
    """Bytes of protobuf messages, both ways, without HTTP/2 framing."""

    sent: int = 0
    received: int = 0
    items: int = 0


def open_scoring_call(channel: grpc.aio.Channel) -> Any:
    """A ``ScoreTrajectories`` call whose chunks are read without protobuf's copies."""
    return channel.stream_stream(
        "/opd.v1.TeacherService/ScoreTrajectories",
        request_serializer=teacher_service_pb2.ScoreTrajectoriesRequest.SerializeToString,
        response_deserializer=decode_response,
    )()


class ScoringStream:
    """One open ``ScoreTrajectories`` stream: many items in flight, each with its own result or error."""

    def __init__(self, call: Any, target: str, wire: WireCount) -> None:
        self._call = call
        self._target = target
        self._wire = wire
        self._waiting: deque[_Pending] = deque()  # for a credit, or for the writer
        self._pending: dict[str, _Pending] = {}  # sent
        self._cancelled: deque[str] = deque()  # item ids that the server has yet to be told
        self._ids = itertools.count(1)
        self._granted_credits: int | None = None
        self._takes_many = False
        self._wake = asyncio.Event()  # of the writer
        self._broken: OpdError | None = None
        self._reader = asyncio.create_task(self._read())
        self._writer = asyncio.create_task(self._write())

    @property
    def broken(self) -> OpdError | None:
        """Why the stream can take no more items, or None."""
        return self._broken

    @property
    def credits(self) -> int | None:
        """Items that the server allows in flight; None before it has said so."""
        return self._granted_credits

    def abandon(self, error: OpdError) -> None:
        """Fail every item in flight with ``error`` without a word to the server, which may not listen."""
        if self._broken is None:
            self._call.cancel()
            self._break(error)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Send one item and wait for its answer.

        Raises:
            OpdError: as the server says of this item; :class:`DeadlineError` after ``timeout_s``;
                :class:`UnavailableError` where the stream broke.

        Cancelling this coroutine gives the item up on the server, too.
        """
        item_id = f"i{next(self._ids)}"
        item = teacher_service_pb2.ScoreItem(
            item_id=item_id,
            teacher_id=request.teacher_id,
            token_ids=request.token_ids,
            scored_spans=[common_pb2.Span(start=start, end=end) for start, end in request.scored_spans],
            signal=request.signal,
            dtype=dtype_code(request.dtype) if request.dtype else common_pb2.D_TYPE_UNSPECIFIED,
            timeout=duration_pb2.Duration(seconds=int(request.timeout_s), nanos=int((request.timeout_s % 1) * 1e9)),
            tokenizer_fingerprint=request.tokenizer_fingerprint,
            expected_teacher_digest=request.expected_teacher_digest,
            expected_head_digest=request.expected_head_digest,
            top_k=request.top_k,
            candidate_token_ids=request.candidate_token_ids,
        )
        if self._broken is not None:
            raise self._broken
        pending = _Pending(item, asyncio.get_running_loop().create_future())
        self._waiting.append(pending)
        self._wake.set()
        try:
            async with asyncio.timeout(request.timeout_s):
                return await pending.future
        except TimeoutError:
            raise DeadlineError(
                f"teacher {request.teacher_id!r} at {self._target} did not answer within {request.timeout_s:g} s",
                metadata={"teacher_id": request.teacher_id, "target": self._target},
            ) from None
        finally:
            if self._pending.pop(item_id, None) is not None and self._broken is None:  # sent, and not answered
                self._cancelled.append(item_id)
                self._wake.set()

    async def _write(self) -> None:
        def next_message() -> teacher_service_pb2.ScoreTrajectoriesRequest | None:
            message = self._next_message()
            self._wire.sent += 0 if message is None else message.ByteSize()
            return message

        self._break(
            await write_when_woken(self._call, self._wake, next_message, reader=self._reader, target=self._target)
        )

    def _next_message(self) -> teacher_service_pb2.ScoreTrajectoriesRequest | None:
        """Items given up first, for their credits are used again; then as many as there are credits for."""
        if self._cancelled:
            return teacher_service_pb2.ScoreTrajectoriesRequest(cancel_item_id=self._cancelled.popleft())
        items: list[teacher_service_pb2.ScoreItem] = []
        size, most = 0, MESSAGE_BYTES if self._takes_many else 1
        while self._waiting and len(self._pending) < (self._granted_credits or 0) and size < most:
            pending = self._waiting.popleft()
            if not pending.future.done():  # else given up before it was sent
                self._pending[pending.item.item_id] = pending
                items.append(pending.item)
                size += pending.item.ByteSize()
        if not items:
            return None
        if len(items) == 1 and not self._takes_many:
            return teacher_service_pb2.ScoreTrajectoriesRequest(item=items[0])
        return teacher_service_pb2.ScoreTrajectoriesRequest(items=teacher_service_pb2.ScoreItems(items=items))

    async def _read(self) -> None:
        failure: OpdError = UnavailableError(f"{self._target} ended the stream")
        try:
            async for response in self._call:
                if isinstance(response, RawChunk):
                    self._wire.received += response.size
                    self._take_chunk(response)
                else:
                    self._wire.received += response.ByteSize()
                    self._take(response)
        except grpc.aio.AioRpcError as error:
            failure = error_of_rpc(error, target=self._target)
        except asyncio.CancelledError:
            failure = UnavailableError("the stream was closed here")
            raise
        except Exception as error:  # noqa: BLE001 - handed to every waiting item, with its cause
            failure = InternalError(f"{self._target}: unreadable answer: {error}")
            failure.__cause__ = error
            self._call.cancel()
        finally:
            self._break(failure)

    def _break(self, error: OpdError) -> None:
        self._broken = self._broken or error
        self._writer.cancel()
        for pending in [*self._pending.values(), *self._waiting]:
            if not pending.future.done():
                pending.future.set_exception(self._broken)
        self._pending.clear()
        self._waiting.clear()

    def _take_chunk(self, chunk: RawChunk) -> None:
        pending = self._pending.get(chunk.item_id)
        if pending is None or pending.future.done():
            return  # given up meanwhile
        pending.wire_bytes += chunk.size
        self._add_chunk(pending, chunk)

    def _add_chunk(self, pending: _Pending, chunk: Chunk) -> None:
        try:
            if pending.assembler is None:
                raise TensorDecodeError("chunk before header", field="chunk")
            pending.assembler.add(chunk)
        except TensorDecodeError as error:
            pending.future.set_exception(error)

    def _take(self, response: teacher_service_pb2.ScoreTrajectoriesResponse) -> None:
        kind = response.WhichOneof("payload")
        if kind == "credits":
            self._granted_credits, self._takes_many = response.credits, response.takes_many
            self._wake.set()
            return
        if kind == "answers":
            for answer in response.answers.answers:
                self._take_answer(answer)
            return
        pending = self._pending.get(response.item_id)
        if pending is None or pending.future.done():
            return  # given up meanwhile
        pending.wire_bytes += response.ByteSize()
        try:
            if kind == "header":
                pending.header = response.header
                pending.assembler = TensorAssembler(response.header.tensors)
            elif kind == "chunk":
                self._add_chunk(pending, response.chunk)
            elif kind == "status":
                self._end(response.item_id, response.status, pending)
        except TensorDecodeError as error:
            pending.future.set_exception(error)

    def _take_answer(self, answer: teacher_service_pb2.ScoreAnswer) -> None:
        pending = self._pending.get(answer.item_id)
        if pending is None or pending.future.done():
            return  # given up meanwhile
        pending.wire_bytes += answer.ByteSize()
        try:
            if answer.HasField("header"):
                pending.header = answer.header
                pending.assembler = TensorAssembler(answer.header.tensors)
                for chunk in answer.chunks:
                    pending.assembler.add(chunk)
            self._end(answer.item_id, answer.status, pending)
        except TensorDecodeError as error:
            pending.future.set_exception(error)

    def _end(self, item_id: str, status: status_pb2.Status, pending: _Pending) -> None:
        del self._pending[item_id]
        self._wake.set()
        if status.code != 0:
            pending.future.set_exception(error_of(status))
            return
        if pending.header is None or pending.assembler is None:
            raise TensorDecodeError("answer without a header", field="header")
        header = pending.header
        tensors = pending.assembler.finish()
        for name, array in tensors.items():
            if array.shape[0] != header.rows:
                raise TensorDecodeError(f"{array.shape[0]} rows, the header says {header.rows}", field=name)
        self._wire.items += 1
        pending.future.set_result(
            ScoreResult(header.teacher_id, header.teacher_digest, header.head_digest, tensors, pending.wire_bytes)
        )

    async def close(self) -> None:
        """End the stream. Items in flight fail."""
        if self._broken is None:
            self._broken = UnavailableError("the stream was closed here")
            self._call.cancel()
        self._reader.cancel()
        self._writer.cancel()
        await asyncio.gather(self._reader, self._writer, return_exceptions=True)
        self._break(self._broken)
