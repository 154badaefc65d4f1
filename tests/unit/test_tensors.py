"""The tensor codec: what goes in comes out, and bytes that lie are refused before anything is allocated."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opd.v1 import common_pb2

from opd_mesh.errors import TensorDecodeError
from opd_mesh.tensors import (
    ALIGNMENT,
    CHUNK_BYTES,
    DTYPES,
    MAX_CHUNK_BYTES,
    TensorAssembler,
    check_header,
    chunks_of,
    dtype_code,
    dtype_name,
    header_of,
)
from opd_mesh.torch_tensors import NAMES, TORCH_DTYPES, from_numpy, to_numpy

FLOAT32 = common_pb2.D_TYPE_FLOAT32


def header(*shape: int, dtype: int = FLOAT32, byte_size: int | None = None, name: str = "t") -> common_pb2.TensorHeader:
    """A header; ``byte_size`` defaults to the true one."""
    if byte_size is None:
        byte_size = math.prod(shape) * DTYPES[dtype].itemsize
    return common_pb2.TensorHeader(name=name, dtype=dtype, shape=shape, byte_size=byte_size)  # type: ignore[arg-type]


def chunk(offset: int, size: int, index: int = 0) -> common_pb2.TensorChunk:
    return common_pb2.TensorChunk(tensor_index=index, offset=offset, data=b"\x01" * size)


def assembled(headers: Iterable[common_pb2.TensorHeader], chunks: Iterable[common_pb2.TensorChunk]) -> dict:
    assembler = TensorAssembler(headers)
    for piece in chunks:
        assembler.add(piece)
    return assembler.finish()


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Random bits of any dtype (NaN and infinities included), any shape with few elements, any memory layout."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    count = math.prod(shape)
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    array = np.frombuffer(raw, np.uint8)
    if dtype == np.dtype("?"):
        array = array % 2
    array = array.view(dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


@given(st.lists(arrays(), max_size=4), st.integers(1, 70))
def test_what_goes_in_comes_out(sent: list[np.ndarray], chunk_bytes: int) -> None:
    headers = [header_of(f"t{index}", array) for index, array in enumerate(sent)]
    chunks = list(chunks_of(sent, chunk_bytes=chunk_bytes))
    assert all(1 <= len(piece.data) <= chunk_bytes for piece in chunks)
    # Through the wire's own encoding, both ways.
    headers = [common_pb2.TensorHeader.FromString(each.SerializeToString()) for each in headers]
    received = assembled(headers, (common_pb2.TensorChunk.FromString(each.SerializeToString()) for each in chunks))
    assert list(received) == [f"t{index}" for index in range(len(sent))]
    for before, after in zip(sent, received.values(), strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert after.tobytes() == before.tobytes()  # bits, so that NaN payloads count
        assert after.flags.writeable


@given(st.permutations([0, 0, 1, 1, 2]))
def test_chunks_of_different_tensors_may_interleave(order: list[int]) -> None:
    sent = [np.arange(6, dtype=np.float32), np.arange(6, 12, dtype=np.float32), np.arange(3, dtype=np.float32)]
    queues = {index: list(chunks_of([array], chunk_bytes=12)) for index, array in enumerate(sent)}
    pieces = []
    for index in order:
        piece = queues[index].pop(0)
        piece.tensor_index = index
        pieces.append(piece)
    received = assembled([header_of(f"t{i}", array) for i, array in enumerate(sent)], pieces)
    assert [array.tolist() for array in received.values()] == [array.tolist() for array in sent]


def test_chunks_are_of_the_size_the_protocol_names() -> None:
    pieces = list(chunks_of([np.zeros(CHUNK_BYTES + 5, np.uint8)]))
    assert [len(piece.data) for piece in pieces] == [CHUNK_BYTES, 5]
    assert CHUNK_BYTES <= MAX_CHUNK_BYTES


def test_bytes_are_little_endian_and_row_major() -> None:
    (piece,) = chunks_of([np.array([[1, 2], [3, 4]], np.int32).T])
    assert piece.data == bytes([1, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])
    (piece,) = chunks_of([np.array([1.0], ml_dtypes.bfloat16)])
    assert piece.data == b"\x80\x3f"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (header(3, 4, byte_size=44), "needs 48 bytes, but byte_size says 44"),
        (header(3, 4, byte_size=52), "needs 48 bytes"),
        (header(2, -3, byte_size=-24), "negative dimension"),
        (header(-2, -3, byte_size=24), "negative dimension"),
        (header(*[1] * 9), "9 dimensions"),
        (header(2, dtype=common_pb2.D_TYPE_UNSPECIFIED, byte_size=8), "unknown dtype code 0"),
        (header(2, dtype=77, byte_size=8), "unknown dtype code 77"),
        # 2**64 elements: a product in 64 bits would be 0.
        (header(2**32, 2**32, byte_size=0), "byte_size says 0"),
        (header(2**62, byte_size=2**62), "needs"),
        # No bytes, and yet more than numpy can address.
        (header(0, 2**62), "too large"),
        (header(2**62, 0, 2**62), "too large"),
    ],
)
def test_a_header_that_lies(bad: common_pb2.TensorHeader, message: str) -> None:
    with pytest.raises(TensorDecodeError, match=message) as caught:
        check_header(bad)
    assert caught.value.field == "tensor 't'"
    with pytest.raises(TensorDecodeError, match=message):
        TensorAssembler([header(1, name="good"), bad])


def test_nothing_is_allocated_for_a_header_that_lies() -> None:
    tracemalloc.start()
    try:
        for bad in (header(2**40, byte_size=8), header(2**27, byte_size=2**29 + 4)):
            with pytest.raises(TensorDecodeError):
                TensorAssembler([header(2**22, name="good"), bad])  # 16 MiB that are not taken either
        with pytest.raises(TensorDecodeError, match="at most"):
            TensorAssembler([header(2**22)], max_bytes=2**24 - 1)
        with pytest.raises(TensorDecodeError, match="33554432 bytes in all, at most"):
            TensorAssembler([header(2**22), header(2**22, name="u")], max_bytes=2**24)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_the_bound_itself_is_accepted() -> None:
    TensorAssembler([header(8), header(8, name="u")], max_bytes=64)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([chunk(0, 8), chunk(4, 8)], "chunk at offset 4, expected 8"),  # overlap
        ([chunk(0, 8), chunk(0, 8)], "chunk at offset 0, expected 8"),  # sent twice
        ([chunk(0, 8), chunk(12, 4)], "chunk at offset 12, expected 8"),  # gap
        ([chunk(4, 8)], "chunk at offset 4, expected 0"),
        ([chunk(-4, 8)], "chunk at offset -4, expected 0"),
        ([chunk(0, 20)], "ends at byte 20, beyond the 16"),
        ([chunk(0, 16), chunk(16, 1)], "ends at byte 17, beyond the 16"),
        ([chunk(0, 8), chunk(8, 0)], "empty chunk"),
        ([chunk(0, 15)], "truncated: 15 of 16"),
        ([], "truncated: 0 of 16"),
    ],
)
def test_chunks_that_do_not_fit(chunks: list[common_pb2.TensorChunk], message: str) -> None:
    with pytest.raises(TensorDecodeError, match=message) as caught:
        assembled([header(4)], chunks)
    assert caught.value.field == "tensor 't'"


def test_a_chunk_for_a_tensor_that_is_not_announced() -> None:
    with pytest.raises(TensorDecodeError, match="chunk for tensor 1, but 1 are announced"):
        assembled([header(4)], [chunk(0, 4, index=1)])


def test_two_tensors_of_one_name() -> None:
    with pytest.raises(TensorDecodeError, match="same name"):
        TensorAssembler([header(1, name="w"), header(2, name="w")])


def test_a_refused_chunk_leaves_what_was_there() -> None:
    assembler = TensorAssembler([header(2)])
    assembler.add(common_pb2.TensorChunk(offset=0, data=np.float32(1.5).tobytes()))
    with pytest.raises(TensorDecodeError):
        assembler.add(chunk(0, 4))
    assembler.add(common_pb2.TensorChunk(offset=4, data=np.float32(2.5).tobytes()))
    assert assembler.finish()["t"].tolist() == [1.5, 2.5]
    assert assembler.bytes_received == 8


def test_dtypes_that_have_no_code() -> None:
    for dtype in (np.dtype(">f4"), np.dtype("c8"), np.dtype("u4"), np.dtype("O")):
        with pytest.raises(TensorDecodeError, match="cannot be sent"):
            header_of("t", np.zeros(2, dtype))


@pytest.mark.parametrize("code", DTYPES)
def test_names_and_codes_are_inverse(code: int) -> None:
    assert dtype_code(dtype_name(code)) == code
    assert dtype_name(code) in TORCH_DTYPES


@pytest.mark.parametrize("name", ["unspecified", "float8", "", "D_TYPE_FLOAT32"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(TensorDecodeError, match="known are float32, bfloat16"):
        dtype_code(name)


def test_every_dtype_of_the_protocol_is_known() -> None:
    codes = {value.number for value in common_pb2.DType.DESCRIPTOR.values if value.number}
    assert set(DTYPES) == codes


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_torch_tensors_keep_their_bits(name: str) -> None:
    dtype = TORCH_DTYPES[name]
    values = torch.tensor([[0.0, 1.0, -1.5], [3.0e4, 255.0, 1.0]]).to(dtype)
    for tensor in (values, values.T, values[:, 1:], values[:0], values[0, 0]):
        array = to_numpy(tensor)
        assert NAMES[dtype] == dtype_name(header_of("t", array).dtype)
        received = assembled([header_of("t", array)], chunks_of([array], chunk_bytes=3))["t"]
        back = from_numpy(received)
        assert back.dtype == dtype
        assert back.shape == tensor.shape
        assert torch.equal(back, tensor)


def test_the_bridge_shares_memory() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.zeros(4, dtype=dtype)
        array = to_numpy(tensor)
        array[2] = 7
        assert tensor[2] == 7
        assert from_numpy(array).data_ptr() == tensor.data_ptr()


def test_bfloat16_nan_and_infinity_survive() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=torch.bfloat16)
    back = from_numpy(to_numpy(tensor).copy())
    assert torch.equal(back.view(torch.int16), tensor.view(torch.int16))


def test_assembled_tensors_share_one_aligned_block() -> None:
    arrays = [np.arange(3, dtype=np.float32), np.zeros((0, 5), np.float32), np.arange(7, dtype=np.uint8)]
    headers = [header_of(str(index), array) for index, array in enumerate(arrays)]
    assembler = TensorAssembler(headers)
    for chunk in chunks_of(arrays):
        assembler.add(chunk)
    found = assembler.finish()
    for index, array in enumerate(arrays):
        np.testing.assert_array_equal(found[str(index)], array)
        assert found[str(index)].flags.writeable
    first, _, last = found.values()
    assert last.ctypes.data - first.ctypes.data == ALIGNMENT
