"""Client of ``opd.v1.GenerativeRewardService``."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.v1 import generative_reward_service_pb2 as pb
from opd.v1 import generative_reward_service_pb2_grpc as pb_grpc

from opd_mesh.clients.base import ServiceClient
from opd_mesh.clients.credit_stream import CreditStream
from opd_mesh.clients.patience import Patience
from opd_mesh.config.services import ChannelConfig
from opd_mesh.errors import JudgeUnavailableError, OpdError, OverloadedError, TooLongError, UnavailableError
from opd_mesh.rpc.channel import open_channel, rpc_errors, wait_until_serving
from opd_mesh.rpc.status import error_of

SERVICE = "opd.v1.GenerativeRewardService"
ITEM_TIMEOUT_S = 600.0
ASK_AGAIN_S = 0.5
# Of a message, for all that is not the item.
ROOM_BYTES = 1024


class JudgeStream(CreditStream[pb.JudgeBatchItem, pb.JudgeResponse]):
    """One open ``JudgeBatch`` call."""

    server = "reward model"
    most_items = 1

    def __init__(self, call: Any, target: str) -> None:
        self._given_up: deque[int] = deque()
        super().__init__(call, target)

    async def ask(self, item: pb.JudgeItem) -> pb.JudgeResponse:
        """Send one item and wait for its judgement; see :meth:`CreditStream._ask`. Cancelled, so is the judging."""
        tag = self._next_tag()
        try:
            return await self._ask(tag, pb.JudgeBatchItem(item_id=str(tag), item=item))
        except asyncio.CancelledError:
            if self._is_sent(tag):
                self._given_up.append(tag)
                self._wake.set()
            raise

    def _next_message(self) -> Any | None:
        if self._given_up:
            return pb.JudgeBatchRequest(cancel_item_id=str(self._given_up.popleft()))
        return super()._next_message()

    def _message_of(self, items: list[pb.JudgeBatchItem]) -> pb.JudgeBatchRequest:
        (item,) = items
        return pb.JudgeBatchRequest(item=item)

    def _answers_in(self, response: pb.JudgeBatchResponse) -> Iterator[tuple[int, pb.JudgeResponse | OpdError]]:
        kind = response.WhichOneof("payload")
        if kind == "judgement":
            yield int(response.item_id), response.judgement
        elif kind == "status":
            yield int(response.item_id), error_of(response.status)


@dataclass
class RewardClient(ServiceClient):
    """One server. Judging is idempotent: what a broken connection leaves unanswered is asked again."""

    address: str
    config: ChannelConfig = field(default_factory=ChannelConfig)

    def __post_init__(self) -> None:
        self._channel = open_channel(self.address, SERVICE, self.config)
        self._stub = pb_grpc.GenerativeRewardServiceStub(self._channel)
        self._stream: JudgeStream | None = None

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until there is a policy that judges.

        Raises:
            UnavailableError: after ``timeout_s`` (default: the channel's ``connect_timeout_s``).
        """
        await wait_until_serving(
            self._channel,
            SERVICE,
            target=self.address,
            timeout_s=self.config.connect_timeout_s if timeout_s is None else timeout_s,
        )

    async def get_judge(self) -> pb.GetJudgeResponse:
        """What judges, and by which rubrics."""
        async with rpc_errors(self.address):
            return await self._stub.GetJudge(pb.GetJudgeRequest(), timeout=self.config.timeout_s)

    async def judge(self, item: pb.JudgeItem, *, timeout_s: float = ITEM_TIMEOUT_S) -> pb.JudgeResponse:
        """Judge one item, by a call of its own.

        Raises:
            JudgeUnavailableError: not judged within ``timeout_s`` seconds, or the server was not to be reached for the
                channel's ``connect_timeout_s`` on end.
            OpdError: as the server says of the item.
        """

        loop = asyncio.get_running_loop()
        reached = False

        async def call() -> pb.JudgeResponse:
            nonlocal reached
            started = loop.time()
            try:
                async with rpc_errors(self.address):
                    return await self._stub.Judge(pb.JudgeRequest(item=item), timeout=timeout_s)
            except UnavailableError as error:
                # In gRPC's own words, so the connection broke, and one that was good for so long had been made.
                broken = error.metadata.get("target") == self.address
                reached = broken and loop.time() - started > self.config.connect_timeout_s
                raise

        return await self._until_judged(call, timeout_s, lambda: reached)

    async def judge_streamed(self, item: pb.JudgeItem, *, timeout_s: float = ITEM_TIMEOUT_S) -> pb.JudgeResponse:
        """As :meth:`judge`, over the one stream that everything asked for at one time shares."""
        allowed = self.config.max_message_bytes - ROOM_BYTES
        if (size := item.ByteSize()) > allowed:  # it would break the stream, and so its neighbours
            raise TooLongError(f"{size} bytes, but {allowed} fit a message", field="item")
        used: list[JudgeStream] = []

        async def call() -> pb.JudgeResponse:
            if self._stream is None or self._stream.broken is not None:
                self._stream = JudgeStream(self._stub.JudgeBatch(), self.address)
            used[:] = [self._stream]
            return await self._stream.ask(item)

        return await self._until_judged(
            call, timeout_s, lambda: bool(used) and used[0].broken is not None and used[0].reached
        )

    async def judge_many(
        self, items: Sequence[pb.JudgeItem], *, timeout_s: float = ITEM_TIMEOUT_S
    ) -> list[pb.JudgeResponse | OpdError]:
        """Judge all, over one stream; in their order, each with its judgement or with why it has none.

        Args:
            timeout_s: for each item from now on.
        """

        async def judged(item: pb.JudgeItem) -> pb.JudgeResponse | OpdError:
            try:
                return await self.judge_streamed(item, timeout_s=timeout_s)
            except OpdError as error:
                return error

        return list(await asyncio.gather(*map(judged, items)))

    async def _until_judged(
        self, call: Callable[[], Awaitable[pb.JudgeResponse]], timeout_s: float, was_reached: Callable[[], bool]
    ) -> pb.JudgeResponse:
        """Ask again where the connection breaks or the server is full.

        Args:
            was_reached: whether the connection that broke had been good.
        """
        patience = Patience(self.config.connect_timeout_s)
        last: OpdError | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await call()
                    except OverloadedError as error:
                        last = error
                        patience.reached()
                        await asyncio.sleep(error.retry_delay_s or ASK_AGAIN_S)
                        continue
                    except UnavailableError as error:
                        last = error
                        if was_reached():
                            patience.reached()
                    if patience.is_over():
                        raise JudgeUnavailableError(
                            f"the reward model at {self.address} did not judge for {self.config.connect_timeout_s:g} s "
                            f"(last: {last})",
                            metadata={"target": self.address},
                        )
                    await asyncio.sleep(last.retry_delay_s or ASK_AGAIN_S)
        except TimeoutError:
            raise JudgeUnavailableError(
                f"the reward model at {self.address} did not judge the item within {timeout_s:g} s"
                + (f" (last: {last})" if last else ""),
                metadata={"target": self.address},
            ) from last

    async def close(self) -> None:
        """Ends the stream and the channel."""
        if self._stream is not None:
            await self._stream.close()
        await super().close()
