"""``ScoreTrajectoriesResponse`` with a chunk, on the wire without protobuf's copies.

protobuf copies the bytes of a chunk when the message is made, when it is serialized, when it is parsed and when the
field is read; an answer of 64 MiB spends more time in those copies than in gRPC. What is made here is byte for byte
what protobuf makes, and what is not of that form is left to protobuf, so any other client or server works as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from opd.v1 import teacher_service_pb2

from opd_mesh.tensors import CHUNK_BYTES, byte_view

Response = teacher_service_pb2.ScoreTrajectoriesResponse
# Field number and wire type, of ScoreTrajectoriesResponse and of TensorChunk.
_ITEM_ID, _CHUNK = b"\x0a", b"\x22"
_TENSOR_INDEX, _OFFSET, _DATA = b"\x08", b"\x10", b"\x1a"
_MAX_VARINT_BYTES = 10


@dataclass(frozen=True, slots=True)
class RawChunk:
    """A chunk whose bytes are still in the message.

    Attributes:
        size: of the whole message.
    """

    item_id: str
    tensor_index: int
    offset: int
    data: memoryview
    size: int


def encode_chunk(item_id: str, tensor_index: int, offset: int, data: memoryview) -> bytes:
    """The message, serialized; one copy of ``data``."""
    name = item_id.encode()
    fields = b""
    if tensor_index:
        fields += _TENSOR_INDEX + _varint(tensor_index)
    if offset:
        fields += _OFFSET + _varint(offset)
    fields += _DATA + _varint(len(data))
    head = (_ITEM_ID + _varint(len(name)) + name) if name else b""
    return b"".join((head, _CHUNK, _varint(len(fields) + len(data)), fields, data))


def encoded_chunks(item_id: str, arrays: Iterable[np.ndarray], *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Messages with the bytes of several announced tensors, in order; see :func:`opd_mesh.tensors.chunks_of`."""
    for index, array in enumerate(arrays):
        view = byte_view(array)
        for offset in range(0, len(view), chunk_bytes):
            yield encode_chunk(item_id, index, offset, view[offset : offset + chunk_bytes])


def decode_response(message: bytes) -> RawChunk | Response:
    """A chunk as a view, anything else parsed. Raises protobuf's DecodeError for what is no message."""
    return _chunk(message) or Response.FromString(message)


def _chunk(message: bytes) -> RawChunk | None:
    """None for what protobuf must look at: another payload, another order, unknown fields."""
    try:
        at, item_id = 0, ""
        if message[0:1] == _ITEM_ID:
            length, at = _read_varint(message, 1)
            item_id = message[at : at + length].decode()
            at += length
        if message[at : at + 1] != _CHUNK:
            return None
        length, at = _read_varint(message, at + 1)
        if at + length != len(message):
            return None
        index = offset = 0
        if message[at : at + 1] == _TENSOR_INDEX:
            index, at = _read_varint(message, at + 1)
        if message[at : at + 1] == _OFFSET:
            offset, at = _read_varint(message, at + 1)
        if message[at : at + 1] != _DATA:
            return None
        length, at = _read_varint(message, at + 1)
    except (IndexError, UnicodeDecodeError):
        return None
    if at + length != len(message) or index >= 1 << 32 or offset >= 1 << 63:
        return None
    return RawChunk(item_id, index, offset, memoryview(message)[at:], len(message))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """(value, where the next field begins)."""
    value = 0
    for place in range(_MAX_VARINT_BYTES):
        byte = message[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise IndexError
