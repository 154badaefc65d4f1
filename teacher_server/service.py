"""``opd.v1.TeacherService``: one method per RPC, and the life of a scored item."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import grpc
import numpy as np
from opd.v1 import common_pb2, teacher_service_pb2, teacher_service_pb2_grpc

from opd_mesh.config.services import TeacherServerConfig
from opd_mesh.errors import (
    CancelledByCallerError,
    DeadlineError,
    HeadMismatchError,
    InvalidInputError,
    OpdError,
    OverloadedError,
    SignalNotOfferedError,
    TokenizerMismatchError,
    UnavailableError,
    UnknownTeacherError,
)
from opd_mesh.rpc.server import with_idle_timeout
from opd_mesh.rpc.status import status_of
from opd_mesh.tensors import CHUNK_BYTES, DTYPES, byte_view, chunks_of, dtype_code, dtype_name, header_of
from opd_mesh.torch_tensors import to_numpy
from opd_mesh.trajectory import Trajectory
from teacher_server.byte_budget import ByteBudget
from teacher_server.engine import EngineFacts, ScoreJob, Signal, TeacherEngine
from teacher_server.scoring_queue import ScoringQueue

Response = teacher_service_pb2.ScoreTrajectoriesResponse
SIGNALS: dict[Signal, teacher_service_pb2.Signal] = {
    Signal.HIDDEN_STATES: teacher_service_pb2.SIGNAL_HIDDEN_STATES,
    Signal.LOGITS: teacher_service_pb2.SIGNAL_LOGITS,
    Signal.TOP_K_LOGPROBS: teacher_service_pb2.SIGNAL_TOP_K_LOGPROBS,
    Signal.TOKEN_LOGPROBS: teacher_service_pb2.SIGNAL_TOKEN_LOGPROBS,
}
SIGNALS_BACK = {code: signal for signal, code in SIGNALS.items()}
# Of messages (about 1 MiB each) computed but not yet taken by gRPC, per stream.
OUTBOX_MESSAGES = 8


@dataclass(frozen=True)
class ServedHead:
    """A head as it goes over the wire."""

    form: teacher_service_pb2.HeadForm
    tensors: tuple[tuple[str, np.ndarray], ...]


class TeacherServicer(teacher_service_pb2_grpc.TeacherServiceServicer):
    """Answers UNAVAILABLE until :meth:`install` has been given loaded engines."""

    def __init__(self, config: TeacherServerConfig) -> None:
        self._config = config
        self._engines: Mapping[str, TeacherEngine] = {}
        self._heads: dict[str, ServedHead | None] = {}
        self._cards: dict[str, teacher_service_pb2.TeacherCard] = {}
        self._loaded_queue: ScoringQueue | None = None
        self._draining = asyncio.Event()

    def install(self, engines: Mapping[str, TeacherEngine], queue: ScoringQueue) -> None:
        """Begin to serve ``engines``."""
        self._engines = engines
        self._heads = {teacher: _served_head(engine.facts) for teacher, engine in engines.items()}
        self._cards = {teacher: self._card(teacher) for teacher in engines}
        self._loaded_queue = queue

    @property
    def _queue(self) -> ScoringQueue:
        if self._loaded_queue is None:
            raise UnavailableError("the teachers are still being loaded", retry_delay_s=2.0)
        return self._loaded_queue

    async def drain(self) -> None:
        """Standing streams end once what they accepted is answered; without this they would last for ever."""
        self._draining.set()

    # --- cards and heads ---------------------------------------------------------------------------------------
    async def ListTeachers(
        self, request: teacher_service_pb2.ListTeachersRequest, context: grpc.aio.ServicerContext
    ) -> teacher_service_pb2.ListTeachersResponse:
        """All cards."""
        self._queue  # noqa: B018 - refuses while loading
        return teacher_service_pb2.ListTeachersResponse(teachers=self._cards.values())

    async def GetTeacher(
        self, request: teacher_service_pb2.GetTeacherRequest, context: grpc.aio.ServicerContext
    ) -> teacher_service_pb2.GetTeacherResponse:
        """One card, and the vocabulary where asked for."""
        facts = self._facts(request.teacher_id)
        response = teacher_service_pb2.GetTeacherResponse(teacher=self._cards[request.teacher_id])
        if request.include_vocabulary:
            for token, token_id in facts.vocabulary.items():
                response.vocabulary.add(token=token.encode("utf-8", "surrogatepass"), id=token_id)
        return response

    async def GetHead(
        self, request: teacher_service_pb2.GetHeadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[teacher_service_pb2.GetHeadResponse]:
        """Manifest, then bytes from ``offset`` on."""
        facts = self._facts(request.teacher_id)
        head = self._heads[request.teacher_id]
        if head is None:
            raise SignalNotOfferedError(f"teacher {request.teacher_id!r} has no head to give: {facts.note}")
        if request.digest and request.digest != head.form.digest:
            raise HeadMismatchError(
                f"teacher {request.teacher_id!r} serves head {head.form.digest}, not {request.digest}"
            )
        total = sum(array.nbytes for _, array in head.tensors)
        if not 0 <= request.offset <= total:
            raise InvalidInputError(f"{request.offset} is outside the head's {total} bytes", field="offset")
        manifest = teacher_service_pb2.HeadManifest(
            form=head.form, tensors=[header_of(name, array) for name, array in head.tensors], total_bytes=total
        )
        yield teacher_service_pb2.GetHeadResponse(manifest=manifest)
        base = 0
        for _, array in head.tensors:
            view = byte_view(array)
            for start in range(max(0, request.offset - base), len(view), CHUNK_BYTES):
                data = bytes(view[start : start + CHUNK_BYTES])
                chunk = teacher_service_pb2.HeadChunk(offset=base + start, data=data)
                yield teacher_service_pb2.GetHeadResponse(chunk=chunk)
            base += len(view)

    # --- scoring -----------------------------------------------------------------------------------------------
    async def ScoreTrajectories(
        self,
        request_iterator: AsyncIterator[teacher_service_pb2.ScoreTrajectoriesRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[Response]:
        """Items in, answers out, each with its own status."""
        credits = self._config.max_items_in_flight
        yield Response(credits=credits)
        outbox: asyncio.Queue[Response | None] = asyncio.Queue(maxsize=OUTBOX_MESSAGES)
        running: dict[str, asyncio.Task[None]] = {}
        given_up: dict[str, OpdError] = {}
        closing = asyncio.Event()
        unsent = ByteBudget(self._config.max_unsent_bytes)

        def give_up(item_id: str, why: OpdError) -> None:
            if item_id in running:
                given_up.setdefault(item_id, why)
                running[item_id].cancel()

        async def receive() -> None:
            idle_s = self._config.server.stream_idle_timeout_s
            requests = with_idle_timeout(request_iterator, idle_s, "ScoreTrajectories", busy=lambda: bool(running))
            async for request in requests:
                if request.WhichOneof("payload") == "cancel_item_id":
                    give_up(request.cancel_item_id, CancelledByCallerError("given up by the client"))
                    continue
                item = request.item
                if item.item_id in running:
                    # An answer could not be told from the first one's, so one status ends both; others go on.
                    why = f"{item.item_id!r} is in flight already; both items of that id are given up"
                    give_up(item.item_id, InvalidInputError(why, field="item_id"))
                    continue
                given_up.pop(item.item_id, None)
                crowded = len(running) >= credits
                task = asyncio.create_task(self._answer_item(item, outbox, unsent, closing, given_up, crowded=crowded))
                running[item.item_id] = task
                task.add_done_callback(partial(_forget, running, item.item_id))

        async def receive_then_end() -> None:
            receiving = asyncio.create_task(receive())
            draining = asyncio.create_task(self._draining.wait())
            try:
                await asyncio.wait({receiving, draining}, return_when=asyncio.FIRST_COMPLETED)
                stopped = not receiving.done()
                if not stopped:
                    await receiving
                await asyncio.gather(*running.values(), return_exceptions=True)
                if stopped:
                    raise UnavailableError("the teacher server is stopping")
            finally:
                receiving.cancel()
                draining.cancel()
                if not closing.is_set():  # otherwise nobody takes from the outbox any more
                    await outbox.put(None)

        receiver = asyncio.create_task(receive_then_end())
        try:
            while (response := await outbox.get()) is not None:
                yield response
            await receiver
        finally:
            closing.set()
            receiver.cancel()
            await asyncio.sleep(0)  # it ends the receiving of items before these are ended
            for task in list(running.values()):
                task.cancel()

    async def _answer_item(
        self,
        item: teacher_service_pb2.ScoreItem,
        outbox: asyncio.Queue[Response | None],
        unsent: ByteBudget,
        closing: asyncio.Event,
        given_up: Mapping[str, OpdError],
        *,
        crowded: bool,
    ) -> None:
        """From arrival to the item's last message; never raises for what is wrong with the item.

        Args:
            given_up: why an item's task was cancelled, by item id.
        """
        timeout_s = item.timeout.ToNanoseconds() / 1e9 or self._config.default_item_timeout_s
        try:
            if crowded:
                raise OverloadedError(
                    f"more than {self._config.max_items_in_flight} items in flight on one stream", retry_delay_s=1.0
                )
            facts, job = self._checked_job(item)
            deadline = asyncio.get_running_loop().time() + timeout_s
            try:
                async with AsyncExitStack() as stack:
                    async with asyncio.timeout_at(deadline):
                        await stack.enter_async_context(unsent.hold(_answer_bytes(facts, job)))
                        tensors = await self._queue.score(item.teacher_id, job)
                    header = teacher_service_pb2.ScoreHeader(
                        teacher_id=item.teacher_id,
                        teacher_digest=facts.teacher_digest,
                        head_digest=facts.head_digest,
                        signal=SIGNALS[job.signal],
                        rows=len(job.predicting_positions),
                        tensors=[header_of(name, array) for name, array in tensors.items()],
                    )
                    await outbox.put(Response(item_id=item.item_id, header=header))
                    for chunk in chunks_of(list(tensors.values())):
                        await outbox.put(Response(item_id=item.item_id, chunk=chunk))
            except TimeoutError:
                raise DeadlineError(f"not computed within {timeout_s:g} s") from None
            end = Response(item_id=item.item_id)
            end.status.SetInParent()
        except OpdError as error:
            end = Response(item_id=item.item_id, status=status_of(error))
        except asyncio.CancelledError:
            if closing.is_set():  # the stream is gone: nobody takes from the outbox any more
                raise
            end = Response(item_id=item.item_id, status=status_of(given_up[item.item_id]))
        while True:
            try:
                await outbox.put(end)
            except asyncio.CancelledError:
                # Given up when all but this was sent: too late, for an item without its last message never ends.
                if closing.is_set():
                    raise
            else:
                return

    def _checked_job(self, item: teacher_service_pb2.ScoreItem) -> tuple[EngineFacts, ScoreJob]:
        facts = self._facts(item.teacher_id)
        if not item.item_id:
            raise InvalidInputError("must not be empty", field="item_id")
        if not item.tokenizer_fingerprint:
            raise InvalidInputError(
                "required: SHA-256 over the sorted (token, id) pairs of the tokenizer that made token_ids",
                field="tokenizer_fingerprint",
            )
        if item.tokenizer_fingerprint != facts.tokenizer_fingerprint:
            raise TokenizerMismatchError(
                f"the ids come from tokenizer {item.tokenizer_fingerprint[:16]}…, but teacher {item.teacher_id!r} "
                f"has {facts.tokenizer_fingerprint[:16]}…; GetTeacher with include_vocabulary shows the difference",
                metadata={"teacher_id": item.teacher_id, "teacher_fingerprint": facts.tokenizer_fingerprint},
            )
        for name, expected, served in (
            ("teacher", item.expected_teacher_digest, facts.teacher_digest),
            ("head", item.expected_head_digest, facts.head_digest),
        ):
            if expected and expected != served:
                raise HeadMismatchError(
                    f"{name} digest {served[:16]}… is served, {expected[:16]}… was expected",
                    field=f"expected_{name}_digest",
                )
        trajectory = Trajectory(
            trajectory_id=item.item_id,
            domain="",
            token_ids=tuple(item.token_ids),
            scored_spans=tuple((span.start, span.end) for span in item.scored_spans),
        )
        limit = self._config.teachers[item.teacher_id].max_tokens_per_item
        trajectory.validate(vocab_size=facts.vocab_size, max_tokens=limit)
        signal = SIGNALS_BACK.get(item.signal)
        if signal is None:
            raise InvalidInputError("name a signal", field="signal")
        if signal not in facts.signals:
            offered = ", ".join(signal.name for signal in facts.signals)
            raise SignalNotOfferedError(
                f"teacher {item.teacher_id!r} offers {offered}, not {signal.name}. {facts.note}".strip(), field="signal"
            )
        if item.dtype not in (
            0,
            common_pb2.D_TYPE_FLOAT32,
            common_pb2.D_TYPE_BFLOAT16,
            common_pb2.D_TYPE_FLOAT16,
        ):
            raise InvalidInputError("must be float32, bfloat16 or float16", field="dtype")
        job = ScoreJob(
            token_ids=trajectory.token_ids,
            predicting_positions=tuple(trajectory.predicting_positions),
            signal=signal,
            dtype=dtype_name(item.dtype) if item.dtype else facts.dtype,
        )
        return facts, job

    # --- cards -------------------------------------------------------------------------------------------------
    def _facts(self, teacher_id: str) -> EngineFacts:
        self._queue  # noqa: B018 - refuses while loading
        engine = self._engines.get(teacher_id)
        if engine is None:
            known = ", ".join(sorted(self._engines))
            raise UnknownTeacherError(f"no teacher {teacher_id!r} here; served are: {known}", field="teacher_id")
        return engine.facts

    def _card(self, teacher_id: str) -> teacher_service_pb2.TeacherCard:
        facts = self._engines[teacher_id].facts
        config = self._config.teachers[teacher_id]
        roles = facts.tokenizer_roles
        head = self._heads[teacher_id]
        return teacher_service_pb2.TeacherCard(
            teacher_id=teacher_id,
            domains=config.domains,
            model_type=facts.model_type,
            vocab_size=facts.vocab_size,
            hidden_size=facts.hidden_size,
            dtype=dtype_code(facts.dtype),
            tokenizer_fingerprint=facts.tokenizer_fingerprint,
            teacher_digest=facts.teacher_digest,
            head=head.form if head else None,
            signals=[SIGNALS[signal] for signal in facts.signals],
            note=facts.note,
            limits=teacher_service_pb2.TeacherLimits(
                max_tokens_per_item=config.max_tokens_per_item,
                max_items_in_flight=self._config.max_items_in_flight,
                max_top_k=self._config.max_top_k,
            ),
            head_error=0.0 if math.isnan(facts.head_error) else facts.head_error,
            batch_layout=facts.batch_layout,
            tokenizer_roles=teacher_service_pb2.TokenizerRoles(
                bos_token_id=roles.bos_token_id,
                eos_token_id=roles.eos_token_id,
                pad_token_id=roles.pad_token_id,
                chat_template_digest=roles.chat_template_sha256 or "",
            ),
            engine=config.engine,
        )


def _forget(running: dict[str, asyncio.Task[None]], item_id: str, _: asyncio.Task[None]) -> None:
    running.pop(item_id, None)


def _answer_bytes(facts: EngineFacts, job: ScoreJob) -> int:
    width = facts.hidden_size if job.signal is Signal.HIDDEN_STATES else facts.vocab_size
    return len(job.predicting_positions) * width * DTYPES[dtype_code(job.dtype)].itemsize


def _served_head(facts: EngineFacts) -> ServedHead | None:
    head = facts.head
    if head is None:
        return None
    tensors = [("weight", to_numpy(head.weight))]
    if head.bias is not None:
        tensors.append(("bias", to_numpy(head.bias)))
    form = teacher_service_pb2.HeadForm(
        digest=facts.head_digest,
        padded_vocab_size=head.weight.shape[0],
        vocab_size=head.vocab_size,
        hidden_size=head.weight.shape[1],
        dtype=dtype_code(facts.dtype),
        has_bias=head.bias is not None,
        logit_scale=head.logit_scale,
        soft_cap=head.soft_cap,
        final_norm_applied=True,
    )
    return ServedHead(form, tuple(tensors))
