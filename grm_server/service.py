"""``opd.v1.GenerativeRewardService``: one method per RPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
from opd.v1 import generative_reward_service_pb2 as pb
from opd.v1 import generative_reward_service_pb2_grpc as pb_grpc

from grm_server.ballots import Texts
from grm_server.batch_call import BatchCall
from grm_server.items import check_item
from grm_server.judges import Judges
from grm_server.judging import Judging
from opd_mesh.config.rubrics import RubricLibrary
from opd_mesh.config.services import GrmServerConfig
from opd_mesh.convert import policy_to_proto
from opd_mesh.errors import TooLongError


class GenerativeRewardServicer(pb_grpc.GenerativeRewardServiceServicer):
    """Judges, as soon as a rollout server holds a policy."""

    def __init__(self, config: GrmServerConfig, judges: Judges, texts: Texts, rubrics: RubricLibrary) -> None:
        self._config = config
        self._judges = judges
        self._texts = texts
        self._rubrics = rubrics
        self._judging = Judging(config, judges, texts)
        self._calls: set[BatchCall] = set()

    def start(self) -> None:
        """Begin to look whether anybody can judge."""
        self._judges.start()

    async def drain(self) -> None:
        """Standing streams end once what they accepted is answered; without this they would last for ever."""
        for call in self._calls:
            call.stop()

    async def GetJudge(self, request: pb.GetJudgeRequest, context: grpc.aio.ServicerContext) -> pb.GetJudgeResponse:
        """What judges, and by which rubrics."""
        judge = self._judges.ready
        counts = self._judging.counts
        rubrics = {name: rubric for name in self._rubrics.names if (rubric := self._rubrics.get(name)) is not None}
        return pb.GetJudgeResponse(
            policy=policy_to_proto(judge.policy) if judge is not None and judge.policy is not None else None,
            tokenizer_fingerprint=self._texts.fingerprint,
            rubrics=[pb.RubricName(name=name, digest=rubric.digest) for name, rubric in rubrics.items()],
            constrained=self._config.constrained if judge is None else judge.constrained,
            items_judged=counts.items_judged,
            items_cached=counts.items_cached,
            votes=counts.votes,
            votes_unparsed=counts.votes_unparsed,
            inline_templates=self._config.inline_templates,
        )

    async def Judge(self, request: pb.JudgeRequest, context: grpc.aio.ServicerContext) -> pb.JudgeResponse:
        """One item."""
        judgement = await self._judge(request.item)
        if (size := judgement.ByteSize()) > self._config.server.max_message_bytes:
            raise TooLongError(
                f"the judgement has {size} bytes, {self._config.server.max_message_bytes} fit a message: ask for fewer "
                "answers or votes at once",
                field="item",
            )
        return judgement

    async def JudgeBatch(
        self, request_iterator: AsyncIterator[pb.JudgeBatchRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.JudgeBatchResponse]:
        """Many, each with its own judgement or status."""
        call = BatchCall(
            self._judge,
            credits=self._config.max_items,
            idle_timeout_s=self._config.server.stream_idle_timeout_s,
            max_message_bytes=self._config.server.max_message_bytes,
        )
        self._calls.add(call)
        try:
            async with aclosing(call.answers(request_iterator)) as answers:
                async for response in answers:
                    yield response
        finally:
            self._calls.discard(call)

    async def _judge(self, item: pb.JudgeItem, given_up: asyncio.Event | None = None) -> pb.JudgeResponse:
        return await self._judging.judge(check_item(item, self._config, self._rubrics), given_up)
