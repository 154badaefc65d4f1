"""``opd run``: a local mesh as child processes, watched, and nothing left behind.

Each child gets an ephemeral loopback port, one log file in ``RUN_DIR/logs/``, and a session of its own, so that Ctrl-C
reaches the supervisor alone, which then ends the children in order: trainer, reward model and its judge, rollout
server, teacher server, Valkey.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from opd_mesh.children import STOP_TIMEOUT_S, Child
from opd_mesh.config.answers import AnswersConfig
from opd_mesh.config.judging import FrozenJudgeConfig, GrmConfig
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.services import (
    GrmServerConfig,
    PeerConfig,
    RolloutServerConfig,
    TeacherConfig,
    TeacherServerConfig,
    TokenLogConfig,
)
from opd_mesh.errors import OpdError
from opd_mesh.progress import MeshView
from opd_mesh.valkey import EmbeddedValkey

log = logging.getLogger("opd_mesh.supervisor")
# A rollout server that ends is started again on its address: its log and the trainer's policy bring it back to where it
# was. A reward model and its judge are asked again. Not for ever: what ends it every time is not mended by starting it.
RESTARTED = ("rollout", "judge", "grm")
MAX_RESTARTS = 5
RESTARTS_WITHIN_S = 1800.0
RESTART_DELAY_S = 1.0


class LocalMesh:
    """The processes of one local run.

    Args:
        keep_open: file descriptors that its processes inherit, so that a lock is held until the last one has ended.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, *, keep_open: Sequence[int] = ()) -> None:
        self.recipe = recipe
        self.run_dir = run_dir
        self._keep_open = tuple(keep_open)
        self.children: list[Child] = []
        self.valkey: EmbeddedValkey | None = None
        self.trainer: Child | None = None
        self._restarted_at: list[float] = []

    def start(self, *, resume: bool) -> None:
        """Start Valkey, the servers that the recipe does not name, and the trainer. Does not wait for the models.

        Raises:
            OpdError: Valkey does not start.
        """
        for folder in ("logs", "services"):
            (self.run_dir / folder).mkdir(parents=True, exist_ok=True)
        self._redis_url = self.recipe.redis_url or os.environ.get("OPD_REDIS_URL")
        if not self._redis_url and self.recipe.writes:
            self.valkey = EmbeddedValkey(self.run_dir / "valkey", self.run_dir / "logs" / "valkey.log")
            self.valkey.start()
            self._redis_url = self.valkey.url
        self._resume = resume
        if any(not teacher.addresses for teacher in self.recipe.teachers.values()):
            self._start("teacher", self._teacher_config())
        if self.recipe.needs_rollouts and not self.recipe.rollout.peers.addresses:
            self._start("rollout", self._rollout_config())
        if self._serves_grm and isinstance(self.recipe.grm.judge, FrozenJudgeConfig):
            self._start("judge", self._judge_config(self.recipe.grm.judge))

    async def start_trainer(self) -> str:
        """Wait for the servers' addresses, then start the trainer. Returns its address."""
        resolved = await self._with_grm(await self._with_addresses())
        extra = ["--run-dir", str(self.run_dir)] + (["--resume"] if self._resume else [])
        self.trainer = self._start("trainer", resolved, *extra)
        return await self.trainer.ready()

    async def start_answers(self, config: AnswersConfig, out: Path) -> Child:
        """Wait for the rollout server's address, then start the process in which models answer."""
        resolved = config.replace(recipe=await self._with_addresses())
        child = self._start("answers", resolved, "--out", str(out))
        await child.ready()
        return child

    async def _with_addresses(self) -> Recipe:
        """The recipe with the addresses of our own servers, once they are known."""
        addresses = {child.name: await child.ready() for child in list(self.children)}
        recipe = self.recipe
        teachers = {
            name: teacher if teacher.addresses else teacher.replace(addresses=[addresses["teacher"]])
            for name, teacher in recipe.teachers.items()
        }
        peers = recipe.rollout.peers
        if "rollout" in addresses:
            peers = peers.replace(addresses=[addresses["rollout"]])
        return recipe.replace(teachers=teachers, rollout=recipe.rollout.replace(peers=peers), redis_url=self._redis_url)

    @property
    def _serves_grm(self) -> bool:
        """Whether rewards come from a reward model that is ours to start."""
        return bool(self.recipe.judged_domains) and not self.recipe.grm.peers.addresses

    async def _with_grm(self, recipe: Recipe) -> Recipe:
        """Start the reward model, once those who judge for it have their addresses, and put its own into the recipe."""
        if not self._serves_grm:
            return recipe
        child = self._start("grm", self._grm_config(recipe))
        peers = recipe.grm.peers.replace(addresses=[await child.ready()])
        # Its settings are the server's now.
        return recipe.replace(grm=GrmConfig(peers=peers))

    def _grm_config(self, recipe: Recipe) -> GrmServerConfig:
        """Of a recipe with addresses."""
        grm = recipe.grm
        model, judge = recipe.student.path, recipe.rollout.peers
        if isinstance(grm.judge, FrozenJudgeConfig):
            address = next(child.address for child in self.children if child.name == "judge")
            # It is on this machine, whatever it takes to reach the rollout servers.
            model, judge = grm.judge.model, PeerConfig(addresses=[address], channel=judge.channel.replace(tls=None))
        return GrmServerConfig(
            model=model,
            judge=judge,
            rubrics=grm.rubrics,
            inline_templates=True,
            sampling=grm.sampling,
            seed=recipe.run.seed,
            constrained=grm.constrained,
            max_verdict_tokens=grm.max_verdict_tokens,
            max_prompt_chars=grm.max_prompt_chars,
            max_answer_chars=grm.max_answer_chars,
            system_prompt=grm.system_prompt,
            item_timeout_s=recipe.rollout.timeout_s,
        )

    def _judge_config(self, judge: FrozenJudgeConfig) -> RolloutServerConfig:
        threads = judge.engine.threads or self.recipe.run.threads
        return RolloutServerConfig(
            model=judge.model,
            frozen=True,
            engine=judge.engine.replace(threads=threads),
            deterministic=self.recipe.run.deterministic,
        )

    def _teacher_config(self) -> TeacherServerConfig:
        recipe = self.recipe
        teachers = {}
        for name, teacher in recipe.teachers.items():
            if not teacher.addresses:
                domains = [key for key, domain in recipe.domains.items() if name in domain.teachers]
                fields = {key: getattr(teacher, key) for key in TeacherConfig.model_fields}
                teachers[name] = TeacherConfig(**{**fields, "domains": teacher.domains or domains})
        return TeacherServerConfig(
            teachers=teachers,
            device=recipe.run.device,
            deterministic=recipe.run.deterministic,
            threads=recipe.run.threads,
            pool=recipe.pool,
        )

    def _rollout_config(self) -> RolloutServerConfig:
        recipe = self.recipe
        engine = recipe.rollout.engine
        return RolloutServerConfig(
            model=recipe.student.path,
            engine=engine.replace(threads=engine.threads or recipe.run.threads),
            log=recipe.rollout.log or TokenLogConfig(path=self.run_dir / "rollout-log"),
            redis_url=self._redis_url,
            stream_timeout_s=recipe.redis_timeout_s,
            deterministic=recipe.run.deterministic,
        )

    def may_restart(self, child: Child) -> bool:
        """Whether what has ended is to be started again."""
        recent = [at for at in self._restarted_at if at > time.monotonic() - RESTARTS_WITHIN_S]
        return child.name in RESTARTED and len(recent) < MAX_RESTARTS

    def restart(self, child: Child) -> Child:
        """Start a server again on the address it had."""
        self.children.remove(child)
        self._restarted_at.append(time.monotonic())
        again = self._start(child.name, child.config, listen=child.address)
        again.address = child.address  # it may end before it has told
        return again

    def _start(self, name: str, config: BaseModel, *extra: str, listen: str = "127.0.0.1:0") -> Child:
        child = Child.start(
            name,
            config,
            services=self.run_dir / "services",
            logs=self.run_dir / "logs",
            listen=listen,
            extra=extra,
            keep_open=self._keep_open,
        )
        self.children.append(child)
        return child

    def ended(self) -> list[Child]:
        """Children that are gone."""
        return [child for child in self.children if child.process.poll() is not None]

    async def stop(self) -> None:
        """End every child, newest first, by SIGTERM, and by SIGKILL what does not end; then Valkey."""
        for child in reversed(self.children):
            await child.stop()
        if self.valkey is not None:
            await asyncio.to_thread(self.valkey.stop)


async def run_local(recipe: Recipe, run_dir: Path, *, resume: bool, progress: MeshView) -> int:
    """Start everything, show the run until it ends, stop everything. Returns the trainer's exit code."""
    loop = asyncio.get_running_loop()
    interrupted = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, interrupted.set)
    try:
        return await run_training(LocalMesh(recipe, run_dir), resume=resume, view=progress, stop=interrupted)
    except OpdError as error:
        progress.failed(str(error))
        return 2


async def run_training(mesh: LocalMesh, *, resume: bool, view: MeshView, stop: asyncio.Event) -> int:
    """One run of the trainer, from the first process to the end of the last. Installs no signal handlers.

    Returns:
        The trainer's exit code; 130 where ``stop`` ended it, after the step in progress and with a checkpoint.

    Raises:
        OpdError: a process does not start.
    """
    from opd_mesh.clients.trainer import TrainerClient

    async def begin() -> Child:
        view.activity("starting Valkey and the servers")
        mesh.start(resume=resume)
        await mesh.start_trainer()
        assert mesh.trainer is not None  # start_trainer has returned
        return mesh.trainer

    async def follow(trainer: Child) -> None:
        async with TrainerClient(trainer.address) as client:
            await view.follow(client)

    return await run_mesh(mesh, begin, follow, view=view, stop=stop)


async def run_mesh(
    mesh: LocalMesh,
    begin: Callable[[], Awaitable[Child]],
    follow: Callable[[Child], Coroutine[Any, Any, None]],
    *,
    view: MeshView,
    stop: asyncio.Event,
    restarts: bool = True,
) -> int:
    """Start a mesh, watch over its servers until its main process ends, stop everything.

    Args:
        begin: starts all processes and returns the main one.
        follow: shows what that does, until it ends.
        stop: once set, the main process is asked to end.
        restarts: a server that has ended may be started again; False where nobody would give it a policy.

    Returns:
        Its exit code, or 130 where it was stopped.

    Raises:
        UnavailableError: without ``restarts``, a server has ended before the main process.
    """
    main: Child | None = None

    async def watch() -> int:
        nonlocal main
        main = await begin()
        view.started(mesh)
        reported: list[Child] = []
        events = asyncio.create_task(follow(main))
        try:
            while main.process.poll() is None:
                for child in mesh.ended():
                    if child is main or child in reported:
                        continue
                    if not restarts:
                        raise child.gone()
                    again = mesh.may_restart(child)
                    view.lost(child, again=again)
                    if again:
                        await asyncio.sleep(RESTART_DELAY_S)
                        mesh.restart(child)
                    else:
                        reported.append(child)
                await asyncio.sleep(0.2)
            await asyncio.wait({events}, timeout=2.0)
        finally:
            events.cancel()
            await asyncio.gather(events, return_exceptions=True)
        return int(main.process.returncode)

    watching = asyncio.create_task(watch())
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({watching, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not watching.done():
            view.activity("stopping after the step in progress")
            if main is not None and main.process.poll() is None:
                main.process.send_signal(signal.SIGTERM)
                await asyncio.wait({watching}, timeout=STOP_TIMEOUT_S)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            return 130
        return watching.result()
    finally:
        for task in (waiting, watching):
            task.cancel()
        await asyncio.gather(waiting, watching, return_exceptions=True)
        await mesh.stop()
