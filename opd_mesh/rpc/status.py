"""The one place where :mod:`opd_mesh.errors` meets gRPC status, in both directions."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from opd_mesh import errors
from opd_mesh.errors import OpdError

ERROR_DOMAIN = "opd.v1"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
# Trailers are headers, and gRPC and proxies refuse more than 8 KiB of them: the error would be lost. The message
# travels twice, percent-encoded (three bytes for one) in `grpc-message` and plainly in the details.
MAX_MESSAGE_BYTES = 1200
MAX_METADATA_BYTES = 1200

# grpc.aio says INTERNAL where the server ended a call while a message was being written to it, and so hides the
# server's own status (grpc/grpc#36066). Asking again meets that status, or a server that is up again.
WRITE_FAILED = "Internal error from Core"

_CLASSES = errors.error_classes_by_reason()
# A status without ErrorInfo comes from gRPC itself or from a proxy.
_BY_CODE: dict[str, type[OpdError]] = {
    "INVALID_ARGUMENT": errors.InvalidInputError,
    "NOT_FOUND": errors.NotFoundError,
    "ALREADY_EXISTS": errors.RequestConflictError,
    "FAILED_PRECONDITION": errors.PreconditionError,
    "RESOURCE_EXHAUSTED": errors.OverloadedError,
    "DEADLINE_EXCEEDED": errors.DeadlineError,
    "CANCELLED": errors.CancelledByCallerError,
    "UNAVAILABLE": errors.UnavailableError,
    "UNIMPLEMENTED": errors.UnimplementedError,
    "DATA_LOSS": errors.CorruptWeightsError,
    "ABORTED": errors.DivergedError,
}


def _cut(text: str, max_bytes: int) -> str:
    raw = text.encode("utf-8", "replace")
    return text if len(raw) <= max_bytes else raw[: max_bytes - 3].decode("utf-8", "ignore") + "…"


def status_of(error: OpdError) -> status_pb2.Status:
    """``google.rpc.Status`` with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    message = _cut(error.message, MAX_MESSAGE_BYTES)
    details: list[any_pb2.Any] = []

    def add(detail: object) -> None:
        packed = any_pb2.Any()
        packed.Pack(detail)  # type: ignore[arg-type]
        details.append(packed)

    room = MAX_METADATA_BYTES // max(1, len(error.metadata))
    metadata = {key: _cut(value, room) for key, value in error.metadata.items()}
    add(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata))
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=_cut(message, MAX_MESSAGE_BYTES // 4)
        )
        add(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_delay_s * 1e9))
        add(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=message, details=details)


def error_of(status: status_pb2.Status) -> OpdError:
    """The inverse of :func:`status_of`: the same class, message, field, delay and metadata."""
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for target in (info, bad_request, retry):
            detail.Unpack(target)  # type: ignore[arg-type]
    known = status.code in code_pb2.Code.values()
    name = code_pb2.Code.Name(status.code) if known else f"code {status.code}"  # type: ignore[arg-type]
    cls = _CLASSES.get(info.reason) if info.domain == ERROR_DOMAIN else None
    cls = cls or _BY_CODE.get(name, errors.InternalError)
    violations = bad_request.field_violations
    delay = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
    return cls(
        status.message or name,
        field=violations[0].field if violations else None,
        retry_delay_s=delay,
        metadata=dict(info.metadata),
    )


def error_of_rpc(error: grpc.aio.AioRpcError, *, target: str) -> OpdError:
    """What a failed call means; ``target`` (address) is put into messages that gRPC itself made."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY:
            try:
                return error_of(status_pb2.Status.FromString(value))  # type: ignore[arg-type]
            except DecodeError:
                break  # not ours to read: the code and the words remain
    name = error.code().name
    cls = _BY_CODE.get(name, errors.InternalError)
    # Who gives a call up himself gets asyncio.CancelledError: CANCELLED is a stream that a stopping server reset.
    if name == "CANCELLED" or (name == "INTERNAL" and error.details() == WRITE_FAILED):
        cls = errors.UnavailableError
    if cls is errors.OverloadedError and "larger than max" in (error.details() or ""):
        cls = errors.TooLongError  # gRPC's own limit on messages: sending it again later never helps
    return cls(f"{target}: {name}: {error.details()}", metadata={"target": target})


GRPC_CODES: dict[str, grpc.StatusCode] = {code.name: code for code in grpc.StatusCode}
