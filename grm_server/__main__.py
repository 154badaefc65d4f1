"""``python -m grm_server --config F --listen ADDR`` (``opd serve grm``).

The protocol stands; the judge comes with a later release. Until then both calls answer UNIMPLEMENTED, by the error
path of every other service, and health says NOT_SERVING.
"""

from collections.abc import AsyncIterator

import grpc
from opd.v1 import generative_reward_service_pb2, generative_reward_service_pb2_grpc

from opd_mesh.config.services import GrmServerConfig
from opd_mesh.errors import UnimplementedError
from opd_mesh.process import ServiceArguments, parse_arguments, run
from opd_mesh.rpc.server import MeshServer

SERVICE = "opd.v1.GenerativeRewardService"
MESSAGE = "judging is not part of this release; rewards come from verifiers"


class GenerativeRewardServicer(generative_reward_service_pb2_grpc.GenerativeRewardServiceServicer):
    """Answers UNIMPLEMENTED."""

    async def Judge(
        self, request: generative_reward_service_pb2.JudgeRequest, context: grpc.aio.ServicerContext
    ) -> generative_reward_service_pb2.JudgeResponse:
        """UNIMPLEMENTED."""
        raise UnimplementedError(MESSAGE)

    async def JudgeBatch(
        self,
        request_iterator: AsyncIterator[generative_reward_service_pb2.JudgeBatchRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[generative_reward_service_pb2.JudgeBatchResponse]:
        """UNIMPLEMENTED."""
        raise UnimplementedError(MESSAGE)
        yield  # makes this an async generator, as a streaming method must be


async def serve(arguments: ServiceArguments[GrmServerConfig]) -> None:
    """Serve until SIGTERM."""
    server = MeshServer(arguments.config.server, services=[SERVICE], insecure=arguments.insecure)
    generative_reward_service_pb2_grpc.add_GenerativeRewardServiceServicer_to_server(
        GenerativeRewardServicer(), server.grpc
    )
    arguments.announce(await server.start(arguments.listen))
    await server.run_until_signal()


if __name__ == "__main__":
    run(serve(parse_arguments("grm", GrmServerConfig)))
