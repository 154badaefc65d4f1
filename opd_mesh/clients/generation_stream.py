"""One open ``GenerateBatch`` call: what is asked for at one moment travels together, and so do the answers."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
from opd.v1 import rollout_service_pb2

from opd_mesh.errors import DeadlineError, InternalError, OpdError, UnavailableError, UnimplementedError
from opd_mesh.rpc.status import error_of, error_of_rpc
from opd_mesh.rpc.writer import MESSAGE_BYTES, write_when_woken

Item = rollout_service_pb2.GenerateBatchItem
Result = rollout_service_pb2.GenerateBatchResult


class GenerationStream:
    """Many requests in flight, each with its own answer or error. For one event loop.

    Args:
        call: made by the stub, with no request iterator.
        count_bytes: called with the size of every message that came.
    """

    def __init__(self, call: Any, target: str, count_bytes: Callable[[int], None]) -> None:
        self._call = call
        self._target = target
        self._count_bytes = count_bytes
        self._tags = itertools.count(1)
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._sent: dict[int, asyncio.Future[Result]] = {}
        self._credits = 0
        self._wake = asyncio.Event()
        self._broken: OpdError | None = None
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    @property
    def broken(self) -> OpdError | None:
        """Why the stream can take no more requests, or None."""
        return self._broken

    @property
    def reached(self) -> bool:
        """The server has answered on this stream."""
        return self._credits > 0

    async def ask(self, request: rollout_service_pb2.GenerateRequest, *, return_trajectory: bool) -> Result:
        """Send one request and wait for its answer.

        Cancelling this coroutine stops nothing on the server.

        Raises:
            OpdError: as the server says of this request; :class:`UnavailableError` where the stream broke, which says
                nothing of what has become of the request.
        """
        if self._broken is not None:
            raise self._broken
        item = Item(request=request, tag=next(self._tags), return_trajectory=return_trajectory)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._wake.set()
        return await future

    async def _write(self) -> None:
        reader = self._tasks[0]
        self._break(
            await write_when_woken(self._call, self._wake, self._next_message, reader=reader, target=self._target)
        )

    def _next_message(self) -> rollout_service_pb2.GenerateBatchRequest | None:
        """As many as there are credits for, and as fit a message."""
        items: list[Item] = []
        size = 0
        while self._waiting and len(self._sent) < self._credits and size < MESSAGE_BYTES:
            item, future = self._waiting.popleft()
            if not future.done():  # else given up before it was sent
                self._sent[item.tag] = future
                items.append(item)
                size += item.ByteSize()
        return rollout_service_pb2.GenerateBatchRequest(items=items) if items else None

    async def _read(self) -> None:
        failure: OpdError = UnavailableError(f"{self._target} ended the stream")
        try:
            async for response in self._call:
                self._count_bytes(response.ByteSize())
                self._credits = self._credits or response.credits
                for result in response.results:
                    self._take(result)
                self._wake.set()
        except grpc.aio.AioRpcError as error:
            failure = error_of_rpc(error, target=self._target)
            if isinstance(failure, UnimplementedError):
                failure = UnimplementedError(f"rollout server {self._target} is older than this client: update it")
            if isinstance(failure, DeadlineError):  # of an idle stream: of no request that it crossed
                failure = UnavailableError(f"{self._target} ended the stream: {failure}")
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                failure = UnavailableError("the stream was closed here")
                raise
        except Exception as error:  # noqa: BLE001 - handed to every request, with its cause
            failure = InternalError(f"{self._target}: unreadable answer: {error}")
            failure.__cause__ = error
        finally:
            self._break(failure)

    def _take(self, result: Result) -> None:
        future = self._sent.pop(result.tag, None)
        if future is None or future.done():
            return  # given up meanwhile
        if result.status.code:
            future.set_exception(error_of(result.status))
        else:
            future.set_result(result)

    def _break(self, error: OpdError) -> None:
        self._broken = self._broken or error
        self._call.cancel()
        self._tasks[1].cancel()
        for future in [*self._sent.values(), *(future for _, future in self._waiting)]:
            if not future.done():
                future.set_exception(self._broken)
        self._sent.clear()
        self._waiting.clear()

    async def close(self) -> None:
        """End the stream. Requests in flight fail here, and go on there."""
        self._broken = self._broken or UnavailableError("the stream was closed here")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._break(self._broken)
