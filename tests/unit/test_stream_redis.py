"""The parts of the trajectory stream that need no server."""

from __future__ import annotations

import pytest
from redis import exceptions as redis_errors

from opd_mesh.errors import ConfigError, InvalidInputError, OverloadedError, StreamUnavailableError, TooLongError
from opd_mesh.stream import MAX_PAYLOAD_BYTES, PAGE, TrajectoryStream, _pages
from opd_mesh.stream_redis import GroupMissingError, RedisLink, redacted_url

NOBODY = "redis://127.0.0.1:1/0"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:hunter2@host:6379/1", "redis://:***@host:6379/1"),
        ("rediss://user:hunter2@host/0", "rediss://user:***@host/0"),
        ("redis://user:hunt@er2@host/0", "redis://user:***@host/0"),
        ("redis://host/0?password=hunter2", "redis://host/0"),
        ("redis://user:hun/ter2@host/0", "redis://***"),
        ("redis://user:hun?ter2@host/0", "redis://***"),
        ("unix:///run/valkey.sock?db=0", "unix:///run/valkey.sock"),
        ("hunter2", "<not a URL>"),
        ("http://[hunter2", "<not a URL>"),
    ],
)
def test_a_url_in_a_message_holds_no_password(url: str, shown: str) -> None:
    assert redacted_url(url) == shown


@pytest.mark.parametrize("url", ["http://host/", "host:6379", "", "redis://host:port/0"])
def test_a_wrong_url_is_a_config_error_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="not a Redis URL") as caught:
        TrajectoryStream(url, "run")
    assert caught.value.field == "redis_url"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"run_id": ""}, "run_id"),
        ({"run_id": "r", "group": ""}, "group"),
        ({"run_id": "r", "consumer": ""}, "consumer"),
        ({"run_id": "r", "timeout_s": 0}, "timeout_s"),
        ({"run_id": "r", "lease_s": float("nan")}, "lease_s"),
        ({"run_id": "r", "max_deliveries": 0}, "max_deliveries"),
    ],
)
def test_settings_are_checked_by_name(settings: dict, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        TrajectoryStream(NOBODY, **settings)
    assert caught.value.field == field


async def test_bad_arguments_never_reach_the_server() -> None:
    stream = TrajectoryStream(NOBODY, "run", timeout_s=30)
    with pytest.raises(InvalidInputError, match="trajectory_id"):
        await stream.publish("", b"x")
    with pytest.raises(TooLongError, match="payload"):
        await stream.publish("t", bytes(MAX_PAYLOAD_BYTES + 1))
    with pytest.raises(InvalidInputError, match="max_count"):
        await stream.read(0, 0)
    await stream.close()


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (redis_errors.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), OverloadedError),
        (redis_errors.ResponseError("OOM allow-oom flag is not set on the script"), OverloadedError),
        (redis_errors.ResponseError("NOGROUP No such key 'x' or consumer group 'y'"), GroupMissingError),
        (redis_errors.ResponseError("MISCONF Errors writing to the AOF file"), StreamUnavailableError),
        (redis_errors.ReadOnlyError("You can't write against a read only replica."), StreamUnavailableError),
    ],
)
def test_refusals_have_their_own_errors(refusal: redis_errors.ResponseError, kind: type[Exception]) -> None:
    error = RedisLink(NOBODY, 1.0)._refusal("XADD", refusal)
    assert type(error) is kind
    if isinstance(error, OverloadedError):
        assert error.retry_delay_s
        assert error.retry_delay_s > 0


def test_pages_cover_all_ids_in_order() -> None:
    ids = [str(number) for number in range(2 * PAGE + 3)]
    pages = _pages(ids)
    assert [len(page) for page in pages] == [PAGE, PAGE, 3]
    assert [entry for page in pages for entry in page] == ids
    assert _pages([]) == []
