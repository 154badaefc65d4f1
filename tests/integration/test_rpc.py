"""The gRPC plumbing on real sockets: life of a server, TLS, errors, limits, retries, traces."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opd.v1 import teacher_service_pb2 as pb
from opd.v1 import teacher_service_pb2_grpc

from opd_mesh.clients.teacher import TeacherClient
from opd_mesh.config.services import ChannelConfig, ClientTlsConfig, ServerConfig, TlsConfig
from opd_mesh.errors import (
    AddressInUseError,
    ConfigError,
    DeadlineError,
    HeadMismatchError,
    InternalError,
    InvalidInputError,
    OpdError,
    OverloadedError,
    TooLongError,
    UnavailableError,
    UnimplementedError,
    UnknownTeacherError,
)
from opd_mesh.rpc.address import is_loopback, split_address
from opd_mesh.rpc.channel import open_channel, responses_of, rpc_errors, wait_until_serving
from opd_mesh.rpc.server import MeshServer, with_idle_timeout

SERVICE = "opd.v1.TeacherService"
QUICK = ServerConfig(drain_propagation_s=0.0, drain_grace_s=5.0)
ONCE = ChannelConfig(max_attempts=1, timeout_s=20.0)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Handler = Callable[[Any], Awaitable[Any]]


@dataclass
class Teacher(teacher_service_pb2_grpc.TeacherServiceServicer):
    """Answers as the test says: ``answers`` by teacher id for GetTeacher. ListTeachers is left to the base class."""

    answers: dict[str, Handler] = field(default_factory=dict)
    stream: Callable[[AsyncIterator[Any]], AsyncIterator[Any]] | None = None
    calls: int = 0

    async def GetTeacher(self, request: pb.GetTeacherRequest, context: grpc.aio.ServicerContext) -> Any:
        """As told; otherwise an empty card of that id."""
        self.calls += 1
        answer = self.answers.get(request.teacher_id)
        if answer is not None:
            return await answer(request)
        return pb.GetTeacherResponse(teacher=pb.TeacherCard(teacher_id=request.teacher_id[:10]))

    async def GetHead(self, request: pb.GetHeadRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        """Two chunks, then what ``answers`` says."""
        self.calls += 1
        for index in range(2):
            yield pb.GetHeadResponse(chunk=pb.HeadChunk(offset=index, data=b"x"))
        await self.answers[request.teacher_id](request)

    async def ScoreTrajectories(
        self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Any]:
        """As told."""
        self.calls += 1
        assert self.stream is not None
        async for response in self.stream(request_iterator):
            yield response


@asynccontextmanager
async def serving(
    teacher: Teacher | None = None, *, config: ServerConfig = QUICK, listen: str = "127.0.0.1:0", **options: Any
) -> AsyncIterator[MeshServer]:
    """A server that serves; its address is an attribute."""
    server = MeshServer(config, services=[SERVICE], **options)
    teacher_service_pb2_grpc.add_TeacherServiceServicer_to_server(teacher or Teacher(), server.grpc)
    await server.start(listen)
    await server.set_serving(True)
    try:
        yield server
    finally:
        await server.grpc.stop(None)


def raising(error: Exception, times: int | None = None) -> Handler:
    """Raises ``error``, for the first ``times`` calls; answers after that."""
    left = [times]

    async def answer(request: Any) -> Any:
        if left[0] is None or left[0] > 0:
            left[0] = None if left[0] is None else left[0] - 1
            raise error
        return pb.GetTeacherResponse(teacher=pb.TeacherCard(teacher_id="recovered"))

    return answer


async def collect(stream: AsyncIterator[Any], into: list[Any]) -> None:
    """Everything that comes, also where the stream then fails."""
    async for item in stream:
        into.append(item)


async def health_of(address: str, service: str = SERVICE) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)).status


async def refused(address: str) -> bool:
    """Whether nobody listens there."""
    try:
        _, writer = await asyncio.open_connection(*split_address(address))
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


# --- life -----------------------------------------------------------------------------------------------------
async def test_health_follows_the_server_through_its_life() -> None:
    server = MeshServer(QUICK, services=[SERVICE])
    teacher_service_pb2_grpc.add_TeacherServiceServicer_to_server(Teacher(), server.grpc)
    address = await server.start("127.0.0.1:0")
    assert address.startswith("127.0.0.1:")
    assert not address.endswith(":0")
    assert [await health_of(address, name) for name in ("", SERVICE)] == [NOT_SERVING] * 2
    await server.set_serving(True)
    assert [await health_of(address, name) for name in ("", SERVICE)] == [SERVING] * 2
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_of(address, "opd.v1.Unheard")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    seen = []

    async def on_drain() -> None:
        seen.append(await health_of(address))
        await server.set_serving(True)  # a late loader must not undo the drain
        seen.append(await health_of(address))

    await server.drain(on_drain)
    assert seen == [NOT_SERVING, NOT_SERVING]
    assert await refused(address)


async def test_waiting_for_a_server() -> None:
    server = MeshServer(QUICK, services=[SERVICE])
    address = await server.start("127.0.0.1:0")
    channel = open_channel(address, SERVICE, ONCE)
    await wait_until_serving(channel, SERVICE, target=address, timeout_s=20, accept_not_serving=True)
    waiting = asyncio.create_task(wait_until_serving(channel, SERVICE, target=address, timeout_s=20))
    with pytest.raises(UnavailableError, match=rf"{address} was not ready within 0.3 s \(last: NOT_SERVING\)"):
        await wait_until_serving(channel, SERVICE, target=address, timeout_s=0.3)
    assert not waiting.done()
    await server.set_serving(True)
    await waiting
    await channel.close()
    await server.grpc.stop(None)


async def test_reflection_lists_what_is_served() -> None:
    async with serving() as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def requests() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)

        listed, described = [response async for response in stub.ServerReflectionInfo(requests())]
    assert {service.name for service in listed.list_services_response.service} == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert b"ScoreTrajectories" in described.file_descriptor_response.file_descriptor_proto[0]


async def test_a_port_in_use_is_refused_and_the_first_server_keeps_it() -> None:
    teacher = Teacher()
    async with serving(teacher) as server:
        port = server.address.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(AddressInUseError, match=f"cannot listen on {host}:{port}"):
                await MeshServer(QUICK, services=[SERVICE]).start(f"{host}:{port}")
        for _ in range(8):  # each on a connection of its own, which a second listener would get some of
            async with TeacherClient([server.address], ONCE) as client:
                await client.get_teacher("a")
        assert teacher.calls == 8


async def test_a_port_that_something_else_holds() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(AddressInUseError, match="choose another") as caught:
            await MeshServer(QUICK, services=[SERVICE]).start(address)
    assert caught.value.field == "listen"


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "mesh.example:0", "localhost.example:0"])
async def test_plaintext_stays_on_loopback(listen: str) -> None:
    with pytest.raises(ConfigError, match="reachable from other machines, and there is no TLS"):
        await MeshServer(QUICK, services=[SERVICE]).start(listen)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.9.10:0", "[::1]:0", "localhost:0"])
async def test_loopback_addresses(listen: str) -> None:
    if listen.startswith("[") and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    async with serving(listen=listen) as server, TeacherClient([server.address], ONCE) as client:
        assert is_loopback(split_address(server.address)[0])
        assert (await client.get_teacher("a")).teacher_id == "a"


async def test_plaintext_elsewhere_where_it_was_asked_for() -> None:
    async with serving(listen="0.0.0.0:0", insecure=True) as server:
        port = server.address.rpartition(":")[2]
        async with TeacherClient([f"127.0.0.1:{port}"], ONCE) as client:
            assert (await client.get_teacher("a")).teacher_id == "a"


@pytest.mark.parametrize("listen", ["127.0.0.1", ":8500", "127.0.0.1:http", "127.0.0.1:70000", ""])
async def test_a_listen_address_that_is_none(listen: str) -> None:
    with pytest.raises(ConfigError, match="is not host:port"):
        await MeshServer(QUICK, services=[SERVICE]).start(listen)


# --- drain ----------------------------------------------------------------------------------------------------
@dataclass
class Slow:
    """A call that has begun, and ends when the test says."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, request: Any) -> Any:
        self.begun.set()
        await self.go_on.wait()
        return pb.GetTeacherResponse(teacher=pb.TeacherCard(teacher_id="finished"))


async def test_sigterm_lets_calls_in_flight_finish() -> None:
    slow = Slow()
    before = signal.getsignal(signal.SIGTERM)
    async with serving(Teacher({"slow": slow})) as server, TeacherClient([server.address], ONCE) as client:
        drained: list[int] = []

        async def drain_hook() -> None:
            drained.append(await health_of(server.address))
            slow.go_on.set()

        running = asyncio.create_task(server.run_until_signal(drain_hook))
        call = asyncio.create_task(client.get_teacher("slow"))
        await slow.begun.wait()
        assert signal.getsignal(signal.SIGTERM) is not before  # else the signal would end the tests
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await call).teacher_id == "finished"
        await asyncio.wait_for(running, 10)
        assert drained == [NOT_SERVING]
        assert await refused(server.address)


async def test_the_grace_of_a_drain_ends() -> None:
    slow = Slow()
    config = QUICK.replace(drain_grace_s=0.1)
    teacher = Teacher({"slow": slow})
    async with serving(teacher, config=config) as server, TeacherClient([server.address], ONCE) as client:
        call = asyncio.create_task(client.get_teacher("slow"))
        await slow.begun.wait()
        await asyncio.wait_for(server.drain(), 10)
        with pytest.raises(UnavailableError):
            await call


# --- TLS ------------------------------------------------------------------------------------------------------
class Authority:
    """A certificate authority that lives in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(name, self.key, ca=True)
        self.ca_file = self._write(f"{name}.pem", self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, hosts: tuple[str, ...] = ("127.0.0.1", "localhost")) -> tuple[Path, Path]:
        """(certificate file, key file)."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, key, hosts=hosts)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        cert_file = self._write(f"{self.name}-{name}.pem", certificate.public_bytes(serialization.Encoding.PEM))
        return cert_file, self._write(f"{self.name}-{name}.key", pem)

    def _sign(
        self, name: str, key: ec.EllipticCurvePrivateKey, *, ca: bool = False, hosts: tuple[str, ...] = ()
    ) -> x509.Certificate:
        def named(common_name: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])

        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder(named(self.name), named(name), key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if hosts:
            numeric = [host for host in hosts if host[0].isdigit()]
            alternatives: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(host)) for host in numeric]
            alternatives += [x509.DNSName(host) for host in hosts if host not in numeric]
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The mesh's authority."""
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Somebody else's."""
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


def tls_server(
    authority: Authority, *, hosts: tuple[str, ...] = ("127.0.0.1",), client_ca: Path | None = None
) -> ServerConfig:
    cert_file, key_file = authority.issue("server", hosts=hosts)
    return QUICK.replace(tls=TlsConfig(cert_file=cert_file, key_file=key_file, client_ca_file=client_ca))


def tls_channel(ca_file: Path, certificate: tuple[Path, Path] | None = None, **fields: Any) -> ChannelConfig:
    cert_file, key_file = certificate or (None, None)
    return ONCE.replace(tls=ClientTlsConfig(ca_file=ca_file, cert_file=cert_file, key_file=key_file, **fields))


async def test_tls(ours: Authority, theirs: Authority) -> None:
    async with serving(config=tls_server(ours), listen="0.0.0.0:0") as server:  # beyond loopback, with no flag
        address = "127.0.0.1:" + server.address.rpartition(":")[2]
        async with TeacherClient([address], tls_channel(ours.ca_file)) as client:
            assert (await client.get_teacher("a")).teacher_id == "a"
        for config in (tls_channel(theirs.ca_file), ONCE):  # an unknown authority; no TLS at all
            async with TeacherClient([address], config) as client:
                with pytest.raises(UnavailableError):
                    await client.get_teacher("a")


async def test_a_certificate_of_another_name(ours: Authority) -> None:
    async with serving(config=tls_server(ours, hosts=("teacher.mesh",))) as server:
        async with TeacherClient([server.address], tls_channel(ours.ca_file)) as client:
            with pytest.raises(UnavailableError):
                await client.get_teacher("a")
        named = tls_channel(ours.ca_file, server_name="teacher.mesh")
        async with TeacherClient([server.address], named) as client:
            assert (await client.get_teacher("a")).teacher_id == "a"


async def test_mutual_tls(ours: Authority, theirs: Authority) -> None:
    teacher = Teacher()
    async with serving(teacher, config=tls_server(ours, client_ca=ours.ca_file)) as server:
        async with TeacherClient([server.address], tls_channel(ours.ca_file, ours.issue("trainer"))) as client:
            assert (await client.get_teacher("a")).teacher_id == "a"
        for certificate in (None, theirs.issue("trainer")):
            async with TeacherClient([server.address], tls_channel(ours.ca_file, certificate)) as client:
                with pytest.raises(UnavailableError):
                    await client.get_teacher("a")
        assert teacher.calls == 1


async def test_certificates_that_cannot_be_used_are_no_port_in_use(ours: Authority, tmp_path: Path) -> None:
    cert_file, key_file = ours.issue("server")
    _, other_key = ours.issue("other")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("not a certificate")
    absent = tmp_path / "absent.pem"
    cases: list[tuple[Path, Path, Path | None, str, str]] = [
        (absent, key_file, None, "server.tls.cert_file", "cannot read .*absent.pem: No such file"),
        (cert_file, absent, None, "server.tls.key_file", "cannot read .*absent.pem"),
        (cert_file, key_file, absent, "server.tls.client_ca_file", "cannot read .*absent.pem"),
        (garbage, key_file, None, "server.tls", "garbage.pem and .* are no certificate and its key"),
        (cert_file, garbage, None, "server.tls", "garbage.pem are no certificate and its key"),
        (cert_file, other_key, None, "server.tls", "other.key are no certificate and its key"),
        (cert_file, key_file, garbage, "server.tls", "garbage.pem holds no certificate of an authority"),
    ]
    for certificate, key, client_ca, where, message in cases:
        config = QUICK.replace(tls=TlsConfig(cert_file=certificate, key_file=key, client_ca_file=client_ca))
        with pytest.raises(ConfigError, match=message) as caught:
            await MeshServer(config, services=[SERVICE]).start("127.0.0.1:0")
        assert caught.value.field == where
    for channel, where in (
        (tls_channel(absent), "tls.ca_file"),
        (tls_channel(garbage), "tls"),
        (tls_channel(ours.ca_file, (cert_file, absent)), "tls.key_file"),
        (tls_channel(ours.ca_file, (cert_file, other_key)), "tls"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_channel("127.0.0.1:1", SERVICE, channel)
        assert caught.value.field == where


# --- errors ---------------------------------------------------------------------------------------------------
async def test_errors_arrive_as_the_class_that_was_raised() -> None:
    said = HeadMismatchError("other head", field="digest", retry_delay_s=1.5, metadata={"teacher_id": "a"})
    teacher = Teacher({"a": raising(said)})
    async with serving(teacher) as server, TeacherClient([server.address], ONCE) as client:
        with pytest.raises(HeadMismatchError) as caught:
            await client.get_teacher("a")
        assert str(caught.value) == "digest: other head"
        assert (caught.value.field, caught.value.retry_delay_s) == ("digest", 1.5)
        assert caught.value.metadata == {"teacher_id": "a"}


async def test_errors_of_a_stream_come_after_what_was_sent() -> None:
    teacher = Teacher({"a": raising(UnknownTeacherError("no teacher 'a'; there are b and c"))})
    async with serving(teacher) as server, open_channel(server.address, SERVICE, ONCE) as channel:
        stub = teacher_service_pb2_grpc.TeacherServiceStub(channel)
        got: list[Any] = []
        with pytest.raises(UnknownTeacherError, match="there are b and c"):
            await collect(responses_of(stub.GetHead(pb.GetHeadRequest(teacher_id="a")), server.address), got)
        assert [response.chunk.offset for response in got] == [0, 1]


async def test_a_long_message_in_any_script_arrives() -> None:
    teacher = Teacher({"a": raising(InvalidInputError("語" * 20_000, field="token_ids", metadata={"x": "ü" * 9000}))})
    async with serving(teacher) as server, TeacherClient([server.address], ONCE) as client:
        with pytest.raises(InvalidInputError, match="token_ids: 語語語語"):
            await client.get_teacher("a")


async def test_a_defect_is_logged_here_and_not_told_there(caplog: pytest.LogCaptureFixture) -> None:
    secret = "password=hunter2"
    teacher = Teacher({"a": raising(RuntimeError(secret))})
    async with serving(teacher) as server, open_channel(server.address, SERVICE, ONCE) as channel:
        stub = teacher_service_pb2_grpc.TeacherServiceStub(channel)

        async def call_unary() -> None:
            async with rpc_errors(server.address):
                await stub.GetTeacher(pb.GetTeacherRequest(teacher_id="a"))

        async def call_stream() -> None:
            await collect(responses_of(stub.GetHead(pb.GetHeadRequest(teacher_id="a")), server.address), [])

        for call in (call_unary, call_stream):
            with pytest.raises(InternalError) as caught:
                await call()
            assert "RuntimeError" in str(caught.value)
            assert "the server's log has the stack" in str(caught.value)
            assert secret not in repr((str(caught.value), caught.value.metadata, caught.value.__cause__))
    logged = [record for record in caplog.records if record.levelno == logging.ERROR and record.name == "opd_mesh.rpc"]
    assert [record.getMessage() for record in logged] == [f"{SERVICE}/GetTeacher failed", f"{SERVICE}/GetHead failed"]
    assert caplog.text.count(secret) == 2


async def test_a_failed_call_inside_a_handler_is_a_defect_of_the_server() -> None:
    async def call_nobody(request: Any) -> Any:
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            return await teacher_service_pb2_grpc.TeacherServiceStub(channel).GetTeacher(request)

    async with serving(Teacher({"a": call_nobody})) as server, TeacherClient([server.address], ONCE) as client:
        with pytest.raises(InternalError, match=f"in {SERVICE}/GetTeacher") as caught:
            await client.get_teacher("a")
    assert "127.0.0.1:1:" not in str(caught.value)


async def test_a_method_that_is_not_served_says_so() -> None:
    async with serving() as server, TeacherClient([server.address], ONCE) as client:
        with pytest.raises(UnimplementedError, match="ListTeachers"):
            await client.list_teachers()
        async with grpc.aio.insecure_channel(server.address) as channel:  # known to nobody
            with pytest.raises(UnimplementedError):
                async with rpc_errors(server.address):
                    await channel.unary_unary(f"/{SERVICE}/Invented")(b"")


async def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it meanwhile
        address = f"127.0.0.1:{free.getsockname()[1]}"
        async with TeacherClient([address], ONCE) as client:
            with pytest.raises(UnavailableError, match=address):
                await client.get_teacher("a")
            with pytest.raises(UnavailableError, match=r"is the server running\?"):
                await client.wait_ready(0.3)


async def test_a_unary_call_has_a_deadline() -> None:
    slow = Slow()
    hasty = ONCE.replace(timeout_s=0.2)
    async with serving(Teacher({"slow": slow})) as server, TeacherClient([server.address], hasty) as client:
        with pytest.raises(DeadlineError):
            await client.get_teacher("slow")


# --- limits ---------------------------------------------------------------------------------------------------
async def test_messages_beyond_the_limit_are_refused_on_either_side() -> None:
    async def large(request: Any) -> Any:
        return pb.GetTeacherResponse(teacher=pb.TeacherCard(note="x" * (1 << 21)))

    narrow, wide = QUICK.replace(max_message_bytes=1 << 20), ONCE.replace(max_message_bytes=1 << 23)
    teacher = Teacher({"large": large})
    async with serving(teacher, config=narrow) as server, TeacherClient([server.address], wide) as client:
        with pytest.raises(TooLongError, match="larger than max"):
            await client.get_teacher("x" * (1 << 21))
        assert teacher.calls == 0
        with pytest.raises(TooLongError, match="larger than max"):
            await client.get_teacher("large")
        assert (await client.get_teacher("x" * (1 << 19))).teacher_id == "x" * 10  # the connection lives on
    small_client = ONCE.replace(max_message_bytes=1 << 20)
    async with serving(teacher) as server, TeacherClient([server.address], small_client) as client:
        for teacher_id in ("large", "x" * (1 << 21)):
            with pytest.raises(TooLongError, match="larger than max"):
                await client.get_teacher(teacher_id)


async def test_too_many_calls_at_once_are_refused_and_not_queued() -> None:
    slow = Slow()
    config = QUICK.replace(max_concurrent_rpcs=1)
    async with (
        serving(Teacher({"slow": slow}), config=config) as server,
        TeacherClient([server.address], ONCE) as first,
        TeacherClient([server.address], ONCE) as second,
    ):
        call = asyncio.create_task(first.get_teacher("slow"))
        await slow.begun.wait()
        for client in (first, second):  # on one connection or on several
            with pytest.raises(OverloadedError, match="1 calls run already") as caught:
                await client.get_teacher("a")
            assert caught.value.retry_delay_s is not None
            assert caught.value.retry_delay_s > 0
        assert await health_of(server.address) == SERVING  # busy is not dead
        slow.go_on.set()
        assert (await call).teacher_id == "finished"
        assert (await second.get_teacher("a")).teacher_id == "a"


# --- retries --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 300 << 10, 4 << 20])
async def test_an_idempotent_call_is_repeated_whatever_its_size(size: int) -> None:
    # Above gRPC's own buffer of 256 KiB it would silently not be.
    name = "x" * size
    teacher = Teacher({name: raising(UnavailableError("just now"), times=1)})
    async with serving(teacher) as server, TeacherClient([server.address], ChannelConfig(max_attempts=3)) as client:
        assert (await client.get_teacher(name)).teacher_id == "recovered"
    assert teacher.calls == 2


async def test_repetition_ends() -> None:
    teacher = Teacher({"a": raising(UnavailableError("for good", metadata={"why": "test"}))})
    async with serving(teacher) as server, TeacherClient([server.address], ChannelConfig(max_attempts=2)) as client:
        with pytest.raises(UnavailableError, match="for good"):
            await client.get_teacher("a")
    assert teacher.calls == 2


@pytest.mark.parametrize("error", [InvalidInputError("no"), OverloadedError("busy"), RuntimeError("oops")])
async def test_only_unavailable_is_repeated(error: Exception) -> None:
    teacher = Teacher({"a": raising(error)})
    async with serving(teacher) as server, TeacherClient([server.address], ChannelConfig()) as client:
        with pytest.raises(OpdError, match=r"^(no|busy|.* log has the stack)$"):
            await client.get_teacher("a")
    assert teacher.calls == 1


async def test_a_request_stream_is_not_repeated() -> None:
    async def broken(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        await anext(requests)
        raise UnavailableError("just now")
        yield

    teacher = Teacher(stream=broken)
    async with serving(teacher) as server, open_channel(server.address, SERVICE, ChannelConfig()) as channel:
        call = teacher_service_pb2_grpc.TeacherServiceStub(channel).ScoreTrajectories()
        await call.write(pb.ScoreTrajectoriesRequest(cancel_item_id="i1"))
        with pytest.raises(UnavailableError, match="just now"):
            _ = [response async for response in responses_of(call, server.address)]
    assert teacher.calls == 1


# --- replicas -------------------------------------------------------------------------------------------------
async def test_replicas_that_are_not_serving_get_no_calls() -> None:
    one, two = Teacher(), Teacher()
    async with serving(one) as first, serving(two) as second:
        await second.set_serving(False)
        async with TeacherClient([first.address, second.address], ONCE) as client:
            await client.wait_ready(20)
            for _ in range(6):
                await client.get_teacher("a")
            assert (one.calls, two.calls) == (6, 0)
            await second.set_serving(True)
            await first.set_serving(False)
            for _ in range(200):  # the change comes by a stream of its own
                if two.calls:
                    break
                await client.get_teacher("a")
                await asyncio.sleep(0.02)
            before = one.calls
            for _ in range(6):
                await client.get_teacher("a")
            assert two.calls >= 6
            assert one.calls == before


def test_an_address_that_makes_no_channel() -> None:
    with pytest.raises(ConfigError, match="is not host:port"):
        open_channel("nowhere", SERVICE, ONCE)


# --- idle streams ---------------------------------------------------------------------------------------------
async def items_of(
    *items: int, then: asyncio.Event | None = None, ended: list[str] | None = None
) -> AsyncIterator[int]:
    try:
        for item in items:
            yield item
        if then is not None:
            await then.wait()
    finally:
        if ended is not None:
            ended.append("ended")


async def test_a_stream_that_flows_is_left_alone() -> None:
    assert [item async for item in with_idle_timeout(items_of(1, 2, 3), 30.0, "x")] == [1, 2, 3]
    assert [item async for item in with_idle_timeout(items_of(), 30.0, "x")] == []


async def test_a_stream_that_falls_silent_is_ended() -> None:
    got: list[int] = []
    ended: list[str] = []
    silent = items_of(1, 2, then=asyncio.Event(), ended=ended)
    with pytest.raises(DeadlineError, match=r"UpdatePolicy: nothing arrived for 0\.05 s"):
        await collect(with_idle_timeout(silent, 0.05, "UpdatePolicy"), got)
    assert got == [1, 2]
    await asyncio.sleep(0)
    assert ended == ["ended"]  # its source was told


async def test_the_consumers_own_time_does_not_count() -> None:
    got = []
    async for item in with_idle_timeout(items_of(1, 2, 3), 0.05, "x"):
        await asyncio.sleep(0.1)
        got.append(item)
    assert got == [1, 2, 3]


async def test_errors_and_cancellation_pass_through() -> None:
    async def failing() -> AsyncIterator[int]:
        yield 1
        raise InvalidInputError("bad")

    with pytest.raises(InvalidInputError, match="bad"):
        _ = [item async for item in with_idle_timeout(failing(), 30.0, "x")]
    ended: list[str] = []
    source = items_of(1, then=asyncio.Event(), ended=ended)
    stream = with_idle_timeout(source, 30.0, "x")
    assert await anext(stream) == 1
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0)
    assert ended == ["ended"]


async def test_an_idle_client_is_told_so() -> None:
    async def echo(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in with_idle_timeout(requests, 0.6, "ScoreTrajectories"):
            yield pb.ScoreTrajectoriesResponse(item_id=request.cancel_item_id)

    async with serving(Teacher(stream=echo)) as server, open_channel(server.address, SERVICE, ONCE) as channel:
        call = teacher_service_pb2_grpc.TeacherServiceStub(channel).ScoreTrajectories()
        for name in ("i1", "i2"):
            await call.write(pb.ScoreTrajectoriesRequest(cancel_item_id=name))
        got: list[Any] = []
        with pytest.raises(DeadlineError, match=r"nothing arrived for 0\.6 s; the stream is ended"):
            await collect(responses_of(call, server.address), got)
        assert [response.item_id for response in got] == ["i1", "i2"]


# --- traces ---------------------------------------------------------------------------------------------------
# A process of its own: providers can be set once in a process.
TRACED = """
import asyncio, json, sys
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))

import test_rpc as t
from opd_mesh import telemetry
from opd_mesh.errors import OpdError

async def inner(request):
    with telemetry.span("inside"):
        return t.pb.GetTeacherResponse()

async def main():
    teacher = t.Teacher({
        "ok": inner,
        "bad": t.raising(t.UnknownTeacherError("no")),
        "boom": t.raising(RuntimeError("x")),
    })
    async with t.serving(teacher) as server, t.TeacherClient([server.address], t.ONCE) as client:
        with telemetry.span("outside"):
            await client.get_teacher("ok")
        for name in ("bad", "boom"):
            try:
                await client.get_teacher(name)
            except OpdError:
                pass
        stub = client._stub
        async with t.rpc_errors("x"):
            try:
                async for _ in stub.GetHead(t.pb.GetHeadRequest(teacher_id="bad")):
                    pass
            except t.grpc.aio.AioRpcError:
                pass
        await asyncio.sleep(0.05)

asyncio.run(main())
spans = [
    {
        "name": span.name, "kind": span.kind.name, "trace": span.context.trace_id, "id": span.context.span_id,
        "parent": span.parent.span_id if span.parent else None, "attributes": dict(span.attributes),
        "status": span.status.status_code.name,
    }
    for span in exporter.get_finished_spans()
]
points = [
    [metric.name, metric.unit, *map(point.attributes.get, ("rpc.method", "rpc.response.status_code")), point.count]
    for resource in reader.get_metrics_data().resource_metrics
    for scope in resource.scope_metrics
    for metric in scope.metrics
    for point in metric.data.data_points
]
print(json.dumps({"spans": spans, "points": points}))
"""


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """Spans and metrics of four calls."""
    root = Path(__file__).resolve().parents[2]
    path = [root, root / "protos", root / "kernels", root / "tests", Path(__file__).parent]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", TRACED],
        env=environment | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def spans_named(traced: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [span for span in traced["spans"] if span["name"] == name]


def test_one_trip_is_one_trace(traced: dict[str, Any]) -> None:
    (outside,), (inside,) = spans_named(traced, "outside"), spans_named(traced, "inside")
    chain = [span for span in traced["spans"] if span["trace"] == outside["trace"]]
    assert {(span["name"], span["kind"]) for span in chain} == {
        ("outside", "INTERNAL"),
        (f"{SERVICE}/GetTeacher", "CLIENT"),
        (f"{SERVICE}/GetTeacher", "SERVER"),
        ("inside", "INTERNAL"),
    }
    client, server = (next(span for span in chain if span["kind"] == kind) for kind in ("CLIENT", "SERVER"))
    assert (client["parent"], server["parent"], inside["parent"]) == (outside["id"], client["id"], server["id"])
    for span in (client, server):
        assert span["attributes"]["rpc.system.name"] == "grpc"
        assert span["attributes"]["rpc.method"] == f"{SERVICE}/GetTeacher"
        assert span["attributes"]["rpc.response.status_code"] == "OK"
        assert span["status"] == "UNSET"


def test_calls_apart_are_traces_apart(traced: dict[str, Any]) -> None:
    servers = [span for span in traced["spans"] if span["kind"] == "SERVER"]
    assert len(servers) == 4
    assert len({span["trace"] for span in servers}) == 4


@pytest.mark.parametrize("kind", ["CLIENT", "SERVER"])
def test_both_sides_tell_how_a_call_ended(traced: dict[str, Any], kind: str) -> None:
    ended = [
        (span["name"].rpartition("/")[2], span["attributes"]["rpc.response.status_code"], span["status"])
        for span in traced["spans"]
        if span["kind"] == kind
    ]
    assert sorted(ended) == [
        ("GetHead", "NOT_FOUND", "ERROR"),
        ("GetTeacher", "INTERNAL", "ERROR"),
        ("GetTeacher", "NOT_FOUND", "ERROR"),
        ("GetTeacher", "OK", "UNSET"),
    ]


@pytest.mark.parametrize("name", ["rpc.client.call.duration", "rpc.server.call.duration"])
def test_durations_are_measured_by_method_and_status(traced: dict[str, Any], name: str) -> None:
    points = sorted(point[1:] for point in traced["points"] if point[0] == name)
    assert points == [
        ["s", f"{SERVICE}/GetHead", "NOT_FOUND", 1],
        ["s", f"{SERVICE}/GetTeacher", "INTERNAL", 1],
        ["s", f"{SERVICE}/GetTeacher", "NOT_FOUND", 1],
        ["s", f"{SERVICE}/GetTeacher", "OK", 1],
    ]
