"""The teachers of a run: connections, cards, and marks with a bounded wait."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
from opd.v1 import teacher_service_pb2

from opd_mesh import telemetry
from opd_mesh.clients.teacher import HeadData, ScoreRequest, TeacherClient
from opd_mesh.config.recipe import Recipe
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
from opd_mesh.tensors import dtype_name
from opd_mesh.trajectory import Trajectory
from student_trainer.batch import Mark, Sample

log = logging.getLogger("student_trainer")
HIDDEN, LOGITS = teacher_service_pb2.SIGNAL_HIDDEN_STATES, teacher_service_pb2.SIGNAL_LOGITS
RETRY_DELAY_S = 0.5


class Teachers:
    """All teachers that the recipe names."""

    def __init__(self, recipe: Recipe, tokenizer_fingerprint: str) -> None:
        self._recipe = recipe
        self._fingerprint = tokenizer_fingerprint
        self._by_addresses: dict[tuple[str, ...], TeacherClient] = {}
        self._clients: dict[str, TeacherClient] = {}
        self.cards: dict[str, teacher_service_pb2.TeacherCard] = {}
        self.signals: dict[str, teacher_service_pb2.Signal] = {}

    async def connect(self) -> None:
        """Wait for every server, read the cards, choose the signals.

        Raises:
            TeacherUnavailableError, UnknownTeacherError, SignalNotOfferedError: naming the teacher.
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
            card = await client.get_teacher(teacher_id)
            self.cards[teacher_id] = card
            self.signals[teacher_id] = self._choose_signal(teacher_id, card)

    def _choose_signal(self, teacher_id: str, card: teacher_service_pb2.TeacherCard) -> teacher_service_pb2.Signal:
        wanted = self._recipe.objective.signal
        order = {"auto": [HIDDEN, LOGITS], "hidden_states": [HIDDEN], "logits": [LOGITS]}[wanted]
        for signal in order:
            if signal in card.signals:
                return signal
        raise SignalNotOfferedError(
            f"teacher {teacher_id!r} does not offer {wanted}. {card.note}".strip(), field="objective.signal"
        )

    @property
    def head_digests(self) -> dict[str, str]:
        """Of the teachers that send hidden states."""
        return {
            teacher_id: self.cards[teacher_id].head.digest
            for teacher_id, signal in self.signals.items()
            if signal == HIDDEN
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

    def weights_for(self, domain: str) -> dict[str, float]:
        """Teacher id → w_i. Raises :class:`ConfigError` for a domain that routes to nobody: no signal is an error."""
        config = self._recipe.domains.get(domain)
        if config is None:
            known = ", ".join(self._recipe.domains)
            raise ConfigError(f"no teacher is routed to domain {domain!r}; the recipe knows {known}", field="domain")
        return config.teachers

    async def mark(self, trajectory: Trajectory, *, with_reference: bool = True) -> Sample:
        """Ask every teacher of the trajectory's domain, and the objective's reference if it has one.

        Raises as :meth:`rows`.
        """
        reference_id = self._recipe.reference_id if with_reference else None
        with telemetry.span("trainer.score", {telemetry.TRAJECTORY: trajectory.trajectory_id}):
            weights = self.weights_for(trajectory.domain)
            asked = list(dict.fromkeys([*weights, *([reference_id] if reference_id is not None else [])]))
            rows = await asyncio.gather(*(self.rows(trajectory, teacher_id) for teacher_id in asked))
        marks = {
            teacher_id: Mark(teacher_id, weights.get(teacher_id, 0.0), said, self.signals[teacher_id] == LOGITS)
            for teacher_id, said in zip(asked, rows, strict=True)
        }
        return Sample(
            trajectory,
            marks=tuple(marks[teacher_id] for teacher_id in weights),
            reference=None if reference_id is None else marks[reference_id],
        )

    async def rows(self, trajectory: Trajectory, teacher_id: str) -> np.ndarray:
        """[R, d] or [R, V] from one teacher, asked again while it is unreachable or overloaded.

        Scoring is pure, so asking again is safe.

        Raises:
            TeacherUnavailableError: silent for ``teacher_timeout_s``, all attempts together.
            OpdError: what the teacher says of this item.
        """
        card = self.cards[teacher_id]
        budget_s = self._recipe.teacher_timeout_s
        wire = self._recipe.objective.wire_dtype
        signal = self.signals[teacher_id]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + budget_s
        last: OpdError | None = None
        while (left := deadline - loop.time()) > 0:
            request = ScoreRequest(
                teacher_id=teacher_id,
                token_ids=trajectory.token_ids,
                scored_spans=trajectory.scored_spans,
                tokenizer_fingerprint=self._fingerprint,
                signal=signal,
                dtype=dtype_name(card.dtype) if wire == "auto" else wire,
                timeout_s=left,
                expected_teacher_digest=card.teacher_digest,
                expected_head_digest=card.head.digest if signal == HIDDEN else "",
            )
            try:
                async with asyncio.timeout(left):
                    result = await self._clients[teacher_id].score(request)
            except TimeoutError:
                break
            except (UnavailableError, OverloadedError, DeadlineError) as error:
                if last is None:
                    log.warning("teacher %s: %s; asking again for up to %.0f s", teacher_id, error, left)
                last = error
                await asyncio.sleep(min(error.retry_delay_s or RETRY_DELAY_S, max(0.0, deadline - loop.time())))
                continue
            (rows,) = result.tensors.values()
            if rows.shape[0] != trajectory.num_scored:
                raise TensorDecodeError(
                    f"teacher {teacher_id!r} answered {rows.shape[0]} rows for {trajectory.num_scored} scored tokens",
                    field="rows",
                )
            return rows
        raise TeacherUnavailableError(
            f"teacher {teacher_id!r} at {self._clients[teacher_id].target} gave no answer for {budget_s:g} s "
            f"(last: {last or 'no answer'}). See whether it is running; then `opd run --resume`",
            metadata={"teacher_id": teacher_id},
        )

    async def close(self) -> None:
        """End the connections."""
        for client in self._by_addresses.values():
            await client.close()
