"""The teachers of a run: connections, cards, and marks with a bounded wait."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np
from opd.v1 import teacher_service_pb2

from opd_mesh import telemetry
from opd_mesh.clients.replica import ReplicaCounts
from opd_mesh.clients.teacher import HeadData, ScoreRequest, TeacherClient
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.training import DivergenceConfig, SampledTokenConfig, TopKConfig
from opd_mesh.errors import (
    ConfigError,
    DeadlineError,
    OpdError,
    OverloadedError,
    SignalNotOfferedError,
    TeacherUnavailableError,
    TensorDecodeError,
    UnavailableError,
)
from opd_mesh.signals import SIGNAL_CODES, SignalKind, answer_bytes
from opd_mesh.tensors import DTYPES, dtype_code, dtype_name
from opd_mesh.trajectory import Trajectory
from student_trainer.batch import Answer, HeldAnswer, Mark, Sample
from student_trainer.mark_buffer import MarkBuffer

log = logging.getLogger("student_trainer")
HIDDEN, LOGITS = SignalKind.HIDDEN_STATES, SignalKind.LOGITS
RETRY_DELAY_S = 0.5


class Teachers:
    """All teachers that the recipe names."""

    def __init__(self, recipe: Recipe, tokenizer_fingerprint: str) -> None:
        self._recipe = recipe
        self._fingerprint = tokenizer_fingerprint
        self._by_addresses: dict[tuple[str, ...], TeacherClient] = {}
        self._clients: dict[str, TeacherClient] = {}
        self.cards: dict[str, teacher_service_pb2.TeacherCard] = {}
        self.signals: dict[str, SignalKind] = {}
        self.full_signals: dict[str, SignalKind | None] = {}
        self._asked_again = 0
        self._asked_tokens: Counter[int] = Counter()  # asked and not answered, by a client's id

    async def connect(self) -> None:
        """Wait for a replica of every teacher, read the cards, choose the signals.

        Raises:
            TeacherUnavailableError, UnknownTeacherError, SignalNotOfferedError: naming the teacher.
            PreconditionError: two replicas have other weights, heads, tokenizers or dtypes.
        """
        for teacher_id, teacher in self._recipe.teachers.items():
            addresses = tuple(teacher.addresses)
            if not addresses:
                raise ConfigError(
                    "has no address: `opd run` fills it in for teachers it serves itself; with `opd serve trainer` "
                    "name the servers",
                    field=f"teachers.{teacher_id}.addresses",
                )
            if addresses not in self._by_addresses:
                self._by_addresses[addresses] = TeacherClient(addresses, self._recipe.teacher_channel.channel)
            client = self._by_addresses[addresses]
            self._clients[teacher_id] = client
            try:
                await client.wait_ready()
            except UnavailableError as error:
                raise TeacherUnavailableError(f"teacher {teacher_id!r}: {error.message}") from error
            client.require_agreement(teacher_id)
            card = await client.get_teacher(teacher_id)
            self.cards[teacher_id] = card
            self.signals[teacher_id] = self._choose_signal(teacher_id, card)
            full = [signal for signal in (HIDDEN, LOGITS) if SIGNAL_CODES[signal] in card.signals]
            chosen = self.signals[teacher_id]
            self.full_signals[teacher_id] = chosen if chosen.is_full else next(iter(full), None)

    def _choose_signal(self, teacher_id: str, card: teacher_service_pb2.TeacherCard) -> SignalKind:
        """The best that the card offers and the objective can use."""
        objective = self._recipe.objective
        if not isinstance(objective, DivergenceConfig):
            return self._reference_signal(teacher_id, card)
        k = self._top_k
        narrow = {
            SignalKind.TOP_K_LOGPROBS: 0 < k <= (card.limits.max_top_k or k),
            SignalKind.TOKEN_LOGPROBS: isinstance(objective, SampledTokenConfig),
        }
        usable = [HIDDEN, LOGITS, *(s for s, fits in narrow.items() if fits and objective.temperature == 1.0)]
        wanted = usable if objective.signal == "auto" else [SignalKind(objective.signal)]
        for signal in wanted:
            if signal in usable and SIGNAL_CODES[signal] in card.signals:
                return signal
        offered = ", ".join(signal for signal, code in SIGNAL_CODES.items() if code in card.signals)
        raise SignalNotOfferedError(
            f"teacher {teacher_id!r} offers {offered} (top k up to {card.limits.max_top_k}); {objective.name} with "
            f"signal: {objective.signal} can use {', '.join(wanted)}. {card.note}".strip(),
            field="objective.signal",
        )

    def _reference_signal(self, teacher_id: str, card: teacher_service_pb2.TeacherCard) -> SignalKind:
        """A policy gradient needs its reference's log-probability of each token, and no more."""
        signal = SignalKind.TOKEN_LOGPROBS
        if SIGNAL_CODES[signal] not in card.signals:
            raise SignalNotOfferedError(
                f"teacher {teacher_id!r} does not offer {signal}, which objective.kl needs. {card.note}".strip(),
                field="objective.kl.reference",
            )
        return signal

    @property
    def head_digests(self) -> dict[str, str]:
        """Of the teachers that send hidden states, for training or for evaluation."""
        if not self._recipe.distils:
            return {}
        return {
            teacher_id: self.cards[teacher_id].head.digest
            for teacher_id, signal in self.signals.items()
            if HIDDEN in (signal, self.full_signals[teacher_id])
        }

    async def get_head(self, teacher_id: str) -> HeadData:
        """The head named on the card."""
        client = self._clients[teacher_id]
        return await client.get_head(
            teacher_id, digest=self.cards[teacher_id].head.digest, timeout_s=self._recipe.teacher_timeout_s
        )

    async def get_vocabulary(self, teacher_id: str) -> dict[str, int]:
        """Token → id."""
        return await self._clients[teacher_id].get_vocabulary(teacher_id)

    @property
    def wire_bytes(self) -> int:
        """Message bytes to and from all teachers since the start."""
        return sum(client.wire.sent + client.wire.received for client in self._by_addresses.values())

    @property
    def retries(self) -> int:
        """Items asked again since the start, of the same teacher server or of another replica."""
        return self._asked_again + sum(client.retries for client in self._by_addresses.values())

    @property
    def replica_counts(self) -> dict[str, ReplicaCounts]:
        """Items, retries and failures since the start, by address."""
        return {address: count for client in self._by_addresses.values() for address, count in client.counts().items()}

    # --- one by one, for the pre-flight ------------------------------------------------------------------------
    def replicas_of(self, teacher_id: str) -> list[str]:
        """Addresses that serve this teacher now."""
        return self._clients[teacher_id].replicas_of(teacher_id)

    def has_one_address(self, teacher_id: str) -> bool:
        """Whether there is nothing to choose, now or later."""
        return self._clients[teacher_id].is_lone

    async def rows_at(self, teacher_id: str, address: str, token_ids: Sequence[int]) -> np.ndarray:
        """What one replica says of all tokens but the first; one attempt. Raises what the replica says."""
        channel = self._recipe.teacher_channel.channel
        timeout_s = channel.item_timeout_s + channel.item_timeout_per_token_s * len(token_ids)
        signal = self.full_signals[teacher_id] or self.signals[teacher_id]
        request = self._request(teacher_id, token_ids, [(1, len(token_ids))], timeout_s, signal)
        result = await self._clients[teacher_id].score_at(address, request)
        return next(array for name, array in result.tensors.items() if name != "token_ids")

    def leave_out(self, teacher_id: str, address: str, error: OpdError) -> None:
        """This replica gets no items until it has passed the probe."""
        self._clients[teacher_id].leave_out(address, error)

    def probe_newcomers(self, probe: Callable[[str, str], Awaitable[None]]) -> None:
        """Ask ``probe`` (teacher id, address) of replicas that join or come back; one that raises gets no items."""
        for client in self._by_addresses.values():

            async def ask(address: str, teacher_id: str, client: TeacherClient = client) -> None:
                if self._clients.get(teacher_id) is client:
                    await probe(teacher_id, address)

            client.probe = ask

    # --- marks -------------------------------------------------------------------------------------------------
    def weights_for(self, domain: str) -> dict[str, float]:
        """Teacher id → w_i. Raises :class:`ConfigError` for a domain that routes to nobody: no signal is an error."""
        config = self._recipe.domains.get(domain)
        if config is None:
            known = ", ".join(self._recipe.domains)
            raise ConfigError(f"no teacher is routed to domain {domain!r}; the recipe knows {known}", field="domain")
        return config.teachers

    def ask(self, trajectory: Trajectory, buffer: MarkBuffer) -> Sample:
        """Ask every teacher of the trajectory's domain, and the objective's reference if it has one.

        Returns at once; the marks come through ``buffer``, and raise as :meth:`tensors` where they are used.
        """
        weights = self.weights_for(trajectory.domain)
        reference_id = self._recipe.reference_id

        def mark(teacher_id: str) -> Mark:
            signal = self.signals[teacher_id]
            size = self._answer_bytes(teacher_id, signal, trajectory.num_scored)
            answer = buffer.ask(size, partial(self.tensors, trajectory, teacher_id, signal))
            return self._mark(teacher_id, weights.get(teacher_id, 0.0), signal, answer)

        asked = list(dict.fromkeys([*weights, *([reference_id] if reference_id is not None else [])]))
        marks = {teacher_id: mark(teacher_id) for teacher_id in asked}
        return Sample(
            trajectory,
            marks=tuple(marks[teacher_id] for teacher_id in weights),
            reference=None if reference_id is None else marks[reference_id],
        )

    def tells_all(self, domain: str) -> bool:
        """Whether every teacher of the domain offers its whole distribution."""
        return all(self.full_signals[teacher_id] is not None for teacher_id in self.weights_for(domain))

    async def mark(self, trajectory: Trajectory) -> Sample:
        """The whole distributions of the domain's teachers, whatever signal trains; for evaluation.

        Raises as :meth:`tensors`.
        """
        weights = self.weights_for(trajectory.domain)
        signals = {teacher_id: self._full(teacher_id) for teacher_id in weights}
        answers = await asyncio.gather(*(self.tensors(trajectory, *asked) for asked in signals.items()))
        return Sample(
            trajectory,
            tuple(
                self._mark(teacher_id, weights[teacher_id], signal, HeldAnswer(answer))
                for (teacher_id, signal), answer in zip(signals.items(), answers, strict=True)
            ),
        )

    def _full(self, teacher_id: str) -> SignalKind:
        signal = self.full_signals[teacher_id]
        if signal is None:
            raise SignalNotOfferedError(f"teacher {teacher_id!r} does not tell its whole distribution")
        return signal

    def _mark(self, teacher_id: str, weight: float, signal: SignalKind, answer: Answer) -> Mark:
        digest = self.cards[teacher_id].head.digest if signal is HIDDEN else None
        return Mark(teacher_id, weight, signal, digest, answer)

    def _answer_bytes(self, teacher_id: str, signal: SignalKind, rows: int) -> int:
        card = self.cards[teacher_id]
        return answer_bytes(
            signal,
            rows,
            itemsize=DTYPES[dtype_code(self._wire_dtype(teacher_id, signal))].itemsize,
            hidden_size=card.hidden_size,
            vocab_size=card.vocab_size,
            top_k=self._top_k,
        )

    def _wire_dtype(self, teacher_id: str, signal: SignalKind) -> str:
        if self.wire_dtype != "auto":
            return self.wire_dtype
        return signal.own_dtype(dtype_name(self.cards[teacher_id].dtype))

    @property
    def wire_dtype(self) -> str:
        """That the recipe asks for; "auto": each teacher's own."""
        objective = self._recipe.objective
        return objective.wire_dtype if isinstance(objective, DivergenceConfig) else "auto"

    @property
    def _top_k(self) -> int:
        return self._recipe.objective.k if isinstance(self._recipe.objective, TopKConfig) else 0

    def _request(
        self,
        teacher_id: str,
        token_ids: Sequence[int],
        spans: Sequence[tuple[int, int]],
        timeout_s: float,
        signal: SignalKind,
    ) -> ScoreRequest:
        card = self.cards[teacher_id]
        return ScoreRequest(
            teacher_id=teacher_id,
            token_ids=token_ids,
            scored_spans=spans,
            tokenizer_fingerprint=self._fingerprint,
            signal=SIGNAL_CODES[signal],
            dtype=self._wire_dtype(teacher_id, signal),
            timeout_s=timeout_s,
            expected_teacher_digest=card.teacher_digest,
            expected_head_digest=card.head.digest if signal is HIDDEN else "",
            top_k=self._top_k if signal is SignalKind.TOP_K_LOGPROBS else 0,
        )

    async def rows(self, trajectory: Trajectory, teacher_id: str) -> np.ndarray:
        """[R, d] hidden states or [R, V] logits, whatever signal trains. Raises as :meth:`tensors`."""
        (rows,) = (await self.tensors(trajectory, teacher_id, self._full(teacher_id))).values()
        return rows

    async def tensors(self, trajectory: Trajectory, teacher_id: str, signal: SignalKind) -> dict[str, np.ndarray]:
        """R rows of each tensor of a signal: of one replica after the other, and again while none can answer.

        Scoring is pure, so asking again is safe.

        Raises:
            TeacherUnavailableError: out of reach for ``teacher_timeout_s``, or silent for so long and the time that all
                we have asked of it may take.
            OpdError: what the teacher says of this item.
        """
        with telemetry.span("trainer.score", {telemetry.TRAJECTORY: trajectory.trajectory_id}):
            return await self._tensors(trajectory, teacher_id, signal)

    async def _tensors(self, trajectory: Trajectory, teacher_id: str, signal: SignalKind) -> dict[str, np.ndarray]:
        client = self._clients[teacher_id]
        tokens = len(trajectory.token_ids)
        self._asked_tokens[id(client)] += tokens
        try:
            return await self._ask_until_answered(client, trajectory, teacher_id, signal)
        finally:
            self._asked_tokens[id(client)] -= tokens

    async def _ask_until_answered(
        self, client: TeacherClient, trajectory: Trajectory, teacher_id: str, signal: SignalKind
    ) -> dict[str, np.ndarray]:
        silence_s = self._recipe.teacher_timeout_s
        # A queue of our own making is no silence: what was asked before this is computed first.
        per_token_s = self._recipe.teacher_channel.channel.item_timeout_per_token_s
        budget_s = silence_s + per_token_s * self._asked_tokens[id(client)]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + budget_s
        last: OpdError | None = None
        unreachable_since: float | None = None
        while (left := deadline - loop.time()) > 0:
            self._asked_again += last is not None
            request = self._request(teacher_id, trajectory.token_ids, trajectory.scored_spans, left, signal)
            try:
                async with asyncio.timeout(left):
                    result = await client.score(request)
            except TimeoutError:
                break
            except (UnavailableError, OverloadedError, DeadlineError) as error:
                if last is None:
                    log.warning("teacher %s: %s; asking again for up to %.0f s", teacher_id, error, silence_s)
                last = error
                if not isinstance(error, UnavailableError):
                    unreachable_since = None
                elif unreachable_since is None:
                    unreachable_since = loop.time()
                if unreachable_since is not None and loop.time() - unreachable_since > silence_s:
                    break
                await asyncio.sleep(min(error.retry_delay_s or RETRY_DELAY_S, max(0.0, deadline - loop.time())))
                continue
            if result.tensors.keys() != set(signal.tensors):
                raise TensorDecodeError(
                    f"teacher {teacher_id!r} answered {', '.join(result.tensors)} for {signal}", field="tensors"
                )
            rows = {len(array) for array in result.tensors.values()}
            if rows != {trajectory.num_scored}:
                raise TensorDecodeError(
                    f"teacher {teacher_id!r} answered {min(rows)} rows for {trajectory.num_scored} scored tokens",
                    field="rows",
                )
            return result.tensors
        waited_s = budget_s if unreachable_since is None else silence_s
        raise TeacherUnavailableError(
            f"teacher {teacher_id!r} at {client.target} gave no answer for {waited_s:g} s "
            f"(last: {client.troubles() or last or 'no answer'}). See whether it is running; then `opd run --resume`",
            metadata={"teacher_id": teacher_id},
        )

    async def close(self) -> None:
        """End the connections."""
        for client in self._by_addresses.values():
            await client.close()
