"""Durable states of a run: safetensors and JSON, written aside, synced, then renamed into place.

``checkpoints/step-000020/`` holds ``student.safetensors`` (what is trained), ``optimizer.safetensors`` and
``state.json``, which is written last and names the SHA-256 of the other two: a folder without it does not count.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_mesh.errors import CorruptWeightsError, NotFoundError
from opd_mesh.files import sha256, sync

log = logging.getLogger("student_trainer")
STUDENT, OPTIMIZER, STATE = "student.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1
# How a checkpoint that is not what was written shows itself.
DAMAGE = (CorruptWeightsError, OSError, ValueError, KeyError, TypeError)


@dataclass
class TrainerState:
    """Everything but tensors that the next step depends on."""

    step: int = 0
    lineage: int = 0
    # Prompts: per domain the place in its source, and how many were drawn.
    cursors: dict[str, int] = field(default_factory=dict)
    drawn: dict[str, int] = field(default_factory=dict)
    # Exactly-once: own trajectories are consumed up to `step` (their ids carry it); those from outside by id.
    consumed_external: list[str] = field(default_factory=list)
    tokens_trained: int = 0
    dropped_external: int = 0
    wall_s: float = 0.0


def save_checkpoint(
    folder: Path, student: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: TrainerState, *, keep: int
) -> Path:
    """Write one checkpoint durably and remove all but the newest ``keep``. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:06d}"
    partial = folder / f".partial-{state.step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    digests = {}
    for name, tensors in ((STUDENT, student), (OPTIMIZER, optimizer)):
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial / name)
        sync(partial / name)
        digests[name] = sha256(partial / name)
    body = {"format": FORMAT, "sha256": digests, "state": asdict(state)}
    (partial / STATE).write_text(json.dumps(body, indent=1), encoding="utf-8")
    sync(partial / STATE)
    sync(partial)
    if final.exists():  # a run that passed over it, damaged or unreadable then, has come to its step again
        shutil.rmtree(final)
    partial.replace(final)
    sync(folder)
    # Later ones are none of ours: this run passed over them because they are damaged.
    for old in [path for path in complete_checkpoints(folder) if _step_of(path) <= state.step][:-keep]:
        shutil.rmtree(old)
    log.info("checkpoint %s", final)
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal() and (path / STATE).exists()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A verified checkpoint."""

    path: Path
    student: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainerState


def load_newest(folder: Path) -> LoadedCheckpoint:
    """The newest checkpoint whose bytes are what was written; a damaged one is passed over with a warning.

    Raises:
        NotFoundError: there is none to resume from.
        CorruptWeightsError: there are some, and all are damaged.
    """
    candidates = complete_checkpoints(folder)
    if not candidates:
        raise NotFoundError(f"{folder} holds no complete checkpoint; start the run anew with another --run-dir")
    damage = []
    for path in reversed(candidates):
        try:
            return _load(path)
        except DAMAGE as error:
            log.warning("checkpoint %s cannot be used: %s", path, error)
            damage.append(f"{path.name}: {error}")
    raise CorruptWeightsError("every checkpoint is damaged: " + "; ".join(damage))


def _load(path: Path) -> LoadedCheckpoint:
    body: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    if body["format"] != FORMAT:
        raise CorruptWeightsError(f"format {body['format']}, this release reads {FORMAT}")
    for name in (STUDENT, OPTIMIZER):
        expected, found = body["sha256"][name], sha256(path / name)
        if found != expected:
            raise CorruptWeightsError(f"{name} hashes to {found[:16]}…, {expected[:16]}… was written")
    return LoadedCheckpoint(
        path=path,
        student=load_file(path / STUDENT),
        optimizer=load_file(path / OPTIMIZER),
        state=TrainerState(**body["state"]),
    )
