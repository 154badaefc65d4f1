"""The reward model's client where the server is old, odd, or not there."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from opd.v1 import generative_reward_service_pb2 as pb

from opd_mesh.clients import reward
from opd_mesh.clients.reward import JudgeStream, RewardClient
from opd_mesh.config.services import ChannelConfig
from opd_mesh.errors import (
    InternalError,
    JudgeUnavailableError,
    NotFoundError,
    TooLongError,
    UnavailableError,
    UnimplementedError,
)

ITEM = pb.JudgeItem(prompt="p", answers=["a"], rubric_name="r")


class Call:
    """Grants credits and answers every message as ``answer`` says; an exception as the first response ends it."""

    def __init__(self, first: Any, answer: Any = None) -> None:
        self._responses: asyncio.Queue[Any] = asyncio.Queue()
        self._responses.put_nowait(first)
        self._answer = answer
        self.written: list[Any] = []

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        response = await self._responses.get()
        if isinstance(response, BaseException):
            raise response
        return response

    async def write(self, message: Any) -> None:
        self.written.append(message)
        if self._answer is not None:
            self._responses.put_nowait(self._answer(message))

    def cancel(self) -> None: ...


async def test_an_item_a_message_within_the_credits_and_answers_in_any_order() -> None:
    call = Call(pb.JudgeBatchResponse(credits=2))
    stream = JudgeStream(call, "host:1")
    async with asyncio.timeout(20):
        asked = [asyncio.create_task(stream.ask(ITEM)) for _ in range(3)]
        while len(call.written) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert [message.item.item_id for message in call.written] == ["1", "2"]
        call._responses.put_nowait(pb.JudgeBatchResponse(item_id="2", status=status_pb2.Status(code=5, message="no")))
        with pytest.raises(NotFoundError, match="no"):
            await asked[1]
        call._responses.put_nowait(pb.JudgeBatchResponse(item_id="1", judgement=pb.JudgeResponse(rubric_digest="d")))
        assert (await asked[0]).rubric_digest == "d"
        while len(call.written) < 3:
            await asyncio.sleep(0)
        call._responses.put_nowait(pb.JudgeBatchResponse(item_id="x", judgement=pb.JudgeResponse()))
        with pytest.raises(InternalError, match="host:1: unreadable answer"):
            await asked[2]
    await stream.close()


async def test_who_gives_an_item_up_tells_the_server_and_the_credit_comes_back() -> None:
    call = Call(pb.JudgeBatchResponse(credits=1))
    stream = JudgeStream(call, "host:1")
    async with asyncio.timeout(20):
        given_up, never_sent = (asyncio.create_task(stream.ask(ITEM)) for _ in range(2))
        while not call.written:
            await asyncio.sleep(0)
        never_sent.cancel()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await given_up
        while len(call.written) < 2:
            await asyncio.sleep(0)
        assert call.written[1] == pb.JudgeBatchRequest(cancel_item_id="1")
        last = asyncio.create_task(stream.ask(ITEM))
        call._responses.put_nowait(pb.JudgeBatchResponse(item_id="1", status=status_pb2.Status(code=1)))
        while len(call.written) < 3:
            await asyncio.sleep(0)
        assert call.written[2].item.item_id == "3"  # and the second, which was not sent, is not told of
        call._responses.put_nowait(pb.JudgeBatchResponse(item_id="3", judgement=pb.JudgeResponse()))
        await last
    await stream.close()


async def test_a_call_that_went_well_for_long_is_no_failure_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "ASK_AGAIN_S", 0.0)
    calls = 0

    metadata = grpc.aio.Metadata()

    async def call(request: pb.JudgeRequest, timeout: float) -> pb.JudgeResponse:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.005)
        if calls < 5:
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, metadata, metadata, details="Socket closed")
        if request.item.prompt == "nobody":  # what the server says of an item is no broken connection
            raise UnavailableError("nobody judges")
        return pb.JudgeResponse(rubric_digest="d")

    async with asyncio.timeout(20), RewardClient("127.0.0.1:9", ChannelConfig(connect_timeout_s=0.001)) as client:
        monkeypatch.setattr(client._stub, "Judge", call)
        assert (await client.judge(ITEM)).rubric_digest == "d"
        with pytest.raises(JudgeUnavailableError, match="last: nobody judges"):
            await client.judge(pb.JudgeItem(prompt="nobody"))


async def test_an_older_server_is_named_and_what_to_do_with_it() -> None:
    empty = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNIMPLEMENTED, empty, empty, details="Method not found!")
    stream = JudgeStream(Call(error), "host:1")
    async with asyncio.timeout(20):
        with pytest.raises(UnimplementedError, match="reward model host:1 is older than this client: update it"):
            await stream.ask(ITEM)
    await stream.close()


async def test_an_item_that_fits_no_message_is_refused_before_it_breaks_the_stream() -> None:
    async with RewardClient("127.0.0.1:9", ChannelConfig(max_message_bytes=1 << 20)) as client:
        (refusal,) = await client.judge_many([pb.JudgeItem(prompt="p" * (1 << 20))])
    assert isinstance(refusal, TooLongError)


async def test_nobody_there_is_told_after_the_connect_timeout() -> None:
    channel = ChannelConfig(connect_timeout_s=0.05, max_attempts=1)
    async with asyncio.timeout(20), RewardClient("127.0.0.1:9", channel) as client:
        with pytest.raises(JudgeUnavailableError, match=r"at 127\.0\.0\.1:9 did not judge for 0\.05 s"):
            await client.judge(ITEM)
        (refusal,) = await client.judge_many([ITEM])
        assert isinstance(refusal, JudgeUnavailableError)
        (late,) = await client.judge_many([ITEM], timeout_s=0.01)
        assert "within 0.01 s" in str(late)
