"""The trainer's process: bind, load the student, run, serve TrainerService meanwhile, report."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path

from opd.v1 import trainer_service_pb2_grpc

from opd_mesh.config.base import dump_config
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError, OpdError
from opd_mesh.models.runtime import configure_torch
from opd_mesh.process import EXIT_USER_ERROR, ServiceArguments
from opd_mesh.report import build_report
from opd_mesh.rpc.server import MeshServer
from opd_mesh.trajectory import Trajectory
from student_trainer.service import TrainerServicer
from student_trainer.student import Student
from student_trainer.trainer import Trainer

log = logging.getLogger("student_trainer")
SERVICE = "opd.v1.TrainerService"
# From SIGTERM on; the supervisor kills what has not ended, checkpoint included, 60 s after it.
STEP_GRACE_S = 40.0


def load_student(recipe: Recipe) -> tuple[Student, str]:
    """(student, device): loaded and proved."""
    run = recipe.run
    device = configure_torch(run.device, threads=run.threads, deterministic=run.deterministic)
    student = Student(recipe.student, device=device, deterministic=run.deterministic, seed=run.seed)
    log.info("student %s: %s, batching %s", recipe.student.path, student.model_type, student.layout)
    return student, device


def check_run_dir(run_dir: Path, *, resume: bool) -> None:
    """Raises :class:`ConfigError` where a new run would write over an old one."""
    if not resume and any(
        (run_dir / name).exists() for name in ("run.json", "metrics.jsonl", "checkpoints", "heldout")
    ):
        raise ConfigError(
            f"{run_dir} holds a run already: continue it with --resume, or choose another --run-dir", field="run_dir"
        )
    run_dir.mkdir(parents=True, exist_ok=True)


async def serve(arguments: ServiceArguments[Recipe]) -> int:
    """Train to the end, or until SIGTERM (after the step in progress, with a checkpoint)."""
    recipe = arguments.config
    run_dir: Path = arguments.extra["run_dir"]
    resume: bool = arguments.extra["resume"]
    check_run_dir(run_dir, resume=resume)
    if not (run_dir / "recipe.yaml").exists():  # `opd run` has written it, without the addresses of its children
        dump_config(recipe, run_dir / "recipe.yaml")
    server = MeshServer(recipe.trainer.server, services=[SERVICE], insecure=arguments.insecure)
    student, device = await asyncio.to_thread(load_student, recipe)
    trainer = Trainer(recipe, run_dir, student, device=device, resume=resume)

    async def submit(trajectory: Trajectory) -> bool:
        if trajectory.trajectory_id in trainer.progress.consumed_external:
            return False
        return await trainer.rollouts.submit(trajectory)

    servicer = TrainerServicer(
        trainer.state,
        submit=submit,
        save=trainer.request_save,
        idle_timeout_s=recipe.trainer.server.stream_idle_timeout_s,
    )
    trainer_service_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, server.grpc)
    address = await server.start(arguments.listen)
    await server.set_serving(True)
    arguments.announce(address)

    loop = asyncio.get_running_loop()
    parent = os.getppid()

    def stop() -> None:
        """After the step in progress, if that ends soon; at once where the supervisor, and so our peers, are dead."""
        trainer.stop()
        loop.call_later(0 if os.getppid() != parent else STEP_GRACE_S, trainer.give_up_step)

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop)
    code = 0
    try:
        await trainer.run()
    except OpdError as error:
        log.error("%s", error)  # noqa: TRY400 - the message is for people; an OpdError needs no stack
        code = EXIT_USER_ERROR
    except Exception:
        log.exception("the trainer failed")
        code = 1
    finally:
        if trainer.metrics.lines:
            with contextlib.suppress(OpdError):
                await asyncio.to_thread(build_report, run_dir)
        await server.drain()
    return code
