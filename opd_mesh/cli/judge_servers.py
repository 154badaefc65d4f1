"""A frozen model that judges while a command lasts: a rollout server and a reward model, as child processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from opd_mesh.children import Child
from opd_mesh.config.services import (
    GrmServerConfig,
    PeerConfig,
    RolloutEngineConfig,
    RolloutServerConfig,
    ServerConfig,
)
from opd_mesh.errors import OpdError


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
        judge_config = RolloutServerConfig(model=model, frozen=True, engine=engine, server=quick)
        judge = Child.start("judge", judge_config, services=folder, logs=folder)
        children.append(judge)
        config = GrmServerConfig(
            model=model,
            judge=PeerConfig(addresses=[await judge.ready()]),
            max_verdict_tokens=max_verdict_tokens,
            inline_templates=True,  # they are from this command line
            server=quick,
        )
        grm = Child.start("grm", config, services=folder, logs=folder)
        children.append(grm)
        address = await grm.ready()
        try:
            yield address
        except OpdError as error:  # which may be that one of them is gone, and its log goes with the folder
            for child in children:
                if child.process.poll() is not None:
                    raise child.gone() from error
            raise
    finally:
        for child in reversed(children):
            await child.stop()
