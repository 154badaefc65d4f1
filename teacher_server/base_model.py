"""Models in memory, shared: one checkpoint serves every teacher that is it, or a LoRA adapter of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_mesh.models.adapters import InjectedAdapter, SharedBase, reason_not_to_share
from opd_mesh.models.checkpoint import load_causal_lm, served_tensors, skeleton, weight_files
from opd_mesh.models.mapped import MappedWeights
from opd_mesh.models.store import default_cache_dir, local_folder

log = logging.getLogger("teacher_server")


class BaseModel:
    """A loaded checkpoint, an adapter merged into it where it has one of its own.

    Args:
        cache_dir: for weights that must be written to be mapped; None: the weights stay in memory as loaded.

    Attributes:
        weights: None where they stay.

    Raises:
        ModelNotFoundError, CorruptWeightsError, ConfigError: as :func:`load_causal_lm`.
    """

    def __init__(
        self, name: str, folder: Path, adapter: Path | None, *, dtype: torch.dtype, device: str, cache_dir: Path | None
    ) -> None:
        loaded = load_causal_lm(folder, adapter=adapter, dtype=dtype, device=device)
        self.name = name
        self.folder = folder
        self.model: Any = loaded.model
        self.model_type = loaded.model_type
        self.digest = loaded.weights_digest
        self.device = torch.device(device)
        self._adapters: dict[str, tuple[InjectedAdapter, MappedWeights | None]] = {}
        self._cache_dir = cache_dir
        self._shared = SharedBase(self.model)
        # By identity, for a tied weight bears the embedding's name.
        served = dict(served_tensors(self.model))
        self._names = {id(tensor): key for key, tensor in served.items()}
        self.weights = self._map(self.digest, served, [] if adapter is not None else weight_files(folder))

    def _map(self, digest: str, tensors: Mapping[str, Tensor], sources: list[Path]) -> MappedWeights | None:
        if self._cache_dir is None:
            return None
        cache_file = self._cache_dir / "weights" / f"{digest}.safetensors"
        return MappedWeights.bind(
            f"{self.name}:{digest[:12]}",
            tensors.items(),
            sources=sources,
            cache_file=cache_file,
            device=str(self.device),
        )

    def add_adapter(self, folder: Path) -> tuple[InjectedAdapter, MappedWeights | None]:
        """Put a LoRA adapter above the base, once. Its tensors come and go on their own."""
        adapter = self._shared.add(folder)
        if adapter.digest in self._adapters:
            self._shared.remove(adapter)
        else:
            self._adapters[adapter.digest] = adapter, self._map(adapter.digest, adapter.tensors, [])
        return self._adapters[adapter.digest]

    def activate(self, adapter: InjectedAdapter | None) -> None:
        """What the model computes from now on. Only the computing thread may call it, once the server runs."""
        self._shared.activate(adapter)

    def same_as(self, other: BaseModel) -> bool:
        """Whether the two compute the same."""
        return self.digest == other.digest and _config_text(self.model) == _config_text(other.model)

    def cpu_copy(self, tensor: Tensor) -> Tensor:
        """A parameter's value on the CPU, whether it is loaded or not."""
        name = self._names.get(id(tensor))
        if self.weights is None or name is None:
            return tensor.detach().cpu()
        return self.weights.read(name)


def _config_text(model: Any) -> str:
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)


class BaseModels:
    """Finds the model that a teacher needs among those that are loaded, or loads it."""

    def __init__(self, *, device: str, keep_in_memory: bool, cache_dir: Path | None) -> None:
        self._device = device
        self._cache_dir = cache_dir or default_cache_dir()
        self._mapped = not keep_in_memory
        self._by_source: dict[tuple[Path, Path | None, torch.dtype], BaseModel] = {}
        self._vocabularies: dict[str, Mapping[str, int]] = {}
        self._skeleton = lru_cache(maxsize=1)(skeleton)  # the adapters of one base usually stand together

    def folder_of(self, source: Path | str) -> Path:
        """A local copy of what a URL holds, or the folder itself."""
        return local_folder(source, self._cache_dir)

    def vocabulary(self, fingerprint: str, vocabulary: Mapping[str, int]) -> Mapping[str, int]:
        """Experts of one base have one vocabulary, of ten and more megabytes: kept once."""
        return self._vocabularies.setdefault(fingerprint, vocabulary)

    def get(self, folder: Path, adapter: Path | None, dtype: torch.dtype) -> tuple[BaseModel, Path | None]:
        """The model, and the adapter that must still be put above it, where it can stand there."""
        if adapter is None:
            return self._load(folder, None, dtype), None
        reason = reason_not_to_share(self._skeleton(folder), adapter)
        if reason is None:
            return self._load(folder, None, dtype), adapter
        log.info("%s is merged into a copy of its base: %s", adapter, reason)
        return self._load(folder, adapter, dtype), None

    def _load(self, folder: Path, adapter: Path | None, dtype: torch.dtype) -> BaseModel:
        key = (folder.resolve(), adapter.resolve() if adapter else None, dtype)
        if key not in self._by_source:
            name = (adapter or folder).name
            base = BaseModel(
                name, folder, adapter, dtype=dtype, device=self._device,
                cache_dir=self._cache_dir if self._mapped else None,
            )  # fmt: skip
            twin = next((other for other in self._by_source.values() if other.same_as(base)), None)
            if twin is not None:
                log.info("%s has the weights of %s: they are in memory once", name, twin.folder)
            self._by_source[key] = twin or base
        return self._by_source[key]
