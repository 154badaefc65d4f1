"""Who the replicas of a service are, and how they are: names resolved, health asked for, losses told."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from opd_mesh.clients.replica import Health, Replica, is_literal, resolve_records
from opd_mesh.config.services import ChannelConfig
from opd_mesh.errors import ConfigError, OpdError, UnavailableError
from opd_mesh.rpc.address import split_address
from opd_mesh.rpc.channel import targets_text, wait_until_serving
from opd_mesh.rpc.status import error_of_rpc

log = logging.getLogger("opd_mesh.replicas")
# How soon a name that resolved to nothing at all is tried again.
UNRESOLVED_RETRY_S = 1.0
# How long an overloaded replica that names no delay is left alone.
BUSY_S = 0.5


class ReplicaWatch:
    """Keeps what is known of the replicas behind some addresses up to date, from the first call on.

    Args:
        admit: asked before a replica gets its first item, and again whenever it has been away; may raise. It sets
            ``teacher_ids`` and ``refused``.

    Raises:
        ConfigError: no address, or one that is not host:port.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        service: str,
        config: ChannelConfig,
        admit: Callable[[Replica], Awaitable[None]],
    ) -> None:
        if not addresses:
            raise ConfigError(f"no address for {service}", field="addresses")
        self._service = service
        self._config = config
        self._admit = admit
        self._given = targets_text(addresses)
        self._replicas: dict[str, Replica] = {}
        self._leaving: set[Replica] = set()  # no replicas any more; what is under way there is waited for
        self._names: list[str] = []
        for address in dict.fromkeys(addresses):
            if is_literal(split_address(address)[0]):
                self._replicas[address] = Replica(address, service, config)
            else:
                self._names.append(address)
        # Nothing to choose: no health checks, no circuit, no limits but the server's; the caller paces its attempts.
        self.lone = len(self._replicas) == 1 and not self._names
        self._tasks: set[asyncio.Task[None]] = set()
        self._following: dict[Replica, asyncio.Task[None]] = {}
        self._news = asyncio.Event()
        self._resolve_now = asyncio.Event()
        self._resolved = not self._names
        self._unresolved: dict[str, str] = {}
        self._started = self._was_ready = self._closed = False

    # --- who they are ------------------------------------------------------------------------------------------
    @property
    def all(self) -> list[Replica]:
        """Present ones, in a stable order."""
        return sorted(self._replicas.values(), key=lambda replica: replica.address)

    @property
    def target(self) -> str:
        """Addresses, for messages."""
        return targets_text(map(str, self.all)) or self._given

    def troubles(self) -> str:
        """What is the matter with each, for a message."""
        lines = [f"{each}: {each.health}" + (f", {each.trouble}" if each.trouble else "") for each in self.all]
        return "; ".join(lines + [f"{name}: {why}" for name, why in self._unresolved.items()])

    def _start(self) -> None:
        if self._started or self.lone:
            return
        self._started = True
        for replica in self._replicas.values():
            self._follow(replica)
        if self._names:
            self._spawn(self._keep_resolving())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # In a context of their own: these outlive the span in which they happen to begin.
        task = asyncio.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("looking after %s failed", self._given, exc_info=error)

    async def _keep_resolving(self) -> None:
        while True:
            self._resolve_now.clear()
            for name in self._names:
                host, port = split_address(name)
                try:
                    self._update(name, await resolve_records(host, port))
                except OSError as error:  # a headless service without a ready pod has no records: keep what there is
                    self._unresolved[name] = f"does not resolve ({error})"
                    log.warning("%s does not resolve: %s", name, error)
            self._resolved = True
            self._tell()
            interval_s = self._config.resolve_interval_s if self._replicas else UNRESOLVED_RETRY_S
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._resolve_now.wait()
            await asyncio.sleep(min(UNRESOLVED_RETRY_S, interval_s))  # many failures at once are one reason

    def _update(self, name: str, addresses: Collection[str]) -> None:
        self._unresolved.pop(name, None)
        for address in addresses:
            if address not in self._replicas:
                config, host = self._config, split_address(name)[0]
                if config.tls is not None and config.tls.server_name is None:  # the certificate bears the name
                    config = config.replace(tls=config.tls.replace(server_name=host))
                self._replicas[address] = replica = Replica(address, self._service, config, name)
                log.info("%s has a replica at %s", name, address)
                self._follow(replica)
        for replica in self.all:
            if replica.name == name and replica.address not in addresses:
                log.info("%s is no replica of %s any more", replica.address, name)
                del self._replicas[replica.address]
                replica.leaving = True
                self._leaving.add(replica)
                self._following.pop(replica).cancel()
                self._part_if_idle(replica)

    def _part_if_idle(self, replica: Replica) -> None:
        """Close one that has left, but not under a call or an item: that would end in a bare cancellation."""
        if replica in self._leaving and replica.idle and not self._closed:
            self._spawn(self._part(replica))

    async def _part(self, replica: Replica) -> None:
        await replica.close()
        self._leaving.discard(replica)

    # --- how they are ------------------------------------------------------------------------------------------
    async def ready(self, timeout_s: float) -> None:
        """Wait for one that serves, and until the others have said whether they do; those that do not are told.

        Raises:
            UnavailableError: none serves within ``timeout_s`` seconds.
        """
        if self.lone:
            (replica,) = self.all
            return await wait_until_serving(replica.channel, self._service, target=replica.address, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self._until(lambda: self._settled and self._some(Health.SERVING))
        except TimeoutError:
            if not self._some(Health.SERVING):
                raise UnavailableError(
                    f"{self._service} at {self._given} was not ready within {timeout_s:g} s ({self.troubles()}); "
                    "is a server running?",
                    metadata={"target": self._given},
                ) from None
        if not self._was_ready:
            for replica in self.all:
                if replica.health is not Health.SERVING:
                    log.warning("replica %s is left out until it serves: %s", replica, replica.trouble)
        self._was_ready = True
        return None

    @property
    def _settled(self) -> bool:
        return self._resolved and not self._some(Health.UNKNOWN)

    def _some(self, health: Health) -> bool:
        return any(replica.health is health for replica in self._replicas.values())

    async def _until(self, condition: Callable[[], bool]) -> None:
        self._start()
        while not condition():
            if self._closed:
                raise self._over()
            self._news.clear()
            await self._news.wait()

    def _over(self) -> UnavailableError:
        return UnavailableError(f"the client of {self._given} was closed", metadata={"target": self._given})

    def _follow(self, replica: Replica) -> None:
        self._following[replica] = self._spawn(self._keep_looking_at(replica))

    async def _keep_looking_at(self, replica: Replica) -> None:
        while True:
            replica.look.clear()
            await self._look_at(replica)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.health_interval_s):
                    await replica.look.wait()

    async def _look_at(self, replica: Replica) -> None:
        if replica.must_reopen and replica.idle:
            await replica.reopen()
        timeout_s = self._config.health_timeout_s
        try:
            request = health_pb2.HealthCheckRequest(service=self._service)
            answer = await health_pb2_grpc.HealthStub(replica.channel).Check(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            trouble = error_of_rpc(error, target=replica.address)
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                frozen = f"{replica.address} did not answer a health check within {timeout_s:g} s: frozen, or cut off"
                self.lose(replica, UnavailableError(frozen, metadata={"target": replica.address}))
            else:
                # No new connection; what is in flight may be on an old one, which a draining server finishes. Where
                # it is not, its stream breaks by itself.
                replica.must_reopen = True
                self._set_health(replica, Health.UNREACHABLE, trouble)
            return
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            said = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            self._set_health(replica, Health.NOT_SERVING, UnavailableError(f"{replica.address} says {said}"))
        elif replica.health is not Health.SERVING:
            try:
                await self._admit(replica)
            except OpdError as error:
                self._set_health(replica, Health.UNREACHABLE, error)
            else:
                self._set_health(replica, Health.SERVING, None)

    def _set_health(self, replica: Replica, health: Health, trouble: OpdError | None) -> None:
        before, replica.health = replica.health, health
        replica.trouble = str(trouble or replica.trouble)
        if before is not health:
            if health is not Health.SERVING and before is Health.SERVING:
                log.warning("replica %s gets no more items: %s", replica, trouble)
            elif health is Health.SERVING and before is not Health.UNKNOWN:
                log.warning("replica %s serves again", replica)
            self._tell()

    def lose(self, replica: Replica, error: OpdError) -> None:
        """It froze, broke off or missed a deadline: its circuit opens, and everything in flight fails at once."""
        replica.circuit.trip(asyncio.get_running_loop().time())
        if replica.in_flight:
            log.warning(
                "%d items in flight at %s are to be asked again elsewhere: %s", replica.in_flight, replica, error
            )
        replica.end_calls(error)
        stream, replica.stream = replica.stream, None
        if stream is not None:
            stream.abandon(error)
            self._spawn(stream.close())
        self._set_health(replica, Health.UNREACHABLE, error)
        replica.look.set()
        self._resolve_now.set()

    def failed(self, replica: Replica, error: OpdError) -> None:
        """It failed one item; enough in a row open its circuit."""
        replica.circuit.fail(asyncio.get_running_loop().time())
        replica.trouble = str(error)
        self._tell()

    def busy(self, replica: Replica, error: OpdError) -> None:
        """It is overloaded: no items until it wants them again. (With the least in flight, it would get them all.)"""
        replica.busy_until = asyncio.get_running_loop().time() + (error.retry_delay_s or BUSY_S)
        replica.trouble = str(error)
        self._tell()

    def _tell(self) -> None:
        """Something has changed for somebody."""
        self._news.set()

    async def close(self) -> None:
        """Ends health checks, streams and channels, also of replicas that have left; what waits fails."""
        self._closed = True
        self._tell()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in [*self.all, *self._leaving]:
            replica.health = Health.UNREACHABLE  # whoever asks again finds nobody, not a closed channel
            replica.end_calls(self._over())
            await replica.close()
        self._leaving.clear()
