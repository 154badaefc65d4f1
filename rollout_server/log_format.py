"""The token log's format: records and their codec, and nothing that touches a disk.

See docs/token-log.md for the bytes. All integers are little-endian. Every record's checksum is seeded with the log's
id, the segment's epoch and number, and the record's own offset, so that a record is valid only where it was written:
neither an old block of the disk nor bytes that a client put into its request can pass for one.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from google_crc32c import extend as crc32c_extend
from google_crc32c import value as crc32c

from opd_mesh.errors import CorruptLogError, InternalError
from opd_mesh.trajectory import FinishReason

assert sys.byteorder == "little", "the token log is read with the machine's own integers"

MAGIC = b"OPDWAL\r\n"  # a transfer that changes line ends, or clears the eighth bit elsewhere, shows here
FORMAT_VERSION = 1
MARKER = 0xA5
MAX_HANDLE = 2**32 - 1

_SEGMENT_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.wal")
_HEADER = struct.Struct("<8sIQQ16s")  # magic, format version, epoch, number, log id; a CRC32C follows
_CRC = struct.Struct("<I")
_HEAD = struct.Struct("<BBI")  # marker, type, payload bytes
_CRCS = struct.Struct("<II")  # of offset and head; of that and the payload
_OFFSET = struct.Struct("<Q")
_PLACE = struct.Struct("<16sQQ")
REQUEST = struct.Struct("<IQ")  # handle, lineage; the payload follows
HANDLE = struct.Struct("<I")
ENDED = struct.Struct("<IBI")  # handle, end, bytes of the reason; reason and message follow
DELIVERED = struct.Struct("<I")  # handle; the stream entry's id follows
# handle, lineage, end, delivered, then the sizes of what follows: payload, tokens, reason, message, stream entry id
SNAPSHOT = struct.Struct("<IQBBIIIII")
_COUNT = struct.Struct("<I")
_ID_BYTES = 4
_SEGMENT = struct.Struct("<QQQ")  # epoch, number, bytes
_TOKEN_FORMAT = "IIiffQB"
TOKEN = struct.Struct("<" + _TOKEN_FORMAT)
TOKEN_DTYPE = np.dtype(
    [
        ("handle", "<u4"),
        ("index", "<u4"),
        ("token_id", "<i4"),
        ("sampling_logprob", "<f4"),
        ("policy_logprob", "<f4"),
        ("policy_version", "<u8"),
        ("finish", "u1"),
    ]
)
TOKEN_BYTES = TOKEN.size
SEGMENT_HEADER_BYTES = _HEADER.size + _CRC.size
RECORD_HEADER_BYTES = _HEAD.size + _CRCS.size
SNAPSHOT_BYTES = RECORD_HEADER_BYTES + SNAPSHOT.size  # of a request, without payload, tokens and texts


class Kind(IntEnum):
    """Type of a record."""

    MANIFEST = 1  # first in every segment, and only there: the segments before it that count
    REQUEST = 2
    TOKENS = 3
    ENDED = 4
    DELIVERED = 5
    FORGOTTEN = 6
    SNAPSHOT = 7
    CLOSED = 8
    MASKED_TOKENS = 9  # as TOKENS, with the ids that they were drawn from


class End(IntEnum):
    """How a response ended; the first end counts."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    FAILED = 4


_END_OF = {None: End.NONE, FinishReason.STOP: End.STOP, FinishReason.LENGTH: End.LENGTH}
REASON_OF = {
    End.STOP: FinishReason.STOP,
    End.LENGTH: FinishReason.LENGTH,
    End.CANCELLED: FinishReason.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class LoggedToken:
    """One token of one response.

    Log-probabilities are nats and are kept as float32; ``index`` is the place in the response, from 0; ``finish`` is
    STOP or LENGTH on the last token; ``kept`` the ids that it was drawn from: of all tokens of a response, or of none.
    """

    handle: int
    index: int
    token_id: int
    sampling_logprob: float
    policy_logprob: float
    policy_version: int
    finish: FinishReason | None
    kept: tuple[int, ...] = ()

    @property
    def snapshot_bytes(self) -> int:
        """What it adds to the snapshot of its request."""
        return TOKEN_BYTES + (masked_bytes([_ID_BYTES * len(self.kept)], first=self.index == 0) if self.kept else 0)


@dataclass(slots=True)
class RecoveredRequest:
    """What the log knows of one request.

    ``error`` is (reason, message) where generation failed; ``finish_reason`` is None where it failed or has not ended;
    ``kept`` has the ids that each token was drawn from (:func:`unpack_ids`), or is empty.
    """

    handle: int
    lineage: int
    payload: bytes
    tokens: list[int]
    sampling_logprobs: list[float]
    policy_logprobs: list[float]
    policy_versions: list[int]
    kept: list[bytes]
    finish_reason: FinishReason | None
    error: tuple[str, str] | None
    delivered: bool
    stream_entry_id: str


class Segment(NamedTuple):
    """A segment and how many of its bytes count."""

    epoch: int
    number: int
    n_bytes: int

    @property
    def name(self) -> str:
        """File name."""
        return segment_name(self.epoch, self.number)


def segment_name(epoch: int, number: int) -> str:
    """File name of a segment."""
    return f"{epoch:016x}-{number:016x}.wal"


def parse_segment_name(name: str) -> tuple[int, int] | None:
    """(epoch, number), or None for a file that is no segment."""
    match = _SEGMENT_NAME.fullmatch(name)
    return (int(match[1], 16), int(match[2], 16)) if match else None


# --- writing ---------------------------------------------------------------------------------------------------
def segment_seed(log_id: bytes, epoch: int, number: int) -> int:
    """What the checksums of a segment's records start from."""
    return crc32c(_PLACE.pack(log_id, epoch, number))


def encode_header(log_id: bytes, epoch: int, number: int) -> bytes:
    """The first bytes of a segment."""
    header = _HEADER.pack(MAGIC, FORMAT_VERSION, epoch, number, log_id)
    return header + _CRC.pack(crc32c(header))


def encode_record(seed: int, offset: int, kind: int, payload: bytes) -> bytes:
    """A record for the byte ``offset`` of the segment with that ``seed``."""
    head = _HEAD.pack(MARKER, kind, len(payload))
    head_crc = crc32c_extend(seed, _OFFSET.pack(offset) + head)
    return head + _CRCS.pack(head_crc, crc32c_extend(head_crc, payload)) + payload


def encode_manifest(segments: Sequence[Segment]) -> bytes:
    """Payload of MANIFEST."""
    return b"".join(_SEGMENT.pack(*segment) for segment in segments)


def encode_request(handle: int, lineage: int, payload: bytes) -> bytes:
    """Payload of REQUEST. Raises :class:`InternalError` for a lineage that is no unsigned 64-bit integer."""
    try:
        return REQUEST.pack(handle, lineage) + payload
    except struct.error as error:
        raise InternalError(f"a request does not fit the log's format: {error}") from error


_TOKEN_STRUCTS: dict[int, struct.Struct] = {}


def encode_tokens(tokens: Sequence[LoggedToken]) -> bytes:
    """Payload of TOKENS. Raises :class:`InternalError` for a token that does not fit the format."""
    packer = _TOKEN_STRUCTS.get(len(tokens))
    if packer is None:
        packer = struct.Struct("<" + _TOKEN_FORMAT * len(tokens))
        if len(tokens) <= 1024:  # one layout per batch size, made once
            _TOKEN_STRUCTS[len(tokens)] = packer
    values: list[int | float] = []
    try:
        for token in tokens:
            values += (
                token.handle,
                token.index,
                token.token_id,
                token.sampling_logprob,
                token.policy_logprob,
                token.policy_version,
                _END_OF[token.finish],
            )
        return packer.pack(*values)
    except (struct.error, OverflowError, KeyError) as error:
        raise InternalError(f"a token does not fit the log's format: {error}") from error


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as int32: a ninth of what a tuple of them takes. Raises :class:`InternalError` for what is none."""
    try:
        return struct.pack(f"<{len(ids)}i", *ids)
    except struct.error as error:
        raise InternalError(f"the ids that a token was drawn from do not fit the log's format: {error}") from error


def unpack_ids(packed: bytes) -> tuple[int, ...]:
    """The inverse of :func:`pack_ids`."""
    return struct.unpack(f"<{len(packed) // _ID_BYTES}i", packed)


def encode_masked_tokens(tokens: Sequence[LoggedToken]) -> bytes:
    """Payload of MASKED_TOKENS. Raises :class:`InternalError` for a token that does not fit the format."""
    return join_masked_tokens(encode_tokens(tokens), [pack_ids(token.kept) for token in tokens])


def join_masked_tokens(entries: bytes, kept: Sequence[bytes]) -> bytes:
    """Payload of MASKED_TOKENS from that of TOKENS and, of each token, its kept ids as int32."""
    parts = [_COUNT.pack(len(kept)), entries]
    for ids in kept:
        parts += (_COUNT.pack(len(ids) // _ID_BYTES), ids)
    return b"".join(parts)


def masked_bytes(kept: Iterable[int], *, first: bool) -> int:
    """What kept ids of so many bytes each add to a request's snapshot; the first of them come with a record."""
    return sum(_COUNT.size + n_bytes for n_bytes in kept) + first * (RECORD_HEADER_BYTES + _COUNT.size)


def encode_text(text: str) -> bytes:
    """UTF-8; a lone surrogate, which an exception's text may hold, becomes a question mark."""
    return text.encode("utf-8", "replace")


def encode_ended(handle: int, end: End, reason: str = "", message: str = "") -> bytes:
    """Payload of ENDED."""
    word = encode_text(reason)
    return ENDED.pack(handle, end, len(word)) + word + encode_text(message)


def encode_delivered(handle: int, stream_entry_id: str) -> bytes:
    """Payload of DELIVERED."""
    return DELIVERED.pack(handle) + encode_text(stream_entry_id)


def encode_forgotten(handle: int) -> bytes:
    """Payload of FORGOTTEN."""
    return HANDLE.pack(handle)


# --- reading ---------------------------------------------------------------------------------------------------
def read_record(data: bytes, offset: int, end: int, seed: int) -> tuple[int, bytes] | None:
    """(type, payload) of the record at ``offset``, or None where no valid one ends by ``end``."""
    start = offset + RECORD_HEADER_BYTES
    if start > end:
        return None
    marker, kind, n_bytes = _HEAD.unpack_from(data, offset)
    if marker != MARKER or start + n_bytes > end:
        return None
    head_crc, payload_crc = _CRCS.unpack_from(data, offset + _HEAD.size)
    if crc32c_extend(seed, _OFFSET.pack(offset) + data[offset : offset + _HEAD.size]) != head_crc:
        return None
    payload = data[start : start + n_bytes]
    return (kind, payload) if crc32c_extend(head_crc, payload) == payload_crc else None


def split_masked_tokens(payload: bytes) -> tuple[bytes, list[bytes]]:
    """The inverse of :func:`join_masked_tokens`. Raises :class:`ValueError` where the sizes do not fit."""
    (count,) = _COUNT.unpack_from(payload)
    offset = _COUNT.size + count * TOKEN_BYTES
    entries, kept = payload[_COUNT.size : offset], []
    for _ in range(count):
        start = offset + _COUNT.size
        if start > len(payload):
            break
        offset = start + _ID_BYTES * _COUNT.unpack_from(payload, offset)[0]
        kept.append(payload[start:offset])
    if offset != len(payload) or len(kept) != count:
        raise ValueError("MASKED_TOKENS of a broken size")
    return entries, kept


_CANDIDATE = re.compile(rb"\xa5(?=[\x01-\x3f])")


def find_record(data: bytes, start: int, seed: int) -> int | None:
    """Offset of the first valid record at ``start`` or after it, wherever it stands.

    The head has a checksum of its own, so a false candidate costs a few bytes, not the length that it claims.
    """
    for match in _CANDIDATE.finditer(data, start):
        if read_record(data, match.start(), len(data), seed) is not None:
            return match.start()
    return None


def corrupt(name: str, offset: int, what: str) -> CorruptLogError:
    """Names file and offset, in the text and in the metadata."""
    return CorruptLogError(
        f"{name} at byte {offset}: {what}; see docs/token-log.md", metadata={"file": name, "offset": str(offset)}
    )


def header_log_id(header: bytes) -> bytes | None:
    """The log that a segment belongs to, by its header alone; None where that is damaged."""
    if (
        len(header) < SEGMENT_HEADER_BYTES
        or crc32c(header[: _HEADER.size]) != _CRC.unpack_from(header, _HEADER.size)[0]
    ):
        return None
    magic, version, _, _, owner = _HEADER.unpack_from(header)
    return owner if (magic, version) == (MAGIC, FORMAT_VERSION) else None


def read_head(log_id: bytes, name: str, data: bytes) -> tuple[list[Segment], int]:
    """The segments that a segment builds on, and the offset of its first record after that list."""
    epoch, number = parse_segment_name(name) or (0, 0)
    header = encode_header(log_id, epoch, number)
    found = data[:SEGMENT_HEADER_BYTES]
    if found != header:
        if len(found) < SEGMENT_HEADER_BYTES or crc32c(found[: _HEADER.size]) != _CRC.unpack(found[_HEADER.size :])[0]:
            raise corrupt(name, 0, "its header is damaged")
        magic, version, _, _, other_id = _HEADER.unpack_from(found)
        if magic != MAGIC:
            raise corrupt(name, 0, "it is not a segment of a token log")
        if version != FORMAT_VERSION:
            raise corrupt(name, 0, f"its format is version {version}, this server reads {FORMAT_VERSION}")
        if other_id != log_id:
            raise corrupt(name, 0, f"it belongs to log {other_id.hex()}, not to {log_id.hex()}")
        raise corrupt(name, 0, "its header names another segment: the file was renamed")
    record = read_record(data, len(header), len(data), segment_seed(log_id, epoch, number))
    # A segment gets its name when its manifest is whole, so this is never a torn end.
    if record is None or record[0] != Kind.MANIFEST or len(record[1]) % _SEGMENT.size:
        raise corrupt(name, len(header), "its manifest is damaged")
    segments = [Segment(*item) for item in _SEGMENT.iter_unpack(record[1])]
    if any(a[:2] >= b[:2] for a, b in pairwise([*segments, Segment(epoch, number, 0)])):
        raise corrupt(name, len(header), "its manifest is out of order")
    return segments, len(header) + RECORD_HEADER_BYTES + len(record[1])
