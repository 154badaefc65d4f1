"""Real servers on real sockets, in the test's own process, and a trainer beside them.

Starting a process costs seconds of imports; what needs processes (signals, supervision) is tested in
``test_processes.py``, everything else here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from opd.v1 import rollout_service_pb2_grpc, teacher_service_pb2_grpc
from tiny_models import save_tiny_checkpoint

from opd_mesh.config.base import parse_config
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.services import RolloutServerConfig, ServerConfig, TeacherServerConfig
from opd_mesh.rpc.server import MeshServer
from opd_mesh.valkey import EmbeddedValkey
from rollout_server.engines import build_engine
from rollout_server.service import RolloutServicer
from student_trainer.server import load_student
from student_trainer.trainer import Trainer
from teacher_server.catalogue import Catalogue
from teacher_server.inference_service import SERVICE as INFERENCE_SERVICE
from teacher_server.inference_service import add_inference_service
from teacher_server.server import load_engines, open_catalogue
from teacher_server.service import TeacherServicer

QUICK = ServerConfig(drain_propagation_s=0.0, drain_grace_s=2.0)


@asynccontextmanager
async def serving_teachers(config: TeacherServerConfig, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """A teacher server; yields its address."""
    config = config.replace(server=config.server.replace(drain_propagation_s=0.0, drain_grace_s=2.0))
    server = MeshServer(config.server, services=["opd.v1.TeacherService", INFERENCE_SERVICE])
    catalogue = Catalogue(config)
    servicer = TeacherServicer(catalogue)
    teacher_service_pb2_grpc.add_TeacherServiceServicer_to_server(servicer, server.grpc)
    add_inference_service(server, catalogue)
    address = await server.start(listen)
    queue = open_catalogue(catalogue, await asyncio.to_thread(load_engines, config))
    await server.set_serving(True)
    try:
        yield address
    finally:
        await server.drain(servicer.drain)
        await queue.close()


@asynccontextmanager
async def serving_rollouts(config: RolloutServerConfig, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """A rollout server; yields its address."""
    server = MeshServer(QUICK, services=["opd.v1.RolloutService"])
    servicer = RolloutServicer(config, redis_url=config.redis_url, on_serving=server.set_serving)
    rollout_service_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server.grpc)
    address = await server.start(listen)
    loaded = await asyncio.to_thread(build_engine, config)
    servicer.install(loaded)
    try:
        yield address
    finally:
        await server.drain(servicer.close)


@contextmanager
def running_valkey(folder: Path) -> Iterator[str]:
    """A real server; yields its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    with EmbeddedValkey(folder / "data", folder / "valkey.log") as valkey:
        yield valkey.url


def teacher_config(teachers: dict[str, Path], **fields: Any) -> TeacherServerConfig:
    """Teachers by id."""
    value = {"teachers": {name: {"path": str(path)} for name, path in teachers.items()}, **fields}
    return parse_config(TeacherServerConfig, value, source="test")


def tiny_recipe(student_path: Path, teacher_paths: dict[str, Path], **sections: Any) -> Recipe:
    """A recipe of three quick steps; the i-th teacher marks domain ``domain_i``. ``sections`` are merged over it."""
    tasks = ["chain_sum", "spell_backward", "number_sorting", "letter_counting"]
    value: dict[str, Any] = {
        "run": {"name": "tiny", "steps": 3, "seed": 1},
        "student": {"path": str(student_path)},
        "teachers": {name: {"path": str(path)} for name, path in teacher_paths.items()},
        "domains": {
            f"domain_{index}": {"reasoning_gym": {"task": tasks[index]}, "teachers": {name: 1.0}}
            for index, name in enumerate(teacher_paths)
        },
        "rollout": {"max_new_tokens": 8, "engine": {"max_context_tokens": 480}},
        "batch": {"prompts_per_step": 4},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"prompts_per_domain": 2},
        "redis_timeout_s": 5.0,
    }
    for name, section in sections.items():
        if isinstance(section, dict) and name in value and name not in ("domains", "teachers"):
            value[name] = _merged(value[name], section)
        else:
            value[name] = section
    return parse_config(Recipe, value, source="test")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return {
        **base,
        **{
            key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
            for key, value in over.items()
        },
    }


@asynccontextmanager
async def mesh(recipe: Recipe, redis_url: str) -> AsyncIterator[Recipe]:
    """Teacher and rollout servers for a recipe; yields it with their addresses filled in."""
    teachers = {name: teacher.path for name, teacher in recipe.teachers.items() if teacher.path is not None}
    served = teacher_config(teachers, deterministic=recipe.run.deterministic, threads=recipe.run.threads)
    rollouts = RolloutServerConfig(
        model=recipe.student.path,
        engine=recipe.rollout.engine,
        redis_url=redis_url,
        deterministic=recipe.run.deterministic,
    )
    async with serving_teachers(served) as teacher_address, serving_rollouts(rollouts) as rollout_address:
        peers = recipe.rollout.peers.replace(addresses=[rollout_address])
        yield recipe.replace(
            teachers={n: t.replace(addresses=t.addresses or [teacher_address]) for n, t in recipe.teachers.items()},
            rollout=recipe.rollout.replace(peers=peers),
            redis_url=redis_url,
        )


async def new_trainer(recipe: Recipe, run_dir: Path, *, resume: bool = False) -> Trainer:
    """A trainer whose servers run already."""
    run_dir.mkdir(parents=True, exist_ok=True)
    student, device = await asyncio.to_thread(load_student, recipe)
    return Trainer(recipe, run_dir, student, device=device, resume=resume)


def tiny_family(folder: Path, arch: str = "llama", teachers: int = 2, **options: Any) -> tuple[Path, dict[str, Path]]:
    """(student, teachers by name): random models of one architecture with one tokenizer."""
    student = save_tiny_checkpoint(folder / "student", arch, 0, **options)
    names = ["one", "two", "three", "four"][:teachers]
    return student, {
        name: save_tiny_checkpoint(folder / name, arch, seed, **options) for seed, name in enumerate(names, start=1)
    }
