"""What is served: the engines with their cards, the queue before them, and what an item must be to enter it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from opd.v1 import common_pb2, teacher_service_pb2

from opd_mesh.config.services import TeacherConfig, TeacherServerConfig
from opd_mesh.errors import (
    HeadMismatchError,
    InvalidInputError,
    SignalNotOfferedError,
    TokenizerMismatchError,
    UnavailableError,
    UnknownTeacherError,
)
from opd_mesh.signals import SIGNAL_CODES, SIGNALS_BY_CODE, answer_bytes
from opd_mesh.tensors import DTYPES, dtype_code, dtype_name
from opd_mesh.trajectory import Trajectory
from teacher_server.engine import EngineFacts, ScoreJob, Signal, TeacherEngine
from teacher_server.scoring_queue import Answer, ScoringQueue

WIRE_DTYPES = (common_pb2.D_TYPE_FLOAT32, common_pb2.D_TYPE_BFLOAT16, common_pb2.D_TYPE_FLOAT16)


@dataclass(frozen=True, slots=True)
class ServedTeacher:
    """One teacher of this server."""

    engine: TeacherEngine
    card: teacher_service_pb2.TeacherCard


class Catalogue:
    """Every service of the process speaks of teachers through this. Empty until :meth:`install`."""

    def __init__(self, config: TeacherServerConfig) -> None:
        self.config = config
        self._served: dict[str, ServedTeacher] = {}
        self._queue: ScoringQueue | None = None

    def install(self, engines: Mapping[str, TeacherEngine], queue: ScoringQueue) -> None:
        """Begin to serve ``engines``."""
        self._served = {
            teacher_id: ServedTeacher(engine, _card(teacher_id, engine.facts, self.config))
            for teacher_id, engine in engines.items()
        }
        self._queue = queue

    @property
    def ready(self) -> bool:
        """Whether there is anything yet."""
        return self._queue is not None

    def get(self, teacher_id: str) -> ServedTeacher:
        """Raises :class:`UnavailableError` while loading, and :class:`UnknownTeacherError`."""
        self._installed_queue()
        served = self._served.get(teacher_id)
        if served is None:
            known = ", ".join(sorted(self._served))
            raise UnknownTeacherError(f"no teacher {teacher_id!r} here; served are: {known}", field="teacher_id")
        return served

    def cards(self) -> list[teacher_service_pb2.TeacherCard]:
        """Of all teachers. Raises :class:`UnavailableError` while loading."""
        self._installed_queue()
        return [served.card for served in self._served.values()]

    async def score(self, teacher_id: str, job: ScoreJob) -> Answer:
        """Wait for the answer; see :meth:`ScoringQueue.score`."""
        return await self._installed_queue().score(teacher_id, job)

    def _installed_queue(self) -> ScoringQueue:
        if self._queue is None:
            raise UnavailableError("the teachers are still being loaded", retry_delay_s=2.0)
        return self._queue

    def checked_job(self, item: teacher_service_pb2.ScoreItem) -> tuple[EngineFacts, ScoreJob]:
        """What the engine will be asked.

        Raises:
            InvalidInputError, UnknownTeacherError, TokenizerMismatchError, HeadMismatchError, SignalNotOfferedError:
                naming the field.
        """
        facts = self.get(item.teacher_id).engine.facts
        if not item.item_id:
            raise InvalidInputError("must not be empty", field="item_id")
        _check_identity(item, facts)
        trajectory = Trajectory(
            trajectory_id=item.item_id,
            domain="",
            token_ids=tuple(item.token_ids),
            scored_spans=tuple((span.start, span.end) for span in item.scored_spans),
        )
        limit = self.config.teachers[item.teacher_id].max_tokens_per_item
        trajectory.validate(vocab_size=facts.vocab_size, max_tokens=limit)
        signal = SIGNALS_BY_CODE.get(item.signal)
        if signal is None:
            raise InvalidInputError("name a signal", field="signal")
        if signal not in facts.signals:
            offered = ", ".join(signal.name for signal in facts.signals)
            raise SignalNotOfferedError(
                f"teacher {item.teacher_id!r} offers {offered}, not {signal.name}. {facts.note}".strip(), field="signal"
            )
        if item.dtype not in (0, *WIRE_DTYPES):
            raise InvalidInputError("must be float32, bfloat16 or float16", field="dtype")
        candidates = self._checked_candidates(item, signal, trajectory.num_scored, facts)
        job = ScoreJob(
            token_ids=trajectory.token_ids,
            predicting_positions=tuple(trajectory.predicting_positions),
            signal=signal,
            dtype=dtype_name(item.dtype) if item.dtype else signal.own_dtype(facts.dtype),
            top_k=item.top_k,
            candidate_ids=candidates,
        )
        return facts, job

    def _checked_candidates(
        self, item: teacher_service_pb2.ScoreItem, signal: Signal, rows: int, facts: EngineFacts
    ) -> np.ndarray | None:
        """[R, k] int64, or None: the teacher's own choice."""
        if signal is not Signal.TOP_K_LOGPROBS:
            if item.top_k or item.candidate_token_ids:
                raise InvalidInputError(f"goes with TOP_K_LOGPROBS alone, {signal.name} was asked for", field="top_k")
            return None
        largest = min(self.config.max_top_k, facts.vocab_size)
        if not 1 <= item.top_k <= largest:
            raise InvalidInputError(
                f"must be from 1 to {largest} (max_top_k of the card), got {item.top_k}", field="top_k"
            )
        count = len(item.candidate_token_ids)
        if not count:
            return None
        if count != rows * item.top_k:
            raise InvalidInputError(
                f"{count} ids, expected {rows} scored tokens × top_k {item.top_k}", field="candidate_token_ids"
            )
        ids = np.fromiter(item.candidate_token_ids, np.int64, count)
        bad = np.flatnonzero((ids < 0) | (ids >= facts.vocab_size))
        if len(bad):
            raise InvalidInputError(
                f"id {ids[bad[0]]} at index {bad[0]} is outside the vocabulary of {facts.vocab_size}",
                field="candidate_token_ids",
            )
        return ids.reshape(rows, item.top_k)


def _check_identity(item: teacher_service_pb2.ScoreItem, facts: EngineFacts) -> None:
    if not item.tokenizer_fingerprint:
        raise InvalidInputError(
            "required: SHA-256 over the sorted (token, id) pairs of the tokenizer that made token_ids",
            field="tokenizer_fingerprint",
        )
    if item.tokenizer_fingerprint != facts.tokenizer_fingerprint:
        raise TokenizerMismatchError(
            f"the ids come from tokenizer {item.tokenizer_fingerprint[:16]}…, but teacher {item.teacher_id!r} "
            f"has {facts.tokenizer_fingerprint[:16]}…; GetTeacher with include_vocabulary shows the difference",
            metadata={"teacher_id": item.teacher_id, "teacher_fingerprint": facts.tokenizer_fingerprint},
        )
    for name, expected, served in (
        ("teacher", item.expected_teacher_digest, facts.teacher_digest),
        ("head", item.expected_head_digest, facts.head.digest if facts.head is not None else ""),
    ):
        if expected and expected != served:
            raise HeadMismatchError(
                f"{name} digest {served[:16]}… is served, {expected[:16]}… was expected",
                field=f"expected_{name}_digest",
            )


def bytes_of(facts: EngineFacts, job: ScoreJob) -> int:
    """Of all tensors of an answer."""
    return answer_bytes(
        job.signal,
        len(job.predicting_positions),
        itemsize=DTYPES[dtype_code(job.dtype)].itemsize,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        top_k=job.top_k,
    )


def _card(teacher_id: str, facts: EngineFacts, server: TeacherServerConfig) -> teacher_service_pb2.TeacherCard:
    config: TeacherConfig = server.teachers[teacher_id]
    roles = facts.tokenizer_roles
    return teacher_service_pb2.TeacherCard(
        teacher_id=teacher_id,
        domains=config.domains,
        model_type=facts.model_type,
        vocab_size=facts.vocab_size,
        hidden_size=facts.hidden_size,
        dtype=dtype_code(facts.dtype),
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        teacher_digest=facts.teacher_digest,
        head=_head_form(facts),
        signals=[SIGNAL_CODES[signal] for signal in facts.signals],
        note=facts.note,
        limits=teacher_service_pb2.TeacherLimits(
            max_tokens_per_item=config.max_tokens_per_item,
            max_items_in_flight=server.max_items_in_flight,
            max_top_k=server.max_top_k,
        ),
        head_error=0.0 if math.isnan(facts.head_error) else facts.head_error,
        batch_layout=facts.batch_layout,
        tokenizer_roles=teacher_service_pb2.TokenizerRoles(
            bos_token_id=roles.bos_token_id,
            eos_token_id=roles.eos_token_id,
            pad_token_id=roles.pad_token_id,
            chat_template_digest=roles.chat_template_sha256 or "",
        ),
        engine=config.engine,
    )


def _head_form(facts: EngineFacts) -> teacher_service_pb2.HeadForm | None:
    head = facts.head
    if head is None:
        return None
    return teacher_service_pb2.HeadForm(
        digest=head.digest,
        padded_vocab_size=head.rows,
        vocab_size=facts.vocab_size,
        hidden_size=head.width,
        dtype=dtype_code(head.dtype),
        has_bias=head.has_bias,
        logit_scale=head.logit_scale,
        soft_cap=head.soft_cap,
        final_norm_applied=True,
    )
