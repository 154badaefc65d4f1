"""Those who asked for a checkpoint, and wait for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TypeAlias

from opd_mesh.errors import PreconditionError

Saved: TypeAlias = tuple[Path, int]  # a checkpoint and its step


class SaveRequests:
    """For one event loop."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[Saved]] = []

    def __bool__(self) -> bool:
        """Somebody waits."""
        return bool(self._waiting)

    async def wait(self) -> Saved:
        """Until the next checkpoint. Raises :class:`PreconditionError` where the run ends without one."""
        future: asyncio.Future[Saved] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return await future

    def answer(self, saved: Saved) -> None:
        """Tell all."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(saved)

    def refuse(self, why: str) -> None:
        """There will be none."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(PreconditionError(why))
