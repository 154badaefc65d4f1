"""Whole runs that write ahead (max_staleness 1 and 2) against one that does not, with generation on a core of its own.

Real processes: the rollout server is pinned to one core, Valkey, teacher server and trainer to another, one thread
each, in every run. Same recipe, seed and number of steps. The first steps fill the pipeline and warm everything up, and
are left out of the rates.

    python benchmarks/async_run.py                  # one JSON object on stdout, progress on stderr; some ten minutes
    python benchmarks/async_run.py --staleness 1    # one asynchronous run only

``step_rate_vs_sync``: steps per second over those of the synchronous run. ``step_rate_vs_ideal``: over what two sides
that never wait for each other could reach, (R + T) / max(R, T) times the synchronous rate, with R the seconds of a
synchronous step in which the trainer waits for responses, and T the rest. ``heldout_kl_vs_sync``: reverse KL on fixed
held-out responses after the same number of steps. ``heldout_kl_reduction_vs_sync``: by how much the run has lowered it,
which tells two runs apart that have both hardly moved. ``max_staleness_seen``: from the versions of the trained tokens.
Refuses to report where a run fails, a bound is broken, the runs trained on numbers of tokens more than 10% apart, or
the synchronous run lowered the held-out KL by less than 10%: then nothing was learned that could be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import yaml
from servers import say

from opd_mesh.config.base import parse_config
from opd_mesh.config.paths import resolve_paths
from opd_mesh.config.recipe import Recipe
from opd_mesh.supervisor import LocalMesh

RECIPE = Path("recipes/smollm2.yaml")
WARM_UP = 2  # steps that the rates leave out
TOKENS_APART = 0.10
LEARNED = 0.10  # of the held-out KL, that the synchronous run must take away
LR = 1.5e-4  # at the demo's 4e-4 a dozen steps move the student so far that the held-out figure is mostly noise
RUN_TIMEOUT_S = 1800.0


def recipe_of(steps: int, prompts: int, new_tokens: int, max_staleness: int) -> Recipe:
    """The demo's recipe with responses so long, and batches so small, that both sides have as much to do."""
    value = yaml.safe_load(RECIPE.read_text())
    value["run"] |= {"steps": steps, "threads": 1, "name": f"async-{max_staleness}"}
    value["rollout"] |= {"max_new_tokens": new_tokens}
    value["batch"] |= {"prompts_per_step": prompts}
    value["checkpoint"] = {"every_steps": 10 * steps}
    value["evaluation"] = {"prompts_per_domain": 12}
    value["optimizer"] |= {"lr": LR}
    value["max_staleness"] = max_staleness
    return resolve_paths(parse_config(Recipe, value, source=str(RECIPE)))


class PinnedMesh(LocalMesh):
    """Every child on the core that its name says; a child inherits the affinity of who starts it."""

    def __init__(self, recipe: Recipe, run_dir: Path, cores: dict[str, int]) -> None:
        super().__init__(recipe, run_dir)
        self._cores = cores

    def _start(self, name: str, *rest: Any) -> Any:
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._cores.get(name, self._cores["trainer"])})
        try:
            return super()._start(name, *rest)
        finally:
            os.sched_setaffinity(0, mine)


async def run(recipe: Recipe, folder: Path, cores: dict[str, int]) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """(lines of metrics.jsonl, summary.json) of a whole run; exits where it fails."""
    mesh = PinnedMesh(recipe, folder, cores)
    os.sched_setaffinity(0, {cores["trainer"]})  # for Valkey; this process sleeps nearly all the time
    try:
        mesh.start(resume=False)
        await mesh.start_trainer()
        assert mesh.trainer is not None  # just started
        began, said = time.monotonic(), 0
        while (code := mesh.trainer.process.poll()) is None:
            if time.monotonic() - began > RUN_TIMEOUT_S:
                sys.exit(f"{recipe.run.name}: not done in {RUN_TIMEOUT_S:g} s")
            path = folder / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            for line in map(json.loads, lines[said:]):
                seconds = {key: round(value, 1) for key, value in line.items() if key.startswith("seconds/")}
                say(f"{recipe.run.name}: step {line['step']} of {recipe.run.steps}, {seconds}")
            said = len(lines)
            await asyncio.sleep(1.0)
        if code:
            sys.exit(f"{recipe.run.name} ended with code {code}: {mesh.trainer.said_error()}")
    finally:
        await mesh.stop()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    if summary["status"] != "finished" or len(lines) != recipe.run.steps:
        sys.exit(f"{recipe.run.name}: {summary['status']} after {len(lines)} steps")
    return lines, summary


def mean(lines: list[dict[str, float]], key: str) -> float:
    """Of the steps behind the warm-up."""
    values = [line.get(key, 0.0) for line in lines[WARM_UP:]]
    return sum(values) / len(values)


def figures(lines: list[dict[str, float]], summary: dict[str, Any]) -> dict[str, Any]:
    """One run's own."""
    step_s = mean(lines, "seconds/step")
    before, after = (summary[f"heldout_kl_{when}"] for when in ("before", "after"))
    return {
        "step_s": round(step_s, 3),
        "wait_rollout_s": round(mean(lines, "seconds/wait_rollout"), 3),
        "update_s": round(mean(lines, "seconds/update"), 3),
        "score_s": round(mean(lines, "seconds/score"), 3),
        "policy_s": round(mean(lines, "seconds/policy"), 3),
        "rollout_idle_s": round(mean(lines, "rollout_idle_s"), 3),
        "backlog": round(mean(lines, "backlog"), 2),
        "tokens": int(sum(line["tokens"] for line in lines)),
        "staleness_max": int(max(line["staleness"] for line in lines)),
        "staleness_mean": round(mean(lines, "staleness_mean"), 3),
        "heldout_kl_before": round(sum(before.values()) / len(before), 5),
        "heldout_kl": round(sum(after.values()) / len(after), 5),
        "first_steps_s": [round(line["seconds/step"], 2) for line in lines[:WARM_UP]],
    }


def reduction(figures: dict[str, Any]) -> float:
    """Of the held-out KL, nats per token."""
    return float(figures["heldout_kl_before"] - figures["heldout_kl"])


def compare(sync: dict[str, Any], ahead: dict[str, Any]) -> dict[str, Any]:
    """Ratios of an asynchronous run to the synchronous one."""
    waiting_s = sync["wait_rollout_s"]
    training_s = sync["step_s"] - waiting_s
    faster = sync["step_s"] / ahead["step_s"]
    ideal = sync["step_s"] / max(waiting_s, training_s)
    return {
        "step_rate_vs_sync": round(faster, 3),
        "step_rate_vs_ideal": round(faster / ideal, 3),
        "ideal_vs_sync": round(ideal, 3),
        "heldout_kl_vs_sync": round(ahead["heldout_kl"] / sync["heldout_kl"], 4),
        "heldout_kl_reduction_vs_sync": round(reduction(ahead) / reduction(sync), 4),
        "max_staleness_seen": ahead["staleness_max"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Asynchronous runs against a synchronous one.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=6, help="per step")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--staleness", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("needs two cores: one writes, the other trains")
    if arguments.steps <= WARM_UP:
        sys.exit(f"needs more than {WARM_UP} steps")
    pinned = {"rollout": cores[0], "trainer": cores[1]}
    runs: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="opd-async-") as folder:
        for bound in [0, *arguments.staleness]:
            load = os.getloadavg()[0]
            say(f"max_staleness {bound}: load average before it {load:.2f}")
            recipe = recipe_of(arguments.steps, arguments.prompts, arguments.new_tokens, bound)
            done = asyncio.run(run(recipe, Path(folder) / f"staleness-{bound}", pinned))
            runs[bound] = figures(*done) | {"load_before": round(load, 2)}
            os.sched_setaffinity(0, cores)
            say(f"max_staleness {bound}: {runs[bound]}")
            if runs[bound]["staleness_max"] > bound:
                sys.exit(f"a token of version −{runs[bound]['staleness_max']} was trained with max_staleness {bound}")
            if bound == 0 and reduction(runs[0]) < LEARNED * runs[0]["heldout_kl_before"]:
                sys.exit(f"held-out KL from {runs[0]['heldout_kl_before']} to {runs[0]['heldout_kl']}: more --steps")
            if abs(runs[bound]["tokens"] / runs[0]["tokens"] - 1) > TOKENS_APART:
                sys.exit(f"{runs[bound]['tokens']} tokens against {runs[0]['tokens']}: not the same run")
    compared = {bound: compare(runs[0], runs[bound]) for bound in arguments.staleness}
    report = compared[arguments.staleness[0]] | {
        "by_max_staleness": {str(bound): ratios for bound, ratios in compared.items()},
        "runs": {str(bound): found for bound, found in runs.items()},
        "steps": arguments.steps,
        "prompts_per_step": arguments.prompts,
        "max_new_tokens": arguments.new_tokens,
        "cores": pinned,
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
