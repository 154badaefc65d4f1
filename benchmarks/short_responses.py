"""How many short responses a rollout server writes in a second, from the asking to the arrival of the trajectories.

A random Llama of 0.4 million parameters is made on the spot; a real server process with a token log decodes it, a real
Valkey carries the trajectories. Asked for are responses of up to 9 tokens to groups of eight equal prompts, as GRPO
draws them, each published, and all are read from the stream and checked. What a response costs beside its few tokens is
what is measured: ``cpu_ms_per_response`` of the server's and of the client's process (this one, which also reads the
stream). Every round asks twice, with the same prompts and seeds: once on a GenerateBatch stream, once by a Generate
call each; ``batch_vs_stream`` is the ratio of their responses per second within a round, batch over stream, larger is
better. Figures are medians over rounds; the server is given the same weights throughout, one thread each.
Refuses to report unless both ways wrote the same tokens.

    python benchmarks/short_responses.py             # one JSON object on stdout
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from servers import START_TIMEOUT_S, say

LETTERS = "0123456789+-=*/ ,.:;<>()[]'\"?!abcdefghijklmnopqrstuvwxyz"
PROMPT_TOKENS, MOST_NEW_TOKENS, GROUP = 11, 9, 8
EOS_ID = 2
READ_COUNT, READ_BLOCK_S, TIMEOUT_S = 512, 0.5, 300.0
TICKS = os.sysconf("SC_CLK_TCK")


def make_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A student on the disk; returns (tensors by name, vocabulary)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from opd_mesh.models.checkpoint import served_tensors
    from opd_mesh.torch_tensors import to_numpy

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": EOS_ID, "<unk>": 3}
    for letter in LETTERS:
        vocabulary.setdefault(letter, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return {name: to_numpy(tensor).copy() for name, tensor in served_tensors(model)}, vocabulary


class RolloutProcess:
    """``python -m rollout_server``, from its start to SIGTERM."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        path, self._ready, self.log = folder / "rollout.yaml", folder / "ready.json", folder / "rollout.log"
        path.write_text(json.dumps(config))  # JSON is YAML
        command = [sys.executable, "-m", "rollout_server", "--config", str(path), "--listen", "127.0.0.1:0"]
        command += ["--ready-file", str(self._ready), "--die-with-parent", str(os.getpid())]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.pid = self._process.pid

    def address(self) -> str:
        """Wait until it listens."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the rollout server did not come up; {self.log} ends with:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)
        return str(json.loads(self._ready.read_text())["address"])

    def cpu_s(self) -> float:
        """Seconds of CPU, user and system, since it began."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


@dataclass(frozen=True)
class Measured:
    """One asking."""

    responses: int
    tokens: int
    wall_s: float
    server_cpu_s: float
    client_cpu_s: float
    written: dict[str, tuple[int, ...]]  # response tokens by request id


def specs_of(run_id: str, fingerprint: str, count: int, vocab_size: int, seed: int) -> list[Any]:
    """Requests in groups of equal prompts."""
    from opd_mesh.clients.rollout import GenerateSpec
    from opd_mesh.trajectory import SamplingParams

    chance = random.Random(seed)
    specs = []
    for index in range(count):
        if index % GROUP == 0:
            prompt = [1, *(chance.randrange(4, vocab_size) for _ in range(PROMPT_TOKENS - 1))]
        sampling = SamplingParams(seed=chance.getrandbits(63), max_new_tokens=MOST_NEW_TOKENS, stop_token_ids=(EOS_ID,))
        specs.append(GenerateSpec(f"r{index:05d}", run_id, "copy", prompt, sampling, fingerprint, publish=True))
    return specs


async def measure(
    server: RolloutProcess, stream: Any, specs: Sequence[Any], ask: Callable[[Any], Awaitable[object]]
) -> Measured:
    """Ask for all at once; ends when each is answered and has come through the stream."""
    from opd.v1 import common_pb2

    from opd_mesh.convert import trajectory_from_proto

    written: dict[str, tuple[int, ...]] = {}
    entry_ids: list[str] = []

    async def read() -> None:
        while len(entry_ids) < len(specs):
            for entry in await stream.read(READ_COUNT, READ_BLOCK_S):
                trajectory = trajectory_from_proto(common_pb2.Trajectory.FromString(entry.payload))
                trajectory.validate()
                written[trajectory.trajectory_id] = tuple(trajectory.scored_token_ids)
                entry_ids.append(entry.entry_id)

    began, server_began, client_began = time.monotonic(), server.cpu_s(), time.process_time()
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        group.create_task(read())
        for spec in specs:
            group.create_task(ask(spec))  # type: ignore[arg-type]
    wall_s, client_s = time.monotonic() - began, time.process_time() - client_began
    server_s = server.cpu_s() - server_began
    await stream.acknowledge(entry_ids)
    if set(written) != {spec.request_id for spec in specs} or len(entry_ids) != len(specs):
        sys.exit(f"{len(entry_ids)} trajectories of {len(written)} ids came for {len(specs)} requests")
    return Measured(len(specs), sum(map(len, written.values())), wall_s, server_s, client_s, written)


def summary(rounds: Sequence[Measured]) -> dict[str, Any]:
    """Medians over rounds."""

    def median(figure: Callable[[Measured], float]) -> float:
        return round(statistics.median(map(figure, rounds)), 3)

    return {
        "wall_s": median(lambda one: one.wall_s),
        "responses_per_s": median(lambda one: one.responses / one.wall_s),
        "tokens_per_s": median(lambda one: one.tokens / one.wall_s),
        "cpu_ms_per_response": {
            "server": median(lambda one: 1000 * one.server_cpu_s / one.responses),
            "client": median(lambda one: 1000 * one.client_cpu_s / one.responses),
        },
    }


async def run(arguments: argparse.Namespace, folder: Path, redis_url: str) -> dict[str, Any]:
    """The whole measurement."""
    from opd_mesh.clients.rollout import RolloutClient
    from opd_mesh.convert import policy_to_proto
    from opd_mesh.models.tokenizer import tokenizer_fingerprint
    from opd_mesh.policy import PolicyId
    from opd_mesh.policy_weights import PolicyWeights
    from opd_mesh.stream import TrajectoryStream

    tensors, vocabulary = make_checkpoint(folder / "student")
    fingerprint = tokenizer_fingerprint(vocabulary)
    engine = {"max_context_tokens": 64, "max_slots": arguments.slots, "max_waiting": 4096, "threads": 1}
    config = {
        "model": str(folder / "student"),
        "engine": engine,
        "log": {"path": str(folder / "log")},
        "redis_url": redis_url,
        "server": {"max_concurrent_rpcs": 2 * arguments.responses, "drain_propagation_s": 0.0},
    }
    server = RolloutProcess(folder, config)
    by_batch: list[Measured] = []
    by_stream: list[Measured] = []
    try:
        async with RolloutClient(await asyncio.to_thread(server.address)) as client:
            weights = PolicyWeights.of(tensors)

            async def by_generate(spec: Any) -> None:
                async for _ in client.stream(spec):
                    pass

            for number in range(-1, arguments.rounds):
                ways: list[tuple[list[Measured], Callable[[Any], Awaitable[object]]]]
                ways = [(by_batch, client.write), (by_stream, by_generate)]
                for way, (measured, ask) in enumerate(ways if number % 2 else ways[::-1]):
                    run_id = f"round{number}-{way}"
                    policy = policy_to_proto(PolicyId(run_id, 1, 1, weights.digest))
                    await client.update_policy(
                        policy,
                        list(weights.tensors.items()),
                        tokenizer_fingerprint=fingerprint,
                        digests=weights.digests,
                    )
                    stream = TrajectoryStream(redis_url, run_id, consumer="trainer-0")
                    await stream.read(1, 0.0)  # connected
                    specs = specs_of(run_id, fingerprint, arguments.responses, len(vocabulary), number)
                    measured.append(await measure(server, stream, specs, ask))
                    await stream.close()
                if by_batch[-1].written != by_stream[-1].written:
                    sys.exit("GenerateBatch and Generate wrote different tokens: nothing is reported")
                say(f"round {number}: batch {by_batch[-1].wall_s:.3f} s, stream {by_stream[-1].wall_s:.3f} s")
    finally:
        server.stop()
    ratios = [stream.wall_s / batch.wall_s for batch, stream in zip(by_batch[1:], by_stream[1:], strict=True)]
    return {
        "responses": arguments.responses,
        "slots": arguments.slots,
        "rounds": arguments.rounds,
        **summary(by_batch[1:]),  # the first round warmed up
        "stream": summary(by_stream[1:]),
        "batch_vs_stream": round(statistics.median(ratios), 3),
        "batch_vs_stream_interval": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    import torch

    from opd_mesh.valkey import EmbeddedValkey

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with EmbeddedValkey(folder / "valkey", folder / "valkey.log") as valkey:
            print(json.dumps(asyncio.run(run(arguments, folder, valkey.url))))


if __name__ == "__main__":
    main()
