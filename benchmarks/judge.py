"""What judging costs beside writing the verdicts: JudgeBatch against the same generations asked for directly.

A random Llama of 0.4 million parameters, made on the spot, is served frozen by a real rollout server; a real reward
model judges with it. A round judges answers that were never seen before, once by ``JudgeBatch`` and once as the very
generations that this makes (same prompts, grammar, seeds; ids of their own) by ``GenerateBatch`` on the same server, in
turns. ``judge_vs_direct`` is the ratio of tokens per second within a round, judging over direct; larger is better, and
1 means that prompts, the stream and parsing cost nothing. ``prefix_prefill_ratio`` is prompt tokens that the engine
read for a JudgeBatch over the tokens of its prompts: 1 where every prompt is read whole, and less by the rubric's share
where what they have in common is read once. Medians over rounds; one thread for the engine.
Refuses to report unless both ways wrote the same verdicts and every one of them parsed.

    python benchmarks/judge.py             # one JSON object on stdout
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from servers import say

CONTEXT_TOKENS = 2048
CRITERIA = ("truth", "order", "brevity")
TIMEOUT_S = 600.0


def make_checkpoint(folder: Path) -> None:
    """A judge on the disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from opd_mesh.pipeline.making import character_tokenizer

    tokenizer = character_tokenizer(string.printable.replace("\t", "").replace("\r", "").replace("\x0b\x0c", ""))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def items_of(rubric: Any, count: int, number: int) -> list[Any]:
    """Of one round: answers to one prompt, no two of them alike."""
    from opd.v1 import common_pb2
    from opd.v1 import generative_reward_service_pb2 as pb

    from opd_mesh.judging.messages import rubric_to_proto

    sampling = common_pb2.SamplingParams(seed=number, temperature=1.0)
    return [
        pb.JudgeItem(
            prompt="Explain in one sentence why the sky is blue.",
            answers=[f"Answer {index} of round {number}: short waves are scattered more than long ones."],
            rubric_inline=rubric_to_proto(rubric),
            samples=1,
            sampling=sampling,
        )
        for index in range(count)
    ]


async def specs_of(judging: Any, texts: Any, config: Any, items: Sequence[Any], policy: Any) -> list[Any]:
    """The generations that judging the items makes, under ids of their own."""
    from grm_server.items import check_item
    from opd_mesh.config.rubrics import RubricLibrary
    from opd_mesh.judging.verdict import verdict_grammar

    specs = []
    for item in items:
        checked = check_item(item, config, RubricLibrary([]))
        (ballot,) = await texts.ballots(checked)
        spec = judging.spec(checked, ballot, policy, 0, verdict_grammar(checked.rubric))
        specs.append(replace(spec, request_id=f"direct-{spec.request_id}", run_id="direct"))
    return specs


async def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole measurement."""
    from opd.v1 import generative_reward_service_pb2 as pb

    from grm_server.ballots import Texts
    from grm_server.judges import Judges
    from grm_server.judging import Judging
    from opd_mesh.children import Child
    from opd_mesh.clients.reward import RewardClient
    from opd_mesh.clients.rollout import RolloutClient
    from opd_mesh.config.rubrics import Criterion, Rubric
    from opd_mesh.config.services import GrmServerConfig, RolloutServerConfig
    from opd_mesh.convert import policy_from_proto
    from opd_mesh.models.tokenizer import load_tokenizer

    make_checkpoint(folder / "judge")
    rubric = Rubric(
        name="bench",
        criteria=[Criterion(name=name, description="Is it good?") for name in CRITERIA],
        max_reason_chars=24,
    )
    engine = {"max_context_tokens": CONTEXT_TOKENS, "max_slots": arguments.slots, "threads": 1}
    values = {"model": folder / "judge", "frozen": True, "engine": engine, "log": {"path": folder / "log"}}
    rollout = Child.start("judge", RolloutServerConfig.model_validate(values), services=folder, logs=folder)
    servers = [rollout]
    ratios: list[float] = []
    read_shares: list[float] = []
    judged_rates: list[float] = []
    direct_rates: list[float] = []
    prompt_tokens = verdict_tokens = 0
    try:
        address = await rollout.ready()
        values = {"model": folder / "judge", "judge": {"addresses": [address]}, "cache_entries": 0}
        config = GrmServerConfig.model_validate(values)
        grm = Child.start("grm", config, services=folder, logs=folder)
        servers.append(grm)
        texts = Texts(load_tokenizer(folder / "judge"), None)

        async def nothing(serving: bool) -> None: ...

        judging = Judging(config, Judges([], nothing), texts)
        async with RolloutClient(address) as direct, RewardClient(await grm.ready()) as client:
            await client.wait_ready()
            policy = policy_from_proto((await direct.get_policy()).policy)
            for number in range(-1, arguments.rounds):
                items = items_of(rubric, arguments.answers, number % (1 << 32))
                specs = await specs_of(judging, texts, config, items, policy)

                async def judge(items: Sequence[Any] = items) -> tuple[float, list[Any], int]:
                    read = (await direct.get_policy()).load.prefill_tokens
                    began = time.monotonic()
                    answers = await client.judge_many(items, timeout_s=TIMEOUT_S)
                    wall_s = time.monotonic() - began
                    return wall_s, answers, (await direct.get_policy()).load.prefill_tokens - read

                async def generate(specs: Sequence[Any] = specs) -> tuple[float, list[Any]]:
                    began = time.monotonic()
                    written = await asyncio.gather(*(direct.generate(spec, timeout_s=TIMEOUT_S) for spec in specs))
                    return time.monotonic() - began, list(written)

                if number % 2:
                    (judged_s, answers, read), (direct_s, written) = await judge(), await generate()
                else:
                    (direct_s, written), (judged_s, answers, read) = await generate(), await judge()
                for answer, text in zip(answers, await texts.written(written), strict=True):
                    if not isinstance(answer, pb.JudgeResponse) or answer.verdicts[0].failure:
                        sys.exit(f"not judged: {answer}")
                    if answer.votes[0].text != text:
                        sys.exit(f"JudgeBatch wrote {answer.votes[0].text!r}, GenerateBatch {text!r}")
                prompt_tokens = sum(len(spec.prompt_token_ids) for spec in specs)
                verdict_tokens = sum(one.num_scored for one in written)
                say(f"round {number}: judged in {judged_s:.2f} s, direct in {direct_s:.2f} s")
                if number >= 0:  # the first round warmed up
                    ratios.append(direct_s / judged_s)
                    read_shares.append(read / prompt_tokens)
                    judged_rates.append(verdict_tokens / judged_s)
                    direct_rates.append(verdict_tokens / direct_s)
        texts.close()
    finally:
        for server in reversed(servers):
            await server.stop()
    return {
        "answers": arguments.answers,
        "slots": arguments.slots,
        "rounds": arguments.rounds,
        "prompt_tokens": prompt_tokens,
        "verdict_tokens": verdict_tokens,
        "judge_tokens_per_s": round(statistics.median(judged_rates), 1),
        "direct_tokens_per_s": round(statistics.median(direct_rates), 1),
        "judge_vs_direct": round(statistics.median(ratios), 3),
        "judge_vs_direct_interval": [round(min(ratios), 3), round(max(ratios), 3)],
        "prefix_prefill_ratio": round(statistics.median(read_shares), 3),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(asyncio.run(run(arguments, Path(name)))))


if __name__ == "__main__":
    main()
