"""The rollout server's process: bind, load, prove, wait for a policy, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import os

from opd.v1 import rollout_service_pb2_grpc

from opd_mesh.config.services import RolloutServerConfig
from opd_mesh.models.checkpoint import load_causal_lm
from opd_mesh.models.runtime import configure_torch
from opd_mesh.models.tokenizer import load_tokenizer, tokenizer_fingerprint, valid_vocab_size
from opd_mesh.process import ServiceArguments
from opd_mesh.rpc.server import MeshServer
from opd_mesh.torch_tensors import TORCH_DTYPES
from rollout_server.decode_engine import DecodeEngine
from rollout_server.service import RolloutServicer

log = logging.getLogger("rollout_server")
SERVICE = "opd.v1.RolloutService"


def load_engine(config: RolloutServerConfig) -> tuple[DecodeEngine, str, int]:
    """(engine, tokenizer fingerprint, vocabulary size). The weights are only there to prove the cache modes on."""
    settings = config.engine
    device = configure_torch(settings.device, threads=settings.threads, deterministic=config.deterministic)
    loaded = load_causal_lm(config.model, dtype=TORCH_DTYPES[settings.dtype], device=device)
    tokenizer = load_tokenizer(config.model)
    vocab_size = valid_vocab_size(tokenizer)
    engine = DecodeEngine(
        loaded.model,
        policy_version=0,
        valid_vocab_size=vocab_size,
        max_slots=settings.max_slots,
        max_context_tokens=settings.max_context_tokens,
        deterministic=config.deterministic,
        prefill_token_budget=settings.prefill_token_budget,
    )
    log.info("student %s (%s), cache mode %s", config.model, loaded.model_type, engine.cache_mode)
    return engine, tokenizer_fingerprint(tokenizer.get_vocab()), vocab_size


async def serve(arguments: ServiceArguments[RolloutServerConfig]) -> None:
    """Serve until SIGTERM. Health is NOT_SERVING until a policy has been given."""
    config = arguments.config
    server = MeshServer(config.server, services=[SERVICE], insecure=arguments.insecure)
    redis_url = config.redis_url or os.environ.get("OPD_REDIS_URL")
    servicer = RolloutServicer(config, redis_url=redis_url, on_serving=server.set_serving)
    rollout_service_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server.grpc)
    address = await server.start(arguments.listen)
    try:
        engine, fingerprint, vocab_size = await asyncio.to_thread(load_engine, config)
    except BaseException:
        await server.grpc.stop(None)  # or its destructor would add a stack to the one clear message
        raise
    servicer.install(engine, tokenizer_fingerprint=fingerprint, vocab_size=vocab_size)
    arguments.announce(address)
    await server.run_until_signal(on_drain=servicer.close)
