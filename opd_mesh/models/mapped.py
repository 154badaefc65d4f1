"""Weights that come and go: tensors of a model on memory-mapped safetensors, and what is copied so that they can be.

A model is loaded once as transformers loads it (converted, cast, an adapter merged). What it then holds is found again
in the files it came from where these have the same bytes under the same names; otherwise it is written once to a file
of its own. From then on loading is mapping: no copy on a CPU, one copy to a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_mesh.errors import CorruptWeightsError

_LOG = logging.getLogger(__name__)
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Which file it was: a checkpoint that is replaced under a server must not be served as the old one."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Raises :class:`CorruptWeightsError` where the file is gone."""
        try:
            stat = path.stat()
        except OSError as error:
            raise CorruptWeightsError(f"{path} cannot be read any more: {error.strerror}") from error
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


def check_unchanged(identities: Mapping[Path, FileIdentity], *, since: str) -> None:
    """Raises :class:`CorruptWeightsError` where a file is gone, or another one than it was."""
    for path, identity in identities.items():
        if FileIdentity.of(path) != identity:
            raise CorruptWeightsError(
                f"{path} has been replaced since {since}; restart the server to serve the new weights"
            )


class MappedWeights:
    """Tensors of a module, each bound to a place in a safetensors file.

    Args:
        name: for logs; unique in a process.
        tensors: parameters and buffers as the module holds them. Their storage is replaced: empty while unloaded.
        places: file of each tensor, by the tensor's name, which is its name in the file.
        identities: of these files, when they held these bytes.
        device: where they are loaded to.

    Made loaded, with what the tensors hold; :meth:`unload` gives the memory back.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        places: Mapping[str, Path],
        identities: Mapping[Path, FileIdentity],
        device: str,
    ) -> None:
        self.name = name
        self.num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._tensors = dict(tensors)
        self._places = dict(places)
        self._device = torch.device(device)
        self._shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self._identities = {path: identities[path] for path in set(places.values())}
        self._loaded = True

    @classmethod
    def bind(
        cls,
        name: str,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        sources: Sequence[Path],
        cache_file: Path,
        device: str,
    ) -> MappedWeights:
        """Find every tensor in ``sources``, bytes compared; write ``cache_file`` where one is not there.

        Servers of one machine may do so at the same time: one writes, the others find what it wrote.

        Raises:
            CorruptWeightsError: the file could not be written.
        """
        held = dict(tensors)
        # Before the bytes are compared: what is put in a file's place later is then noticed.
        identities = {path: FileIdentity.of(path) for path in sources if path.is_file()}
        places = _find(held, list(identities))
        if places is None:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(cache_file.with_suffix(".lock")):
                if not _holds(cache_file, held):
                    _write(held, cache_file)
                identities = {cache_file: FileIdentity.of(cache_file)}
            places = dict.fromkeys(held, cache_file)
        return cls(name, held, places, identities, device)

    def check(self) -> None:
        """Raises :class:`CorruptWeightsError` where a file is gone, or another one than it was."""
        check_unchanged(self._identities, since="it was proved")

    def load(self) -> None:
        """Map the files and touch every page, so that the first forward pass does not wait for the disk.

        Raises:
            CorruptWeightsError: as :meth:`check`, or a tensor is not what it was.
        """
        if self._loaded:
            return
        try:
            self.check()
            self._map()
            self.check()
        except BaseException:
            self.unload()
            raise
        self._loaded = True

    def _map(self) -> None:
        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(_opened(path)) for path in self._identities}
            for name, tensor in self._tensors.items():
                mapped = files[self._places[name]].get_tensor(name)
                if (mapped.shape, mapped.dtype) != self._shapes[name]:
                    raise CorruptWeightsError(f"{self._places[name]}: {name} is not what it was")
                if self._device.type == "cpu":
                    _touch(mapped)
                    tensor.data = mapped
                else:
                    tensor.data = mapped.to(self._device)
        if self._device.type != "cpu":
            torch.cuda.synchronize(self._device)  # the pages may be dropped only once they are copied

    def unload(self) -> None:
        """Drop the mappings (or the device's memory); the module stays, without numbers."""
        self._loaded = False
        for tensor in self._tensors.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the next set may belong to an engine with an allocator of its own

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, mapped on its own, whether loaded or not. Raises as :meth:`check`."""
        with _opened(self._places[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        self.check()
        return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Tensors taken from the file keep its mapping after the end of the block."""
    try:
        yield safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CorruptWeightsError(f"{path} cannot be mapped: {error}; copy it again") from error


def _touch(tensor: Tensor) -> None:
    if tensor.numel():
        tensor.reshape(-1).view(torch.uint8)[::PAGE_BYTES].max()


def _find(tensors: Mapping[str, Tensor], sources: Sequence[Path]) -> dict[str, Path] | None:
    """File by tensor name, or None where a tensor is not there with the same bytes."""
    places: dict[str, Path] = {}
    for path in sources:
        with _opened(path) as file:
            for name in set(file.keys()) & tensors.keys():
                found, held = file.get_tensor(name), tensors[name]
                if found.dtype == held.dtype and found.shape == held.shape and _same_bytes(found, held):
                    places[name] = path
    return places if places.keys() == tensors.keys() else None


def _holds(cache_file: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it was written before, and whole."""
    try:
        return cache_file.is_file() and _find(tensors, [cache_file]) is not None
    except CorruptWeightsError as error:
        _LOG.warning("%s; it is written again", error)
        return False


def _same_bytes(found: Tensor, held: Tensor) -> bool:
    def flat(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    return torch.equal(flat(found), flat(held))


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise CorruptWeightsError(
            f"cannot write {path}: {error}. Set pool.cache_dir to a folder with room for the weights"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
