"""A bound on bytes that are computed but not yet sent, so that a slow reader cannot fill the server's memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """For one event loop. What is larger than the whole budget passes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._freed = asyncio.Event()
        self.held = 0

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Wait until ``size`` bytes fit, and keep them for as long as the block runs."""
        while self.held and self.held + size > self._limit:
            await self._freed.wait()
        self.held += size
        try:
            yield
        finally:
            self.held -= size
            self._freed.set()
            self._freed = asyncio.Event()
