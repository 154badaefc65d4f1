"""``opd judge``: answers in, scores with reasons out, a line of JSON each.

The way of a line: read and checked with all others before anything is judged → one item on the judging stream → one
line in the output. What is there already is not asked for again.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from google.protobuf import duration_pb2
from opd.v1 import common_pb2
from opd.v1 import generative_reward_service_pb2 as pb
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from opd_mesh.cli.judge_lines import JudgedLines, Line, Way, read_lines, with_probes
from opd_mesh.cli.judge_servers import frozen_judge
from opd_mesh.cli.judge_summary import summary_of, told
from opd_mesh.clients.reward import RewardClient
from opd_mesh.config.rubrics import Rubric, RubricLibrary, load_rubric
from opd_mesh.config.services import ChannelConfig
from opd_mesh.errors import ConfigError, InvalidInputError, NotFoundError, OpdError, PreconditionError, UnavailableError
from opd_mesh.files import write_durably
from opd_mesh.judging.messages import rubric_to_proto

MAX_IN_FLIGHT = 256
ITEM_TIMEOUT_S = 3600
PROGRESS_AFTER_S = 2.0
LINE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """What the command line says, see its help.

    Attributes:
        address: of a reward model; or None, and then ``model`` is started as one.
        rubric: a YAML file; or a name, in ``rubrics`` where that is given, else on the server.
        temperature: None: 0 for one vote, 1 for several.
        probes: judge also what somebody would make of every answer who wants a better score alone.
    """

    address: str | None
    model: Path | None
    rubric: str
    rubrics: Path | None = None
    samples: int = 1
    temperature: float | None = None
    seed: int = 0
    max_verdict_tokens: int = 512
    max_context_tokens: int = 4096
    device: str = "auto"
    probes: bool = False
    channel: ChannelConfig = field(default_factory=ChannelConfig)

    @property
    def drawn_at(self) -> float:
        """The temperature."""
        return self.temperature if self.temperature is not None else (0.0 if self.samples == 1 else 1.0)


async def judge_file(source: Path, out: Path, options: JudgeOptions, summary_file: Path | None = None) -> int:
    """Judge every line of ``source`` and say how it went.

    Returns:
        0; 1 where some lines have no score, which are told.

    Raises:
        ConfigError: options that cannot be, lines that cannot be judged, or an output that holds other judgements.
        UnavailableError, NotFoundError, PreconditionError: what concerns all lines. What was judged before is kept, and
            the same command continues.
    """
    _check_options(source, out, options)
    rubric = await asyncio.to_thread(_own_rubric, options)
    lines = await asyncio.to_thread(read_lines, source, rubric)
    if options.probes:
        if rubric is None:
            raise ConfigError("--probes imitate verdicts, and need the rubric here: give --rubric FILE", field="rubric")
        lines = with_probes(lines, rubric)
    async with _client(options) as client:
        digest = rubric.digest if rubric is not None else await _digest_on_server(client, options.rubric)
        # A model of our own stays as it is; what a reward model judges with may be in training.
        judge = None if options.model is None else (await client.get_judge()).policy.digest
        store = JudgedLines(out, Way(digest, options.samples, options.drawn_at, options.seed, judge))
        judging = _Judging(client, store, options, rubric)
        await judging.run(lines)
    summary = summary_of(lines, {**store.done, **judging.failed})
    if summary_file is not None:
        await asyncio.to_thread(write_durably, summary_file, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    print(told(summary), file=sys.stderr)
    return 1 if summary["failed"] or summary["failed_probes"] else 0


def _check_options(source: Path, out: Path, options: JudgeOptions) -> None:
    if (options.address is None) == (options.model is None):
        raise ConfigError(
            "give exactly one of --address (of a reward model) and --model (a checkpoint that is to judge)",
            field="model",
        )
    if options.samples > 1 and options.drawn_at == 0:
        raise ConfigError(f"at --temperature 0 all {options.samples} votes are the same", field="temperature")
    if options.model is not None and not options.model.is_dir():
        raise ConfigError(f"--model: there is no folder {options.model}; give that of a checkpoint", field="model")
    if not source.is_file():
        raise ConfigError(f"there is no file {source}", field="input")
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out must end in .jsonl, got {out}", field="out")
    if out.exists() and out.samefile(source):
        raise ConfigError(f"--out is the input itself: {out}", field="out")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}", field="out")


def _own_rubric(options: JudgeOptions) -> Rubric | None:
    """None where the server holds it."""
    path = Path(options.rubric)
    if path.suffix in (".yaml", ".yml"):
        return load_rubric(path)
    if options.rubrics is None:
        if options.model is not None:
            raise ConfigError("--rubric names no file, so say with --rubrics in which folder it is", field="rubric")
        return None
    library = RubricLibrary.of_folder(options.rubrics)
    if (rubric := library.get(options.rubric)) is None:
        raise ConfigError(
            f"no rubric {options.rubric!r} in {options.rubrics}, but {', '.join(library.names) or 'none'}",
            field="rubric",
        )
    return rubric


async def _digest_on_server(client: RewardClient, name: str) -> str:
    held = (await client.get_judge()).rubrics
    found = [one.digest for one in held if name in (one.name, one.name.rpartition("@")[0])]
    if not found:
        known = ", ".join(one.name for one in held) or "none"
        raise NotFoundError(
            f"no rubric {name!r} is held at {client.address}, but {known}; or give a YAML file", field="rubric"
        )
    return found[-1]  # they come in order of their versions


@asynccontextmanager
async def _client(options: JudgeOptions) -> AsyncIterator[RewardClient]:
    async with AsyncExitStack() as stack:
        address = options.address
        if address is None:
            assert options.model is not None  # checked with the options
            folder = stack.enter_context(TemporaryDirectory(prefix="opd-judge-"))
            print(f"starting {options.model} as a judge", file=sys.stderr, flush=True)
            address = await stack.enter_async_context(
                frozen_judge(
                    options.model.absolute(),
                    Path(folder),
                    device=options.device,
                    max_context_tokens=options.max_context_tokens,
                    max_verdict_tokens=options.max_verdict_tokens,
                )
            )
        client = await stack.enter_async_context(RewardClient(address, options.channel))
        await client.wait_ready()
        yield client


class _Judging:
    """One pass over the lines.

    Attributes:
        failed: rows of lines that have no judgement and are not in the output, so that they are tried again.
    """

    def __init__(self, client: RewardClient, store: JudgedLines, options: JudgeOptions, rubric: Rubric | None) -> None:
        self._client = client
        self._store = store
        self._options = options
        self._rubric = rubric_to_proto(rubric) if rubric is not None else None
        self._console = Console(stderr=True)
        self.failed: dict[str, dict[str, Any]] = {}
        self._done = 0

    async def run(self, lines: list[Line]) -> None:
        """Raises what concerns all lines."""
        waiting = [line for line in lines if not self._store.known(line)]
        self._done = len(lines) - len(waiting)
        window = asyncio.Semaphore(MAX_IN_FLIGHT)
        showing = asyncio.create_task(_show(self._console, "judged", lambda: self._done, len(lines)))
        try:
            async with asyncio.TaskGroup() as tasks:
                for line in waiting:
                    await window.acquire()
                    task = tasks.create_task(self._judge(line))
                    task.add_done_callback(lambda _: window.release())
        except BaseExceptionGroup as group:
            if self._store.done:
                print(f"the same command continues from {self._store.path}", file=sys.stderr)
            raise group.exceptions[0] from None
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)

    async def _judge(self, line: Line) -> None:
        try:
            outcome: pb.JudgeResponse | OpdError = await self._client.judge_streamed(
                self._item(line), timeout_s=ITEM_TIMEOUT_S
            )
        except (UnavailableError, NotFoundError, PreconditionError):
            raise  # as for this line, so for all
        except InvalidInputError as error:
            outcome = error  # and it always will be, unless the server is configured otherwise
        except OpdError as error:
            self._tell(line, str(error))
            self.failed[line.key] = {"score": None, "failure": str(error), "votes": []}
            return
        self._store.add(line, outcome)
        self._done += 1
        if failure := self._store.done[line.key]["failure"]:
            self._tell(line, failure)

    def _item(self, line: Line) -> pb.JudgeItem:
        options = self._options
        item = pb.JudgeItem(
            prompt=line.prompt,
            answers=line.answers,
            reference=line.reference,
            samples=options.samples,
            sampling=common_pb2.SamplingParams(seed=options.seed, temperature=options.drawn_at),
            mode=pb.JUDGE_MODE_PAIRWISE if line.pairwise else pb.JUDGE_MODE_POINTWISE,
            timeout=duration_pb2.Duration(seconds=ITEM_TIMEOUT_S),
        )
        if self._rubric is not None:
            item.rubric_inline.CopyFrom(self._rubric)
        else:
            item.rubric_name = options.rubric
        return item

    def _tell(self, line: Line, failure: str) -> None:
        text = " ".join(f"line {line.number} ({line.key!r}): {failure}".split())
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


async def _show(console: Console, title: str, done: Callable[[], int], total: int) -> None:
    """A bar on a terminal, a line now and then elsewhere; nothing for what is quick."""
    await asyncio.sleep(PROGRESS_AFTER_S)
    if not console.is_terminal:
        started = time.monotonic()
        while True:
            print(f"{title}: {done()} of {total}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            await asyncio.sleep(LINE_EVERY_S)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(title, total=total)
        while True:
            progress.update(bar, completed=done())
            await asyncio.sleep(0.2)
