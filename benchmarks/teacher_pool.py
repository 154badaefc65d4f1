"""Twelve teachers in the room of two, at least eight of them in every mini-batch, against all twelve in memory.

Three servers get the same items in the same order of arrival, one teacher after the other in turn: one with all weights
in memory, one with room for two teachers that orders by teacher and prefetches, and one with the same room that does
neither. A round is one mini-batch on each; ratios are of the same round. Refuses to report unless the answers agree.

    python benchmarks/teacher_pool.py                # one JSON object on stdout
    python benchmarks/teacher_pool.py --adapters 10  # instead: the memory of LoRA teachers above one base

``ordered_vs_resident``, ``unordered_vs_resident``: throughput. ``peak_memory_vs_budget``: the server's resident set at
its highest, mapped file pages included, above that of a server with one tiny teacher, over ``pool.memory_bytes``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from servers import TeacherProcess, say

MODEL = Path(".cache/smollm2/smollm2-135m-instruct")
PROMPT_TOKENS, RESPONSE_TOKENS = 32, 128
BATCH_TOKENS = 480
TOLERANCE = 2e-3  # of hidden states, whose batches differ between the servers


def make_teachers(folder: Path, count: int) -> dict[str, Path]:
    """Copies of SmolLM2 in float32, each with other weights; kept for the next run."""
    import torch
    from safetensors.torch import load_file, save_file

    paths = {}
    weights = None
    for number in range(count):
        path = folder / f"teacher{number:02d}"
        paths[path.name] = path
        if (path / "model.safetensors").exists():
            continue
        say(f"making {path.name}")
        weights = weights or {k: v.float() for k, v in load_file(MODEL / "model.safetensors").items()}
        shutil.copytree(MODEL, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        generator = torch.Generator().manual_seed(number)
        changed = {
            name: tensor * (1 + 0.02 * torch.randn(tensor.shape[0], *[1] * (tensor.ndim - 1), generator=generator))
            for name, tensor in weights.items()
        }
        save_file(changed, path / "partial", metadata={"format": "pt"})
        (path / "partial").rename(path / "model.safetensors")
    return paths


def bare_rss(folder: Path) -> int:
    """Bytes of a server whose one teacher weighs nothing, after it has computed: libraries, tokenizer, protocol."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / "tiny"
    if not path.exists():
        torch.manual_seed(0)
        shutil.copytree(MODEL, path, ignore=shutil.ignore_patterns("*.safetensors"))
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **sizes)).save_pretrained(path)
    server = TeacherProcess(folder / "logs", "bare", {"teachers": {"tiny": {"path": str(path)}}})
    try:
        server.address()
        return server.memory()["rss"]
    finally:
        server.stop()


def make_items(teachers: list[str], response_tokens: int, chance: random.Random, vocab_size: int) -> list[Any]:
    """(teacher, token ids, spans) of a mini-batch, the teachers in turn."""
    per_teacher = response_tokens // RESPONSE_TOKENS
    items = []
    for _ in range(per_teacher):
        for teacher in teachers:
            ids = [chance.randrange(vocab_size) for _ in range(PROMPT_TOKENS + RESPONSE_TOKENS)]
            items.append((teacher, ids, [(PROMPT_TOKENS, len(ids))]))
    return items


async def score(client: Any, cards: dict[str, Any], items: list[Any]) -> tuple[float, list[Any]]:
    """(seconds, answers) of all items, all asked for at once."""
    from opd_mesh.clients.teacher import ScoreRequest

    requests = [
        ScoreRequest(teacher, ids, spans, cards[teacher].tokenizer_fingerprint, timeout_s=900)
        for teacher, ids, spans in items
    ]
    started = time.monotonic()
    answers = await asyncio.gather(*(client.score(request) for request in requests))
    return time.monotonic() - started, [answer.tensors["hidden_states"] for answer in answers]


def disagreement(found: list[Any], wanted: list[Any]) -> float:
    """Largest difference in standard deviations."""
    return max(float(abs(a - b).max() / b.std()) for a, b in zip(found, wanted, strict=True))


async def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds."""
    from opd_mesh.clients.teacher import TeacherClient
    from opd_mesh.config.services import ChannelConfig

    paths = make_teachers(folder, arguments.teachers)
    bare = bare_rss(folder)
    size = (next(iter(paths.values())) / "model.safetensors").stat().st_size
    budget = arguments.room * size
    pools: dict[str, dict[str, Any]] = {
        "resident": {"memory_bytes": (arguments.teachers + 1) * size},
        "ordered": {"memory_bytes": budget},
        "unordered": {"memory_bytes": budget, "order": "arrival", "prefetch": False},
    }
    base = {
        "teachers": {name: {"path": str(path)} for name, path in paths.items()},
        "batch_tokens": BATCH_TOKENS,
        "max_items_in_flight": 1024,
        "threads": arguments.threads,
    }
    servers: dict[str, TeacherProcess] = {}
    seconds: dict[str, list[float]] = {name: [] for name in pools}
    memory: dict[str, dict[str, int]] = {}
    worst = 0.0
    chance = random.Random(0)
    try:
        for name, pool in pools.items():  # one after the other: each proves all its teachers first
            say(f"starting the {name} server")
            servers[name] = TeacherProcess(folder / "logs", name, base | {"pool": pool})
            servers[name].address()
        clients = {
            name: TeacherClient([server.address()], ChannelConfig(timeout_s=60)) for name, server in servers.items()
        }
        cards = {card.teacher_id: card for card in await clients["resident"].list_teachers()}
        vocab_size = next(iter(cards.values())).vocab_size
        idle = {name: server.memory() for name, server in servers.items()}
        warm = make_items(list(paths), RESPONSE_TOKENS, chance, vocab_size)
        await score(clients["resident"], cards, warm)  # every teacher is in memory from here on
        for server in servers.values():
            server.reset_peak()
        for number in range(arguments.rounds):
            names = chance.sample(list(paths), arguments.per_batch)
            items = make_items(names, arguments.response_tokens, chance, vocab_size)
            said = {}
            for name in chance.sample(list(pools), len(pools)):
                took, said[name] = await score(clients[name], cards, items)
                seconds[name].append(took)
                say(f"round {number + 1}: {name} {took:.1f} s")
            worst = max(worst, *(disagreement(said[name], said["resident"]) for name in ("ordered", "unordered")))
            if worst > TOLERANCE:
                sys.exit(f"answers differ by {worst:.1e} standard deviations: nothing was measured")
        memory = {name: server.memory() for name, server in servers.items()}
        for client in clients.values():
            await client.close()
    finally:
        for server in servers.values():
            server.stop()
    ratios = {
        name: [whole / took for whole, took in zip(seconds["resident"], seconds[name], strict=True)]
        for name in ("ordered", "unordered")
    }
    tokens = arguments.per_batch * (arguments.response_tokens // RESPONSE_TOKENS) * (PROMPT_TOKENS + RESPONSE_TOKENS)
    return {
        "ordered_vs_resident": round(statistics.median(ratios["ordered"]), 3),
        "unordered_vs_resident": round(statistics.median(ratios["unordered"]), 3),
        "peak_memory_vs_budget": round((memory["ordered"]["peak"] - bare) / budget, 3),
        "ratios": {name: [round(ratio, 3) for ratio in values] for name, values in ratios.items()},
        "tokens_per_s": {name: round(tokens / statistics.median(times), 1) for name, times in seconds.items()},
        "budget_bytes": budget,
        "bare_rss_bytes": bare,
        "idle_rss_bytes": {name: figures["rss"] for name, figures in idle.items()},
        "peak_rss_bytes": {name: figures["peak"] for name, figures in memory.items()},
        "largest_difference_stds": worst,
        "teachers": arguments.teachers,
        "teachers_per_batch": arguments.per_batch,
        "response_tokens_per_teacher": arguments.response_tokens,
        "threads": arguments.threads,
    }


async def run_adapters(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One base and LoRA adapters above it, each asked for some sequences."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from opd_mesh.clients.teacher import TeacherClient

    (base,) = make_teachers(folder, 1).values()
    bare = bare_rss(folder)
    size = (base / "model.safetensors").stat().st_size
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=arguments.rank, target_modules="all-linear")
    )
    teachers = {"base": {"path": str(base)}}
    for number in range(arguments.adapters):
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        model.save_pretrained(folder / f"adapter{number}")
        teachers[f"adapter{number}"] = {"path": str(base), "adapter": str(folder / f"adapter{number}")}
    del model
    adapter_bytes = (folder / "adapter0" / "adapter_model.safetensors").stat().st_size
    peaks: dict[str, int] = {}
    for name, served in (("base", {"base": teachers["base"]}), ("adapters", teachers)):
        config = {
            "teachers": served,
            "batch_tokens": BATCH_TOKENS,
            "threads": arguments.threads,
            "pool": {"memory_bytes": int(1.3 * size), "cache_dir": str(folder / "cache")},
        }
        server = TeacherProcess(folder / "logs", name, config)
        try:
            async with TeacherClient([server.address()]) as client:
                cards = {card.teacher_id: card for card in await client.list_teachers()}
                server.reset_peak()
                items = make_items(list(served), 512, random.Random(0), cards["base"].vocab_size)
                _, said = await score(client, cards, items)
                peaks[name] = server.memory()["peak"]
        finally:
            server.stop()
    return {
        "adapters_vs_base": round((peaks["adapters"] - bare) / (peaks["base"] - bare), 3),
        "weights_vs_base": round(1 + arguments.adapters * adapter_bytes / size, 3),
        "peak_rss_bytes": peaks,
        "bare_rss_bytes": bare,
        "adapters": arguments.adapters,
        "rank": arguments.rank,
        "base_bytes": size,
        "adapter_bytes": adapter_bytes,
        "heads": len({card.head.digest for card in cards.values()}),
        "answers": len(said),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, default=12)
    parser.add_argument("--room", type=int, default=2, help="teachers that fit the budget")
    parser.add_argument("--per-batch", type=int, default=8, help="teachers in a mini-batch")
    parser.add_argument("--response-tokens", type=int, default=2048, help="per teacher and mini-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keeps the teachers (0.5 GB each) for the next run")
    parser.add_argument("--adapters", type=int, default=0, help="measure so many LoRA teachers above one base instead")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters, on all linear layers")
    arguments = parser.parse_args()
    if not MODEL.exists():
        sys.exit(f"{MODEL} is missing: make demo-models")
    with tempfile.TemporaryDirectory() as temporary:
        measure = run_adapters if arguments.adapters else run
        result = asyncio.run(measure(arguments, arguments.folder or Path(temporary)))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
