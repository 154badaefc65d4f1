"""Construction and life of a gRPC server: limits, health, reflection, TLS, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from opd_mesh.config.services import ServerConfig
from opd_mesh.errors import AddressInUseError, ConfigError, DeadlineError
from opd_mesh.rpc.address import require_secure, split_address
from opd_mesh.rpc.interceptors import ServerInterceptor

log = logging.getLogger("opd_mesh.rpc")
ItemT = TypeVar("ItemT")


def read_pem(path: Path, field: str) -> bytes:
    """Raises :class:`ConfigError` naming the field."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field=field) from error


def check_pem(cert_file: Path | None, key_file: Path | None, ca_file: Path | None, field: str) -> None:
    """Raises :class:`ConfigError` naming files that are no PEM, or a key of another certificate.

    gRPC itself says of such files only that it cannot bind, or that the peer is unavailable.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if cert_file is not None:
            context.load_cert_chain(cert_file, key_file, password="")  # never asks on the terminal
    except ssl.SSLError as error:
        raise ConfigError(f"{cert_file} and {key_file} are no certificate and its key: {error}", field=field) from error
    try:
        if ca_file is not None:
            context.load_verify_locations(ca_file)
    except ssl.SSLError as error:
        raise ConfigError(f"{ca_file} holds no certificate of an authority: {error}", field=field) from error


def _credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    if config.tls is None:
        return None
    pair = (
        read_pem(config.tls.key_file, "server.tls.key_file"),
        read_pem(config.tls.cert_file, "server.tls.cert_file"),
    )
    client_ca = config.tls.client_ca_file
    roots = read_pem(client_ca, "server.tls.client_ca_file") if client_ca else None
    check_pem(config.tls.cert_file, config.tls.key_file, client_ca, "server.tls")
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)


class MeshServer:
    """A server with the manners of the mesh. Services are registered between construction and :meth:`start`.

    Example:
        server = MeshServer(config, services=["opd.v1.TeacherService"])
        add_TeacherServiceServicer_to_server(servicer, server.grpc)
        address = await server.start("127.0.0.1:0")
        await server.set_serving(True)
        await server.run_until_signal(on_drain=servicer.drain)
    """

    def __init__(self, config: ServerConfig, *, services: Iterable[str], insecure: bool = False) -> None:
        self.config = config
        self.insecure = insecure
        self.services = list(services)
        self.address = ""
        self.serving = False  # what health says
        options = [
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
            # Without this a second server on the same port binds silently and takes half of the calls.
            ("grpc.so_reuseport", 0),
            # Allow our own clients' keepalive (60 s), which gRPC would answer with too_many_pings.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # A client whose machine vanished without a word must not hold a stream for ever.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            # Per connection, and more than are admitted: calls beyond it wait in the client until their deadline,
            # where those between the two are told at once that the server is busy.
            ("grpc.max_concurrent_streams", 2 * config.max_concurrent_rpcs),
        ]
        self.grpc = grpc.aio.server(interceptors=[ServerInterceptor(config.max_concurrent_rpcs)], options=options)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = [*self.services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self.grpc)
        self._stop = asyncio.Event()

    async def start(self, listen: str) -> str:
        """Bind and serve (NOT_SERVING until :meth:`set_serving`). Returns the address, port filled in.

        Raises:
            ConfigError: a malformed address, unreadable PEM files, or plaintext beyond loopback.
            AddressInUseError: another process has the port.
        """
        require_secure(listen, tls=self.config.tls is not None, insecure=self.insecure)
        host, port = split_address(listen)
        credentials = _credentials(self.config)
        # `localhost` is two addresses, and gRPC is content with one of them: the port in use would go unnoticed.
        target = f"127.0.0.1:{port}" if host == "localhost" else listen
        try:
            if credentials is None:
                bound = self.grpc.add_insecure_port(target)
            else:
                bound = self.grpc.add_secure_port(target, credentials)
        except RuntimeError as error:
            raise AddressInUseError(
                f"cannot listen on {listen}: {error}. Another process may have the port; "
                "end it or choose another (port 0 lets the system choose)",
                field="listen",
            ) from error
        await self.set_serving(False)
        await self.grpc.start()
        self.address = f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
        log.info("listening on %s (%s)", self.address, "TLS" if credentials else "plaintext")
        return self.address

    async def set_serving(self, serving: bool) -> None:
        """What health says of every service and of the whole server (``""``)."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ["", *self.services]:
            await self._health.set(name, status)
        self.serving = serving

    def request_stop(self) -> None:
        """Begin the drain, as SIGTERM does."""
        self._stop.set()

    async def run_until_signal(self, on_drain: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve until SIGTERM or SIGINT, then drain: NOT_SERVING → wait → finish in-flight → stop."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.request_stop)
        await self._stop.wait()
        log.info("draining")
        await self.drain(on_drain)

    async def drain(self, on_drain: Callable[[], Awaitable[None]] | None = None) -> None:
        """The drain itself; the process may end after it."""
        self.serving = False
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(self.config.drain_propagation_s)
        if on_drain is not None:
            await on_drain()
        await self.grpc.stop(self.config.drain_grace_s)
        log.info("stopped")


async def with_idle_timeout(
    items: AsyncIterator[ItemT], timeout_s: float, what: str, *, busy: Callable[[], bool] = lambda: False
) -> AsyncIterator[ItemT]:
    """The items, until none has come for ``timeout_s`` seconds: then :class:`DeadlineError`.

    Streams have idle time-outs, not deadlines (DESIGN §4). While ``busy`` says that the peer is waiting for us, its
    silence does not count.
    """
    iterator = items.__aiter__()
    while True:
        pending = asyncio.ensure_future(iterator.__anext__())
        try:
            done, _ = await asyncio.wait({pending}, timeout=timeout_s)
            while not done and busy():
                done, _ = await asyncio.wait({pending}, timeout=timeout_s)
        except asyncio.CancelledError:
            pending.cancel()
            raise
        if not done:
            pending.cancel()
            raise DeadlineError(f"{what}: nothing arrived for {timeout_s:g} s; the stream is ended")
        try:
            yield pending.result()
        except StopAsyncIteration:
            return
