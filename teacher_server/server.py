"""The teacher server's process: bind, load, prove, serve, drain."""

from __future__ import annotations

import asyncio
import logging

from opd.v1 import teacher_service_pb2_grpc

from opd_mesh.config.services import TeacherServerConfig
from opd_mesh.errors import OpdError
from opd_mesh.models.runtime import configure_torch, release_free_memory
from opd_mesh.process import ServiceArguments
from opd_mesh.rpc.server import MeshServer
from teacher_server.base_model import BaseModels
from teacher_server.catalogue import Catalogue
from teacher_server.engine import TeacherEngine
from teacher_server.engines import load_engine
from teacher_server.inference_service import SERVICE as INFERENCE_SERVICE
from teacher_server.inference_service import add_inference_service
from teacher_server.pool import WeightPool, check_fits
from teacher_server.scoring_queue import ScoringQueue
from teacher_server.service import TeacherServicer

log = logging.getLogger("teacher_server")
SERVICE = "opd.v1.TeacherService"


def load_engines(config: TeacherServerConfig) -> dict[str, TeacherEngine]:
    """Load and prove every teacher, one after the other. Raises the errors of its engine, naming the teacher.

    Raises:
        ConfigError: a teacher is larger than the pool's memory.
    """
    device = configure_torch(config.device, threads=config.threads, deterministic=config.deterministic)
    bases = BaseModels(device=device, keep_in_memory=config.pool.memory_bytes is None, cache_dir=config.pool.cache_dir)
    engines: dict[str, TeacherEngine] = {}
    try:
        for teacher_id, teacher in config.teachers.items():
            log.info("loading teacher %s from %s", teacher_id, teacher.path)
            try:
                engine = engines[teacher_id] = load_engine(teacher_id, teacher, config, bases)
            except OpdError as error:
                error.message = f"teacher {teacher_id!r}: {error.message}"
                raise
            check_fits(teacher_id, engine.weight_sets, config.pool.memory_bytes)
            facts = engine.facts
            log.info(
                "teacher %s: %s, V=%d, d=%d, %s, batching %s, head error %.1e, digest %s",
                teacher_id, facts.model_type, facts.vocab_size, facts.hidden_size, facts.dtype,
                facts.batch_layout, facts.head_error, facts.teacher_digest[:12],
            )  # fmt: skip
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    release_free_memory()
    return engines


def open_catalogue(catalogue: Catalogue, engines: dict[str, TeacherEngine]) -> ScoringQueue:
    """Begin to serve the engines; the queue is to be closed at the end."""
    config = catalogue.config
    pool = WeightPool(config.pool.memory_bytes)
    queue = ScoringQueue(engines, pool, config)
    queue.start()
    catalogue.install(engines, queue)
    return queue


async def serve(arguments: ServiceArguments[TeacherServerConfig]) -> None:
    """Serve until SIGTERM."""
    config = arguments.config
    server = MeshServer(config.server, services=[SERVICE, INFERENCE_SERVICE], insecure=arguments.insecure)
    catalogue = Catalogue(config)
    servicer = TeacherServicer(catalogue)
    teacher_service_pb2_grpc.add_TeacherServiceServicer_to_server(servicer, server.grpc)
    add_inference_service(server, catalogue)
    # The port first: one that is taken should not cost minutes of loading.
    address = await server.start(arguments.listen)
    try:
        queue = open_catalogue(catalogue, await asyncio.to_thread(load_engines, config))
    except BaseException:
        await server.grpc.stop(None)  # or its destructor would add a stack to the one clear message
        raise
    await server.set_serving(True)
    arguments.announce(address)
    await server.run_until_signal(on_drain=servicer.drain)
    await queue.close()
    log.info("served %d tokens in %d batches; %s", queue.tokens, queue.batches, queue.pool.counters)
