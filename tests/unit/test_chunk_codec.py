"""Chunks without protobuf's copies: byte for byte protobuf's messages."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from opd.v1 import common_pb2, teacher_service_pb2

from opd_mesh.chunk_codec import RawChunk, decode_response, encode_chunk

Response = teacher_service_pb2.ScoreTrajectoriesResponse
IDS = st.text(max_size=200)
INDICES = st.integers(0, 2**32 - 1)
OFFSETS = st.integers(0, 2**63 - 1)
DATA = st.binary(min_size=0, max_size=400)


@given(IDS, INDICES, OFFSETS, DATA)
def test_it_is_protobufs_message_and_comes_back(item_id: str, index: int, offset: int, data: bytes) -> None:
    chunk = common_pb2.TensorChunk(tensor_index=index, offset=offset, data=data)
    theirs = Response(item_id=item_id, chunk=chunk).SerializeToString()
    ours = encode_chunk(item_id, index, offset, memoryview(data))
    if data:  # protobuf leaves an empty field out; no chunk is empty
        assert ours == theirs
    assert Response.FromString(ours) == Response.FromString(theirs)
    for message in (ours, theirs):
        found = decode_response(message)
        if isinstance(found, RawChunk):
            assert (found.item_id, found.tensor_index, found.offset, bytes(found.data)) == (
                item_id,
                index,
                offset,
                data,
            )
            assert found.size == len(message)
        else:
            assert not data
            assert found == Response.FromString(message)
    if data:
        assert isinstance(decode_response(ours), RawChunk)


@given(
    st.one_of(
        st.builds(lambda n: Response(credits=n), st.integers(0, 99)),
        st.builds(lambda i: Response(item_id=i, header=teacher_service_pb2.ScoreHeader(rows=3)), IDS),
        st.builds(lambda i: Response(item_id=i, status={"code": 3, "message": "x"}), IDS),
    )
)
def test_every_other_message_is_protobufs(message: Response) -> None:
    assert decode_response(message.SerializeToString()) == message


@given(st.binary(max_size=60), st.integers(0, 60), st.integers(0, 255))
def test_rubbish_is_what_protobuf_says_it_is(data: bytes, place: int, value: int) -> None:
    """Cut or changed anywhere: the same message, or the same refusal, as protobuf alone gives."""
    message = bytearray(encode_chunk("i7", 1, 1 << 20, memoryview(data or b"x")))
    if place < len(message):
        message[place] = value
    for raw in (bytes(message), bytes(message[:place])):
        try:
            wanted = Response.FromString(raw)
        except DecodeError:
            with pytest.raises(DecodeError):
                decode_response(raw)
            continue
        found = decode_response(raw)
        if isinstance(found, RawChunk):
            assert wanted.item_id == found.item_id
            assert wanted.chunk.data == bytes(found.data)
            assert (wanted.chunk.tensor_index, wanted.chunk.offset) == (found.tensor_index, found.offset)
        else:
            assert found == wanted
