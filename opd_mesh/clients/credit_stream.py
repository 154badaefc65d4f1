"""One open call that carries many items, each with an answer or an error of its own, within the server's credits."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import grpc

from opd_mesh.errors import DeadlineError, InternalError, OpdError, UnavailableError, UnimplementedError
from opd_mesh.rpc.status import error_of_rpc
from opd_mesh.rpc.writer import MESSAGE_BYTES, write_when_woken


class Sized(Protocol):
    """A protobuf message."""

    def ByteSize(self) -> int:
        """On the wire."""


ItemT = TypeVar("ItemT", bound=Sized)
ResultT = TypeVar("ResultT")


class CreditStream(ABC, Generic[ItemT, ResultT]):
    """Many items in flight. For one event loop.

    Args:
        call: made by the stub, with no request iterator.
        target: address, for messages.
        count_bytes: called with the size of every message that came.
    """

    # What the server is called, for messages; and items in one message at most, whatever their size.
    server = "server"
    most_items = 1 << 20

    def __init__(self, call: Any, target: str, count_bytes: Callable[[int], None] = lambda size: None) -> None:
        self._call = call
        self._target = target
        self._count_bytes = count_bytes
        self._tags = itertools.count(1)
        self._waiting: deque[tuple[int, ItemT, asyncio.Future[ResultT]]] = deque()
        self._sent: dict[int, asyncio.Future[ResultT]] = {}
        self._credits = 0
        self._wake = asyncio.Event()
        self._broken: OpdError | None = None
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    @property
    def broken(self) -> OpdError | None:
        """Why the stream can take no more items, or None."""
        return self._broken

    @property
    def reached(self) -> bool:
        """The server has answered on this stream."""
        return self._credits > 0

    @abstractmethod
    def _message_of(self, items: list[ItemT]) -> Any:
        """The request that carries them."""

    @abstractmethod
    def _answers_in(self, response: Any) -> Iterator[tuple[int, ResultT | OpdError]]:
        """(tag, what became of the item), for each that a response ends."""

    def _next_tag(self) -> int:
        """For an item that :meth:`_ask` is to send."""
        return next(self._tags)

    async def _ask(self, tag: int, item: ItemT) -> ResultT:
        """Send one item and wait for its answer.

        Cancelling this coroutine stops nothing on the server, unless the stream's own class sees to it.

        Raises:
            OpdError: as the server says of this item; :class:`UnavailableError` where the stream broke, which says
                nothing of what has become of the item.
        """
        if self._broken is not None:
            raise self._broken
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((tag, item, future))
        self._wake.set()
        return await future

    def _is_sent(self, tag: int) -> bool:
        """It is the server's, which has not answered it."""
        return tag in self._sent

    async def _write(self) -> None:
        reader = self._tasks[0]
        self._break(
            await write_when_woken(self._call, self._wake, self._next_message, reader=reader, target=self._target)
        )

    def _next_message(self) -> Any | None:
        """As many as there are credits for, and as fit a message."""
        items: list[ItemT] = []
        size = 0
        while self._waiting and len(self._sent) < self._credits and size < MESSAGE_BYTES:
            if len(items) == self.most_items:
                break
            tag, item, future = self._waiting.popleft()
            if not future.done():  # else given up before it was sent
                self._sent[tag] = future
                items.append(item)
                size += item.ByteSize()
        return self._message_of(items) if items else None

    async def _read(self) -> None:
        failure: OpdError = UnavailableError(f"{self._target} ended the stream")
        try:
            async for response in self._call:
                self._count_bytes(response.ByteSize())
                self._credits = self._credits or response.credits
                for tag, answer in self._answers_in(response):
                    self._take(tag, answer)
                self._wake.set()
        except grpc.aio.AioRpcError as error:
            failure = error_of_rpc(error, target=self._target)
            if isinstance(failure, UnimplementedError):
                failure = UnimplementedError(f"{self.server} {self._target} is older than this client: update it")
            if isinstance(failure, DeadlineError):  # of an idle stream: of no item that it crossed
                failure = UnavailableError(f"{self._target} ended the stream: {failure}")
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                failure = UnavailableError("the stream was closed here")
                raise
        except Exception as error:  # noqa: BLE001 - handed to every item, with its cause
            failure = InternalError(f"{self._target}: unreadable answer: {error}")
            failure.__cause__ = error
        finally:
            self._break(failure)

    def _take(self, tag: int, answer: ResultT | OpdError) -> None:
        future = self._sent.pop(tag, None)
        if future is None or future.done():
            return  # given up meanwhile
        if isinstance(answer, OpdError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _break(self, error: OpdError) -> None:
        self._broken = self._broken or error
        self._call.cancel()
        self._tasks[1].cancel()
        for future in [*self._sent.values(), *(future for _, _, future in self._waiting)]:
            if not future.done():
                future.set_exception(self._broken)
        self._sent.clear()
        self._waiting.clear()

    async def close(self) -> None:
        """End the stream. Items in flight fail here, and go on there."""
        self._broken = self._broken or UnavailableError("the stream was closed here")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._break(self._broken)
