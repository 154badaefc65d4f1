"""Taking, keeping and giving back the token log: its folder, and the lease in Redis where there is one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from opd_mesh.config.services import TokenLogConfig
from opd_mesh.errors import LogOwnedError
from rollout_server.log_folder import log_id
from rollout_server.log_lease import LogLease
from rollout_server.token_log import RecoveredRequest, TokenLog

log = logging.getLogger("rollout_server")
TakenT = TypeVar("TakenT")
TRY_AGAIN_S = 0.5
SAY_AGAIN_S = 30.0


@dataclass
class OwnedLog:
    """A log that is ours."""

    log: TokenLog
    recovered: list[RecoveredRequest]
    lease: LogLease | None
    _watch: asyncio.Task[None] | None = None

    @classmethod
    async def take(cls, config: TokenLogConfig, redis_url: str | None, *, timeout_s: float) -> OwnedLog:
        """Wait until the log is free, then recover it. A server that stands by waits here for as long as it takes.

        Raises:
            CorruptLogError: naming file and offset.
            StreamUnavailableError: Redis does not answer within ``timeout_s``.
        """
        lease: LogLease | None = None
        epoch = 0
        if redis_url is not None:
            lease = LogLease(redis_url, await asyncio.to_thread(log_id, config.path), config, timeout_s=timeout_s)
            epoch = await _patiently(lambda: lease.acquire(wait_s=SAY_AGAIN_S))
        try:
            token_log, recovered = await _patiently(lambda: asyncio.to_thread(TokenLog.open, config, min_epoch=epoch))
        except BaseException:
            if lease is not None:
                await lease.release()
            raise
        if lease is not None:
            token_log.fence = lease.check
        log.info("log %s is ours, epoch %d", config.path, token_log.epoch)
        return cls(token_log, recovered, lease)

    def when_lost(self, tell: Callable[[BaseException], None]) -> None:
        """Call once where the lease is lost; the log refuses to be written by then."""
        if self.lease is None:
            return
        lease = self.lease

        async def watch() -> None:
            await lease.lost.wait()
            tell(LogOwnedError("the lease of the token log was lost: another server may own it now"))

        self._watch = asyncio.create_task(watch())

    async def release(self) -> None:
        """Close the log and let others have it."""
        if self._watch is not None:
            self._watch.cancel()
        try:
            await asyncio.to_thread(self.log.close)
        finally:
            if self.lease is not None:
                await self.lease.release()


async def _patiently(take: Callable[[], Awaitable[TakenT]]) -> TakenT:
    loop = asyncio.get_running_loop()
    said = -SAY_AGAIN_S
    while True:
        try:
            return await take()
        except LogOwnedError as error:
            if loop.time() - said > SAY_AGAIN_S:
                said = loop.time()
                log.warning("waiting for the log: %s", error)
        await asyncio.sleep(TRY_AGAIN_S)
