"""Checkpoints: what comes back is what was written, and damage is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from opd_mesh.errors import CorruptWeightsError, NotFoundError
from student_trainer.checkpoint import (
    OPTIMIZER,
    STATE,
    STUDENT,
    LoadedCheckpoint,
    TrainerState,
    complete_checkpoints,
    load_newest,
    save_checkpoint,
)


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.randn(3, 5, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "view": torch.randn(6, 4, generator=generator).T,
    }


def save(folder: Path, step: int, *, keep: int = 10, content: int | None = None) -> Path:
    """A checkpoint of ``step``; what is in it follows from ``content`` (default: the step)."""
    content = step if content is None else content
    state = TrainerState(
        step=step,
        lineage=3,
        cursors={"sums": content * 7},
        drawn={"sums": content * 6},
        consumed_external=[f"x{content}"],
        tokens_trained=content * 100,
        dropped_external=2,
        wall_s=content + 0.1,
    )
    moments = {f"exp_avg.{name}": tensor * 2 for name, tensor in tensors(content).items()}
    return save_checkpoint(folder, tensors(content), moments, state, keep=keep)


def assert_holds(loaded: LoadedCheckpoint, step: int, content: int | None = None) -> None:
    content = step if content is None else content
    assert loaded.path.name == f"step-{step:06d}"
    assert loaded.state == TrainerState(
        step, 3, {"sums": content * 7}, {"sums": content * 6}, [f"x{content}"], content * 100, 2, content + 0.1
    )
    assert loaded.student.keys() == tensors(content).keys()
    for name, tensor in tensors(content).items():
        assert loaded.student[name].dtype == tensor.dtype
        assert torch.equal(loaded.student[name], tensor)
        assert torch.equal(loaded.optimizer[f"exp_avg.{name}"], tensor * 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def steps(folder: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(folder)]


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    path = save(folder, 4)
    assert sorted(file.name for file in path.iterdir()) == [OPTIMIZER, STATE, STUDENT]
    assert_holds(load_newest(folder), 4)
    save(folder, 12)
    assert_holds(load_newest(folder), 12)


def test_a_parameter_that_trains_is_not_kept_by_reference(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    path = save_checkpoint(tmp_path, {"w": weight}, {}, TrainerState(step=1), keep=1)
    with torch.no_grad():
        weight += 1
    assert torch.equal(load_newest(tmp_path).student["w"], torch.zeros(3))
    assert path == load_newest(tmp_path).path


def damage_by(kind: str, path: Path) -> None:
    """Do to a checkpoint what disks and people do."""
    if kind == "bit in the student":
        flip_a_bit(path / STUDENT)
    elif kind == "bit in the optimizer":
        flip_a_bit(path / OPTIMIZER)
    elif kind == "truncated":
        content = (path / STUDENT).read_bytes()
        (path / STUDENT).write_bytes(content[: len(content) // 2])
    elif kind == "missing file":
        (path / OPTIMIZER).unlink()
    elif kind == "state cut off":
        text = (path / STATE).read_text()
        (path / STATE).write_text(text[: len(text) // 2])
    elif kind == "state without digests":
        body = json.loads((path / STATE).read_text())
        (path / STATE).write_text(json.dumps({**body, "sha256": {}}))
        flip_a_bit(path / STUDENT)
    elif kind == "state is a list":
        (path / STATE).write_text("[]")
    elif kind == "digests are a list":
        body = json.loads((path / STATE).read_text())
        (path / STATE).write_text(json.dumps({**body, "sha256": []}))
    elif kind == "unknown key":
        body = json.loads((path / STATE).read_text())
        body["state"]["stepp"] = 1
        (path / STATE).write_text(json.dumps(body))
    elif kind == "other format":
        body = json.loads((path / STATE).read_text())
        (path / STATE).write_text(json.dumps({**body, "format": 99}))


KINDS = [
    "bit in the student",
    "bit in the optimizer",
    "truncated",
    "missing file",
    "state cut off",
    "state without digests",
    "state is a list",
    "digests are a list",
    "unknown key",
    "other format",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_newest_is_passed_over(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 4)
    damage_by(kind, save(tmp_path, 8))
    assert_holds(load_newest(tmp_path), 4)
    assert "step-000008 cannot be used" in caplog.text


def test_when_all_are_damaged_each_is_named(tmp_path: Path) -> None:
    for step in (4, 8):
        flip_a_bit(save(tmp_path, step) / STUDENT)
    with pytest.raises(CorruptWeightsError, match=r"every checkpoint is damaged: step-000008.*; step-000004"):
        load_newest(tmp_path)


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: (folder / "step-000004").mkdir(parents=True)])
def test_when_there_is_none(tmp_path: Path, make: object) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(NotFoundError, match="holds no complete checkpoint"):
        load_newest(tmp_path)


def test_folders_that_are_not_complete_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, 4)
    shutil.copytree(save(tmp_path, 6), tmp_path / ".partial-000007")
    (tmp_path / "step-000006" / STATE).unlink()  # as if ended between the files
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-notes" / STATE).write_text("{}")
    assert steps(tmp_path) == ["step-000004"]
    assert_holds(load_newest(tmp_path), 4)
    # And the step is written when its turn comes again.
    save(tmp_path, 6)
    assert_holds(load_newest(tmp_path), 6)


def test_what_an_interrupted_save_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".partial-000004").mkdir(parents=True)
    (tmp_path / ".partial-000004" / STUDENT).write_bytes(b"half")
    save(tmp_path, 4)
    assert_holds(load_newest(tmp_path), 4)
    assert not (tmp_path / ".partial-000004").exists()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=keep)
        assert steps(tmp_path) == [f"step-{kept:06d}" for kept in range(max(1, step - keep + 1), step + 1)]


def test_a_million_steps_come_after_the_ones_before(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step, keep=1)
    assert steps(tmp_path) == ["step-1000000"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    # A run that passed over an unreadable newest may come to that step with other trajectories from outside.
    path = save(tmp_path, 4)
    before = (path / STATE).stat().st_mtime_ns
    assert save(tmp_path, 4) == path
    assert (path / STATE).stat().st_mtime_ns != before
    assert_holds(load_newest(tmp_path), 4)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    # A run that passed over its damaged newest comes to that step again, and must not take it for saved.
    save(tmp_path, 4)
    flip_a_bit(save(tmp_path, 8) / STUDENT)
    save(tmp_path, 8)
    assert_holds(load_newest(tmp_path), 8)


def test_a_damaged_later_one_does_not_push_out_what_is_being_written(tmp_path: Path) -> None:
    save(tmp_path, 4)
    flip_a_bit(save(tmp_path, 8) / STUDENT)
    path = save(tmp_path, 6, keep=1)
    assert path.exists()
    assert_holds(load_newest(tmp_path), 6)
