"""Keys and values of unfinished requests on the disk, so that a server that was told to go need not read again.

A convenience: what is missing, damaged, of other weights or of other lengths, is read again from the tokens. One
safetensors file per request in ``kv/`` beside the log; metadata say whose it is, and hold a digest of the tensors.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_mesh.models.checkpoint import state_digest
from rollout_server.engine import RolloutEngine
from rollout_server.requests import RequestState

log = logging.getLogger("rollout_server")


class SavedKv:
    """Of one log.

    Args:
        log_path: the log's folder.
    """

    def __init__(self, log_path: Path) -> None:
        self._folder = log_path / "kv"

    def save(self, engine: RolloutEngine, states: Iterable[RequestState], policy_digest: str) -> None:
        """Write what the engine can export. Where the disk says no, the rest is left out."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        saved = 0
        try:
            for state in states:
                tensors = engine.export_kv(state.params.key)
                if tensors is None:
                    continue
                contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
                metadata = {
                    "handle": str(state.handle),
                    "policy": policy_digest,
                    "sha256": state_digest(contiguous.items()),
                }
                save_file(contiguous, self._folder / f"{state.handle}.safetensors", metadata)
                saved += 1
        except (OSError, SafetensorError) as error:
            log.warning("keys and values could not all be saved: %s", error)
        log.info("saved keys and values of %d unfinished requests", saved)

    def take(self, policy_digest: str) -> dict[int, dict[str, Tensor]]:
        """By the log's handle, those of these weights; the files go."""
        found: dict[int, dict[str, Tensor]] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
                    if metadata.get("policy") == policy_digest:
                        tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
                        if state_digest(tensors.items()) != metadata["sha256"]:  # never written to their end
                            raise ValueError("its bytes are not those that were saved")
                        found[int(metadata["handle"])] = tensors
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                log.warning("%s cannot be used: %s", path, error)
        shutil.rmtree(self._folder, ignore_errors=True)
        return found
