"""``opd``: run, serve, score, report, doctor. Imports no torch; commands import what they need."""

from __future__ import annotations

import asyncio
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from opd_mesh.errors import ConfigError, OpdError

app = typer.Typer(
    name="opd",
    help="OPD Mesh: multi-teacher on-policy distillation as a mesh of gRPC services.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class ServiceName(StrEnum):
    """What `opd serve` can start."""

    teacher = "teacher"
    rollout = "rollout"
    grm = "grm"
    trainer = "trainer"


MODULES = {
    ServiceName.teacher: "teacher_server",
    ServiceName.rollout: "rollout_server",
    ServiceName.grm: "grm_server",
    ServiceName.trainer: "student_trainer",
}


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; not needed with --resume")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="default: runs/NAME-TIME")] = None,
    resume: Annotated[Path | None, typer.Option(help="continue the run in this folder")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="of a pipeline: say what would run and what is kept")] = False,
) -> None:
    """Run a recipe: a local mesh as child processes, or the servers that the recipe names.

    A recipe with `stages` is a pipeline: what its folder holds already is used again.
    """
    from opd_mesh.cli.run import resume_run, start_run

    if resume is not None:
        if recipe is not None or run_dir is not None:
            raise ConfigError("--resume takes recipe and folder from the run itself; give nothing else")
        sys.exit(resume_run(resume, plan=plan))
    if recipe is None:
        raise ConfigError("give a recipe, or --resume RUN_DIR")
    sys.exit(start_run(recipe, run_dir, plan=plan))


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context, service: ServiceName) -> None:
    """Start one server: opd serve teacher --config F --listen ADDR (more with --help after the name)."""
    import os

    os.execv(sys.executable, [sys.executable, "-m", MODULES[service], *context.args])


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="folder of a run")]) -> None:
    """Write RUN_DIR/report.html from what the run left behind so far."""
    from opd_mesh.report import build_report

    typer.echo(build_report(run_dir))


@app.command()
def doctor() -> None:
    """What this machine can do, what is missing, and how to get it."""
    from opd_mesh.cli.doctor import examine, print_findings

    sys.exit(print_findings(examine()))


@app.command()
def score(
    trajectories: Annotated[
        Path,
        typer.Argument(help="JSONL: trajectory_id, token_ids, scored_spans on every line; may be candidate_token_ids"),
    ],
    teacher: Annotated[str, typer.Option(help="teacher id")],
    address: Annotated[list[str], typer.Option(help="host:port of a teacher server; again for each replica")],
    out: Annotated[Path, typer.Option(help=".safetensors (tensors by trajectory id) or .jsonl; resumes either")],
    tokenizer: Annotated[Path | None, typer.Option(help="folder of the tokenizer that made the ids")] = None,
    fingerprint: Annotated[str, typer.Option(help="its fingerprint, instead of the folder")] = "",
    signal: Annotated[
        str, typer.Option(help="hidden_states, logits, top_k_logprobs or token_logprobs")
    ] = "hidden_states",
    top_k: Annotated[int | None, typer.Option(help="ids per scored token, for top_k_logprobs")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default: the teacher's, float32 for log-probabilities"),
    ] = None,
    ca_file: Annotated[Path | None, typer.Option(help="PEM of the CA that signed the server: use TLS")] = None,
    cert_file: Annotated[Path | None, typer.Option(help="PEM of our own certificate, for mutual TLS")] = None,
    key_file: Annotated[Path | None, typer.Option(help="PEM of its key")] = None,
) -> None:
    """Have a teacher mark trajectories, from the shell.

    Exit code 0: all are marked; 1: some could not be, each told on stderr; 2: none can be.
    """
    from opd_mesh.cli.score import channel_to, score_file

    sys.exit(
        asyncio.run(
            score_file(
                trajectories,
                teacher_id=teacher,
                addresses=address,
                out=out,
                tokenizer=tokenizer,
                fingerprint=fingerprint,
                signal=signal,
                dtype=dtype,
                top_k=top_k,
                channel=channel_to(ca_file, cert_file, key_file),
            )
        )
    )


@app.command()
def judge(
    answers: Annotated[
        Path,
        typer.Argument(help="JSONL: prompt and answer (or answers, a pair) on every line; may be id, reference, gold"),
    ],
    rubric: Annotated[str, typer.Option(help="a YAML file, or a rubric's name")],
    out: Annotated[Path, typer.Option(help=".jsonl with a judgement on every line; resumes")],
    address: Annotated[str | None, typer.Option(help="host:port of a reward model (opd serve grm)")] = None,
    model: Annotated[Path | None, typer.Option(help="or the folder of a checkpoint that is to judge, frozen")] = None,
    rubrics: Annotated[Path | None, typer.Option(help="folder in which the rubric's name is looked up")] = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="votes for each answer; of a pair, in each order")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=100, help="default: 0 for one vote, 1 for several", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="of the votes")] = 0,
    summary: Annotated[Path | None, typer.Option(help="write the summary as JSON, too")] = None,
    probes: Annotated[
        bool, typer.Option(help="judge every answer also lengthened, with a verdict, and with an instruction behind it")
    ] = False,
    max_verdict_tokens: Annotated[int, typer.Option(min=1, help="with --model")] = 512,
    max_context_tokens: Annotated[int, typer.Option(min=2, help="with --model: of prompt and verdict together")] = 4096,
    device: Annotated[str, typer.Option(help="with --model: auto, cpu or cuda")] = "auto",
    ca_file: Annotated[Path | None, typer.Option(help="PEM of the CA that signed the server: use TLS")] = None,
    cert_file: Annotated[Path | None, typer.Option(help="PEM of our own certificate, for mutual TLS")] = None,
    key_file: Annotated[Path | None, typer.Option(help="PEM of its key")] = None,
) -> None:
    """Have answers judged by a rubric, from the shell.

    Exit code 0: all have a score; 1: some have none, each told on stderr; 2: nothing can be judged.
    """
    from opd_mesh.cli.judge import JudgeOptions, judge_file
    from opd_mesh.cli.score import channel_to

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu or cuda, got {device!r}", field="device")
    options = JudgeOptions(
        address=address,
        model=model,
        rubric=rubric,
        rubrics=rubrics,
        samples=samples,
        temperature=temperature,
        seed=seed,
        max_verdict_tokens=max_verdict_tokens,
        max_context_tokens=max_context_tokens,
        device=device,
        probes=probes,
        channel=channel_to(ca_file, cert_file, key_file),
    )
    sys.exit(asyncio.run(judge_file(answers, out, options, summary)))


def main() -> None:
    """Entry point; an :class:`OpdError` is one clear message and exit code 2."""
    try:
        app()
    except OpdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
