"""The rollout server's process: bind, load, prove, own the log, wait for a policy, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress

from opd.v1 import rollout_service_pb2_grpc

from opd_mesh.config.services import RolloutServerConfig
from opd_mesh.errors import OpdError
from opd_mesh.process import ServiceArguments
from opd_mesh.rpc.server import MeshServer
from rollout_server.engines import build_engine
from rollout_server.owned_log import OwnedLog
from rollout_server.request_log import states_of
from rollout_server.service import RolloutServicer

log = logging.getLogger("rollout_server")
SERVICE = "opd.v1.RolloutService"


async def serve(arguments: ServiceArguments[RolloutServerConfig]) -> int:
    """Serve until SIGTERM, or until the decode loop or the log fails: then 1, and whoever starts us should do it again.

    Health is NOT_SERVING until a policy has been given; a frozen server has one of its own.
    """
    config = arguments.config
    server = MeshServer(config.server, services=[SERVICE], insecure=arguments.insecure)
    redis_url = config.redis_url or os.environ.get("OPD_REDIS_URL")
    failures: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        log.error("the server ends: %s", error)
        server.config = server.config.replace(drain_propagation_s=0.0)  # nothing is served any more
        server.request_stop()

    servicer = RolloutServicer(config, redis_url=redis_url, on_serving=server.set_serving, on_failure=on_failure)
    rollout_service_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server.grpc)
    address = await server.start(arguments.listen)
    owned: OwnedLog | None = None
    try:
        loaded = await asyncio.to_thread(build_engine, config)
        if config.log is not None:
            owned = await OwnedLog.take(config.log, redis_url, timeout_s=config.stream_timeout_s)
            owned.when_lost(on_failure)
            recovered = await asyncio.to_thread(states_of, owned.take_recovered())
            servicer.install(loaded, token_log=owned.log, recovered=recovered)
            del recovered
        else:
            log.warning("no log is configured: requests do not survive this process")
            servicer.install(loaded)
        del loaded  # of the checkpoint's own weights the service keeps what it needs
        if config.frozen:
            await servicer.serve_frozen()
    except BaseException:
        await server.grpc.stop(None)  # or its destructor would add a stack to the one clear message
        raise
    arguments.announce(address)
    await server.run_until_signal(on_drain=lambda: servicer.close(save_kv=not failures))
    if owned is not None:
        with suppress(OpdError):  # fenced, or its disk is broken: said already
            await owned.release()
    return 1 if failures else 0
