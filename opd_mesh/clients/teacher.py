"""Client of ``opd.v1.TeacherService``."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
from google.protobuf import duration_pb2
from opd.v1 import common_pb2, teacher_service_pb2, teacher_service_pb2_grpc

from opd_mesh.clients.base import ServiceClient
from opd_mesh.config.services import ChannelConfig
from opd_mesh.errors import (
    DeadlineError,
    HeadMismatchError,
    InternalError,
    OpdError,
    TeacherUnavailableError,
    TensorDecodeError,
    UnavailableError,
)
from opd_mesh.rpc.channel import open_channel, responses_of, rpc_errors, targets_text, wait_until_serving
from opd_mesh.rpc.status import error_of, error_of_rpc
from opd_mesh.tensors import TensorAssembler, check_header, dtype_code

SERVICE = "opd.v1.TeacherService"
# A server that has computed for `timeout_s` still needs time to send; past this the client stops waiting itself.
TRANSFER_SLACK_S = 10.0


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One sequence to be marked by one teacher; see ``ScoreItem`` in the proto."""

    teacher_id: str
    token_ids: Sequence[int]
    scored_spans: Sequence[tuple[int, int]]
    tokenizer_fingerprint: str
    signal: teacher_service_pb2.Signal = teacher_service_pb2.SIGNAL_HIDDEN_STATES
    dtype: str | None = None  # None: the teacher's own
    timeout_s: float = 120.0
    expected_teacher_digest: str = ""
    expected_head_digest: str = ""
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """A teacher's answer: tensors by name, R rows each (DESIGN §4, alignment)."""

    teacher_id: str
    teacher_digest: str
    head_digest: str
    tensors: dict[str, np.ndarray]
    wire_bytes: int  # of the messages received for this item


@dataclass(frozen=True, slots=True)
class HeadData:
    """A downloaded head: its form and its tensors ("weight" [V, d], "bias" [V])."""

    form: teacher_service_pb2.HeadForm
    tensors: dict[str, np.ndarray]


@dataclass(slots=True)
class _Pending:
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


class ScoringStream:
    """One open ``ScoreTrajectories`` stream: many items in flight, each with its own result or error."""

    def __init__(self, stub: teacher_service_pb2_grpc.TeacherServiceStub, target: str, wire: WireCount) -> None:
        self._call = stub.ScoreTrajectories()
        self._target = target
        self._wire = wire
        self._pending: dict[str, _Pending] = {}
        self._ids = itertools.count(1)
        self._credits: asyncio.Semaphore | None = None
        self._granted = asyncio.Event()
        self._write_lock = asyncio.Lock()
        self._broken: OpdError | None = None
        self._reader = asyncio.create_task(self._read())

    @property
    def broken(self) -> OpdError | None:
        """Why the stream can take no more items, or None."""
        return self._broken

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Send one item and wait for its answer.

        Raises:
            OpdError: as the server says of this item; :class:`DeadlineError` after ``timeout_s`` (and a slack for
                the transfer); :class:`UnavailableError` where the stream broke.

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
        )
        try:
            async with asyncio.timeout(request.timeout_s + TRANSFER_SLACK_S):
                await self._granted.wait()
                if self._credits is None:
                    raise self._broken or UnavailableError(f"{self._target}: the stream ended before it began")
                async with self._credits:
                    return await self._exchange(item)
        except TimeoutError:
            raise DeadlineError(
                f"teacher {request.teacher_id!r} at {self._target} did not answer within {request.timeout_s:g} s",
                metadata={"teacher_id": request.teacher_id, "target": self._target},
            ) from None

    async def _exchange(self, item: teacher_service_pb2.ScoreItem) -> ScoreResult:
        if self._broken is not None:
            raise self._broken
        pending = _Pending(asyncio.get_running_loop().create_future())
        self._pending[item.item_id] = pending
        try:
            await self._write(teacher_service_pb2.ScoreTrajectoriesRequest(item=item))
            return await pending.future
        finally:
            if not pending.future.done() or pending.future.cancelled():
                self._give_up(item.item_id)
            self._pending.pop(item.item_id, None)

    async def _write(self, message: teacher_service_pb2.ScoreTrajectoriesRequest) -> None:
        self._wire.sent += message.ByteSize()
        async with self._write_lock:  # grpc.aio allows one write at a time
            try:
                await self._call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
                raise self._broken or UnavailableError(f"{self._target}: the stream is broken: {error}") from error

    def _give_up(self, item_id: str) -> None:
        if self._broken is None:
            task = asyncio.create_task(
                self._write(teacher_service_pb2.ScoreTrajectoriesRequest(cancel_item_id=item_id))
            )
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _read(self) -> None:
        failure: OpdError = UnavailableError(f"{self._target} ended the stream")
        try:
            async for response in self._call:
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
            self._broken = failure
            self._granted.set()
            for pending in self._pending.values():
                if not pending.future.done():
                    pending.future.set_exception(failure)

    def _take(self, response: teacher_service_pb2.ScoreTrajectoriesResponse) -> None:
        kind = response.WhichOneof("payload")
        if kind == "credits":
            self._credits = asyncio.Semaphore(response.credits)
            self._granted.set()
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
                if pending.assembler is None:
                    raise TensorDecodeError("chunk before header", field="chunk")
                pending.assembler.add(response.chunk)
            elif kind == "status":
                self._end(response, pending)
        except TensorDecodeError as error:
            pending.future.set_exception(error)

    def _end(self, response: teacher_service_pb2.ScoreTrajectoriesResponse, pending: _Pending) -> None:
        if response.status.code != 0:
            pending.future.set_exception(error_of(response.status))
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
        await asyncio.gather(self._reader, return_exceptions=True)


@dataclass
class TeacherClient(ServiceClient):
    """One or several replicas of the same teachers.

    Items of the standing stream all go to one healthy replica, and to another after a break.
    """

    addresses: Sequence[str]
    config: ChannelConfig = field(default_factory=ChannelConfig)

    def __post_init__(self) -> None:
        self.target = targets_text(self.addresses)
        self.wire = WireCount()
        self._channel = open_channel(self.addresses, SERVICE, self.config, health_checked=len(self.addresses) > 1)
        self._stub = teacher_service_pb2_grpc.TeacherServiceStub(self._channel)
        self._stream: ScoringStream | None = None

    async def close(self) -> None:
        """Ends the stream and the channel."""
        if self._stream is not None:
            await self._stream.close()
        await super().close()

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Raises :class:`UnavailableError` after ``timeout_s`` (default: the channel's ``connect_timeout_s``)."""
        wait_s = self.config.connect_timeout_s if timeout_s is None else timeout_s
        await wait_until_serving(self._channel, SERVICE, target=self.target, timeout_s=wait_s)

    async def list_teachers(self) -> list[teacher_service_pb2.TeacherCard]:
        """All cards."""
        async with rpc_errors(self.target):
            request = teacher_service_pb2.ListTeachersRequest()
            response = await self._stub.ListTeachers(request, timeout=self.config.timeout_s)
        return list(response.teachers)

    async def get_teacher(self, teacher_id: str) -> teacher_service_pb2.TeacherCard:
        """One card. Raises :class:`UnknownTeacherError`."""
        async with rpc_errors(self.target):
            request = teacher_service_pb2.GetTeacherRequest(teacher_id=teacher_id)
            response = await self._stub.GetTeacher(request, timeout=self.config.timeout_s)
        return response.teacher

    async def get_vocabulary(self, teacher_id: str) -> dict[str, int]:
        """Token → id of the teacher's tokenizer."""
        async with rpc_errors(self.target):
            request = teacher_service_pb2.GetTeacherRequest(teacher_id=teacher_id, include_vocabulary=True)
            response = await self._stub.GetTeacher(request, timeout=self.config.timeout_s)
        return {entry.token.decode("utf-8", "surrogatepass"): entry.id for entry in response.vocabulary}

    async def get_head(self, teacher_id: str, *, digest: str = "", timeout_s: float = 600.0) -> HeadData:
        """Download a head, resuming by offset where the stream breaks.

        Raises:
            HeadMismatchError: the head served is not the one of ``digest``.
            TeacherUnavailableError: not here, whole, within ``timeout_s``.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        manifest: teacher_service_pb2.HeadManifest | None = None
        buffer = memoryview(b"")
        offset = 0
        last: OpdError | None = None
        while True:
            try:
                request = teacher_service_pb2.GetHeadRequest(teacher_id=teacher_id, digest=digest, offset=offset)
                call = self._stub.GetHead(request, timeout=max(0.0, deadline - loop.time()))
                async for response in responses_of(call, self.target):
                    self.wire.received += response.ByteSize()
                    if response.WhichOneof("payload") == "manifest":
                        if manifest is None:
                            manifest = response.manifest
                            buffer = np.empty(_checked_head_bytes(manifest), dtype=np.uint8).data
                            digest = digest or manifest.form.digest
                        continue
                    data = response.chunk.data
                    if response.chunk.offset != offset or offset + len(data) > len(buffer):
                        raise TensorDecodeError(f"chunk at {response.chunk.offset}, expected {offset}", field="head")
                    buffer[offset : offset + len(data)] = data
                    offset += len(data)
                if manifest is not None and offset == len(buffer):
                    return HeadData(manifest.form, _split_head(manifest, buffer))
                raise TensorDecodeError(f"truncated: {offset} of {len(buffer)} bytes", field="head")
            except (UnavailableError, DeadlineError) as error:
                # The last attempt may die of the deadline itself; what kept it from succeeding is the better message.
                last = error if isinstance(error, UnavailableError) or last is None else last
                if loop.time() >= deadline or isinstance(error, DeadlineError):
                    raise TeacherUnavailableError(
                        f"the head of teacher {teacher_id!r} did not arrive within {timeout_s:g} s: {last}"
                    ) from error
                await asyncio.sleep(min(1.0, max(0.0, deadline - loop.time())))

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """One item over the client's standing stream, which is opened, and reopened after a break, as needed.

        One attempt: the caller decides about retries (scoring is pure, so they are safe). Raises as
        :meth:`ScoringStream.score`.
        """
        if self._stream is None or self._stream.broken is not None:
            self._stream = ScoringStream(self._stub, self.target, self.wire)
        result = await self._stream.score(request)
        if request.expected_head_digest and result.head_digest != request.expected_head_digest:
            raise HeadMismatchError(
                f"{self.target} answered with head {result.head_digest[:12]}…, expected "
                f"{request.expected_head_digest[:12]}…: the teacher's weights changed during the run",
                metadata={"teacher_id": request.teacher_id},
            )
        return result

    @asynccontextmanager
    async def scoring_stream(self) -> AsyncIterator[ScoringStream]:
        """A stream of one's own."""
        stream = ScoringStream(self._stub, self.target, self.wire)
        try:
            yield stream
        finally:
            await stream.close()


def _checked_head_bytes(manifest: teacher_service_pb2.HeadManifest) -> int:
    for header in manifest.tensors:
        check_header(header)
    total = sum(header.byte_size for header in manifest.tensors)
    if total != manifest.total_bytes:
        raise TensorDecodeError(f"tensors have {total} bytes, the manifest says {manifest.total_bytes}", field="head")
    return total


def _split_head(manifest: teacher_service_pb2.HeadManifest, buffer: memoryview) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    offset = 0
    flat = np.asarray(buffer)
    for header in manifest.tensors:
        dtype = check_header(header)
        piece = flat[offset : offset + math.prod(header.shape) * dtype.itemsize]
        tensors[header.name] = piece.view(dtype).reshape(tuple(header.shape))
        offset += header.byte_size
    return tensors
