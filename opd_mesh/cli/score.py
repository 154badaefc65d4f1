"""``opd score``: trajectories in, a teacher's marks out, one file each.

The way of a line: parsed and checked here against the teacher's card → one item on the scoring stream → one line of
JSON with the tensors in base64. A ``.jsonl`` output is that file; a ``.safetensors`` output is made of it at the end,
and it lies beside the output as ``NAME.safetensors.partial.jsonl`` until every trajectory has its marks. Both
therefore resume: what is there already is not asked for again.

Letters: R scored tokens of a trajectory, d hidden size, V vocabulary, K ids of a top-k signal.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
from opd.v1 import teacher_service_pb2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from opd_mesh.cli.score_input import CANDIDATES, Item, candidates_of, count_lines, parse_line
from opd_mesh.cli.score_output import SAFETENSORS_DTYPES, AnswerStore, Source
from opd_mesh.clients.teacher import ScoreRequest, TeacherClient
from opd_mesh.config.services import ChannelConfig, ClientTlsConfig
from opd_mesh.errors import (
    ConfigError,
    HeadMismatchError,
    InvalidInputError,
    OpdError,
    OverloadedError,
    PreconditionError,
    SignalNotOfferedError,
    TeacherUnavailableError,
    TokenizerMismatchError,
    TooLongError,
    TrajectoryError,
    UnavailableError,
    UnknownTeacherError,
)
from opd_mesh.signals import SIGNAL_CODES, SignalKind
from opd_mesh.tensors import dtype_name
from opd_mesh.trajectory import Trajectory

SIGNALS = {str(signal): code for signal, code in SIGNAL_CODES.items()}
CONNECT_TIMEOUT_S = 10.0
ITEM_TIMEOUT_S = 300.0
# Of one item, while the server is overloaded or the connection breaks.
MAX_ATTEMPTS = 5
# Between attempts, where nobody says how long.
RETRY_DELAY_S = 1.0
MAX_IN_FLIGHT = 64
# Of a message, for all that is not ids.
ROOM_BYTES = 4096
PROGRESS_AFTER_S = 2.0
LINE_EVERY_S = 10.0


async def score_file(
    trajectories: Path,
    *,
    teacher_id: str,
    addresses: Sequence[str],
    out: Path,
    tokenizer: Path | None,
    fingerprint: str,
    signal: str,
    dtype: str | None,
    top_k: int | None = None,
    channel: ChannelConfig | None = None,
) -> int:
    """Have ``teacher_id`` at ``addresses`` (several: replicas) mark every trajectory of a JSONL file.

    A line is ``opd.v1.Trajectory`` in JSON, of which ``trajectory_id``, ``token_ids`` and ``scored_spans`` (objects
    with ``start`` and ``end``, or pairs) are enough. For ``top_k_logprobs`` it may also hold ``candidate_token_ids``, R
    lists of K ids: then those are asked about, and the teacher's K most probable ones where it holds none.

    Tensors: ``hidden_states`` [R, d]; ``logits`` [R, V]; for ``top_k_logprobs`` ``token_ids`` [R, K] int64 and
    ``logprobs`` [R, K]; for ``token_logprobs`` ``logprobs`` [R]. Log-probabilities are in nats, at temperature 1.

    Args:
        out: ``.safetensors`` (a tensor per trajectory, under its id; two for ``top_k_logprobs``, under ID.token_ids and
            ID.logprobs; metadata: teacher, digests, signal, dtype, top_k), or ``.jsonl`` (a line per trajectory: id,
            shape, base64 of little-endian bytes, and the same facts; for ``top_k_logprobs`` dtype, shape and data of
            each tensor under "tensors"; in order of arrival).
        tokenizer: folder of the tokenizer that made the ids; exactly one of it and ``fingerprint``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None: the teacher's own, for log-probabilities float32.
        top_k: K, for ``top_k_logprobs`` alone.

    Returns:
        0; 1 where some trajectories could not be marked: each is told on stderr, the others are in ``out``.

    Raises:
        ConfigError: options that cannot be, or an output that holds other answers.
        UnavailableError, UnknownTeacherError, SignalNotOfferedError, TokenizerMismatchError, HeadMismatchError,
            PreconditionError: what concerns all trajectories. What was marked before is kept, and the same command
            continues.
    """
    _check_options(trajectories, out, tokenizer, fingerprint, signal, dtype, top_k)
    vocabulary: dict[str, int] | None = None
    if tokenizer is not None:
        vocabulary, fingerprint = await asyncio.to_thread(_read_tokenizer, tokenizer)
    channel = channel or channel_to(None, None, None)
    async with TeacherClient(addresses, channel) as client:
        await client.wait_ready()
        client.require_agreement(teacher_id)
        card = await client.get_teacher(teacher_id)
        await _check_teacher(client, card, fingerprint, vocabulary, signal, top_k)
        own = SignalKind(signal).own_dtype(dtype_name(card.dtype))
        source = Source(teacher_id, card.teacher_digest, card.head.digest, signal, dtype or own, top_k or 0)
        store = AnswerStore(out, source)
        scoring = _Scoring(client, card, source, store, fingerprint)
        await scoring.run(trajectories)
    if out.suffix == ".safetensors":
        await asyncio.to_thread(store.write_safetensors, scoring.wanted, keep=bool(scoring.failed))
    counts = {"marked": scoring.scored, "there already": scoring.skipped, "failed": scoring.failed}
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "marked")
    print(f"{told}: {out}", file=sys.stderr)
    return 1 if scoring.failed else 0


def channel_to(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ChannelConfig:
    """A channel that soon says when nobody answers; TLS where ``ca_file`` is given. Raises :class:`ConfigError`."""
    if (cert_file is None) != (key_file is None) or (cert_file is not None and ca_file is None):
        raise ConfigError("--cert-file and --key-file go together, with --ca-file", field="cert_file")
    tls = ClientTlsConfig(ca_file=ca_file, cert_file=cert_file, key_file=key_file) if ca_file is not None else None
    return ChannelConfig(tls=tls, connect_timeout_s=CONNECT_TIMEOUT_S)


def _check_options(
    trajectories: Path,
    out: Path,
    tokenizer: Path | None,
    fingerprint: str,
    signal: str,
    dtype: str | None,
    top_k: int | None,
) -> None:
    if (tokenizer is None) == (not fingerprint):
        raise ConfigError(
            "give exactly one of --tokenizer (the folder of the tokenizer that made the ids) and --fingerprint (its "
            "SHA-256, as in a teacher's card): ids of another tokenizer would be marked without any sign of it",
            field="tokenizer",
        )
    if signal not in SIGNALS:
        raise ConfigError(f"--signal must be one of {', '.join(SIGNALS)}, got {signal!r}", field="signal")
    if (top_k is None) == (signal == "top_k_logprobs"):
        raise ConfigError(
            f"--top-k goes with --signal top_k_logprobs alone; leave it out for {signal}"
            if top_k is not None
            else "--signal top_k_logprobs needs --top-k K, the number of ids per scored token",
            field="top_k",
        )
    if dtype is not None and dtype not in SAFETENSORS_DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(SAFETENSORS_DTYPES)}, got {dtype!r}", field="dtype")
    if out.suffix not in (".safetensors", ".jsonl"):
        raise ConfigError(f"--out must end in .safetensors or .jsonl, got {out}", field="out")
    if not trajectories.is_file():
        raise ConfigError(f"there is no file {trajectories}", field="trajectories")
    if out.exists() and out.samefile(trajectories):
        raise ConfigError(f"--out is the file of the trajectories itself: {out}", field="out")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}", field="out")


def _read_tokenizer(folder: Path) -> tuple[dict[str, int], str]:
    from opd_mesh.models.tokenizer import load_tokenizer, tokenizer_fingerprint

    try:
        vocabulary = load_tokenizer(folder).get_vocab()
    except ImportError as error:
        raise PreconditionError(
            f"--tokenizer needs the package {error.name}: pip install 'opd-mesh[teacher]', or give --fingerprint"
        ) from error
    return vocabulary, tokenizer_fingerprint(vocabulary)


async def _check_teacher(
    client: TeacherClient,
    card: teacher_service_pb2.TeacherCard,
    fingerprint: str,
    vocabulary: dict[str, int] | None,
    signal: str,
    top_k: int | None,
) -> None:
    if card.tokenizer_fingerprint != fingerprint:
        theirs = f"{card.teacher_id!r} ({card.tokenizer_fingerprint})"
        message = f"the ids come from another tokenizer ({fingerprint}) than that of teacher {theirs}"
        if vocabulary is not None:
            from opd_mesh.models.tokenizer import first_difference

            served = await client.get_vocabulary(card.teacher_id)
            difference = first_difference(vocabulary, served, name_a="--tokenizer", name_b=f"teacher {card.teacher_id}")
            message += f"; {difference}" if difference else ""
        raise TokenizerMismatchError(message)
    if SIGNALS[signal] not in card.signals:
        offered = [name for name, code in SIGNALS.items() if code in card.signals]
        raise SignalNotOfferedError(
            f"teacher {card.teacher_id!r} does not offer {signal}, but {', '.join(offered)}. {card.note}".strip()
        )
    largest = min(card.limits.max_top_k or card.vocab_size, card.vocab_size)
    if top_k is not None and not 1 <= top_k <= largest:
        raise ConfigError(
            f"--top-k must be from 1 to {largest}, what teacher {card.teacher_id!r} allows (max_top_k of its server), "
            f"got {top_k}",
            field="top_k",
        )


class _Scoring:
    """One pass over the input."""

    def __init__(
        self,
        client: TeacherClient,
        card: teacher_service_pb2.TeacherCard,
        source: Source,
        store: AnswerStore,
        fingerprint: str,
    ) -> None:
        self._client = client
        self._card = card
        self._source = source
        self._store = store
        self._fingerprint = fingerprint
        self._lines: dict[str, int] = {}  # trajectory id → where it stood first
        self._console = Console(stderr=True)
        self.wanted: set[str] = set()
        self.scored = self.skipped = self.failed = 0

    @property
    def done(self) -> int:
        """Lines that need nothing more."""
        return self.scored + self.skipped + self.failed

    async def run(self, path: Path) -> None:
        """Raises what concerns all trajectories; the rest is told and counted."""
        total = await asyncio.to_thread(count_lines, path)
        in_flight = self._card.limits.max_items_in_flight * len(self._client.addresses)
        window = asyncio.Semaphore(max(1, min(in_flight, MAX_IN_FLIGHT)))
        async with AsyncExitStack() as stack:
            ticker = asyncio.create_task(self._show_progress(total))
            stack.callback(ticker.cancel)
            try:
                async with asyncio.TaskGroup() as tasks:
                    for item in self._items(path):
                        await window.acquire()
                        task = tasks.create_task(self._score(item))
                        task.add_done_callback(lambda _: window.release())
            except BaseExceptionGroup as group:
                if self._store.digests:
                    print(f"the same command continues from {self._store.path}", file=sys.stderr)
                raise group.exceptions[0] from None

    def _fail(self, place: str, error: OpdError | str) -> None:
        self.failed += 1
        text = " ".join(f"{place}: {error}".split())
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _items(self, path: Path) -> Iterator[Item]:
        """What is still to be marked; bad lines are told."""
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    trajectory, candidates = parse_line(raw)
                    place += f": trajectory {trajectory.trajectory_id!r}"
                    self._check(trajectory, number)
                    item = Item(place, trajectory, self._candidates(trajectory, candidates))
                    known = self._store.digests.get(trajectory.trajectory_id)
                    if known is not None and known != item.digest:
                        what = "tokens or candidates" if self._source.top_k else "tokens"
                        raise TrajectoryError(
                            f"{self._store.path} has an answer to other {what} under this id; give another id or --out",
                            field="trajectory_id",
                        )
                except OpdError as error:
                    self._fail(place, error)
                    continue
                self.wanted.add(trajectory.trajectory_id)
                if known is not None:
                    self.skipped += 1
                else:
                    yield item

    def _check(self, trajectory: Trajectory, number: int) -> None:
        # The server checks the same; here, because a message too large for it would take its neighbours along.
        limits = self._card.limits
        trajectory.validate(vocab_size=self._card.vocab_size, max_tokens=limits.max_tokens_per_item or None)
        first = self._lines.setdefault(trajectory.trajectory_id, number)
        if first != number:
            raise TrajectoryError(f"was on line {first} already", field="trajectory_id")
        if trajectory.trajectory_id == "__metadata__":
            raise TrajectoryError("this name is safetensors' own", field="trajectory_id")

    def _candidates(self, trajectory: Trajectory, value: Any) -> tuple[int, ...]:
        ids = candidates_of(
            value, rows=trajectory.num_scored, top_k=self._source.top_k, vocab_size=self._card.vocab_size
        )
        size = teacher_service_pb2.ScoreItem(token_ids=trajectory.token_ids, candidate_token_ids=ids).ByteSize()
        allowed = self._client.config.max_message_bytes - ROOM_BYTES
        if size > allowed:
            raise TooLongError(
                f"{size} bytes of ids, but {allowed} fit a message; give a smaller --top-k, or the scored tokens on "
                "several lines",
                field=CANDIDATES,
            )
        return ids

    async def _score(self, item: Item) -> None:
        try:
            tensors = await self._ask(item)
        except (UnavailableError, UnknownTeacherError, PreconditionError):
            raise  # as for this item, so for all
        except OpdError as error:
            self._fail(item.place, error)
            return
        await self._store.add(item, tensors)
        self.scored += 1

    async def _ask(self, item: Item) -> dict[str, np.ndarray]:
        trajectory = item.trajectory
        request = ScoreRequest(
            teacher_id=self._source.teacher_id,
            token_ids=trajectory.token_ids,
            scored_spans=trajectory.scored_spans,
            tokenizer_fingerprint=self._fingerprint,
            signal=SIGNALS[self._source.signal],
            dtype=self._source.dtype,
            timeout_s=ITEM_TIMEOUT_S,
            expected_teacher_digest=self._source.teacher_digest,
            expected_head_digest=self._source.head_digest,
            top_k=self._source.top_k,
            candidate_token_ids=item.candidate_token_ids,
        )
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                result = await self._client.score(request)
            except OverloadedError as error:
                if attempt == MAX_ATTEMPTS:
                    raise
                await asyncio.sleep(error.retry_delay_s or RETRY_DELAY_S)
            except UnavailableError as error:
                if attempt == MAX_ATTEMPTS:
                    raise TeacherUnavailableError(str(error)) from error
                # Replicas that are all overloaded say that they serve, so this is no matter of readiness alone.
                await asyncio.sleep(error.retry_delay_s or RETRY_DELAY_S)
                await self._client.wait_ready()
            else:
                if result.teacher_digest != self._source.teacher_digest:
                    raise HeadMismatchError(f"the weights of teacher {result.teacher_id!r} have changed meanwhile")
                for name in self._source.tensors:
                    if name not in result.tensors or len(result.tensors[name]) != trajectory.num_scored:
                        raise InvalidInputError(f"the answer has no {name} for every scored token")
                return result.tensors
        raise AssertionError("unreachable")

    async def _show_progress(self, total: int) -> None:
        """A bar on a terminal, a line now and then elsewhere; nothing for what is quick."""
        await asyncio.sleep(PROGRESS_AFTER_S)
        title = f"teacher {self._source.teacher_id} marks"
        if not self._console.is_terminal:
            started = time.monotonic()
            while True:
                print(
                    f"{title}: {self.done} of {total}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True
                )
                await asyncio.sleep(LINE_EVERY_S)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            bar = progress.add_task(title, total=total)
            while True:
                progress.update(bar, completed=self.done)
                await asyncio.sleep(0.2)
