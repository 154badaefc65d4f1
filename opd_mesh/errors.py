"""The exception tree of OPD Mesh, and nothing else: no gRPC here.

Every error that a user or a peer can cause is an :class:`OpdError`. The class fixes the gRPC status
(``opd_mesh.rpc.status`` maps it in one place) and ``reason``, a stable upper-snake word that travels in
``google.rpc.ErrorInfo`` so that a client in any language can tell errors apart, and so that our own client raises
the same class on the other side of the wire.
"""

from __future__ import annotations

from typing import ClassVar


class OpdError(Exception):
    """Base of all errors of the mesh.

    Args:
        message: what is wrong and how to mend it.
        field: the offending request or recipe field, for ``BadRequest.field_violations``.
        retry_delay_s: when a retry may succeed, in seconds (``google.rpc.RetryInfo``).
        metadata: further facts as strings (``google.rpc.ErrorInfo.metadata``).
    """

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_delay_s: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_delay_s = retry_delay_s
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


# --- bad input -------------------------------------------------------------------------------------------------
class InvalidInputError(OpdError):
    """The caller sent something that can never work."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_INPUT"


class ConfigError(InvalidInputError):
    """A recipe or a service configuration is wrong."""

    reason = "INVALID_CONFIG"

    def __str__(self) -> str:
        return self.message  # it lists every problem with its own path


class TensorDecodeError(InvalidInputError):
    """Tensor bytes do not fit their header (dtype × shape), or came out of order."""

    reason = "TENSOR_DECODE"


class TrajectoryError(InvalidInputError):
    """A trajectory is malformed: empty response, ids outside the vocabulary, spans outside the ids."""

    reason = "INVALID_TRAJECTORY"


class BeyondLogError(InvalidInputError):
    """A client has seen more of a response than the log has kept: ask again from ``metadata["written"]``, at most."""

    reason = "BEYOND_LOG"


class TooLongError(InvalidInputError):
    """A sequence or a message is longer than the server accepts."""

    reason = "TOO_LONG"


# --- not there -------------------------------------------------------------------------------------------------
class NotFoundError(OpdError):
    """The named thing does not exist here."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class UnknownTeacherError(NotFoundError):
    """No teacher of that id is served here."""

    reason = "UNKNOWN_TEACHER"


class ModelNotFoundError(NotFoundError):
    """A checkpoint path does not exist or holds no model."""

    reason = "MODEL_NOT_FOUND"


class RequestNotFoundError(NotFoundError):
    """No generation request of that id is known here."""

    reason = "UNKNOWN_REQUEST"


# --- the state of things forbids it ----------------------------------------------------------------------------
class RequestConflictError(OpdError):
    """A ``request_id`` or ``trajectory_id`` is used again with other contents."""

    code = "ALREADY_EXISTS"
    reason = "REQUEST_CONFLICT"


class PreconditionError(OpdError):
    """The call is well formed, but the state of the server forbids it."""

    code = "FAILED_PRECONDITION"
    reason = "PRECONDITION"


class TokenizerMismatchError(PreconditionError):
    """Two tokenizers that must be the same are not."""

    reason = "TOKENIZER_MISMATCH"


class HeadMismatchError(PreconditionError):
    """The teacher or head behind an answer is not the one the caller asked for."""

    reason = "HEAD_MISMATCH"


class SignalNotOfferedError(PreconditionError):
    """The teacher does not offer the signal asked for; its card says why."""

    reason = "SIGNAL_NOT_OFFERED"


class VerifierError(PreconditionError):
    """A domain's verifier fails on every answer, so that there are no rewards."""

    reason = "VERIFIER_FAILED"


class StalePolicyError(PreconditionError):
    """A policy older than the one served, of the same lineage."""

    reason = "STALE_POLICY"


class PolicyBaseMismatchError(PreconditionError):
    """A policy came as the difference to another one than is served; send it whole."""

    reason = "POLICY_BASE_MISMATCH"


class CorruptLogError(OpdError):
    """The token log holds damage that is no torn end; names the file and the offset."""

    code = "DATA_LOSS"
    reason = "CORRUPT_LOG"


class CorruptWeightsError(OpdError):
    """Weights are truncated, wrongly hashed, or hold NaN or infinity."""

    code = "DATA_LOSS"
    reason = "CORRUPT_WEIGHTS"


class DivergedError(OpdError):
    """The loss or a gradient is not finite; nothing was applied."""

    code = "ABORTED"
    reason = "DIVERGED"


# --- not now ---------------------------------------------------------------------------------------------------
class OverloadedError(OpdError):
    """More work than the server admits; try again after ``retry_delay_s``."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"


class LogFullError(OverloadedError):
    """The disk of the token log is full: nothing new is begun, what is logged is served."""

    reason = "LOG_FULL"


class DeadlineError(OpdError):
    """The time allowed for a call or an item ran out."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE"


class CancelledByCallerError(OpdError):
    """The caller cancelled the item."""

    code = "CANCELLED"
    reason = "CANCELLED"


class UnavailableError(OpdError):
    """A peer cannot be reached, or is not ready."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class TeacherUnavailableError(UnavailableError):
    """A teacher did not answer within the time allowed."""

    reason = "TEACHER_UNAVAILABLE"


class RolloutUnavailableError(UnavailableError):
    """A rollout server did not answer within the time allowed."""

    reason = "ROLLOUT_UNAVAILABLE"


class JudgeUnavailableError(UnavailableError):
    """The reward model did not answer within the time allowed, or no one policy judged a whole item."""

    reason = "JUDGE_UNAVAILABLE"


class StreamUnavailableError(UnavailableError):
    """The Redis stream cannot be reached."""

    reason = "STREAM_UNAVAILABLE"


class NoPolicyError(UnavailableError):
    """The rollout server holds no policy: it is new, or was restarted. Whoever trains must give it one."""

    reason = "NO_POLICY"


class LogOwnedError(UnavailableError):
    """Another server owns the token log, or has taken it over from this one."""

    reason = "LOG_OWNED"


class AddressInUseError(UnavailableError):
    """The listen address is taken."""

    reason = "ADDRESS_IN_USE"


class UnimplementedError(OpdError):
    """The RPC is part of the protocol, but this server does not serve it."""

    code = "UNIMPLEMENTED"
    reason = "UNIMPLEMENTED"


class InternalError(OpdError):
    """A defect of ours; the server's log has the stack."""


def _below(cls: type[OpdError]) -> list[type[OpdError]]:
    return [leaf for sub in cls.__subclasses__() for leaf in (sub, *_below(sub))]


def error_classes_by_reason() -> dict[str, type[OpdError]]:
    """``reason`` → class, for the client side of the wire. The base itself is not among them: it is never raised."""
    classes: dict[str, type[OpdError]] = {}
    for cls in _below(OpdError):
        classes.setdefault(cls.reason, cls)
    return classes
