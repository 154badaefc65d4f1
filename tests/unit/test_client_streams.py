"""Both sides' many-in-one streams where sending fails, or the server does not know them: nobody waits for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from opd.v1 import rollout_service_pb2, teacher_service_pb2

from opd_mesh.clients.generation_stream import GenerationStream
from opd_mesh.clients.scoring_stream import ScoreRequest, ScoringStream, WireCount
from opd_mesh.errors import InternalError, OpdError, UnimplementedError


class Call:
    """Grants credits; what is written to it fails as it is told."""

    def __init__(self, first: Any, failure: BaseException) -> None:
        self._first = first
        self._failure = failure
        self.cancelled = False

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        if self._first is None:
            await asyncio.Event().wait()
        if isinstance(self._first, BaseException):
            raise self._first
        first, self._first = self._first, None
        return first

    async def write(self, message: Any) -> None:
        raise self._failure

    def cancel(self) -> None:
        self.cancelled = True


async def test_a_request_that_cannot_be_written_breaks_the_generation_stream() -> None:
    call = Call(rollout_service_pb2.GenerateBatchResponse(credits=4), TypeError("no bytes"))
    stream = GenerationStream(call, "server", lambda size: None)
    async with asyncio.timeout(20):
        with pytest.raises(InternalError, match="could not be sent: no bytes"):
            await stream.ask(rollout_service_pb2.GenerateRequest(request_id="r"), return_trajectory=False)
    assert isinstance(stream.broken, OpdError)
    assert call.cancelled
    await stream.close()


async def test_an_item_that_cannot_be_written_breaks_the_scoring_stream() -> None:
    call = Call(teacher_service_pb2.ScoreTrajectoriesResponse(credits=4), ValueError("too odd"))
    stream = ScoringStream(call, "server", WireCount())
    async with asyncio.timeout(20):
        with pytest.raises(InternalError, match="could not be sent: too odd"):
            await stream.score(ScoreRequest("t", [1, 2], [(1, 2)], "f"))
    assert isinstance(stream.broken, InternalError)
    assert call.cancelled
    await stream.close()


async def test_an_older_server_is_named_and_what_to_do_with_it() -> None:
    empty = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNIMPLEMENTED, empty, empty, details="Method not found!")
    stream = GenerationStream(Call(error, error), "host:1", lambda size: None)
    async with asyncio.timeout(20):
        with pytest.raises(UnimplementedError, match="rollout server host:1 is older than this client: update it"):
            await stream.ask(rollout_service_pb2.GenerateRequest(request_id="r"), return_trajectory=False)
    await stream.close()
