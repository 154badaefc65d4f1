"""Teachers' heads: downloaded once, kept on disk by digest, one or a few at a time on the device."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from pathlib import Path

from opd_kernels import LinearHead
from safetensors import safe_open
from safetensors.torch import save_file

from opd_mesh.clients.teacher import HeadData
from opd_mesh.errors import CorruptWeightsError
from opd_mesh.models.heads import head_digest
from opd_mesh.torch_tensors import from_numpy


def head_of(data: HeadData) -> LinearHead:
    """The head that a teacher sent, verified against its digest.

    Raises:
        CorruptWeightsError: form and bytes do not hash to ``form.digest``.
    """
    form = data.form
    head = LinearHead(
        weight=from_numpy(data.tensors["weight"]),
        bias=from_numpy(data.tensors["bias"]) if form.has_bias else None,
        logit_scale=form.logit_scale,
        soft_cap=form.soft_cap if form.HasField("soft_cap") else None,
        valid_vocab_size=None if form.vocab_size == form.padded_vocab_size else form.vocab_size,
    )
    found = head_digest(head)
    if found != form.digest:
        raise CorruptWeightsError(f"the head received hashes to {found[:16]}…, {form.digest[:16]}… was announced")
    return head


class HeadStore:
    """Heads on disk, at most ``resident`` of them in memory, the least recently used leaving first.

    Attributes:
        loads: how often a head was brought to the device since the store was made.
        peak: of heads that were there together since :meth:`release_all`.
    """

    def __init__(self, folder: Path, device: str, *, resident: int = 1) -> None:
        self._folder = folder
        self._device = device
        self._limit = resident
        self._resident: OrderedDict[str, LinearHead] = OrderedDict()
        self._lock = threading.Lock()  # evaluation and update run in threads of the pool
        self.loads = 0
        self.peak = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, digest: str) -> bool:
        return self._path(digest).exists()

    def add(self, data: HeadData) -> None:
        """Verify a download and keep it. Raises :class:`CorruptWeightsError`."""
        head = head_of(data)
        tensors = {"weight": head.weight} | ({"bias": head.bias} if head.bias is not None else {})
        form = {
            "logit_scale": head.logit_scale,
            "soft_cap": head.soft_cap,
            "valid_vocab_size": head.valid_vocab_size,
        }
        path = self._path(data.form.digest)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"form": json.dumps(form)})
        os.replace(partial, path)

    def get(self, digest: str) -> LinearHead:
        """The head, on the device; before it is loaded, room is made for it."""
        with self._lock:
            if digest not in self._resident:
                while len(self._resident) >= self._limit:
                    self._resident.popitem(last=False)
                self._resident[digest] = self._load(digest)
                self.loads += 1
                self.peak = max(self.peak, len(self._resident))
            self._resident.move_to_end(digest)
            return self._resident[digest]

    def release_all(self) -> None:
        """The mini-batch is done: its heads' memory is the trunk's and the rollout's until the next."""
        with self._lock:
            self._resident.clear()
            self.peak = 0

    def _load(self, digest: str) -> LinearHead:
        with safe_open(self._path(digest), framework="pt", device=self._device) as file:
            form = json.loads(file.metadata()["form"])
            names = set(file.keys())
            return LinearHead(
                weight=file.get_tensor("weight"),
                bias=file.get_tensor("bias") if "bias" in names else None,
                **form,
            )

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"
