"""Tensors on the wire: dtype, shape, little-endian row-major bytes, in chunks of about 1 MiB.

Works on numpy arrays, so that a client needs no torch; ``ml_dtypes`` gives numpy its bfloat16.
:mod:`opd_mesh.torch_tensors` bridges to torch without copies.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import ml_dtypes
import numpy as np
from opd.v1 import common_pb2

from opd_mesh.errors import TensorDecodeError

if sys.byteorder != "little":  # pragma: no cover - no such machine is supported
    raise ImportError("OPD Mesh sends little-endian bytes without swapping and runs on little-endian machines only")

CHUNK_BYTES = 1 << 20  # measured best for grpc.aio on loopback, see docs/wire.md
MAX_CHUNK_BYTES = 4 << 20
MAX_TENSOR_BYTES = 1 << 40
MAX_DIMENSIONS = 8
ALIGNMENT = 64  # of an assembled tensor's first byte in the memory it shares with others

DTYPES: dict[common_pb2.DType, np.dtype] = {
    common_pb2.D_TYPE_FLOAT32: np.dtype("<f4"),
    common_pb2.D_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    common_pb2.D_TYPE_FLOAT16: np.dtype("<f2"),
    common_pb2.D_TYPE_FLOAT64: np.dtype("<f8"),
    common_pb2.D_TYPE_INT32: np.dtype("<i4"),
    common_pb2.D_TYPE_INT64: np.dtype("<i8"),
    common_pb2.D_TYPE_UINT8: np.dtype("u1"),
    common_pb2.D_TYPE_BOOL: np.dtype("?"),
}
CODES: dict[np.dtype, common_pb2.DType] = {dtype: code for code, dtype in DTYPES.items()}

NAMES: dict[str, common_pb2.DType] = {
    common_pb2.DType.Name(code).removeprefix("D_TYPE_").lower(): code for code in DTYPES
}


def dtype_name(code: common_pb2.DType) -> str:
    """``D_TYPE_BFLOAT16`` → ``"bfloat16"``."""
    return common_pb2.DType.Name(code).removeprefix("D_TYPE_").lower()


def dtype_code(name: str) -> common_pb2.DType:
    """``"bfloat16"`` → ``D_TYPE_BFLOAT16``. Raises :class:`TensorDecodeError` for an unknown name."""
    try:
        return NAMES[name]
    except KeyError:
        known = ", ".join(dtype_name(code) for code in DTYPES)
        raise TensorDecodeError(f"unknown dtype {name!r}; known are {known}", field="dtype") from None


def header_of(name: str, array: np.ndarray) -> common_pb2.TensorHeader:
    """The announcement of ``array``. Raises :class:`TensorDecodeError` for a dtype that has no code."""
    code = CODES.get(array.dtype)
    if code is None:
        raise TensorDecodeError(f"dtype {array.dtype} cannot be sent", field=name)
    return common_pb2.TensorHeader(name=name, dtype=code, shape=array.shape, byte_size=array.nbytes)


def check_header(header: common_pb2.TensorHeader, *, max_bytes: int = MAX_TENSOR_BYTES) -> np.dtype:
    """Check a header before anything is allocated for it.

    Raises:
        TensorDecodeError: unknown dtype, negative or too many dimensions, or shape × dtype ≠ byte_size.
    """
    field = f"tensor {header.name!r}"
    dtype = DTYPES.get(header.dtype)
    if dtype is None:
        raise TensorDecodeError(f"unknown dtype code {header.dtype}", field=field)
    if len(header.shape) > MAX_DIMENSIONS:
        raise TensorDecodeError(f"{len(header.shape)} dimensions, at most {MAX_DIMENSIONS}", field=field)
    if any(size < 0 for size in header.shape):
        raise TensorDecodeError(f"negative dimension in shape {list(header.shape)}", field=field)
    expected = math.prod(header.shape) * dtype.itemsize  # Python integers: no overflow
    if expected != header.byte_size:
        raise TensorDecodeError(
            f"shape {list(header.shape)} of {dtype_name(header.dtype)} needs {expected} bytes, "
            f"but byte_size says {header.byte_size}",
            field=field,
        )
    if math.prod(max(1, size) for size in header.shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        # A dimension of 0 makes no bytes, but numpy still multiplies the others.
        raise TensorDecodeError(f"shape {list(header.shape)} is too large", field=field)
    if expected > max_bytes:
        raise TensorDecodeError(f"{expected} bytes, at most {max_bytes} are accepted", field=field)
    return dtype


def byte_view(array: np.ndarray) -> memoryview:
    """The bytes of ``array``, row-major, copied only where it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def chunks_of(arrays: Sequence[np.ndarray], *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[common_pb2.TensorChunk]:
    """The bytes of several announced tensors, in order. An empty tensor has no chunk."""
    for index, array in enumerate(arrays):
        view = byte_view(array)
        for offset in range(0, len(view), chunk_bytes):
            yield common_pb2.TensorChunk(
                tensor_index=index, offset=offset, data=bytes(view[offset : offset + chunk_bytes])
            )


def _allocate(headers: Sequence[common_pb2.TensorHeader], dtypes: Sequence[np.dtype]) -> list[np.ndarray]:
    """Arrays in one block of memory: numpy asks for huge pages for it, which it does not for many small ones."""
    ends = list(accumulate(-(-header.byte_size // ALIGNMENT) * ALIGNMENT for header in headers))
    block = np.empty(ends[-1] if ends else 0, dtype=np.uint8)
    return [
        block[start : start + header.byte_size].view(dtype).reshape(tuple(header.shape))
        for start, header, dtype in zip([0, *ends], headers, dtypes, strict=False)
    ]


class Chunk(Protocol):
    """``opd.v1.TensorChunk``, or :class:`opd_mesh.chunk_codec.RawChunk`."""

    @property
    def tensor_index(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def data(self) -> bytes | memoryview: ...


class TensorAssembler:
    """Collects the chunks of announced tensors into arrays.

    Args:
        headers: checked at once, all of them; buffers are allocated only after that.
        max_bytes: bound on the sum of the tensors.

    Raises:
        TensorDecodeError: from the constructor or :meth:`add`, naming the tensor.
    """

    def __init__(self, headers: Iterable[common_pb2.TensorHeader], *, max_bytes: int = MAX_TENSOR_BYTES) -> None:
        self._headers = list(headers)
        dtypes = [check_header(header, max_bytes=max_bytes) for header in self._headers]
        names = [header.name for header in self._headers]
        if len(set(names)) != len(names):
            raise TensorDecodeError("two tensors bear the same name", field="tensors")
        total = sum(header.byte_size for header in self._headers)
        if total > max_bytes:
            raise TensorDecodeError(f"{total} bytes in all, at most {max_bytes} are accepted", field="tensors")
        self._arrays = _allocate(self._headers, dtypes)
        self._views = [
            array.reshape(-1).view(np.uint8).data if array.nbytes else memoryview(b"") for array in self._arrays
        ]
        self._filled = [0] * len(self._arrays)
        self.bytes_received = 0

    def add(self, chunk: Chunk) -> None:
        """Take one chunk; they come in order, without gaps."""
        index = chunk.tensor_index
        if index >= len(self._arrays):
            raise TensorDecodeError(
                f"chunk for tensor {index}, but {len(self._arrays)} are announced", field="tensor_index"
            )
        field = f"tensor {self._headers[index].name!r}"
        data = chunk.data  # of a protobuf message one copy; reading the field again would be another
        if chunk.offset != self._filled[index]:
            raise TensorDecodeError(f"chunk at offset {chunk.offset}, expected {self._filled[index]}", field=field)
        end = chunk.offset + len(data)
        if end > self._headers[index].byte_size:
            raise TensorDecodeError(
                f"chunk ends at byte {end}, beyond the {self._headers[index].byte_size} announced", field=field
            )
        if not data:
            raise TensorDecodeError("empty chunk", field=field)
        self._views[index][chunk.offset : end] = data
        self._filled[index] = end
        self.bytes_received += len(data)

    def fill(self, read: Callable[[Sequence[np.ndarray]], None]) -> None:
        """Take all at once: ``read`` fills the arrays, of announced dtypes and shapes, or raises."""
        read(self._arrays)
        self._filled = [header.byte_size for header in self._headers]
        self.bytes_received = sum(self._filled)

    def finish(self) -> dict[str, np.ndarray]:
        """The tensors by name. Raises :class:`TensorDecodeError` where bytes are missing."""
        for header, filled in zip(self._headers, self._filled, strict=True):
            if filled != header.byte_size:
                raise TensorDecodeError(
                    f"truncated: {filled} of {header.byte_size} bytes arrived", field=f"tensor {header.name!r}"
                )
        return {header.name: array for header, array in zip(self._headers, self._arrays, strict=True)}
