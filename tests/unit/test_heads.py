"""The trainer's store of heads: how many are alive, and in which order they leave."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from opd_kernels import LinearHead
from safetensors.torch import save_file

from opd_mesh.signals import SignalKind
from opd_mesh.trajectory import Trajectory
from student_trainer.batch import HeldAnswer, Mark, Sample, plan_batch
from student_trainer.heads import HeadStore
from student_trainer.shares import shares_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abcd":
        form = '{"logit_scale": 1.0, "soft_cap": null, "valid_vocab_size": null}'
        save_file({"weight": torch.full((5, 2), float(ord(name)))}, tmp_path / f"{name}.safetensors", {"form": form})
    return tmp_path


def test_the_least_recently_used_head_leaves_first(folder: Path) -> None:
    store = HeadStore(folder, "cpu", resident=2)
    for name, loads in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4), ("c", 5)):
        assert store.get(name).weight[0, 0] == ord(name)
        assert store.loads == loads


@pytest.mark.parametrize("resident", [1, 2])
def test_no_more_heads_are_alive_than_may_be_resident(folder: Path, resident: int) -> None:
    store = HeadStore(folder, "cpu", resident=resident)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    load = store._load

    def counting(digest: str) -> LinearHead:
        nonlocal most
        head = load(digest)
        alive.add(head.weight)
        most = max(most, len(alive))
        return head

    store._load = counting  # type: ignore[method-assign]
    trajectory = Trajectory("t", "d", token_ids=(0, 1, 2), scored_spans=((1, 3),))
    answer = HeldAnswer({"hidden_states": np.zeros((2, 2), np.float32)})
    sample = Sample(trajectory, tuple(Mark(name, 1.0, SignalKind.HIDDEN_STATES, name, answer) for name in "abcd"))
    shares = 0
    plan = plan_batch([sample], tokens_per_pass=9, heads_together=resident)
    for visit in plan.visits:
        for share in shares_of([sample], plan.shares(visit), store, torch.device("cpu")):
            assert len(share.teachers) == resident
            shares += 1
            del share
    assert shares == 4 // resident
    assert store.loads == 4
    assert most == resident == store.peak
    store.release_all()
    assert len(alive) == store.peak == 0
    store.get("d")
    assert store.loads == 5
