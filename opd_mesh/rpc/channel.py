"""Construction of client channels: limits, keepalive, retries of idempotent calls, TLS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from opd_mesh.config.services import ChannelConfig
from opd_mesh.errors import UnavailableError
from opd_mesh.rpc.address import is_loopback, split_address
from opd_mesh.rpc.interceptors import client_interceptors
from opd_mesh.rpc.server import check_pem, read_pem
from opd_mesh.rpc.status import error_of_rpc

ItemT = TypeVar("ItemT")

# Only calls that may be repeated are retried. Streams are committed at their first response, so GetHead, Generate
# and ScoreTrajectories resume by offset or id in their clients.
IDEMPOTENT: dict[str, tuple[str, ...]] = {
    "opd.v1.TeacherService": ("ListTeachers", "GetTeacher", "GetHead"),
    "opd.v1.RolloutService": (
        "GetPolicy",
        "Generate",
        "CancelGeneration",
        "PauseGeneration",
        "ResumeGeneration",
    ),
    "opd.v1.GenerativeRewardService": ("GetJudge", "Judge"),
    "opd.v1.TrainerService": ("GetRun", "WatchRun", "PauseRun", "ResumeRun", "SaveCheckpoint"),
}


def service_config(service: str, *, max_attempts: int) -> str:
    """gRPC service config (JSON): retries for what is idempotent."""
    config: dict[str, object] = {}
    if max_attempts > 1:
        config["methodConfig"] = [
            {
                "name": [{"service": service, "method": method} for method in IDEMPOTENT[service]],
                "retryPolicy": {
                    "maxAttempts": max_attempts,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    return json.dumps(config)


def open_channel(address: str, service: str, config: ChannelConfig) -> grpc.aio.Channel:
    """A channel to one server; several replicas are several channels (:mod:`opd_mesh.clients.replicas`).

    Raises:
        ConfigError: the address is not host:port, or TLS is configured only in part.
    """
    host, _ = split_address(address)
    options: list[tuple[str, object]] = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.enable_retries", 1),
        # Above the default of 256 KiB the retry policy silently does not apply to larger requests.
        ("grpc.per_rpc_retry_buffer_size", config.max_message_bytes),
        ("grpc.service_config", service_config(service, max_attempts=config.max_attempts)),
    ]
    if config.tls is None:
        # No proxy between processes of one machine, whatever the environment says.
        if is_loopback(host):
            options.append(("grpc.enable_http_proxy", 0))
        return grpc.aio.insecure_channel(address, options=options, interceptors=client_interceptors())
    tls = config.tls
    credentials = grpc.ssl_channel_credentials(
        root_certificates=read_pem(tls.ca_file, "tls.ca_file"),
        private_key=read_pem(tls.key_file, "tls.key_file") if tls.key_file else None,
        certificate_chain=read_pem(tls.cert_file, "tls.cert_file") if tls.cert_file else None,
    )
    check_pem(tls.cert_file, tls.key_file, tls.ca_file, "tls")
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.aio.secure_channel(address, credentials, options=options, interceptors=client_interceptors())


@asynccontextmanager
async def rpc_errors(target: str) -> AsyncIterator[None]:
    """Inside, a failed call raises the :class:`opd_mesh.errors.OpdError` that the server meant."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of_rpc(error, target=target) from error


async def responses_of(call: AsyncIterator[ItemT], target: str) -> AsyncIterator[ItemT]:
    """The responses of a stream, with errors mapped."""
    async with rpc_errors(target):
        async for response in call:
            yield response


async def wait_until_serving(
    channel: grpc.aio.Channel, service: str, *, target: str, timeout_s: float, accept_not_serving: bool = False
) -> None:
    """Wait until health says SERVING (or, where accepted, NOT_SERVING).

    Raises:
        UnavailableError: naming the target and the last answer, after ``timeout_s`` seconds.
    """
    stub = health_pb2_grpc.HealthStub(channel)
    deadline = asyncio.get_running_loop().time() + timeout_s
    last = "no answer"
    accepted = {health_pb2.HealthCheckResponse.SERVING}
    if accept_not_serving:
        accepted.add(health_pb2.HealthCheckResponse.NOT_SERVING)
    while (left := deadline - asyncio.get_running_loop().time()) > 0:
        try:
            answer = await stub.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=min(5.0, left), wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            last = f"{error.code().name}: {error.details()}"
        else:
            if answer.status in accepted:
                return
            last = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        await asyncio.sleep(min(0.1, max(0.0, left)))
    raise UnavailableError(
        f"{service} at {target} was not ready within {timeout_s:g} s (last: {last}); is the server running?",
        metadata={"target": target},
    )


def targets_text(addresses: Iterable[str]) -> str:
    """Addresses for messages."""
    return ", ".join(addresses)
