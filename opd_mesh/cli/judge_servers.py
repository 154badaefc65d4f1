"""A frozen model that judges while a command lasts: a rollout server and a reward model, as child processes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic import BaseModel

from opd_mesh.config.base import dump_config
from opd_mesh.config.services import (
    GrmServerConfig,
    PeerConfig,
    RolloutEngineConfig,
    RolloutServerConfig,
    ServerConfig,
)
from opd_mesh.errors import OpdError, UnavailableError
from opd_mesh.supervisor import START_TIMEOUT_S, STOP_TIMEOUT_S, Child

log = logging.getLogger("opd_mesh.cli")
MODULES = {"rollout": "rollout_server", "grm": "grm_server"}


@asynccontextmanager
async def frozen_judge(
    model: Path, folder: Path, *, device: str, max_context_tokens: int, max_verdict_tokens: int
) -> AsyncIterator[str]:
    """The address of a reward model whose judge is the checkpoint in ``model``.

    Args:
        folder: of their configurations and logs.

    Raises:
        UnavailableError: one does not start, or has ended before an error was raised inside; with what it said.
    """
    quick = ServerConfig(drain_propagation_s=0.0)
    engine = RolloutEngineConfig.model_validate({"device": device, "max_context_tokens": max_context_tokens})
    children: list[Child] = []
    try:
        rollout = _start("rollout", RolloutServerConfig(model=model, frozen=True, engine=engine, server=quick), folder)
        children.append(rollout)
        judge = PeerConfig(addresses=[await _address(rollout)])
        config = GrmServerConfig(
            model=model,
            judge=judge,
            max_verdict_tokens=max_verdict_tokens,
            inline_templates=True,  # they are from this command line
            server=quick,
        )
        grm = _start("grm", config, folder)
        children.append(grm)
        address = await _address(grm)
        try:
            yield address
        except OpdError as error:  # which may be that one of them is gone, and its log goes with the folder
            for child in children:
                _check_alive(child, error)
            raise
    finally:
        for child in reversed(children):
            await _stop(child)


def _start(name: str, config: BaseModel, folder: Path) -> Child:
    config_path, ready_file, log_path = folder / f"{name}.yaml", folder / f"{name}.ready.json", folder / f"{name}.log"
    dump_config(config, config_path)
    command = [sys.executable, "-m", MODULES[name], "--config", str(config_path), "--listen", "127.0.0.1:0"]
    command += ["--ready-file", str(ready_file), "--die-with-parent", str(os.getpid())]
    with log_path.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # They take turns on the same cores: OpenMP threads that spin while they wait steal the other's.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
    return Child(name, process, log_path, ready_file, config)


async def _address(child: Child) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not child.ready_file.exists():
        _check_alive(child)
        if time.monotonic() > deadline:
            raise UnavailableError(f"the {child.name} server is not ready: {child.said_error()}")
        await asyncio.sleep(0.05)
    return str(json.loads(child.ready_file.read_text())["address"])


def _check_alive(child: Child, cause: OpdError | None = None) -> None:
    if (code := child.process.poll()) is not None:
        raise UnavailableError(f"the {child.name} server ended with code {code}: {child.said_error()}") from cause


async def _stop(child: Child) -> None:
    """SIGTERM, and SIGKILL where that does not end it."""
    if child.process.poll() is None:
        child.process.send_signal(signal.SIGTERM)
    try:
        await asyncio.to_thread(child.process.wait, STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        log.warning("%s did not end within %g s and is killed", child.name, STOP_TIMEOUT_S)
        child.process.kill()
        await asyncio.to_thread(child.process.wait)
