"""The one place where :mod:`opd_mesh.errors` meets gRPC status, in both directions."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from opd_mesh import errors
from opd_mesh.errors import OpdError

ERROR_DOMAIN = "opd.v1"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_CHARS = 2000  # trailers are headers: proxies bound them, commonly at 8 KiB

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


def status_of(error: OpdError) -> status_pb2.Status:
    """``google.rpc.Status`` with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    message = error.message[:MAX_MESSAGE_CHARS]
    details: list[any_pb2.Any] = []

    def add(detail: object) -> None:
        packed = any_pb2.Any()
        packed.Pack(detail)  # type: ignore[arg-type]
        details.append(packed)

    add(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata))
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        add(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_delay_s * 1e9))
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
    name = code_pb2.Code.Name(status.code)
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
            return error_of(status_pb2.Status.FromString(value))  # type: ignore[arg-type]
    name = error.code().name
    cls = _BY_CODE.get(name, errors.InternalError)
    return cls(f"{target}: {name}: {error.details()}", metadata={"target": target})


GRPC_CODES: dict[str, grpc.StatusCode] = {code.name: code for code in grpc.StatusCode}
