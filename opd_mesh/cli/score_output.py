"""What ``opd score`` writes: answers as lines of JSON, and the safetensors file made of them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_mesh.cli.score_input import Item
from opd_mesh.errors import ConfigError, PreconditionError
from opd_mesh.signals import SignalKind
from opd_mesh.tensors import CODES, byte_view, dtype_name

SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
MAX_HEADER_BYTES = 100 << 20  # safetensors' own bound


@dataclass(frozen=True, slots=True)
class Source:
    """What every answer of one output shares; an output is never continued with another.

    Attributes:
        dtype: of the floating tensors; ids are int64.
        top_k: 0 where the signal has none.
    """

    teacher_id: str
    teacher_digest: str
    head_digest: str
    signal: str
    dtype: str
    top_k: int = 0

    def as_dict(self) -> dict[str, str]:
        """For the metadata of a safetensors file, whose values are text."""
        return {name: str(getattr(self, name)) for name in self.__slots__ if name != "top_k" or self.top_k}

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors of an answer, that of the widest dtype first."""
        return SignalKind(self.signal).tensors

    def key(self, trajectory_id: str, tensor: str) -> str:
        """What the tensor is called in a safetensors file."""
        return trajectory_id if len(self.tensors) == 1 else f"{trajectory_id}.{tensor}"

    def check(self, found: Any, where: str, what: str) -> None:
        """Compare with what an output says of itself.

        Args:
            where, what: for the message: the file, and what of it is none of ours if it is none.

        Raises:
            ConfigError: it was made with other settings, or not by `opd score`.
        """
        try:
            ours = all(isinstance(found[name], str) for name in self.__slots__ if name != "top_k")
        except (KeyError, TypeError):
            ours = False
        if not ours:
            raise ConfigError(f"{where}{what} of opd score: give another --out, or remove it", field="out")
        for name, expected in self.as_dict().items():
            if str(found.get(name)) != expected:
                raise ConfigError(
                    f"{where} holds answers with {name} {found.get(name)}, not {expected}: give another --out, or "
                    "remove the file",
                    field="out",
                )


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
        if self.path != out and out.exists():
            self._check_finished()
        if self.path.exists():
            self._take_up()

    def _check_finished(self) -> None:
        """A safetensors file that is there will be replaced, but only by its like."""
        found = None
        with suppress(ValueError, KeyError, TypeError, IsADirectoryError), self._out.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(min(size, MAX_HEADER_BYTES)))["__metadata__"]
        self._source.check(found, str(self._out), " is no output")

    def _take_up(self) -> None:
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # cut off in the middle of a write
                try:
                    value = json.loads(line)
                    self.digests[value["trajectory_id"]] = value["item_digest"]
                except (ValueError, KeyError, TypeError):
                    value = None
                self._source.check(value, str(self.path), f", line {number}, is no answer")
                whole += len(line)
        if whole < self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(whole)

    async def add(self, item: Item, tensors: Mapping[str, np.ndarray]) -> None:
        """Append one answer, R rows of each tensor; handed to the operating system on return."""
        async with self._lock:
            await asyncio.to_thread(self._append, item, tensors)
        self.digests[item.trajectory.trajectory_id] = item.digest

    def _append(self, item: Item, tensors: Mapping[str, np.ndarray]) -> None:
        value: dict[str, Any] = {"trajectory_id": item.trajectory.trajectory_id, "item_digest": item.digest}
        value |= self._source.as_dict() | ({"top_k": self._source.top_k} if self._source.top_k else {})
        encoded = {name: _encoded(tensors[name]) for name in self._source.tensors}
        if len(encoded) == 1:  # its dtype is the line's
            (only,) = encoded.values()
            value |= {key: only[key] for key in ("shape", "data")}
        else:
            value["tensors"] = encoded
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(value).encode() + b"\n")
        except OSError as error:
            raise PreconditionError(f"cannot write {self.path}: {error.strerror}") from error

    def _answers(self, wanted: set[str], tensor: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(trajectory id, {"dtype", "shape", "data"} of one of its tensors) of those wanted."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                value = json.loads(line)
                if value["trajectory_id"] in wanted:
                    yield value["trajectory_id"], value["tensors"][tensor] if "tensors" in value else value

    def write_safetensors(self, wanted: set[str], *, keep: bool) -> None:
        """Write the answers to the trajectories ``wanted`` into one safetensors file, one tensor in memory at a time.

        Written by hand (8 bytes of length, a JSON header, the bytes), because the library takes all tensors at once,
        and bfloat16 only from torch. The widest dtype comes first, so that every tensor is aligned.

        Args:
            keep: leave the lines beside it, for a run that adds what is missing.
        """
        header: dict[str, Any] = {"__metadata__": self._source.as_dict()}
        end = 0
        for tensor in self._source.tensors:
            for trajectory_id, answer in self._answers(wanted, tensor):
                start, end = end, end + _decoded_size(answer["data"])
                header[self._source.key(trajectory_id, tensor)] = {
                    "dtype": "I64" if answer["dtype"] == "int64" else SAFETENSORS_DTYPES[answer["dtype"]],
                    "shape": answer["shape"],
                    "data_offsets": [start, end],
                }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        partial = self._out.with_name(self._out.name + ".partial")
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in self._source.tensors:
                for _, answer in self._answers(wanted, tensor):
                    file.write(base64.b64decode(answer["data"]))
        partial.replace(self._out)
        if not keep:
            self.path.unlink(missing_ok=True)


def _encoded(array: np.ndarray) -> dict[str, Any]:
    return {
        "dtype": dtype_name(CODES[array.dtype]),
        "shape": list(array.shape),
        "data": base64.b64encode(byte_view(array)).decode("ascii"),
    }


def _decoded_size(data: str) -> int:
    """Bytes in a base64 text."""
    return len(data) // 4 * 3 - data[-2:].count("=")
