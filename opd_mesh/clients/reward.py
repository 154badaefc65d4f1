"""Client of ``opd.v1.GenerativeRewardService``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from opd.v1 import generative_reward_service_pb2 as pb
from opd.v1 import generative_reward_service_pb2_grpc as pb_grpc

from opd_mesh.clients.base import ServiceClient
from opd_mesh.config.services import ChannelConfig
from opd_mesh.rpc.channel import open_channel, responses_of, rpc_errors

SERVICE = "opd.v1.GenerativeRewardService"


@dataclass
class RewardClient(ServiceClient):
    """Both calls answer UNIMPLEMENTED in this release."""

    address: str
    config: ChannelConfig = field(default_factory=ChannelConfig)

    def __post_init__(self) -> None:
        self._channel = open_channel(self.address, SERVICE, self.config)
        self._stub = pb_grpc.GenerativeRewardServiceStub(self._channel)

    async def judge(self, item: pb.JudgeItem) -> pb.JudgeResponse:
        """Judge one item."""
        async with rpc_errors(self.address):
            return await self._stub.Judge(pb.JudgeRequest(item=item), timeout=self.config.timeout_s)

    async def judge_batch(self, items: Iterable[pb.JudgeBatchItem]) -> AsyncIterator[pb.JudgeBatchResponse]:
        """Judge many; answers in any order."""

        async def requests() -> AsyncIterator[pb.JudgeBatchRequest]:
            for item in items:
                yield pb.JudgeBatchRequest(item=item)

        async for response in responses_of(self._stub.JudgeBatch(requests()), self.address):
            yield response
