"""The reward model's process: bind, read tokenizer and rubrics, watch the judges, serve, drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from opd.v1 import generative_reward_service_pb2_grpc

from grm_server.ballots import Texts
from grm_server.judges import Judge, Judges
from grm_server.service import GenerativeRewardServicer
from opd_mesh.config.rubrics import RubricLibrary
from opd_mesh.config.services import GrmServerConfig
from opd_mesh.errors import ConfigError
from opd_mesh.models.tokenizer import load_tokenizer
from opd_mesh.process import ServiceArguments
from opd_mesh.rpc.server import MeshServer

log = logging.getLogger("grm_server")
SERVICE = "opd.v1.GenerativeRewardService"


@asynccontextmanager
async def judging_service(
    config: GrmServerConfig, on_serving: Callable[[bool], Awaitable[None]]
) -> AsyncIterator[GenerativeRewardServicer]:
    """The servicer, to be started once its server is, and what it works with.

    Args:
        on_serving: called with whether there is a policy that judges, at first and when that changes.

    Raises:
        ConfigError: nobody to judge, or rubrics that are none.
        ModelNotFoundError: no tokenizer.
    """
    if not config.judge.addresses:
        raise ConfigError(
            "judge.addresses names the rollout servers that hold the judging policy; for a frozen model start one with "
            "`frozen: true`",
            field="judge.addresses",
        )
    rubrics = RubricLibrary([]) if config.rubrics is None else RubricLibrary.of_folder(config.rubrics)
    texts = Texts(await asyncio.to_thread(load_tokenizer, config.model), config.system_prompt)
    judges = Judges(
        [
            Judge(address, config.judge.channel, texts.fingerprint, constrained=config.constrained)
            for address in config.judge.addresses
        ],
        on_serving,
    )
    log.info("rubrics: %s", ", ".join(rubrics.names) or "those of the items alone")
    try:
        yield GenerativeRewardServicer(config, judges, texts, rubrics)
    finally:
        await judges.close()
        texts.close()


async def serve(arguments: ServiceArguments[GrmServerConfig]) -> None:
    """Serve until SIGTERM. Health is NOT_SERVING while no judge's rollout server holds a policy."""
    config = arguments.config
    server = MeshServer(config.server, services=[SERVICE], insecure=arguments.insecure)

    async def on_serving(serving: bool) -> None:
        await server.set_serving(serving)

    async with judging_service(config, on_serving) as servicer:
        generative_reward_service_pb2_grpc.add_GenerativeRewardServiceServicer_to_server(servicer, server.grpc)
        arguments.announce(await server.start(arguments.listen))
        servicer.start()
        await server.run_until_signal(on_drain=servicer.drain)
