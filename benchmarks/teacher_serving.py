"""What serving costs: tokens per second through gRPC against the same forward passes in process; bytes per second of a
large answer against a bare gRPC stream of the same bytes; and how fast health answers during a forward pass.

Forward passes: a teacher server in a process of its own scores items that come through gRPC, and calls the same engine
directly with the same items in the same batches, in turn. (In another process the same forward passes take up to 15%
longer or shorter, by where their memory happens to lie.) Bytes: a server whose engine answers at once from memory, and
beside it in the same process a gRPC method that yields the same bytes in chunks of the same size and does nothing else.
Refuses to report unless the answers are equal.

    python benchmarks/teacher_serving.py             # one JSON object on stdout

``serving_vs_in_process``, ``goodput_vs_bare_stream``: medians of ratios within one round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from servers import say

MODEL = Path(".cache/smollm2/smollm2-135m-instruct")
PROMPT_TOKENS, RESPONSE_TOKENS, BATCH_ITEMS = 32, 128, 4
ROWS, WIDTH = 16384, 1024  # of the large answer: 64 MiB of float32
VALUE = 0.5
BARE = "/bare.Bare/Call"
LARGEST_MESSAGE = 64 << 20


# --- forward passes ----------------------------------------------------------------------------------------------
def make_items(count: int, chance: random.Random, vocab_size: int) -> list[list[int]]:
    """Token ids of equal length, so that batches are the same wherever they are made."""
    length = PROMPT_TOKENS + RESPONSE_TOKENS
    return [[chance.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def config(threads: int) -> dict[str, Any]:
    """Of the server and of the engine in this process."""
    return {
        "teachers": {"smollm2": {"path": str(MODEL)}},
        "threads": threads,
        "batch_tokens": BATCH_ITEMS * (PROMPT_TOKENS + RESPONSE_TOKENS),
        "max_items_in_flight": 256,
    }


def in_process(engine: Any, items: list[list[int]]) -> tuple[float, list[Any]]:
    """(seconds, answers)."""
    from teacher_server.engine import ScoreJob, Signal

    positions = tuple(range(PROMPT_TOKENS - 1, PROMPT_TOKENS + RESPONSE_TOKENS - 1))
    jobs = [ScoreJob(tuple(ids), positions, Signal.HIDDEN_STATES, "float32") for ids in items]
    started = time.monotonic()
    answers = []
    for start in range(0, len(jobs), BATCH_ITEMS):
        answers += engine.score(jobs[start : start + BATCH_ITEMS])
    return time.monotonic() - started, [answer["hidden_states"] for answer in answers]


async def serve_forward(threads: int) -> None:
    """A teacher server, and a method of its own that calls the engine directly; prints the addresses."""
    import grpc

    from opd_mesh.config.base import parse_config
    from opd_mesh.config.services import TeacherServerConfig
    from teacher_server.server import load_engines

    settings = parse_config(TeacherServerConfig, config(threads), source="benchmark")
    engines = await asyncio.to_thread(load_engines, settings)

    async def direct(request: bytes, context: Any) -> bytes:
        seconds, answers = await asyncio.to_thread(in_process, engines["smollm2"], json.loads(request))
        return struct.pack("<d", seconds) + b"".join(answer.tobytes() for answer in answers)

    await serve(settings, engines, grpc.unary_unary_rpc_method_handler(direct))


async def serve(settings: Any, engines: dict[str, Any], bare_handler: Any) -> None:
    """The engines behind a teacher server, and the handler on a server of its own, without our interceptors."""
    import grpc
    from opd.v1 import teacher_service_pb2_grpc

    from opd_mesh.rpc.server import MeshServer
    from teacher_server.catalogue import Catalogue
    from teacher_server.server import open_catalogue
    from teacher_server.service import TeacherServicer

    server = MeshServer(settings.server, services=["opd.v1.TeacherService"])
    catalogue = Catalogue(settings)
    teacher_service_pb2_grpc.add_TeacherServiceServicer_to_server(TeacherServicer(catalogue), server.grpc)
    bare = grpc.aio.server(options=[("grpc.max_send_message_length", LARGEST_MESSAGE)])
    bare.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bare.Bare", {"Call": bare_handler})])
    bare_port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    address = await server.start("127.0.0.1:0")
    open_catalogue(catalogue, engines)
    await server.set_serving(True)
    print(json.dumps({"served": address, "bare": f"127.0.0.1:{bare_port}"}), flush=True)
    await asyncio.Event().wait()


async def through_grpc(client: Any, card: Any, items: list[list[int]]) -> tuple[float, list[Any]]:
    """(seconds, answers)."""
    from opd_mesh.clients.teacher import ScoreRequest

    spans = [(PROMPT_TOKENS, PROMPT_TOKENS + RESPONSE_TOKENS)]
    requests = [ScoreRequest("smollm2", ids, spans, card.tokenizer_fingerprint, timeout_s=600) for ids in items]
    started = time.monotonic()
    answers = await asyncio.gather(*(client.score(request) for request in requests))
    return time.monotonic() - started, [answer.tensors["hidden_states"] for answer in answers]


async def health_seconds(address: str, latencies: list[float]) -> None:
    """Ask for health all the while."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            started = time.monotonic()
            await stub.Check(health_pb2.HealthCheckRequest(service="opd.v1.TeacherService"))
            latencies.append(time.monotonic() - started)
            await asyncio.sleep(0.05)


async def forward(addresses: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Forward passes, and health during them."""
    import grpc
    import numpy as np

    from opd_mesh.clients.teacher import TeacherClient

    chance = random.Random(0)
    ratios: list[float] = []
    tokens_per_s: dict[str, list[float]] = {"in_process": [], "grpc": []}
    latencies: list[float] = []
    options = [("grpc.max_receive_message_length", LARGEST_MESSAGE)]
    async with (
        TeacherClient([addresses["served"]]) as client,
        grpc.aio.insecure_channel(addresses["bare"], options=options) as channel,
    ):
        card = await client.get_teacher("smollm2")
        for number in range(arguments.rounds + 1):
            items = make_items(arguments.items, chance, card.vocab_size)
            direct = await channel.unary_unary(BARE)(json.dumps(items).encode())
            (own_s,) = struct.unpack("<d", direct[:8])
            served_s, found = await through_grpc(client, card, items)
            if not np.array_equal(np.frombuffer(direct[8:], np.float32), np.concatenate(found).reshape(-1)):
                sys.exit("the answers differ: nothing was measured")
            if number == 0:
                continue  # warm-up
            ratios.append(own_s / served_s)
            tokens = len(items) * (PROMPT_TOKENS + RESPONSE_TOKENS)
            tokens_per_s["in_process"].append(tokens / own_s)
            tokens_per_s["grpc"].append(tokens / served_s)
            say(f"round {number}: in process {own_s:.2f} s, through gRPC {served_s:.2f} s")
        asking = asyncio.create_task(health_seconds(addresses["served"], latencies))
        await through_grpc(client, card, make_items(arguments.items, chance, card.vocab_size))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    latencies.sort()
    return {
        "serving_vs_in_process": round(statistics.median(ratios), 3),
        "serving_ratios": [round(ratio, 3) for ratio in ratios],
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in tokens_per_s.items()},
        "health_during_forward_ms": {
            "median": round(1e3 * statistics.median(latencies), 2),
            "p99": round(1e3 * latencies[int(0.99 * (len(latencies) - 1))], 2),
            "largest": round(1e3 * latencies[-1], 2),
            "checks": len(latencies),
        },
    }


# --- bytes -------------------------------------------------------------------------------------------------------
class InstantEngine:
    """Answers every job with the same rows."""

    weight_sets = ()

    def __init__(self) -> None:
        import numpy as np

        from opd_mesh.models.tokenizer import TokenizerRoles
        from teacher_server.engine import EngineFacts, HeadFacts, Signal

        self._rows = np.full((ROWS, WIDTH), VALUE, np.float32)
        self.facts = EngineFacts(
            model_type="instant",
            vocab_size=2,
            hidden_size=WIDTH,
            dtype="float32",
            teacher_digest="0" * 64,
            head=HeadFacts("1" * 64, 2, WIDTH, "float32", has_bias=False, logit_scale=1.0, soft_cap=None),
            head_error=0.0,
            signals=(Signal.HIDDEN_STATES,),
            note="",
            batch_layout="lone",
            tokenizer_fingerprint="2" * 64,
            tokenizer_roles=TokenizerRoles(None, None, None, None),
            vocabulary={},
        )

    def score(self, jobs: Sequence[Any]) -> list[dict[str, Any]]:
        """See TeacherEngine."""
        return [{"hidden_states": self._rows} for _ in jobs]

    def head_tensors(self) -> list[Any]:
        """See TeacherEngine."""
        return []

    def close(self) -> None:
        """See TeacherEngine."""


async def serve_bytes() -> None:
    """Both ways of sending, in one process."""
    import grpc
    import numpy as np

    from opd_mesh.config.base import parse_config
    from opd_mesh.config.services import TeacherServerConfig
    from opd_mesh.tensors import CHUNK_BYTES

    settings = parse_config(
        TeacherServerConfig,
        {"teachers": {"instant": {"path": "nowhere", "max_tokens_per_item": ROWS + 1}}},
        source="benchmark",
    )
    view = np.full((ROWS, WIDTH), VALUE, np.float32).reshape(-1).view(np.uint8).data

    async def stream(request: bytes, context: Any) -> Any:
        for start in range(0, len(view), CHUNK_BYTES):
            yield bytes(view[start : start + CHUNK_BYTES])

    await serve(settings, {"instant": InstantEngine()}, grpc.unary_stream_rpc_method_handler(stream))


async def goodput(addresses: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """One large answer at a time, bare and served in turn."""
    import grpc
    import numpy as np

    from opd_mesh.clients.teacher import ScoreRequest, TeacherClient
    from opd_mesh.config.services import ChannelConfig

    total = ROWS * WIDTH * 4
    speeds: dict[str, list[float]] = {"bare": [], "served": []}
    request = ScoreRequest("instant", [0] * (ROWS + 1), [(1, ROWS + 1)], "2" * 64, timeout_s=120)

    async def served(client: TeacherClient) -> float:
        started = time.monotonic()
        rows = (await client.score(request)).tensors["hidden_states"]
        took = time.monotonic() - started
        if rows.shape != (ROWS, WIDTH) or not np.all(rows == VALUE):
            sys.exit("the answer is not what was sent: nothing was measured")
        return took

    async def bare(channel: grpc.aio.Channel) -> float:
        started = time.monotonic()
        # As any client would have it: one array of the bytes.
        block, end = np.empty(total, np.uint8).data, 0
        async for data in channel.unary_stream(BARE)(b""):
            block[end : end + len(data)] = data
            end += len(data)
        took = time.monotonic() - started
        if end != total:
            sys.exit("the bare stream is short: nothing was measured")
        return took

    options = [("grpc.max_receive_message_length", 8 << 20)]
    async with (
        TeacherClient([addresses["served"]], ChannelConfig(max_attempts=1)) as client,
        grpc.aio.insecure_channel(addresses["bare"], options=options) as channel,
    ):
        await client.wait_ready()
        for number in range(arguments.transfers + 1):
            seconds = {"bare": await bare(channel), "served": await served(client)}
            if number:  # the first is warm-up
                for name, took in seconds.items():
                    speeds[name].append(total / took / (1 << 20))
    ratios = [served / bare for served, bare in zip(speeds["served"], speeds["bare"], strict=True)]
    return {
        "goodput_vs_bare_stream": round(statistics.median(ratios), 3),
        "goodput_mib_per_s": {name: round(statistics.median(values)) for name, values in speeds.items()},
        "answer_bytes": total,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=32, help="sequences in a round")
    parser.add_argument("--transfers", type=int, default=20, help="large answers, served and bare")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["forward", "bytes"])
    parser.add_argument("--serve", choices=["forward", "bytes"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve_bytes() if arguments.serve == "bytes" else serve_forward(arguments.threads))
        return
    if not MODEL.exists():
        sys.exit(f"{MODEL} is missing: make demo-models")
    result: dict[str, Any] = {}
    for part, measure in (("bytes", goodput), ("forward", forward)):
        if arguments.only in (None, part):
            command = [sys.executable, __file__, "--serve", part, "--threads", str(arguments.threads)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                assert process.stdout is not None
                addresses = json.loads(process.stdout.readline())
                result |= asyncio.run(measure(addresses, arguments))
            finally:
                process.terminate()
                process.wait(30)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
