"""Weights that come and go: tensors of a model on memory-mapped safetensors, and what is copied so that they can be.

A model is loaded once as transformers loads it (converted, cast, an adapter merged). What it then holds is found again
in the files it came from where these have the same bytes under the same names; otherwise it is written once to a file
of its own. From then on loading is mapping: no copy on a CPU, one copy to a GPU.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_mesh.errors import CorruptWeightsError

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


class MappedWeights:
    """Tensors of a module, each bound to a place in a safetensors file.

    Args:
        name: for logs; unique in a process.
        tensors: parameters and buffers as the module holds them. Their storage is replaced: empty while unloaded.
        places: file of each tensor, by the tensor's name, which is its name in the file.
        device: where they are loaded to.

    Made loaded, with what the tensors hold; :meth:`unload` gives the memory back.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor], places: Mapping[str, Path], device: str) -> None:
        self.name = name
        self.num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._tensors = dict(tensors)
        self._places = dict(places)
        self._device = torch.device(device)
        self._shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self._identities = {path: FileIdentity.of(path) for path in set(places.values())}
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

        Raises:
            CorruptWeightsError: the file could not be written.
        """
        held = dict(tensors)
        places = _find(held, sources)
        if places is None:
            places = dict.fromkeys(held, cache_file)
            if _find(held, [cache_file]) is None:
                _write(held, cache_file)
        return cls(name, held, places, device)

    def load(self) -> None:
        """Map the files and touch every page, so that the first forward pass does not wait for the disk.

        Raises:
            CorruptWeightsError: a file is gone, or another one than it was.
        """
        if self._loaded:
            return
        for path, identity in self._identities.items():
            if FileIdentity.of(path) != identity:
                raise CorruptWeightsError(
                    f"{path} has been replaced since it was proved; restart the server to serve the new weights"
                )
        with _opened(self._identities) as files:
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
        self._loaded = True

    def unload(self) -> None:
        """Drop the mappings (or the device's memory); the module stays, without numbers."""
        self._loaded = False
        for tensor in self._tensors.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self._device)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, mapped on its own, whether loaded or not."""
        with _opened([self._places[name]]) as files:
            tensor: Tensor = files[self._places[name]].get_tensor(name)
            return tensor


@contextmanager
def _opened(paths: Iterable[Path]) -> Iterator[dict[Path, safe_open]]:
    """Tensors taken from the files keep their mapping after the end of the block."""
    try:
        yield {path: safe_open(str(path), framework="pt") for path in paths}
    except (SafetensorError, OSError) as error:
        raise CorruptWeightsError(f"weights cannot be mapped: {error}; copy the checkpoint again") from error


def _touch(tensor: Tensor) -> None:
    tensor.reshape(-1).view(torch.uint8)[::PAGE_BYTES].max()


def _find(tensors: Mapping[str, Tensor], sources: Sequence[Path]) -> dict[str, Path] | None:
    """File by tensor name, or None where a tensor is not there with the same bytes."""
    places: dict[str, Path] = {}
    for path in sources:
        if not path.is_file():
            continue
        with _opened([path]) as files:
            names = set(files[path].keys())
            for name in names & tensors.keys():
                found, held = files[path].get_tensor(name), tensors[name]
                if found.dtype == held.dtype and found.shape == held.shape and _same_bytes(found, held):
                    places[name] = path
    return places if places.keys() == tensors.keys() else None


def _same_bytes(found: Tensor, held: Tensor) -> bool:
    def flat(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    return torch.equal(flat(found), flat(held))


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise CorruptWeightsError(
            f"cannot write {path}: {error}. Set pool.cache_dir to a folder with room for the weights"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
