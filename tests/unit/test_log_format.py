"""The token log's records, and recovery from bytes alone."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_mesh.errors import CorruptLogError, InternalError
from opd_mesh.trajectory import FinishReason
from rollout_server.log_format import (
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    SNAPSHOT_BYTES,
    TOKEN_DTYPE,
    End,
    Kind,
    LoggedToken,
    Segment,
    encode_delivered,
    encode_ended,
    encode_forgotten,
    encode_header,
    encode_manifest,
    encode_masked_tokens,
    encode_record,
    encode_request,
    encode_tokens,
    find_record,
    header_log_id,
    join_masked_tokens,
    parse_segment_name,
    read_record,
    segment_name,
    segment_seed,
    unpack_ids,
)
from rollout_server.log_recovery import Recovery, Replay, recover

LOG_ID = bytes(range(16))
Records = list[tuple[int, bytes]]


def segment(records: Records, epoch: int = 1, number: int = 0, manifest: tuple[Segment, ...] = ()) -> bytes:
    """A segment's bytes."""
    seed = segment_seed(LOG_ID, epoch, number)
    data = encode_header(LOG_ID, epoch, number)
    for kind, payload in [(Kind.MANIFEST, encode_manifest(manifest)), *records]:
        data += encode_record(seed, len(data), kind, payload)
    return data


def token(handle: int, index: int, finish: FinishReason | None = None) -> LoggedToken:
    return LoggedToken(handle, index, 100 * handle + index, -0.5 * index, -0.25 * index, 7 + index, finish)


def kept(handle: int, index: int, *ids: int) -> LoggedToken:
    return replace(token(handle, index), kept=ids)


def recovered(*records: tuple[int, bytes]) -> Recovery:
    return recover(LOG_ID, {segment_name(1, 0): segment(list(records))})


BEGUN = (Kind.REQUEST, encode_request(0, 9, b"prompt"))


# Any float32: packed and read as bits, because two NaN are never equal.
float_bits = st.integers(0, 2**32 - 1)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(-(2**31), 2**31 - 1),
    st.floats(width=32),
    st.floats(width=32),
    st.integers(0, 2**64 - 1),
    st.sampled_from([None, FinishReason.STOP, FinishReason.LENGTH]),
)
def test_a_token_comes_back_to_the_bit(
    lineage: int, token_id: int, sampling: float, policy: float, version: int, finish: FinishReason | None
) -> None:
    logged = LoggedToken(0, 0, token_id, sampling, policy, version, finish)
    recovery = recovered((Kind.REQUEST, encode_request(0, lineage, b"p")), (Kind.TOKENS, encode_tokens([logged])))
    request = recovery.replay.requests[0].recovered(0)
    assert (request.lineage, request.tokens, request.policy_versions) == (lineage, [token_id], [version])
    assert struct.pack("<f", request.sampling_logprobs[0]) == struct.pack("<f", sampling)
    assert struct.pack("<f", request.policy_logprobs[0]) == struct.pack("<f", policy)
    assert request.finish_reason == finish


@given(
    st.lists(float_bits, max_size=20),
    st.binary(max_size=50),
    st.text(max_size=9),
    st.text(max_size=9),
    st.booleans(),
    st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5), min_size=23, max_size=23) | st.none(),
)
def test_a_snapshot_keeps_every_id_and_the_bits_of_every_float(
    bits: list[int], payload: bytes, reason: str, message: str, delivered: bool, ids: list[list[int]] | None
) -> None:
    replay = Replay()
    replay.apply(Kind.REQUEST, encode_request(3, 2**64 - 1, payload))
    for index, word in enumerate(bits):
        entry = struct.pack("<IIiIIQB", 3, index, index, word, word ^ 1, 2**64 - 1, 0)
        if ids is None:
            replay.apply(Kind.TOKENS, entry)
        else:
            packed = struct.pack(f"<{len(ids[index])}i", *ids[index])
            replay.apply(Kind.MASKED_TOKENS, join_masked_tokens(entry, [packed]))
    replay.apply(Kind.ENDED, encode_ended(3, End.FAILED, reason, message))
    if delivered:
        replay.apply(Kind.DELIVERED, encode_delivered(3, "17-0"))
    again = Replay()
    for kind, record in replay.requests[3].records(3):
        again.apply(kind, record)
    assert again.requests == replay.requests
    found = [unpack_ids(packed) for packed in again.requests[3].recovered(3).kept]
    assert found == [tuple(one) for one in (ids or [])[: len(bits)]]
    whole = sum(RECORD_HEADER_BYTES + len(record) for _, record in replay.requests[3].records(3))
    assert replay.requests[3].snapshot_bytes == whole
    assert again.next_handle == replay.next_handle == 4
    assert again.requests[3].recovered(3).error == (reason, message)
    assert again.requests[3].recovered(3).stream_entry_id == ("17-0" if delivered else "")


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**40), st.sampled_from(list(Kind)), st.binary(max_size=100))
def test_a_record_is_valid_only_where_it_was_written(seed: int, offset: int, kind: Kind, payload: bytes) -> None:
    data = encode_record(seed, 0, kind, payload)
    assert read_record(data, 0, len(data), seed) == (kind, payload)
    assert read_record(data, 0, len(data) - 1, seed) is None
    assert read_record(data, 0, len(data), seed ^ 1) is None
    assert read_record(b"x" + data, 1, len(data) + 1, seed) is None


def test_a_token_is_29_bytes_and_numpy_reads_what_struct_wrote() -> None:
    assert len(encode_tokens([token(1, 2)])) == TOKEN_DTYPE.itemsize == 29
    assert (SEGMENT_HEADER_BYTES, RECORD_HEADER_BYTES) == (48, 14)


@pytest.mark.parametrize(
    "wrong",
    [
        LoggedToken(0, 0, 2**31, 0.0, 0.0, 0, None),
        LoggedToken(0, 0, 1, 1e300, 0.0, 0, None),
        LoggedToken(0, 0, 1, 0.0, 0.0, -1, None),
        LoggedToken(0, 0, 1, 0.0, 0.0, 1, FinishReason.CANCELLED),
    ],
)
def test_what_does_not_fit_is_refused(wrong: LoggedToken) -> None:
    with pytest.raises(InternalError, match="does not fit"):
        encode_tokens([wrong])
    with pytest.raises(InternalError, match="does not fit"):
        encode_request(0, -1, b"")
    with pytest.raises(InternalError, match="do not fit"):
        encode_masked_tokens([kept(0, 0, 2**31)])


def test_names() -> None:
    assert parse_segment_name(segment_name(10, 2**64 - 1)) == (10, 2**64 - 1)
    for name in ("RESERVE", segment_name(1, 0) + ".tmp", "1-0.wal", segment_name(1, 0).upper()):
        assert parse_segment_name(name) is None
    assert header_log_id(segment([])) == LOG_ID
    assert header_log_id(segment([])[:40]) is None
    assert header_log_id(b"x" * 48) is None


def test_all_kinds_of_ends() -> None:
    records: Records = [(Kind.REQUEST, encode_request(handle, 9, b"%d" % handle)) for handle in range(6)]
    records += [
        (Kind.TOKENS, encode_tokens([token(0, 0), token(1, 0, FinishReason.STOP), token(2, 0, FinishReason.LENGTH)])),
        (Kind.ENDED, encode_ended(3, End.CANCELLED)),
        (Kind.ENDED, encode_ended(4, End.FAILED, "INTERNAL", "bröken")),
        (Kind.ENDED, encode_ended(1, End.CANCELLED)),  # the first end counts
        (Kind.TOKENS, encode_tokens([token(3, 0), token(3, 1, FinishReason.STOP)])),  # the step that was under way
        (Kind.DELIVERED, encode_delivered(2, "5-1")),
        (Kind.FORGOTTEN, encode_forgotten(5)),
        (Kind.CLOSED, b""),
    ]
    recovery = recovered(*records)
    found = [request.recovered(handle) for handle, request in recovery.replay.requests.items()]
    assert [request.payload for request in found] == [b"0", b"1", b"2", b"3", b"4"]
    assert [request.finish_reason for request in found] == [None, "stop", "length", "cancelled", None]
    assert [request.error for request in found] == [None, None, None, None, ("INTERNAL", "bröken")]
    assert [request.delivered for request in found] == [False, False, True, False, False]
    assert (recovery.clean, recovery.torn, recovery.replay.next_handle) == (True, None, 6)
    again = Replay()
    for handle, request in recovery.replay.requests.items():
        for kind, payload in request.records(handle):
            again.apply(kind, payload)
    assert again.requests == recovery.replay.requests


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ([(Kind.TOKENS, encode_tokens([token(0, 1)]))], "token 1 follows 0"),
        ([(Kind.TOKENS, encode_tokens([token(0, 0), token(0, 0)]))], "token 0 follows 1"),
        ([(Kind.TOKENS, encode_tokens([token(0, 0, FinishReason.STOP), token(0, 1)]))], "follows the last"),
        ([(Kind.TOKENS, encode_tokens([token(1, 0)]))], "of no request"),
        ([(Kind.TOKENS, encode_tokens([token(0, 0)])[:-1] + b"\3")], "unknown finish"),
        ([(Kind.TOKENS, b"x" * 30)], "broken size"),
        ([BEGUN], "begins again"),
        ([(Kind.ENDED, encode_ended(0, End.STOP))], "unknown end"),
        ([(Kind.ENDED, encode_ended(1, End.CANCELLED))], "of no request"),
        ([(Kind.DELIVERED, encode_delivered(1, "x"))], "of no request"),
        ([(Kind.FORGOTTEN, encode_forgotten(1))], "of no request"),
        ([(Kind.FORGOTTEN, b"")], "cannot be"),
        ([(Kind.SNAPSHOT, b"x" * 40)], "broken size"),
        ([(Kind.MASKED_TOKENS, encode_masked_tokens([kept(1, 0, 5)]))], "of no request"),
        ([(Kind.MASKED_TOKENS, encode_masked_tokens([kept(0, 1, 5)]))], "token 1 follows 0"),
        ([(Kind.MASKED_TOKENS, encode_masked_tokens([kept(0, 0, 5)])[:-1])], "broken size"),
        ([(Kind.MASKED_TOKENS, encode_masked_tokens([kept(0, 0, 5)]) + b"x")], "broken size"),
        ([(Kind.MASKED_TOKENS, struct.pack("<I", 2**32 - 1))], "broken size"),
        ([(Kind.MASKED_TOKENS, encode_masked_tokens([kept(0, 0)])[:-4] + b"\xff" * 4)], "broken size"),
        ([(Kind.MASKED_TOKENS, b"\0\0\0")], "cannot be"),
        (
            [
                (Kind.TOKENS, encode_tokens([token(0, 0)])),
                (Kind.MASKED_TOKENS, encode_masked_tokens([kept(0, 1, 5)])),
            ],
            "token 1 comes with the ids",
        ),
        ([(Kind.MASKED_TOKENS, encode_masked_tokens([kept(0, 0, 5), token(0, 1)]))], "token 1 comes without the ids"),
        ([(Kind.CLOSED, b""), (Kind.FORGOTTEN, encode_forgotten(0))], "follows CLOSED"),
        ([(Kind.MANIFEST, b"")], "unknown record type 1"),
        ([(42, b"")], "unknown record type 42"),
    ],
)
def test_a_whole_record_that_cannot_be_is_corruption(records: Records, what: str) -> None:
    with pytest.raises(CorruptLogError, match=what) as caught:
        recovered(BEGUN, *records)
    assert caught.value.metadata["file"] == segment_name(1, 0)
    offset = int(caught.value.metadata["offset"])
    assert offset > len(segment([]))
    assert f"at byte {offset}" in str(caught.value)


def test_only_the_newest_segment_may_be_torn() -> None:
    first = segment([BEGUN])
    listed = Segment(1, 0, len(first))
    second = segment([(Kind.TOKENS, encode_tokens([token(0, 0)]))], number=1, manifest=(listed,))
    names = segment_name(1, 0), segment_name(1, 1)
    torn = recover(LOG_ID, {names[0]: first, names[1]: second[:-1]})
    whole = second[: -RECORD_HEADER_BYTES - 29]
    assert torn.torn == (Segment(1, 1, len(whole)), len(second) - len(whole) - 1)
    assert len(torn.replay.requests[0].tokens) == 0
    with pytest.raises(CorruptLogError, match="shorter than"):
        recover(LOG_ID, {names[0]: first[:-1], names[1]: second})
    with pytest.raises(CorruptLogError, match="missing"):
        recover(LOG_ID, {names[1]: second})
    late = recover(LOG_ID, {names[0]: first + b"of an owner that does not know", names[1]: second})
    assert len(late.replay.requests[0].tokens) == 29
    short = Segment(1, 0, len(first) - 1)
    with pytest.raises(CorruptLogError, match="a record is damaged"):  # the accepted length is inside a record
        recover(LOG_ID, {names[0]: first, names[1]: segment([], number=1, manifest=(short,))})


def test_a_step_is_one_record_though_only_some_of_it_has_kept_ids() -> None:
    step = encode_masked_tokens([kept(0, 0, 3, 5), token(1, 0)])
    requests = recovered(BEGUN, (Kind.REQUEST, encode_request(1, 9, b"q")), (Kind.MASKED_TOKENS, step)).replay.requests
    found = [requests[handle].recovered(handle) for handle in (0, 1)]
    assert [(request.tokens, [*map(unpack_ids, request.kept)]) for request in found] == [([0], [(3, 5)]), ([100], [])]
    assert requests[1].snapshot_bytes == token(1, 0).snapshot_bytes + SNAPSHOT_BYTES + 1
    assert requests[0].snapshot_bytes == kept(0, 0, 3, 5).snapshot_bytes + SNAPSHOT_BYTES + len(requests[0].payload)


def test_a_hole_in_the_newest_step_is_a_torn_end_however_large_its_masks_are() -> None:
    """As a power cut leaves it: a block of the last write that never reached the disk."""
    step = encode_masked_tokens([kept(0, 0, *range(4000))])
    data = bytearray(segment([BEGUN, (Kind.MASKED_TOKENS, step)]))
    data[-8192:-4096] = bytes(4096)
    recovery = recover(LOG_ID, {segment_name(1, 0): bytes(data)})
    assert recovery.torn is not None
    assert recovery.replay.requests[0].tokens == b""


def test_foreign_and_newer_segments_are_refused() -> None:
    name = segment_name(1, 0)
    for data, what in [
        (segment([]).replace(b"OPDWAL", b"OPDWAX"), "damaged"),
        (segment([], number=1), "renamed"),
        (b"", "damaged"),
        (segment([])[:50], "manifest"),
        (segment([], manifest=(Segment(1, 0, 0),)), "out of order"),
    ]:
        with pytest.raises(CorruptLogError, match=what):
            recover(LOG_ID, {name: data})
    with pytest.raises(CorruptLogError, match="belongs to log"):
        recover(bytes(16), {name: segment([])})


def test_an_empty_folder_is_an_empty_log() -> None:
    recovery = recover(LOG_ID, {"notes.txt": b"not ours"})
    assert (recovery.newest_epoch, recovery.clean, recovery.segments) == (0, True, [])


def test_a_record_inside_a_requests_payload_is_no_record() -> None:
    # A client that sends what looks like a record, in a request whose own record is torn.
    inner = encode_record(0, 0, Kind.CLOSED, b"") * 50
    data = segment([(Kind.REQUEST, encode_request(0, 0, inner))])
    assert recover(LOG_ID, {segment_name(1, 0): data[:-1]}).torn is not None


def test_the_search_after_damage_is_quick_in_large_segments() -> None:
    seed = segment_seed(LOG_ID, 1, 0)
    noise = random.Random(1).randbytes(8 << 20)
    assert find_record(noise, 0, seed) is None
    # The worst case: every second byte begins a candidate that claims to reach far.
    assert find_record(b"\xa5\x02\x00\x10" * (1 << 19), 0, seed) is None
    valid = encode_record(seed, len(noise), Kind.CLOSED, b"")
    assert find_record(noise + valid, 0, seed) == len(noise)
