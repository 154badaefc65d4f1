"""``opd.v1.TeacherService``: one method per RPC, and the life of a scored item."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from functools import partial

import grpc
from opd.v1 import teacher_service_pb2, teacher_service_pb2_grpc

from opd_mesh.chunk_codec import encoded_chunks
from opd_mesh.errors import (
    CancelledByCallerError,
    DeadlineError,
    HeadMismatchError,
    InvalidInputError,
    OpdError,
    OverloadedError,
    SignalNotOfferedError,
    UnavailableError,
)
from opd_mesh.rpc.server import with_idle_timeout
from opd_mesh.rpc.status import status_of
from opd_mesh.signals import SIGNAL_CODES
from opd_mesh.tensors import CHUNK_BYTES, byte_view, chunks_of, header_of
from teacher_server.byte_budget import ByteBudget
from teacher_server.catalogue import Catalogue, bytes_of
from teacher_server.outbox import Answer, Outbox, Outgoing, Response

# Answers to items that came several at once leave together up to this; larger ones are sent in chunks.
SMALL_ANSWER_BYTES = 64 << 10
# Candidates that are checked in a thread: a million of them take a tenth of a second.
MANY_IDS = 10_000


class TeacherServicer(teacher_service_pb2_grpc.TeacherServiceServicer):
    """Answers UNAVAILABLE until the catalogue has been given its engines."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._config = catalogue.config
        self._draining = asyncio.Event()

    async def drain(self) -> None:
        """Standing streams end once what they accepted is answered; without this they would last for ever."""
        self._draining.set()

    # --- cards and heads ---------------------------------------------------------------------------------------
    async def ListTeachers(
        self, request: teacher_service_pb2.ListTeachersRequest, context: grpc.aio.ServicerContext
    ) -> teacher_service_pb2.ListTeachersResponse:
        """All cards."""
        return teacher_service_pb2.ListTeachersResponse(teachers=self.catalogue.cards())

    async def GetTeacher(
        self, request: teacher_service_pb2.GetTeacherRequest, context: grpc.aio.ServicerContext
    ) -> teacher_service_pb2.GetTeacherResponse:
        """One card, and the vocabulary where asked for."""
        served = self.catalogue.get(request.teacher_id)
        response = teacher_service_pb2.GetTeacherResponse(teacher=served.card)
        if request.include_vocabulary:
            for token, token_id in served.engine.facts.vocabulary.items():
                response.vocabulary.add(token=token.encode("utf-8", "surrogatepass"), id=token_id)
        return response

    async def GetHead(
        self, request: teacher_service_pb2.GetHeadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[teacher_service_pb2.GetHeadResponse]:
        """Manifest, then bytes from ``offset`` on."""
        served = self.catalogue.get(request.teacher_id)
        form, note = served.card.head, served.engine.facts.note
        if served.engine.facts.head is None:
            raise SignalNotOfferedError(f"teacher {request.teacher_id!r} has no head to give: {note}")
        if request.digest and request.digest != form.digest:
            raise HeadMismatchError(f"teacher {request.teacher_id!r} serves head {form.digest}, not {request.digest}")
        tensors = await asyncio.to_thread(served.engine.head_tensors)
        total = sum(array.nbytes for _, array in tensors)
        if not 0 <= request.offset <= total:
            raise InvalidInputError(f"{request.offset} is outside the head's {total} bytes", field="offset")
        manifest = teacher_service_pb2.HeadManifest(
            form=form, tensors=[header_of(name, array) for name, array in tensors], total_bytes=total
        )
        yield teacher_service_pb2.GetHeadResponse(manifest=manifest)
        base = 0
        for _, array in tensors:
            view = byte_view(array)
            for start in range(max(0, request.offset - base), len(view), CHUNK_BYTES):
                # Mapped pages come from the disk here: not on the loop.
                data = await asyncio.to_thread(bytes, view[start : start + CHUNK_BYTES])
                chunk = teacher_service_pb2.HeadChunk(offset=base + start, data=data)
                yield teacher_service_pb2.GetHeadResponse(chunk=chunk)
            base += len(view)

    # --- scoring -----------------------------------------------------------------------------------------------
    async def ScoreTrajectories(
        self,
        request_iterator: AsyncIterator[teacher_service_pb2.ScoreTrajectoriesRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[Outgoing]:
        """Items in, answers out, each with its own status."""
        credits = self._config.max_items_in_flight
        yield Response(credits=credits, takes_many=True)
        outbox = Outbox()
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
                many = request.WhichOneof("payload") == "items"
                for item in request.items.items if many else (request.item,):
                    if item.item_id in running:
                        await asyncio.sleep(0)  # a task that has not begun could not answer for what is given up
                    begin(item, together=many)

        def begin(item: teacher_service_pb2.ScoreItem, *, together: bool) -> None:
            if item.item_id in running:
                # An answer could not be told from the first one's, so one status ends both; others go on.
                why = f"{item.item_id!r} is in flight already; both items of that id are given up"
                give_up(item.item_id, InvalidInputError(why, field="item_id"))
                return
            given_up.pop(item.item_id, None)
            crowded = len(running) >= credits
            answering = self._answer_item(item, outbox, unsent, closing, given_up, crowded=crowded, together=together)
            running[item.item_id] = task = asyncio.create_task(answering)
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
                outbox.end()

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
        outbox: Outbox,
        unsent: ByteBudget,
        closing: asyncio.Event,
        given_up: Mapping[str, OpdError],
        *,
        crowded: bool,
        together: bool,
    ) -> None:
        """From arrival to the item's last message; never raises for what is wrong with the item.

        Args:
            given_up: why an item's task was cancelled, by item id.
            together: the client takes whole answers.
        """
        timeout_s = item.timeout.ToNanoseconds() / 1e9 or self._config.default_item_timeout_s
        try:
            if crowded:
                raise OverloadedError(
                    f"more than {self._config.max_items_in_flight} items in flight on one stream", retry_delay_s=1.0
                )
            if len(item.candidate_token_ids) > MANY_IDS:
                facts, job = await asyncio.to_thread(self.catalogue.checked_job, item)
            else:
                facts, job = self.catalogue.checked_job(item)
            deadline = asyncio.get_running_loop().time() + timeout_s
            try:
                async with AsyncExitStack() as stack:
                    async with asyncio.timeout_at(deadline):
                        await stack.enter_async_context(unsent.hold(bytes_of(facts, job)))
                        tensors = await self.catalogue.score(item.teacher_id, job)
                    header = teacher_service_pb2.ScoreHeader(
                        teacher_id=item.teacher_id,
                        teacher_digest=facts.teacher_digest,
                        head_digest=facts.head.digest if facts.head is not None else "",
                        signal=SIGNAL_CODES[job.signal],
                        rows=len(job.predicting_positions),
                        tensors=[header_of(name, array) for name, array in tensors.items()],
                    )
                    if together and sum(array.nbytes for array in tensors.values()) <= SMALL_ANSWER_BYTES:
                        whole = chunks_of(list(tensors.values()))
                        end: Response | Answer = Answer(item_id=item.item_id, header=header, chunks=whole)
                    else:
                        end = Response(item_id=item.item_id)
                        await outbox.put(Response(item_id=item.item_id, header=header))
                        for message in encoded_chunks(item.item_id, tensors.values()):
                            await outbox.put(message)
            except TimeoutError:
                raise DeadlineError(f"not computed within {timeout_s:g} s") from None
            end.status.SetInParent()
        except OpdError as error:
            end = (Answer if together else Response)(item_id=item.item_id, status=status_of(error))
        except asyncio.CancelledError:
            if closing.is_set():  # the stream is gone: nobody takes from the outbox any more
                raise
            end = (Answer if together else Response)(item_id=item.item_id, status=status_of(given_up[item.item_id]))
        while True:
            try:
                await outbox.put(end)
            except asyncio.CancelledError:
                # Given up when all but this was sent: too late, for an item without its last message never ends.
                if closing.is_set():
                    raise
            else:
                return


def _forget(running: dict[str, asyncio.Task[None]], item_id: str, _: asyncio.Task[None]) -> None:
    running.pop(item_id, None)
