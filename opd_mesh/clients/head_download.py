"""A teacher's head on its way here: resumable at the byte where a stream broke, from any replica that has it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from opd.v1 import teacher_service_pb2

from opd_mesh.errors import TensorDecodeError
from opd_mesh.tensors import check_header


@dataclass(frozen=True, slots=True)
class HeadData:
    """A downloaded head: its form and its tensors ("weight" [V, d], "bias" [V])."""

    form: teacher_service_pb2.HeadForm
    tensors: dict[str, np.ndarray]


class HeadDownload:
    """What has arrived so far.

    Args:
        digest: of the head wanted; empty: whichever the first answer brings, and that one from then on.
    """

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.offset = 0
        self._manifest: teacher_service_pb2.HeadManifest | None = None
        self._buffer = memoryview(b"")

    def take(self, response: teacher_service_pb2.GetHeadResponse) -> None:
        """One message. Raises :class:`TensorDecodeError` for bytes out of place."""
        if response.WhichOneof("payload") == "manifest":
            if self._manifest is None:
                self._manifest = response.manifest
                self._buffer = np.empty(_checked_head_bytes(response.manifest), dtype=np.uint8).data
                self.digest = self.digest or response.manifest.form.digest
            return
        data, offset = response.chunk.data, self.offset
        if response.chunk.offset != offset or offset + len(data) > len(self._buffer):
            raise TensorDecodeError(f"chunk at {response.chunk.offset}, expected {offset}", field="head")
        self._buffer[offset : offset + len(data)] = data
        self.offset += len(data)

    def finish(self) -> HeadData:
        """The head. Raises :class:`TensorDecodeError` where bytes are missing."""
        if self._manifest is None or self.offset != len(self._buffer):
            raise TensorDecodeError(f"truncated: {self.offset} of {len(self._buffer)} bytes", field="head")
        return HeadData(self._manifest.form, _split_head(self._manifest, self._buffer))


def _checked_head_bytes(manifest: teacher_service_pb2.HeadManifest) -> int:
    for header in manifest.tensors:
        check_header(header)
    total = sum(header.byte_size for header in manifest.tensors)
    if total != manifest.total_bytes:
        raise TensorDecodeError(f"tensors have {total} bytes, the manifest says {manifest.total_bytes}", field="head")
    return total


def _split_head(manifest: teacher_service_pb2.HeadManifest, buffer: memoryview) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    offset = 0
    flat = np.asarray(buffer)
    for header in manifest.tensors:
        dtype = check_header(header)
        piece = flat[offset : offset + math.prod(header.shape) * dtype.itemsize]
        tensors[header.name] = piece.view(dtype).reshape(tuple(header.shape))
        offset += header.byte_size
    return tensors
