"""Taking, keeping and giving back the token log: its folder, and the lease in Redis where there is one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from opd_mesh.config.services import TokenLogConfig
from opd_mesh.errors import LogOwnedError, StreamUnavailableError
from rollout_server.log_folder import FolderLock, log_id
from rollout_server.log_lease import LogLease
from rollout_server.token_log import RecoveredRequest, TokenLog

log = logging.getLogger("rollout_server")
TakenT = TypeVar("TakenT")
TRY_AGAIN_S = 0.25
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

        Args:
            timeout_s: for one call to Redis. One that does not answer is waited for, too.

        Raises:
            CorruptLogError: naming file and offset.
        """
        lease: LogLease | None = None
        if redis_url is None:
            token_log, recovered = await _patiently(lambda: asyncio.to_thread(TokenLog.open, config))
        else:
            identity = await asyncio.to_thread(log_id, config.path)
            lease = held = LogLease(redis_url, identity, config, timeout_s=timeout_s)
            try:
                token_log, recovered = await _patiently(lambda: _open_leased(config, held))
            except BaseException:
                await lease.release()
                raise
        log.info("log %s is ours, epoch %d", config.path, token_log.epoch)
        return cls(token_log, recovered, lease)

    def take_recovered(self) -> list[RecoveredRequest]:
        """What the log held; it is given away once, so that it does not stay in memory twice."""
        given, self.recovered = self.recovered, []
        return given

    def when_lost(self, tell: Callable[[BaseException], None]) -> None:
        """Call on the event loop where the log has failed or its lease is lost; it refuses to be written by then."""
        loop = asyncio.get_running_loop()

        def tell_failed(error: BaseException) -> None:
            with suppress(RuntimeError):  # the loop has been closed: nobody is left to be told
                loop.call_soon_threadsafe(tell, error)

        self.log.on_failed = tell_failed
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


async def _open_leased(config: TokenLogConfig, lease: LogLease) -> tuple[TokenLog, list[RecoveredRequest]]:
    """One attempt: the flock first, which tells whether a leaseholder of this machine still lives."""
    flock = await asyncio.to_thread(lambda: FolderLock(config.path, leased=True))
    try:
        epoch = await lease.acquire(flock)
    except BaseException:
        flock.close()
        raise
    try:
        return await asyncio.to_thread(lambda: TokenLog.open(config, epoch=epoch, fence=lease.check, flock=flock))
    except BaseException:
        await lease.release()
        raise


async def _patiently(take: Callable[[], Awaitable[TakenT]]) -> TakenT:
    loop = asyncio.get_running_loop()
    said = -SAY_AGAIN_S
    while True:
        try:
            return await take()
        except (LogOwnedError, StreamUnavailableError) as error:
            if loop.time() - said > SAY_AGAIN_S:
                said = loop.time()
                log.warning("waiting for the log: %s", error)
        await asyncio.sleep(TRY_AGAIN_S)
