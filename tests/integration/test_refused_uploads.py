"""A client that is refused in the middle of its upload hears why, from a server in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from opd.v1 import common_pb2, rollout_service_pb2, rollout_service_pb2_grpc

from opd_mesh.errors import UnavailableError
from opd_mesh.rpc.status import WRITE_FAILED, error_of_rpc

ROOT = Path(__file__).resolve().parents[2]
CHUNKS, CHUNK_BYTES, TRIES = 64, 1 << 16, 60
REFUSES = """
import asyncio
from opd.v1 import rollout_service_pb2_grpc
from opd_mesh.config.services import ServerConfig
from opd_mesh.errors import StalePolicyError
from opd_mesh.rpc.server import MeshServer

class Refuses(rollout_service_pb2_grpc.RolloutServiceServicer):
    async def UpdatePolicy(self, requests, context):
        for _ in range(3):
            await anext(aiter(requests))
        raise StalePolicyError("too old")

async def main():
    server = MeshServer(ServerConfig(), services=["opd.v1.RolloutService"])
    rollout_service_pb2_grpc.add_RolloutServiceServicer_to_server(Refuses(), server.grpc)
    await server.start("127.0.0.1:0")
    print(server.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def address() -> Iterator[str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "protos", "kernels"))
    process = subprocess.Popen(
        [sys.executable, "-c", REFUSES], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


async def test_the_reason_arrives_though_the_client_is_writing(address: str) -> None:
    """Cut off at once, about one call in five says INTERNAL and nothing more (grpc/grpc#36066)."""
    message = rollout_service_pb2.UpdatePolicyRequest(chunk=common_pb2.TensorChunk(data=b"x" * CHUNK_BYTES))

    async def upload() -> AsyncIterator[rollout_service_pb2.UpdatePolicyRequest]:
        for _ in range(CHUNKS):
            yield message

    heard: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rollout_service_pb2_grpc.RolloutServiceStub(channel)
        for _ in range(TRIES):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.UpdatePolicy(upload(), timeout=20)
            heard[f"{caught.value.code().name}: {caught.value.details()}"] += 1
    assert heard == {"FAILED_PRECONDITION: too old": TRIES}


@pytest.mark.parametrize(
    ("code", "details"),
    [
        pytest.param(grpc.StatusCode.INTERNAL, WRITE_FAILED, id="lost in a write"),
        pytest.param(grpc.StatusCode.CANCELLED, "CANCELLED", id="reset by a server that stops"),
    ],
)
def test_a_status_that_is_not_the_servers_word_is_one_to_ask_again_for(code: grpc.StatusCode, details: str) -> None:
    empty = grpc.aio.Metadata()
    lost = grpc.aio.AioRpcError(code, empty, empty, details=details)
    assert isinstance(error_of_rpc(lost, target="x"), UnavailableError)
