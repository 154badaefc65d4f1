"""What a teacher can say of a position, on both sides of the wire.

Letters: R scored tokens, V vocabulary, d hidden size, k ids of a top-k signal.
"""

from __future__ import annotations

from enum import StrEnum

from opd.v1 import teacher_service_pb2


class SignalKind(StrEnum):
    """The names of ``opd.v1.Signal`` without their prefix, in lower case."""

    HIDDEN_STATES = "hidden_states"
    LOGITS = "logits"
    TOP_K_LOGPROBS = "top_k_logprobs"
    TOKEN_LOGPROBS = "token_logprobs"

    @property
    def is_full(self) -> bool:
        """Whether it tells the whole distribution."""
        return self in (SignalKind.HIDDEN_STATES, SignalKind.LOGITS)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of what an answer consists of, the widest dtype first; see ``opd.v1.Signal``."""
        if self.is_full:
            return (str(self),)
        return ("token_ids", "logprobs") if self is SignalKind.TOP_K_LOGPROBS else ("logprobs",)

    def own_dtype(self, teacher_dtype: str) -> str:
        """Of an answer where none is asked for."""
        return teacher_dtype if self.is_full else "float32"


SIGNAL_CODES: dict[SignalKind, teacher_service_pb2.Signal] = {
    SignalKind.HIDDEN_STATES: teacher_service_pb2.SIGNAL_HIDDEN_STATES,
    SignalKind.LOGITS: teacher_service_pb2.SIGNAL_LOGITS,
    SignalKind.TOP_K_LOGPROBS: teacher_service_pb2.SIGNAL_TOP_K_LOGPROBS,
    SignalKind.TOKEN_LOGPROBS: teacher_service_pb2.SIGNAL_TOKEN_LOGPROBS,
}
SIGNALS_BY_CODE = {code: signal for signal, code in SIGNAL_CODES.items()}


def answer_bytes(
    signal: SignalKind, rows: int, *, itemsize: int, hidden_size: int, vocab_size: int, top_k: int = 0
) -> int:
    """Of all tensors of an answer with R rows, in a dtype of ``itemsize`` bytes."""
    match signal:
        case SignalKind.HIDDEN_STATES:
            return rows * hidden_size * itemsize
        case SignalKind.LOGITS:
            return rows * vocab_size * itemsize
        case SignalKind.TOP_K_LOGPROBS:
            return rows * top_k * (8 + itemsize)
        case SignalKind.TOKEN_LOGPROBS:
            return rows * itemsize
