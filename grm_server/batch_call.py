"""One open ``JudgeBatch`` call: items in, and a judgement or a status for each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial

from opd.v1 import generative_reward_service_pb2 as pb

from opd_mesh.errors import (
    CancelledByCallerError,
    InternalError,
    InvalidInputError,
    OpdError,
    OverloadedError,
    TooLongError,
    UnavailableError,
)
from opd_mesh.rpc.server import with_idle_timeout
from opd_mesh.rpc.status import status_of

log = logging.getLogger("grm_server")
RETRY_DELAY_S = 1.0
ROOM_BYTES = 1024  # of a message, for all that is not the judgement

Response = pb.JudgeBatchResponse


class BatchCall:
    """What one client is owed. For one event loop.

    Args:
        judge: of one item; raises why it cannot be judged. The event is set before the item is cancelled where its
            client gave it up; where the stream ends it is not, for a client that asks again.
        credits: items that may be unanswered.
        idle_timeout_s: without an item, and with nothing owed.
        max_message_bytes: of what is sent.
    """

    def __init__(
        self,
        judge: Callable[[pb.JudgeItem, asyncio.Event], Awaitable[pb.JudgeResponse]],
        *,
        credits: int,
        idle_timeout_s: float,
        max_message_bytes: int,
    ) -> None:
        self._judge = judge
        self._credits = credits
        self._idle_timeout_s = idle_timeout_s
        self._max_judgement_bytes = max_message_bytes - ROOM_BYTES
        self._running: dict[str, asyncio.Task[None]] = {}
        self._given_up: dict[str, OpdError] = {}  # why an item's task was cancelled
        self._unwanted: dict[str, asyncio.Event] = {}
        self._answers: asyncio.Queue[Response | None] = asyncio.Queue()  # None: no more
        self._sent = asyncio.Event()  # set when an answer goes out
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """The server ends: nothing more is taken, and the stream ends once what was taken is answered."""
        self._stopping.set()

    async def answers(self, messages: AsyncIterator[pb.JudgeBatchRequest]) -> AsyncGenerator[Response, None]:
        """The stream's responses.

        Raises:
            DeadlineError: idle for too long.
            UnavailableError: the server is stopping.
        """
        yield Response(credits=self._credits)
        ending = asyncio.create_task(self._receive_then_end(messages))
        try:
            while (response := await self._answers.get()) is not None:
                self._sent.set()
                yield response
            await ending
        finally:
            ending.cancel()
            # Votes that are being written go on without us, for a client that asks again.
            for task in list(self._running.values()):
                task.cancel()
            await asyncio.gather(ending, *self._running.values(), return_exceptions=True)

    async def _receive_then_end(self, messages: AsyncIterator[pb.JudgeBatchRequest]) -> None:
        receiving = asyncio.create_task(self._receive(messages))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({receiving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()
            receiving.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)
            if self._stopping.is_set():
                raise UnavailableError("the reward model is stopping")
        finally:
            receiving.cancel()
            stopping.cancel()
            await asyncio.gather(receiving, stopping, return_exceptions=True)
            self._answers.put_nowait(None)

    async def _receive(self, messages: AsyncIterator[pb.JudgeBatchRequest]) -> None:
        # A client that waits for a judgement is not idle.
        arriving = with_idle_timeout(messages, self._idle_timeout_s, "JudgeBatch", busy=lambda: bool(self._running))
        async for message in arriving:
            match message.WhichOneof("payload"):
                case "item":
                    self._begin(message.item)
                case "cancel_item_id":
                    self._give_up(message.cancel_item_id, CancelledByCallerError("given up by the client"))
                case _:
                    raise InvalidInputError("is empty: send an item, or the id of one to cancel", field="payload")
            # A client within its credits never owes us a pause; one beyond them must read before it is read on.
            while self._answers.qsize() > self._credits:
                self._sent.clear()
                await self._sent.wait()

    def _give_up(self, item_id: str, why: OpdError) -> None:
        if item_id in self._running:
            self._given_up.setdefault(item_id, why)
            self._unwanted[item_id].set()
            self._running[item_id].cancel()

    def _begin(self, item: pb.JudgeBatchItem) -> None:
        refusal: OpdError | None = None
        if item.item_id in self._running:
            # An answer could not be told from the first one's, so one status ends both; others go on.
            why = f"{item.item_id!r} is in flight already; both items of that id are given up"
            self._give_up(item.item_id, InvalidInputError(why, field="item_id"))
            return
        if not item.item_id:
            refusal = InvalidInputError("must not be empty", field="item_id")
        elif len(self._running) >= self._credits:
            refusal = OverloadedError(
                f"more than {self._credits} items unanswered on one stream", retry_delay_s=RETRY_DELAY_S
            )
        if refusal is not None:
            self._answers.put_nowait(Response(item_id=item.item_id, status=status_of(refusal)))
            return
        unwanted = self._unwanted[item.item_id] = asyncio.Event()
        task = asyncio.create_task(self._answer(item, unwanted))
        self._running[item.item_id] = task
        task.add_done_callback(partial(self._ended, item.item_id))

    def _ended(self, item_id: str, task: asyncio.Task[None]) -> None:
        self._running.pop(item_id, None)
        self._unwanted.pop(item_id, None)
        why = self._given_up.pop(item_id, None)
        if why is not None and task.cancelled():  # else it was done already, or the stream has ended
            self._answers.put_nowait(Response(item_id=item_id, status=status_of(why)))

    async def _answer(self, item: pb.JudgeBatchItem, unwanted: asyncio.Event) -> None:
        try:
            judgement = await self._judge(item.item, unwanted)
            size = judgement.ByteSize()
            if size > self._max_judgement_bytes:
                raise TooLongError(
                    f"the judgement has {size} bytes, {self._max_judgement_bytes} fit a message: ask for fewer answers "
                    "or votes at once",
                    field="item",
                )
        except OpdError as error:
            status = status_of(error)
        except Exception as error:  # a defect of ours must not take the neighbours along
            log.exception("item %s", item.item_id)
            status = status_of(InternalError(f"{type(error).__name__}; the server's log has the stack"))
        else:
            self._answers.put_nowait(Response(item_id=item.item_id, judgement=judgement))
            return
        self._answers.put_nowait(Response(item_id=item.item_id, status=status))
