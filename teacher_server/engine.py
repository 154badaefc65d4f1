"""The engine interface: what a teacher must be able to do. A further engine costs one more file.

Letters: N tokens of a sequence, R scored tokens, V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from opd_kernels import LinearHead

from opd_mesh.errors import OpdError
from opd_mesh.models.tokenizer import TokenizerRoles


class Signal(StrEnum):
    """What a teacher can say of a position; the names of ``opd.v1.Signal`` without their prefix."""

    HIDDEN_STATES = "hidden_states"
    LOGITS = "logits"
    TOP_K_LOGPROBS = "top_k_logprobs"
    TOKEN_LOGPROBS = "token_logprobs"


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One sequence for one teacher, checked already against its limits."""

    token_ids: tuple[int, ...]
    predicting_positions: tuple[int, ...]  # [R] whose output predicts the scored tokens
    signal: Signal
    dtype: str  # of the answer

    @property
    def num_tokens(self) -> int:
        """N, what the job costs."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the engine knows of its teacher after loading; the service makes the card of it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    dtype: str
    teacher_digest: str
    head: LinearHead | None  # None: hidden states are not offered
    head_digest: str
    head_error: float
    signals: tuple[Signal, ...]
    note: str
    batch_layout: str
    tokenizer_fingerprint: str
    tokenizer_roles: TokenizerRoles
    vocabulary: Mapping[str, int]


class TeacherEngine(Protocol):
    """Runs in one thread of its own; the event loop never waits for it."""

    facts: EngineFacts

    def score(self, jobs: Sequence[ScoreJob]) -> list[dict[str, np.ndarray] | OpdError]:
        """One answer per job, in order: tensors by name with R rows each, or the error of that job alone."""
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...
