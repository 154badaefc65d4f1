"""The engine interface: what a teacher must be able to do. A further engine costs one more file.

Letters: N tokens of a sequence, R scored tokens, V vocabulary, d hidden size, k ids of a top-k signal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from opd_kernels import LinearHead

from opd_mesh.errors import OpdError
from opd_mesh.models.heads import head_digest
from opd_mesh.models.tokenizer import TokenizerRoles
from opd_mesh.signals import SignalKind as Signal


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One sequence for one teacher, checked already against its limits."""

    token_ids: tuple[int, ...]
    predicting_positions: tuple[int, ...]  # [R] whose output predicts the scored tokens
    signal: Signal
    dtype: str  # of the answer
    top_k: int = 0  # of TOP_K_LOGPROBS
    candidate_ids: np.ndarray | None = None  # [R, k] int64; None: the teacher's own choice

    @property
    def num_tokens(self) -> int:
        """N, what the job costs."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """The form of a head (see ``opd.v1.HeadForm``), without its weights."""

    digest: str
    rows: int  # of the weight, padding included
    width: int
    dtype: str
    has_bias: bool
    logit_scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, head: LinearHead) -> HeadFacts:
        """Hashes the weights, so they must be there."""
        return cls(
            digest=head_digest(head),
            rows=head.weight.shape[0],
            width=head.weight.shape[1],
            dtype=str(head.weight.dtype).removeprefix("torch."),
            has_bias=head.bias is not None,
            logit_scale=head.logit_scale,
            soft_cap=head.soft_cap,
        )


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is known of a teacher after it has been proved once; the service makes the card of it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    dtype: str
    teacher_digest: str
    head: HeadFacts | None  # None: hidden states are not offered
    head_error: float
    signals: tuple[Signal, ...]
    note: str
    batch_layout: str
    tokenizer_fingerprint: str
    tokenizer_roles: TokenizerRoles
    vocabulary: Mapping[str, int]
    most_batch_tokens: int | None = None  # more in one pass would be slower


class WeightSet(Protocol):
    """What comes into memory and leaves it as one. Teachers that share weights share the object, which is its identity.

    Attributes:
        name: for people.
    """

    name: str
    num_bytes: int

    def check(self) -> None:
        """Raise :class:`OpdError` where the files are not what they were when they were proved. A few stats."""
        ...

    def load(self) -> None:
        """Bring it into memory, in the pool's thread. Raises :class:`OpdError` where it cannot be had."""
        ...

    def unload(self) -> None:
        """Give the memory back, in the pool's thread."""
        ...


class TeacherEngine(Protocol):
    """One teacher. Constructing it loads and proves it once; from then on the pool says when its weights are there."""

    @property
    def facts(self) -> EngineFacts:
        """What it proved to be."""
        ...

    @property
    def weight_sets(self) -> tuple[WeightSet, ...]:
        """What must be in memory for :meth:`score`; empty for weights that never leave it."""
        ...

    def score(self, jobs: Sequence[ScoreJob]) -> list[dict[str, np.ndarray] | OpdError]:
        """One answer per job, in order: tensors by name with R rows each, or the error of that job alone.

        Runs in the one thread that computes; the event loop never waits for it.
        """
        ...

    def head_tensors(self) -> list[tuple[str, np.ndarray]]:
        """ "weight" [V, d] and, where there is one, "bias" [V]. Needs no weight set; may be called from any thread."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
