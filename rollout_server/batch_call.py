"""One open ``GenerateBatch`` call: items in, and one answer for each when its request has ended."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import suppress

from google.rpc import status_pb2
from opd.v1 import rollout_service_pb2

from opd_mesh.convert import finish_reason_to_proto, trajectory_to_proto
from opd_mesh.errors import InvalidInputError, OpdError, OverloadedError, TooLongError, UnavailableError
from opd_mesh.policy import PolicyId
from opd_mesh.rpc.server import with_idle_timeout
from opd_mesh.rpc.status import status_of
from opd_mesh.rpc.writer import MESSAGE_BYTES
from rollout_server.generations import RETRY_DELAY_S, Generations
from rollout_server.requests import RequestParams, RequestState

Response = rollout_service_pb2.GenerateBatchResponse
Result = rollout_service_pb2.GenerateBatchResult
_OK = status_pb2.Status()
ROOM_BYTES = 1 << 16  # of a message, for all that is not answers


class _Item:
    """One that is not answered; :meth:`end` is told its request once that has ended, or why it has none."""

    __slots__ = ("_ended", "key", "outcome", "request_id", "return_trajectory", "run_id", "tag")

    def __init__(self, item: rollout_service_pb2.GenerateBatchItem, ended: Callable[[_Item], None]) -> None:
        request = item.request
        self.request_id, self.run_id, self.tag = request.request_id, request.run_id, item.tag
        self.return_trajectory = item.return_trajectory
        self.key = ""  # of the request, where it can be one
        self.outcome: RequestState | OpdError | None = None
        self._ended = ended

    def end(self, outcome: RequestState | OpdError) -> None:
        """It can be answered."""
        # An error is of the moment: what could not be published may be, later.
        is_error = isinstance(outcome, OpdError)
        self.outcome = outcome if is_error else (outcome.error or outcome)  # type: ignore[union-attr]
        self._ended(self)

    def answer(self, max_bytes: int) -> tuple[Result, int]:
        """:meth:`result`, or the error that it does not fit a message: kept ids may be many. With its size in bytes."""
        result = self.result()
        if (size := result.ByteSize()) > max_bytes:
            self.outcome = TooLongError(
                f"the trajectory has {size} bytes, {max_bytes} fit a message: publish it and leave it out of the "
                "answer, lower top_k or max_new_tokens, or raise server.max_message_bytes here and the same key of "
                "the client's channel",
                field="return_trajectory",
            )
            result = self.result()
            size = result.ByteSize()
        return result, size

    def result(self) -> Result:
        """What it was told."""
        state = self.outcome
        if not isinstance(state, RequestState):
            assert state is not None  # asked for once it has ended
            return Result(request_id=self.request_id, run_id=self.run_id, tag=self.tag, status=status_of(state))
        trajectory = state.trajectory() if self.return_trajectory else None
        return Result(
            request_id=self.request_id,
            run_id=self.run_id,
            tag=self.tag,
            status=_OK,
            num_tokens=len(state.tokens),
            finish_reason=finish_reason_to_proto(state.finish_reason),
            stream_entry_id=state.stream_entry_id,
            trajectory=trajectory_to_proto(trajectory) if trajectory is not None else None,
        )


class BatchCall:
    """What one client is owed. For one event loop.

    Args:
        check: the parameters of a request; raises what is wrong with it.
        policy: what is served at the moment.
        credits: items that may be unanswered.
        idle_timeout_s: without an item, and with nothing owed.
        max_message_bytes: of what is sent.
    """

    def __init__(
        self,
        generations: Generations,
        *,
        check: Callable[[rollout_service_pb2.GenerateRequest], RequestParams],
        policy: Callable[[], PolicyId | None],
        credits: int,
        idle_timeout_s: float,
        max_message_bytes: int,
    ) -> None:
        self._generations = generations
        self._check = check
        self._policy = policy
        self._credits = credits
        self._idle_timeout_s = idle_timeout_s
        self._max_answer_bytes = max_message_bytes - ROOM_BYTES
        self._owed: set[_Item] = set()
        self._ended: deque[_Item] = deque()  # to be answered
        self._wake = asyncio.Event()
        self._sent = asyncio.Event()  # set when answers go out
        self._stopping = False

    def stop(self) -> None:
        """The server ends: so does the stream, once what has ended is answered."""
        self._stopping = True
        self._wake.set()

    async def answers(
        self, messages: AsyncIterator[rollout_service_pb2.GenerateBatchRequest]
    ) -> AsyncGenerator[Response, None]:
        """The stream's responses.

        Raises:
            DeadlineError: idle for too long.
            UnavailableError: the server is stopping.
        """
        yield Response(credits=self._credits)
        receiving = asyncio.create_task(self._receive(messages))
        receiving.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                for response in self._responses():
                    yield response
                if self._stopping:
                    raise UnavailableError("the rollout server is stopping")
                if receiving.done() and (not self._owed or receiving.exception() is not None):
                    receiving.result()
                    return
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            for item in self._owed:
                state = self._generations.table.lookup(item.key)
                if state is not None:
                    with suppress(ValueError):
                        state.on_end.remove(item.end)

    async def _receive(self, messages: AsyncIterator[rollout_service_pb2.GenerateBatchRequest]) -> None:
        # What is owed is worth waiting for, and a client that does not read is not idle.
        arriving = with_idle_timeout(messages, self._idle_timeout_s, "GenerateBatch", busy=lambda: bool(self._owed))
        async for message in arriving:
            new: list[tuple[RequestParams, Callable[[RequestState | OpdError], None]]] = []
            for sent in message.items:
                item = _Item(sent, self._answer)
                crowded = len(self._owed) >= self._credits
                self._owed.add(item)
                try:
                    if crowded:
                        raise OverloadedError(
                            f"more than {self._credits} items unanswered on one stream", retry_delay_s=RETRY_DELAY_S
                        )
                    params = self._checked(sent.request)
                except OpdError as error:
                    item.end(error)
                else:
                    item.key = params.key
                    new.append((params, item.end))
            await self._generations.begin_many(new, self._policy())
            # A client within its credits never owes us a pause; one beyond them must read before it is read on.
            while len(self._owed) > self._credits:
                self._sent.clear()
                await self._sent.wait()

    def _checked(self, request: rollout_service_pb2.GenerateRequest) -> RequestParams:
        if request.from_index or request.HasField("last_seen"):
            name = "from_index" if request.from_index else "last_seen"
            raise InvalidInputError("is of no use to GenerateBatch: its answers are whole", field=name)
        return self._check(request)

    def _answer(self, item: _Item) -> None:
        self._ended.append(item)
        self._wake.set()

    def _responses(self) -> Iterator[Response]:
        """All that has ended, several answers to a message."""
        response, size = Response(), 0
        while self._ended:
            item = self._ended.popleft()
            self._owed.discard(item)
            self._sent.set()
            result, more = item.answer(self._max_answer_bytes)
            if size and size + more > MESSAGE_BYTES - ROOM_BYTES:
                yield response
                response, size = Response(), 0
            response.results.append(result)
            size += more
        if size:
            yield response
