"""The exception tree and its mapping to ``google.rpc.Status``, both ways."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh import errors
from opd_mesh.errors import InternalError, InvalidInputError, OpdError, OverloadedError, error_classes_by_reason
from opd_mesh.rpc.status import (
    _BY_CODE,
    ERROR_DOMAIN,
    GRPC_CODES,
    STATUS_DETAILS_KEY,
    error_of,
    error_of_rpc,
    status_of,
)

CLASSES = sorted(
    (value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, OpdError)),
    key=lambda cls: cls.__name__,
)
RAISED = [cls for cls in CLASSES if cls is not OpdError]


@pytest.mark.parametrize("cls", RAISED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("field", [None, "token_ids"])
def test_an_error_is_the_same_on_the_other_side(cls: type[OpdError], field: str | None) -> None:
    error = cls("too much of it", field=field, retry_delay_s=0.29, metadata={"teacher_id": "a", "target": "b:1"})
    status = status_pb2.Status.FromString(status_of(error).SerializeToString())
    back = error_of(status)
    assert type(back) is cls
    assert (back.message, back.field, back.metadata) == (error.message, field, error.metadata)
    assert back.retry_delay_s == pytest.approx(0.29, abs=1e-9)
    assert str(back) == str(error)
    assert code_pb2.Code.Name(status.code) == cls.code


def test_what_is_absent_stays_absent() -> None:
    back = error_of(status_of(OverloadedError("busy")))
    assert (back.field, back.retry_delay_s, back.metadata) == (None, None, {})


@given(
    message=st.text(min_size=1, max_size=100),
    field=st.none() | st.text(min_size=1, max_size=30),
    delay=st.none() | st.floats(0, 1e6),
    metadata=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3),
)
def test_any_text_survives(message: str, field: str | None, delay: float | None, metadata: dict[str, str]) -> None:
    error = InvalidInputError(message, field=field, retry_delay_s=delay, metadata=metadata)
    back = error_of(status_pb2.Status.FromString(status_of(error).SerializeToString()))
    assert (back.message, back.field, back.metadata) == (message, field, metadata)
    assert (back.retry_delay_s is None) == (delay is None)
    if delay is not None:
        assert back.retry_delay_s == pytest.approx(delay, abs=1e-8, rel=1e-12)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_codes_are_grpc_codes(cls: type[OpdError]) -> None:
    assert GRPC_CODES[cls.code] is getattr(grpc.StatusCode, cls.code)
    assert code_pb2.Code.Value(cls.code) == GRPC_CODES[cls.code].value[0]
    assert cls.code != "OK"


def test_every_class_has_a_reason_of_its_own() -> None:
    # Only the base shares its word, with the class that a caller sees for it.
    reasons = [cls.reason for cls in RAISED]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.isupper() and reason.replace("_", "").isalnum() for reason in reasons)
    assert error_classes_by_reason() == {cls.reason: cls for cls in RAISED}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_class_has_its_parents_code(cls: type[OpdError]) -> None:
    # A caller that catches by code and one that catches by class see the same.
    parent = cls.__mro__[1]
    if parent not in (Exception, OpdError):
        assert cls.code == parent.code


def foreign(code: int, *details: object, message: str = "said by a proxy") -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)  # type: ignore[arg-type]
        status.details.append(packed)
    return status


@pytest.mark.parametrize("name", [name for name in GRPC_CODES if name != "OK"])
def test_a_foreign_status_maps_by_its_code(name: str) -> None:
    error = error_of(foreign(code_pb2.Code.Value(name)))
    assert type(error) is _BY_CODE.get(name, InternalError)
    assert error.message == "said by a proxy"
    if name in _BY_CODE:
        assert error.code == name


@pytest.mark.parametrize(
    "info",
    [
        # Our word in another's domain, and a word of ours from a later release.
        error_details_pb2.ErrorInfo(reason="UNKNOWN_TEACHER", domain="googleapis.com"),
        error_details_pb2.ErrorInfo(reason="INVENTED_LATER", domain=ERROR_DOMAIN),
    ],
)
def test_a_reason_that_is_not_ours_maps_by_code(info: error_details_pb2.ErrorInfo) -> None:
    assert type(error_of(foreign(code_pb2.Code.Value("NOT_FOUND"), info))) is errors.NotFoundError


def test_a_code_from_the_future_is_an_internal_error() -> None:
    error = error_of(foreign(99))
    assert type(error) is InternalError
    assert "said by a proxy" in str(error)


def rpc_error(code: grpc.StatusCode, details: str, *trailing: tuple[str, bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


def test_a_failed_call_names_its_target() -> None:
    error = error_of_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, "failed to connect"), target="10.0.0.7:8500")
    assert type(error) is errors.UnavailableError
    assert str(error) == "10.0.0.7:8500: UNAVAILABLE: failed to connect"
    assert error.metadata == {"target": "10.0.0.7:8500"}


def test_details_in_the_trailers_win() -> None:
    said = status_of(errors.UnknownTeacherError("no teacher 'x'")).SerializeToString()
    error = error_of_rpc(rpc_error(grpc.StatusCode.NOT_FOUND, "no", (STATUS_DETAILS_KEY, said)), target="t:1")
    assert type(error) is errors.UnknownTeacherError


def test_unreadable_details_do_not_hide_the_failure() -> None:
    failed = rpc_error(grpc.StatusCode.NOT_FOUND, "no such thing", (STATUS_DETAILS_KEY, b"\xff\xff\xff"))
    error = error_of_rpc(failed, target="t:1")
    assert type(error) is errors.NotFoundError
    assert "no such thing" in str(error)


def test_a_message_beyond_grpcs_limit_is_too_long_and_not_overload() -> None:
    # gRPC says RESOURCE_EXHAUSTED of both, but sending the same message again later never helps.
    failed = rpc_error(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9000000 vs. 8388608)"
    )
    assert type(error_of_rpc(failed, target="t:1")) is errors.TooLongError
    failed = rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")
    assert type(error_of_rpc(failed, target="t:1")) is OverloadedError


@pytest.mark.parametrize("letter", ["a", "ü", "語", "\n"])
def test_a_status_fits_into_trailers(letter: str) -> None:
    # Trailers are headers: gRPC refuses more than 8 KiB of them, and the error would be lost altogether. The message
    # travels percent-encoded as well.
    status = status_of(InvalidInputError(letter * 100_000, field="x", metadata={"path": letter * 3000}))
    percent_encoded = len(status.message.encode()) * (1 if letter == "a" else 3)
    assert status.ByteSize() + percent_encoded < 7 * 1024
    assert error_of(status).message.startswith(letter * 50)
