"""Ownership of a token log as a lease in Redis, for servers that share a volume but not a machine.

The lease keeps two servers from writing at a time; what makes it safe is the epoch that comes with it. An owner that
slept through its lease fails its next write (:meth:`LogLease.check`), and what it had on its way to the disk is in
segments, or beyond offsets, that its successor's manifest does not count.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable
from typing import Any

from opd_mesh.config.services import TokenLogConfig
from opd_mesh.errors import LogOwnedError, OpdError
from opd_mesh.stream_redis import RedisLink
from rollout_server.log_folder import FolderLock, newest_epoch

log = logging.getLogger("rollout_server")

ASK_AGAIN_S = 0.25  # while Redis refuses a renewal

# lease key, epoch key | owner, milliseconds, newest epoch in the folder, how the name of an owner ends that is dead, or
# '' → {1, epoch} when it is ours, {0, owner, milliseconds left} otherwise. Asked again by the same owner it gives the
# same epoch, so a lost answer is cured by asking again; but never one that the folder has seen.
_ACQUIRE = """#!lua flags=allow-oom
local owner = redis.call('GET', KEYS[1])
local dead = owner and ARGV[4] ~= '' and string.sub(owner, -#ARGV[4]) == ARGV[4]
if owner and owner ~= ARGV[1] and not dead then return {0, owner, redis.call('PTTL', KEYS[1])} end
local epoch, in_folder = tonumber(redis.call('GET', KEYS[2]) or 0), tonumber(ARGV[3])
if owner ~= ARGV[1] or epoch <= in_folder then
  epoch = math.max(epoch, in_folder) + 1
  redis.call('SET', KEYS[2], string.format('%.0f', epoch))
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {1, epoch}
"""
# lease key, epoch key | owner, milliseconds, epoch → 1 when it is still ours. It is asked only while the lease has time
# left, so one that is not there was lost by Redis (emptied, started again without its data, its clock set): it is ours
# still where nobody took it meanwhile, which would have raised the epoch.
_RENEW = """#!lua flags=allow-oom
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
local epoch = redis.call('GET', KEYS[2])
if not owner and epoch and epoch ~= ARGV[3] then return 0 end
if not epoch then redis.call('SET', KEYS[2], ARGV[3]) end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# lease key | owner
_RELEASE = """#!lua flags=allow-oom
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


def _now_s() -> float:
    """A clock that goes on while the machine is suspended, where there is one: Redis's does, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class LogLease:
    """The lease of one log: ``acquire``, open the log with ``check`` as its fence; ``release`` after closing the log.

    Renewed every third of ``config.lease_s`` by a task; Redis may be away for less than the lease.

    Args:
        log_id: of :meth:`rollout_server.token_log.TokenLog.identify`.
        timeout_s: for one call to Redis, before it counts as away.

    Attributes:
        owner: this holder, as others see it in their errors; since ``acquire`` with the place of the flock that it has.
        lost: set once the lease has run out or another has it; it does not come back.

    Raises:
        ConfigError: ``redis_url`` is not a Redis URL.
    """

    def __init__(self, redis_url: str, log_id: bytes, config: TokenLogConfig, *, timeout_s: float = 10.0) -> None:
        self._name = self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.lost = asyncio.Event()
        self._keys = [f"opd:log:{log_id.hex()}", f"opd:log:{log_id.hex()}:epoch"]
        self._path = config.path
        self._lease_s = config.lease_s
        self._link = RedisLink(redis_url, timeout_s)
        scripts = {"acquire": _ACQUIRE, "renew": _RENEW, "release": _RELEASE}
        self._scripts = {name: self._link.redis.register_script(source) for name, source in scripts.items()}
        self._epoch = 0
        self._valid_until_s = float("-inf")  # on _now_s(); written by the event loop, read by any thread
        self._is_lost = True  # not acquired yet
        self._loop: asyncio.AbstractEventLoop | None = None
        self._renewal: asyncio.Task[None] | None = None

    async def acquire(self, flock: FolderLock | None = None) -> int:
        """Take the lease where nobody has it; returns the epoch that comes with it, later than any in the folder.

        Args:
            flock: of the log's folder. Where it is ours, a leaseholder that had this very flock has ended, and its
                lease need not run out. It must stay ours for as long as the lease.

        Raises:
            LogOwnedError: another owner, whom it names, still holds it.
            StreamUnavailableError: Redis does not answer.
        """
        place = f"@{flock.place}" if flock is not None and flock.place else ""
        self.owner = self._name + place
        in_folder = await asyncio.to_thread(newest_epoch, self._path)
        started_s, answer = await self._ask("acquire", self.owner, self._lease_ms, in_folder, place)
        if answer[0] != 1:
            owner, left_s = answer[1].decode("utf-8", "replace"), max(answer[2], 0) / 1000
            raise LogOwnedError(
                f"the token log {self._path} is owned by {owner}; its lease runs out in {left_s:.1f} s, unless it is "
                "renewed",
                retry_delay_s=left_s,
                metadata={"owner": owner},
            )
        self._epoch = int(answer[1])
        self._valid_until_s = started_s + self._lease_s
        self._is_lost = False
        self.lost.clear()
        self._loop = asyncio.get_running_loop()
        self._renewal = asyncio.create_task(self._renew_regularly())
        return self._epoch

    def check(self) -> None:
        """For the log's ``fence``: any thread, no I/O.

        Raises:
            LogOwnedError: the lease has run out, counted from the start of the last renewal that Redis granted.
        """
        if self._is_lost or _now_s() > self._valid_until_s:
            self._lose("it was not renewed in time")
            raise LogOwnedError(
                f"the lease of the token log {self._path} has run out: another server may have taken it over"
            )

    async def release(self) -> None:
        """Let others have the log at once. Where Redis does not answer, they wait for the lease to run out."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
            self._renewal = None
        try:
            if not self._is_lost:
                await self._ask("release", self.owner)
        except OpdError as error:
            log.warning("the lease of the token log %s is left to run out: %s", self._path, error)
        finally:
            self._is_lost = True
            self._valid_until_s = float("-inf")
            await self._link.redis.aclose()

    @property
    def _lease_ms(self) -> int:
        return max(1, int(self._lease_s * 1000))

    async def _ask(self, what: str, *args: str | int) -> tuple[float, Any]:
        """(when the attempt that was answered began, the answer)."""
        started_s = _now_s()
        script = self._scripts[what]

        def attempt() -> Awaitable[Any]:
            nonlocal started_s
            started_s = _now_s()
            return script(keys=self._keys, args=args)

        answer = await self._link.call(f"{what} of a log's lease", attempt)
        return started_s, answer

    async def _renew_regularly(self) -> None:
        pause_s = self._lease_s / 3
        while True:
            await asyncio.sleep(pause_s)
            left_s = self._valid_until_s - _now_s()
            if self._is_lost or left_s <= 0:
                return self._lose("it was not renewed in time")
            try:
                async with asyncio.timeout(left_s):
                    started_s, answer = await self._ask("renew", self.owner, self._lease_ms, self._epoch)
            except TimeoutError:
                return self._lose("Redis did not answer in time")
            except OpdError as error:
                log.warning("the lease of the token log %s is not renewed: %s", self._path, error)
                pause_s = min(ASK_AGAIN_S, self._lease_s / 3)
                continue
            if answer != 1:
                return self._lose("another server has it")
            self._valid_until_s = started_s + self._lease_s
            pause_s = self._lease_s / 3

    def _lose(self, why: str) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        log.error("the lease of the token log %s is lost: %s", self._path, why)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.lost.set)
