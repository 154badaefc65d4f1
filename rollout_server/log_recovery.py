"""Recovery of the token log: records in, requests out, and nothing that touches a disk."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rollout_server.log_format import (
    DELIVERED,
    ENDED,
    HANDLE,
    REASON_OF,
    RECORD_HEADER_BYTES,
    REQUEST,
    SNAPSHOT,
    SNAPSHOT_BYTES,
    TOKEN,
    TOKEN_BYTES,
    TOKEN_DTYPE,
    End,
    Kind,
    RecoveredRequest,
    Segment,
    corrupt,
    encode_text,
    find_record,
    join_masked_tokens,
    masked_bytes,
    parse_segment_name,
    read_head,
    read_record,
    segment_name,
    segment_seed,
    split_masked_tokens,
)


@dataclass(slots=True)
class LoggedRequest:
    """A request while the log is replayed: tokens stay as the log's own bytes, which a snapshot copies.

    ``kept`` has the ids that each token was drawn from, or is empty.
    """

    lineage: int
    payload: bytes
    tokens: bytearray = field(default_factory=bytearray)
    kept: list[bytes] = field(default_factory=list)
    end: End = End.NONE
    reason: str = ""
    message: str = ""
    delivered: bool = False
    stream_entry_id: str = ""

    @property
    def n_tokens(self) -> int:
        """Of the response."""
        return len(self.tokens) // TOKEN_BYTES

    def add(self, index: int, finish: int, entry: bytes, ids: bytes = b"") -> None:
        """Append one token. Raises :class:`ValueError` where it cannot follow."""
        if index != self.n_tokens:
            raise ValueError(f"token {index} follows {self.n_tokens} tokens")
        if index and bool(ids) != bool(self.kept):
            raise ValueError(f"token {index} comes {'with' if ids else 'without'} the ids that it was drawn from")
        if self.tokens and self.tokens[-1]:  # the finish of the token before
            raise ValueError("a token follows the last one")
        if finish > End.LENGTH:
            raise ValueError(f"unknown finish {finish}")
        self.tokens += entry
        if ids:
            self.kept.append(ids)
        if finish and not self.end:
            self.end = End(finish)

    @property
    def snapshot_bytes(self) -> int:
        """Of what :meth:`records` gives, with headers."""
        texts = sum(len(encode_text(text)) for text in (self.reason, self.message, self.stream_entry_id))
        masked = masked_bytes(map(len, self.kept), first=True) if self.kept else 0
        return SNAPSHOT_BYTES + len(self.payload) + len(self.tokens) + texts + masked

    def records(self, handle: int) -> Iterator[tuple[Kind, bytes]]:
        """What says all of it again."""
        texts = [encode_text(text) for text in (self.reason, self.message, self.stream_entry_id)]
        tokens = b"" if self.kept else bytes(self.tokens)
        sizes = (len(self.payload), len(tokens) // TOKEN_BYTES, *map(len, texts))
        head = SNAPSHOT.pack(handle, self.lineage, self.end, self.delivered, *sizes)
        yield Kind.SNAPSHOT, b"".join((head, self.payload, tokens, *texts))
        if self.kept:
            yield Kind.MASKED_TOKENS, join_masked_tokens(bytes(self.tokens), self.kept)

    def recovered(self, handle: int) -> RecoveredRequest:
        """As the server wants it."""
        columns = np.frombuffer(bytes(self.tokens), TOKEN_DTYPE)
        return RecoveredRequest(
            handle=handle,
            lineage=self.lineage,
            payload=self.payload,
            tokens=columns["token_id"].tolist(),
            sampling_logprobs=columns["sampling_logprob"].tolist(),
            policy_logprobs=columns["policy_logprob"].tolist(),
            policy_versions=columns["policy_version"].tolist(),
            kept=list(self.kept),
            finish_reason=REASON_OF.get(self.end),
            error=(self.reason, self.message) if self.end is End.FAILED else None,
            delivered=self.delivered,
            stream_entry_id=self.stream_entry_id,
        )


class Replay:
    """Applies records in order; ``requests`` by handle are in order of first appearance."""

    def __init__(self) -> None:
        self.requests: dict[int, LoggedRequest] = {}
        self.next_handle = 0
        self.closed = False

    def apply(self, kind: int, payload: bytes) -> None:
        """Raises :class:`ValueError`, :class:`KeyError` or :class:`struct.error` for what no writer of ours wrote."""
        if self.closed:
            raise ValueError("a record follows CLOSED")
        if kind == Kind.TOKENS:
            if len(payload) % TOKEN_BYTES:
                raise ValueError("TOKENS of a broken size")
            self._tokens(payload)
        elif kind == Kind.MASKED_TOKENS:
            self._tokens(*split_masked_tokens(payload))
        elif kind == Kind.REQUEST:
            handle, lineage = REQUEST.unpack_from(payload)
            self._begin(handle, lineage, payload[REQUEST.size :])
        elif kind == Kind.ENDED:
            handle, end, n_reason = ENDED.unpack_from(payload)
            if end not in (End.CANCELLED, End.FAILED):
                raise ValueError(f"unknown end {end}")
            request, text = self.requests[handle], payload[ENDED.size :]
            if not request.end:
                request.end = End(end)
                request.reason, request.message = text[:n_reason].decode(), text[n_reason:].decode()
        elif kind == Kind.DELIVERED:
            request = self.requests[DELIVERED.unpack_from(payload)[0]]
            request.delivered, request.stream_entry_id = True, payload[DELIVERED.size :].decode()
        elif kind == Kind.FORGOTTEN:
            del self.requests[HANDLE.unpack(payload)[0]]
        elif kind == Kind.SNAPSHOT:
            self._snapshot(payload)
        elif kind == Kind.CLOSED:
            self.closed = True
        else:
            raise ValueError(f"unknown record type {kind}")

    def _begin(self, handle: int, lineage: int, payload: bytes) -> LoggedRequest:
        if handle in self.requests:
            raise ValueError(f"handle {handle} begins again")
        self.next_handle = max(self.next_handle, handle + 1)
        request = self.requests[handle] = LoggedRequest(lineage, payload)
        return request

    def _tokens(self, entries: bytes, kept: Sequence[bytes] = (), only: int | None = None) -> None:
        for place, (handle, index, _, _, _, _, finish) in enumerate(TOKEN.iter_unpack(entries)):
            if only not in (None, handle):
                raise ValueError("a token of another request in a snapshot")
            entry = entries[place * TOKEN_BYTES : (place + 1) * TOKEN_BYTES]
            self.requests[handle].add(index, finish, entry, kept[place] if kept else b"")

    def _snapshot(self, payload: bytes) -> None:
        handle, lineage, end, delivered, *sizes = SNAPSHOT.unpack_from(payload)
        sizes[1] *= TOKEN_BYTES
        parts, offset = [], SNAPSHOT.size
        for size in sizes:
            parts.append(payload[offset : offset + size])
            offset += size
        if offset != len(payload):
            raise ValueError("SNAPSHOT of a broken size")
        request = self._begin(handle, lineage, parts[0])
        self._tokens(parts[1], only=handle)
        request.end, request.delivered = End(end), bool(delivered)
        request.reason, request.message, request.stream_entry_id = (part.decode() for part in parts[2:])


@dataclass(slots=True)
class Recovery:
    """What a log holds, and where the next epoch starts from.

    Attributes:
        segments: those that count and hold any request's records, in order.
        newest_epoch: of any segment in the folder; 0 where there is none.
        clean: the last owner closed the log, or there has been none.
        torn: the newest segment up to where it is whole, and how many bytes follow; None where it ends well.
    """

    replay: Replay
    segments: list[Segment]
    newest_epoch: int
    clean: bool
    torn: tuple[Segment, int] | None


def replay_segment(replay: Replay, log_id: bytes, name: str, data: bytes, start: int, end: int) -> int:
    """Apply the records from ``start`` to ``end``; returns where the first one that is not valid would be."""
    epoch, number = parse_segment_name(name) or (0, 0)
    seed, offset = segment_seed(log_id, epoch, number), start
    while (record := read_record(data, offset, end, seed)) is not None:
        try:
            replay.apply(*record)
        except (ValueError, LookupError, struct.error) as error:
            what = f"of no request that is known: {error}" if isinstance(error, LookupError) else str(error)
            raise corrupt(name, offset, f"a record that cannot be: {what}") from error
        offset += RECORD_HEADER_BYTES + len(record[1])
    return offset


def replay_closed(replay: Replay, log_id: bytes, segment: Segment, files: Mapping[str, bytes]) -> bool:
    """Apply a segment to which nothing may be added; returns whether it holds any record but CLOSED.

    Raises :class:`CorruptLogError` where it is missing, shorter, or not whole up to its accepted length.
    """
    name, end = segment.name, segment.n_bytes
    try:
        data = files[name]
    except KeyError:
        raise corrupt(name, 0, "the segment is missing") from None
    _, start = read_head(log_id, name, data)
    if len(data) < end:
        raise corrupt(name, len(data), f"the segment is shorter than the {end} bytes that were accepted of it")
    replay.closed = False  # an earlier owner's CLOSED ends its own segment only
    offset = replay_segment(replay, log_id, name, data, start, end)
    if offset != end:
        raise corrupt(name, offset, "a record is damaged")
    return end - start > RECORD_HEADER_BYTES


def recover(log_id: bytes, files: Mapping[str, bytes]) -> Recovery:
    """Everything the log holds.

    The newest segment decides which others count and how much of each: whatever another owner wrote beyond that is not
    of this log. Only the newest may end in a torn record, with nothing valid after it.

    Args:
        files: contents by name; each is asked for once, oldest first but for the newest. Other names are ignored.

    Raises:
        CorruptLogError: damage that no torn write explains; names file and offset.
    """
    replay = Replay()
    places = sorted(place for name in files if (place := parse_segment_name(name)))
    if not places:
        return Recovery(replay, [], newest_epoch=0, clean=True, torn=None)
    epoch, number = places[-1]
    name = segment_name(epoch, number)
    data = files[name]
    manifest, start = read_head(log_id, name, data)
    segments = [segment for segment in manifest if replay_closed(replay, log_id, segment, files)]
    replay.closed = False
    end = replay_segment(replay, log_id, name, data, start, len(data))
    newest = Segment(epoch, number, end)
    if end < len(data):
        valid = find_record(data, end + 1, segment_seed(log_id, epoch, number))
        if valid is not None:
            raise corrupt(name, end, f"a record is damaged, and a valid one follows at byte {valid}")
    if end - start > RECORD_HEADER_BYTES:  # CLOSED is nothing but a header
        segments.append(newest)
    torn = (newest, len(data) - end) if end < len(data) else None
    return Recovery(replay, segments, newest_epoch=epoch, clean=replay.closed, torn=torn)
