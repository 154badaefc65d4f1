"""What a marked token costs on the wire: bytes counted on the socket, between a client and a real teacher server.

A counting relay stands between the two, so HTTP/2 framing, headers, digests and statuses are all in the figures.
Refuses to report unless the tensors that arrived equal a forward pass in this process.

    python benchmarks/wire.py        # one JSON object on stdout
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HIDDEN_SIZE, VOCAB_SIZE = 576, 4096
PROMPT_TOKENS, RESPONSE_TOKENS, ITEMS = 32, 64, 16
# Of the largest value: what rounding to the wire's dtype explains.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


@dataclass
class Relay:
    """Forwards TCP and counts what passes, by direction."""

    target: tuple[str, int]
    to_client: int = 0
    to_server: int = 0

    async def start(self) -> str:
        """Listen; returns the address to dial."""
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(*self.target)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: str) -> None:
            while data := await source.read(1 << 16):
                setattr(self, direction, getattr(self, direction) + len(data))
                sink.write(data)
                await sink.drain()
            sink.close()

        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.gather(pump(reader, up_writer, "to_server"), pump(up_reader, writer, "to_client"))


def make_teacher(folder: Path) -> Any:
    """A random Llama of SmolLM2's width, saved with a tokenizer of its own; returns the model."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        vocab_size=VOCAB_SIZE,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokens = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="w1").save_pretrained(folder)
    return model


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], tuple[str, int]]:
    """A teacher server process and its address."""
    config, ready = folder / "server.yaml", folder / "ready.json"
    config.write_text(json.dumps({"teachers": {"t": {"path": str(folder)}}}))
    command = [sys.executable, "-m", "teacher_server", "--config", str(config), "--ready-file", str(ready)]
    process = subprocess.Popen(
        [*command, "--die-with-parent", str(os.getpid())], stderr=(folder / "server.log").open("wb")
    )
    deadline = time.monotonic() + 120
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the teacher server did not start:\n{(folder / 'server.log').read_text()}")
        time.sleep(0.05)
    host, port = json.loads(ready.read_text())["address"].rsplit(":", 1)
    return process, (host, int(port))


async def measure(model: Any, target: tuple[str, int], signal_name: str, dtype: str) -> tuple[float, float]:
    """(bytes to the client, bytes to the server) per response token, over one stream of many items."""
    import torch
    from opd.v1 import teacher_service_pb2

    from opd_mesh.clients.teacher import ScoreRequest, TeacherClient
    from opd_mesh.torch_tensors import from_numpy

    relay = Relay(target)
    generator = torch.Generator().manual_seed(1)
    async with TeacherClient([await relay.start()]) as client:
        card = await client.get_teacher("t")
        before = relay.to_client, relay.to_server

        def request() -> ScoreRequest:
            total = PROMPT_TOKENS + RESPONSE_TOKENS
            return ScoreRequest(
                teacher_id="t",
                token_ids=torch.randint(VOCAB_SIZE, (total,), generator=generator).tolist(),
                scored_spans=[(PROMPT_TOKENS, total)],
                tokenizer_fingerprint=card.tokenizer_fingerprint,
                signal=teacher_service_pb2.Signal.Value(f"SIGNAL_{signal_name.upper()}"),
                dtype=dtype,
            )

        requests = [request() for _ in range(ITEMS)]
        results = await asyncio.gather(*(client.score(item) for item in requests))
        moved = relay.to_client - before[0], relay.to_server - before[1]

    for item, result in zip(requests, results, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([item.token_ids]), output_hidden_states=True)
        wanted = (output.hidden_states[-1] if signal_name == "hidden_states" else output.logits)[
            0, PROMPT_TOKENS - 1 : -1
        ]
        found = from_numpy(result.tensors[signal_name]).float()
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if found.shape != wanted.shape or not error <= TOLERANCE[dtype]:
            sys.exit(f"refusing to report: {signal_name} as {dtype} differ from a local forward pass by {error:.1e}")
    tokens = ITEMS * RESPONSE_TOKENS
    return moved[0] / tokens, moved[1] / tokens


async def run() -> dict[str, float | int]:
    """All measurements."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_teacher(folder)
        process, target = start_server(folder)
        try:
            hidden_bf16, up = await measure(model, target, "hidden_states", "bfloat16")
            hidden_fp32, _ = await measure(model, target, "hidden_states", "float32")
            logits_fp32, _ = await measure(model, target, "logits", "float32")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    return {
        "hidden_size": HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
        "response_tokens_per_item": RESPONSE_TOKENS,
        "hidden_bf16_bytes_per_token": round(hidden_bf16, 1),
        "hidden_fp32_bytes_per_token": round(hidden_fp32, 1),
        "logits_fp32_bytes_per_token": round(logits_fp32, 1),
        "request_bytes_per_token": round(up, 1),
        "hidden_bf16_overhead": round(hidden_bf16 / (2 * HIDDEN_SIZE) - 1, 4),
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(json.dumps(asyncio.run(run())))
