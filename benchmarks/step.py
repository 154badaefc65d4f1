"""A whole step of on-policy distillation: our mesh against TRL's ``DistillationTrainer``, tokens per second.

Eight prompts, exactly 32 new tokens each, reverse KL over the whole vocabulary, AdamW; SmolLM2-135M in float32 on both
sides. Ours are the processes of ``opd run`` (Valkey, teacher, rollout server, trainer), and the step includes handing
the new policy to the rollout server. TRL is one process, at its fastest settings, which the output lists. The two take
turns on the same cores in one run, and the ratio is taken within each pair of turns.

Refuses to time unless the losses and gradient norms of both, on one batch, equal plain torch with full logits.

    python benchmarks/step.py        # one JSON object on stdout; needs `make demo-models` and the extra `bench`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("OPD_REDIS_URL", None)  # the mesh starts its own

MODEL = Path(__file__).parent.parent / ".cache" / "smollm2" / "smollm2-135m-instruct"
NEW_TOKENS = 32
LEARNING_RATE = 1e-5
# A special token that is never drawn takes the part of the end of text, for both sides: every answer has 32 tokens.
NEVER_DRAWN = "<empty_output>"
# Of each weight's standard deviation, added to the student at random: there must be something to learn.
STUDENT_NOISE = 0.08
# Relative. All compute in float32, in different orders.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
PROMPTS = (
    "State the final answer to the following arithmetic problem: 54 + 81 =",
    "What is the capital of France, and on which river does it lie?",
    "Reverse the order of these words: apple, stone, river, candle, window",
    "Write one sentence about the sea in winter that a child would understand.",
    "State the final answer to the following arithmetic problem: 712 - 94 + 38 =",
    "Name three animals that live in the desert and say what each of them eats.",
    "Translate into plain English: the committee has resolved to defer its deliberations.",
    "A train leaves at 9:40 and arrives at 11:25. How long was it on its way, in minutes?",
)
TOKENS_PER_STEP = len(PROMPTS) * NEW_TOKENS


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Before torch is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of turns that count")
    parser.add_argument("--steps", type=int, default=3, help="steps in one turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each side that do not count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every process")
    parser.add_argument("--keep", type=Path, help="leave the run directory, with its logs, here")
    return parser.parse_args()


# --- models ----------------------------------------------------------------------------------------------------
def make_models(folder: Path) -> tuple[Path, Path]:
    """(student, teacher): the demo's model, and the same with noise on its weights."""
    import torch
    from safetensors.torch import load_file, save_file

    if not MODEL.exists():
        sys.exit("there is no model: run `make demo-models` first")
    student, teacher = folder / "student", folder / "teacher"
    for target in (student, teacher):
        shutil.copytree(MODEL, target, ignore=shutil.ignore_patterns("model.safetensors"))
        tokenizer_file, generation_file = target / "tokenizer_config.json", target / "generation_config.json"
        tokenizer = json.loads(tokenizer_file.read_text()) | {"eos_token": NEVER_DRAWN}
        tokenizer_file.write_text(json.dumps(tokenizer))
        added = json.loads((target / "tokenizer.json").read_text())["added_tokens"]
        (eos_id,) = (token["id"] for token in added if token["content"] == NEVER_DRAWN)
        for file in (generation_file, target / "config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": eos_id}))
    (teacher / "model.safetensors").symlink_to((MODEL / "model.safetensors").resolve())
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        weight = tensor.float()
        if weight.ndim == 2:
            weight += STUDENT_NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
        weights[name] = weight
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    return student, teacher


# --- the two sides ---------------------------------------------------------------------------------------------
@dataclass
class Turn:
    """Some steps in a row."""

    seconds: float
    tokens: int
    steps: list[dict[str, float]]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Trl:
    """TRL in a child process that does so many steps when told over a pipe."""

    def __init__(self, folder: Path, student: Path, teacher: Path, threads: int) -> None:
        settings = {
            "student": str(student),
            "teacher": str(teacher),
            "prompts": PROMPTS,
            "new_tokens": NEW_TOKENS,
            "learning_rate": LEARNING_RATE,
            "threads": threads,
            "output_dir": str(folder / "trl"),
        }
        self._log = (folder / "trl.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("step_trl.py")), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._log_path = folder / "trl.log"
        self.settings: dict[str, Any] = self._answer()

    def ask(self, **command: Any) -> dict[str, Any]:
        """One command, one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"TRL's process has ended:\n{self._log_path.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def turn(self, steps: int) -> Turn:
        """Do so many steps."""
        return Turn(**self.ask(do="steps", count=steps))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()


@dataclass
class Ours:
    """The mesh of ``opd run``, paused between its turns by ``PauseRun``."""

    mesh: Any
    client: Any
    _events: Any = None
    _done: int = field(default=0)

    @classmethod
    async def start(cls, folder: Path, student: Path, teacher: Path, threads: int) -> Ours:
        """Start all processes; returns once the policy is in place and the first step would begin."""
        from opd_mesh.clients.trainer import TrainerClient
        from opd_mesh.config.base import dump_config, parse_config
        from opd_mesh.config.recipe import Recipe
        from opd_mesh.supervisor import LocalMesh

        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        recipe = parse_config(
            Recipe,
            {
                "run": {"name": "step", "steps": 100_000, "threads": threads},
                "student": {"path": str(student)},
                "teachers": {"teacher": {"path": str(teacher)}},
                "domains": {"prompts": {"jsonl": {"path": str(prompts)}, "teachers": {"teacher": 1.0}}},
                "rollout": {"max_new_tokens": NEW_TOKENS, "engine": {"max_context_tokens": 1024}},
                "optimizer": {"lr": LEARNING_RATE},
                "batch": {"prompts_per_step": len(PROMPTS)},
                "evaluation": {"prompts_per_domain": 0},
                "checkpoint": {"every_steps": 100_000},
            },
            source="benchmark",
        )
        run_dir = folder / "run"
        run_dir.mkdir()
        dump_config(recipe, run_dir / "recipe.yaml")
        mesh = LocalMesh(recipe, run_dir)
        mesh.start(resume=False)
        client = TrainerClient(await mesh.start_trainer())
        ours = cls(mesh, client)
        await client.pause_run()
        ours._events = client.watch_run(from_step=1)
        await ours._until(lambda event: event.run.HasField("policy"))
        return ours

    async def _until(self, wanted: Any) -> Any:
        async for event in self._events:
            if event.HasField("run") and event.run.error:
                sys.exit(f"the run failed: {event.run.error}")
            if wanted(event):
                return event
        sys.exit("the run has ended")

    async def turn(self, steps: int) -> Turn:
        """Resume, do so many steps, be paused."""
        last = self._done + steps
        started = time.monotonic()
        await self.client.resume_run()
        lines = []
        # While the last one is in progress, so that none follows it.
        await self._until(
            lambda event: self._note(event, lines) or (self._done == last - 1 and "writing" in event.run.phase)
        )
        await self.client.pause_run()
        await self._until(lambda event: self._note(event, lines) or self._done == last)
        seconds = time.monotonic() - started
        return Turn(seconds, sum(int(line["tokens"]) for line in lines), lines)

    def _note(self, event: Any, lines: list[dict[str, float]]) -> None:
        if event.HasField("step"):
            lines.append(dict(event.step.metrics))
            self._done = event.step.step

    async def trajectories(self) -> list[Any]:
        """Of all steps so far, as they lie in the stream."""
        import redis
        from opd.v1 import common_pb2

        from opd_mesh.convert import trajectory_from_proto

        run = await self.client.get_run()
        with redis.Redis.from_url(self.mesh.valkey.url) as server:
            entries = server.xrange(f"opd:{run.run_id}:trajectories")
        return [trajectory_from_proto(common_pb2.Trajectory.FromString(fields[b"payload"])) for _, fields in entries]

    async def close(self) -> None:
        """End all processes. The trainer is killed: its last checkpoint would be 1.6 GB that nobody wants."""
        await self.client.close()
        if self.mesh.trainer is not None:
            self.mesh.trainer.process.kill()
        await self.mesh.stop()


# --- the gate --------------------------------------------------------------------------------------------------
def plain_reverse_kl(student_path: Path, teacher_path: Path, trajectories: list[Any]) -> tuple[float, float]:
    """(loss, gradient norm) of the batch by plain torch: float32, full logits, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (student_path, teacher_path)
    )
    tokens = sum(trajectory.num_scored for trajectory in trajectories)
    loss = 0.0
    for trajectory in trajectories:
        ids, rows = torch.tensor([trajectory.token_ids]), torch.tensor(trajectory.predicting_positions)
        log_p = student(ids, use_cache=False).logits[0, rows].log_softmax(-1)
        with torch.no_grad():
            log_q = teacher(ids, use_cache=False).logits[0, rows].log_softmax(-1)
        part = (log_p.exp() * (log_p - log_q)).sum() / tokens
        part.backward()
        loss += float(part.detach())
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
    return loss, float(norm)


async def check(ours: Ours, trl: Trl, student: Path, teacher: Path) -> dict[str, float]:
    """The mesh's first step, whole, against plain torch on the very trajectories it wrote; TRL on the same batch."""
    (line,) = (await ours.turn(1)).steps
    trajectories = await ours.trajectories()
    prompts = sorted(list(t.token_ids[: t.scored_spans[0][0]]) for t in trajectories)
    if prompts != sorted(trl.settings["prompt_ids"]):
        sys.exit("refusing to time: the two sides do not see the same prompt tokens")
    if any(t.num_scored != NEW_TOKENS for t in trajectories) or len(trajectories) != len(PROMPTS):
        sys.exit(f"refusing to time: {[t.num_scored for t in trajectories]} response tokens, not {NEW_TOKENS} of each")
    loss, norm = await asyncio.to_thread(plain_reverse_kl, student, teacher, trajectories)
    answer = await asyncio.to_thread(
        trl.ask,
        do="loss",
        prompts=[list(t.token_ids[:-NEW_TOKENS]) for t in trajectories],
        completions=[list(t.token_ids[-NEW_TOKENS:]) for t in trajectories],
    )
    gate = {
        "plain_torch_loss": loss,
        "ours_loss": line["loss"],
        "trl_loss": answer["loss"],
        "loss_tolerance": LOSS_TOLERANCE,
        "plain_torch_grad_norm": norm,
        "ours_grad_norm": line["grad_norm"],
        "trl_grad_norm": answer["grad_norm"],
        "grad_norm_tolerance": GRADIENT_TOLERANCE,
    }
    for side in ("ours", "trl"):
        for name, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", GRADIENT_TOLERANCE)):
            found, wanted = gate[f"{side}_{name}"], gate[f"plain_torch_{name}"]
            if not abs(found - wanted) <= tolerance * wanted:
                sys.exit(f"refusing to time: {side} {name} is {found}, plain torch says {wanted}")
    return gate


# --- timing ----------------------------------------------------------------------------------------------------
def phases(turns: list[Turn]) -> dict[str, float]:
    """Median seconds by phase over all steps."""
    steps = [step for turn in turns for step in turn.steps]
    names = dict.fromkeys(key for step in steps for key in step if key.startswith("seconds/"))
    return {
        name.removeprefix("seconds/"): round(statistics.median(step.get(name, 0.0) for step in steps), 3)
        for name in names
    }


def largest(seconds: dict[str, float]) -> str:
    """The phase that takes most of our step, in words; a part of a phase counts before the whole."""
    parts = {name: value for name, value in seconds.items() if name not in ("step", "policy_swap")}
    name = max(parts, key=lambda key: parts[key])
    return f"{name}: {parts[name]:.2f} s of {seconds['step']:.2f} s"


async def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything; returns what is printed."""
    say("making the models")
    student, teacher = make_models(folder)
    say("starting TRL's process")
    trl = Trl(folder, student, teacher, arguments.threads)
    ours: Ours | None = None
    try:
        say("starting the mesh")
        ours = await Ours.start(folder, student, teacher, arguments.threads)
        say("checking both against plain torch")
        gate = await check(ours, trl, student, teacher)
        say("warming up")
        await ours.turn(arguments.warmup)
        await asyncio.to_thread(trl.turn, arguments.warmup)
        our_turns, trl_turns, ratios = [], [], []
        for number in range(arguments.rounds):
            our_turns.append(await ours.turn(arguments.steps))
            trl_turns.append(await asyncio.to_thread(trl.turn, arguments.steps))
            for side, turn in (("ours", our_turns[-1]), ("TRL", trl_turns[-1])):
                if turn.tokens != TOKENS_PER_STEP * arguments.steps:
                    sys.exit(f"refusing to report: {side} trained on {turn.tokens} tokens in {arguments.steps} steps")
            ratios.append(our_turns[-1].tokens_per_s / trl_turns[-1].tokens_per_s)
            say(
                f"round {number + 1} of {arguments.rounds}: ours {our_turns[-1].tokens_per_s:.1f}, "
                f"TRL {trl_turns[-1].tokens_per_s:.1f} tokens/s, ratio {ratios[-1]:.2f}"
            )
    finally:
        trl.close()
        if ours is not None:
            await ours.close()
    our_phases = phases(our_turns)
    return {
        "speedup_vs_trl": round(statistics.median(ratios), 3),
        "ours_tokens_per_s": round(statistics.median(turn.tokens_per_s for turn in our_turns), 2),
        "trl_tokens_per_s": round(statistics.median(turn.tokens_per_s for turn in trl_turns), 2),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "phases": {"ours": our_phases, "trl": phases(trl_turns)},
        "next_bottleneck": largest(our_phases),
        "tokens_per_step": TOKENS_PER_STEP,
        "trl_settings": {key: value for key, value in trl.settings.items() if key != "prompt_ids"},
        "threads": arguments.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "liger-kernel")},
        "gate": gate,
    }


def main() -> None:
    """Print the figures."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running, or in /tmp
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            result = asyncio.run(run(arguments, folder))
        finally:
            if arguments.keep:
                ignore = shutil.ignore_patterns("*.safetensors", "valkey")
                shutil.copytree(folder, arguments.keep, dirs_exist_ok=True, ignore=ignore)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
