"""What ``opd score`` writes: answers as lines of JSON, and the safetensors file made of them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_mesh.errors import ConfigError, PreconditionError
from opd_mesh.tensors import byte_view
from opd_mesh.trajectory import Trajectory

SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class Source:
    """What every answer of one output shares; an output is never continued with another."""

    teacher_id: str
    teacher_digest: str
    head_digest: str
    signal: str
    dtype: str

    def as_dict(self) -> dict[str, str]:
        """For a line of JSON and for the metadata of a safetensors file."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Item:
    """One good line of the input."""

    place: str  # "FILE:LINE: trajectory ID"
    trajectory: Trajectory

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over ids and spans: the same id with other contents is not the same item."""
        text = json.dumps([self.trajectory.token_ids, self.trajectory.scored_spans])
        return hashlib.sha256(text.encode()).hexdigest()


class AnswerStore:
    """The answers of one output as lines of JSON, appended as they come, read again by the next run.

    Raises:
        ConfigError: the file holds answers of another :class:`Source`, or lines that are none.
    """

    def __init__(self, out: Path, source: Source) -> None:
        self._out = out
        self._source = source
        self.path = out if out.suffix == ".jsonl" else out.with_name(out.name + ".partial.jsonl")
        self.digests: dict[str, str] = {}  # trajectory id → digest of its item
        self._lock = asyncio.Lock()
        if self.path.exists():
            self._take_up()

    def _take_up(self) -> None:
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # cut off in the middle of a write
                try:
                    value = json.loads(line)
                    facts = {name: value[name] for name in self._source.as_dict()}
                    self.digests[value["trajectory_id"]] = value["item_digest"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ConfigError(
                        f"{self.path}, line {number}, is no answer of opd score: give another --out, or remove it",
                        field="out",
                    ) from error
                for name, expected in self._source.as_dict().items():
                    if facts[name] != expected:
                        raise ConfigError(
                            f"{self.path} holds answers with {name} {facts[name]}, not {expected}: give another "
                            "--out, or remove the file",
                            field="out",
                        )
                whole += len(line)
        if whole < self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(whole)

    async def add(self, item: Item, array: np.ndarray) -> None:
        """Append one answer; handed to the operating system on return."""
        async with self._lock:
            await asyncio.to_thread(self._append, item, array)
        self.digests[item.trajectory.trajectory_id] = item.digest

    def _append(self, item: Item, array: np.ndarray) -> None:
        value: dict[str, Any] = {"trajectory_id": item.trajectory.trajectory_id, "item_digest": item.digest}
        value |= self._source.as_dict() | {"shape": list(array.shape)}
        value["data"] = base64.b64encode(byte_view(array)).decode("ascii")
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(value).encode() + b"\n")
        except OSError as error:
            raise PreconditionError(f"cannot write {self.path}: {error.strerror}") from error

    def _answers(self, wanted: set[str]) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for line in file:
                value = json.loads(line)
                if value["trajectory_id"] in wanted:
                    yield value

    def write_safetensors(self, wanted: set[str], *, keep: bool) -> None:
        """Write the answers to the trajectories ``wanted`` into one safetensors file, one tensor in memory at a time.

        Written by hand (8 bytes of length, a JSON header, the bytes), because the library takes all tensors at once,
        and bfloat16 only from torch.

        Args:
            keep: leave the lines beside it, for a run that adds what is missing.
        """
        header: dict[str, Any] = {"__metadata__": self._source.as_dict()}
        end = 0
        if self.path.exists():
            for value in self._answers(wanted):
                start, end = end, end + _decoded_size(value["data"])
                header[value["trajectory_id"]] = {
                    "dtype": SAFETENSORS_DTYPES[value["dtype"]],
                    "shape": value["shape"],
                    "data_offsets": [start, end],
                }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        partial = self._out.with_name(self._out.name + ".partial")
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if end:
                for value in self._answers(wanted):
                    file.write(base64.b64decode(value["data"]))
        partial.replace(self._out)
        if not keep:
            self.path.unlink(missing_ok=True)


def _decoded_size(data: str) -> int:
    """Bytes in a base64 text."""
    return len(data) // 4 * 3 - data[-2:].count("=")
