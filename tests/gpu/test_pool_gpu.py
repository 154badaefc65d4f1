"""Teachers on a CUDA device: weights come to its memory and leave it, and answers stay what they were."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_checkpoint

from opd_mesh.config.base import parse_config
from opd_mesh.config.services import TeacherServerConfig
from teacher_server.catalogue import Catalogue
from teacher_server.engine import ScoreJob, Signal
from teacher_server.server import load_engines, open_catalogue

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ("a", "b", "c")
JOB = ScoreJob((5, 9, 12, 40, 41, 42), (2, 3, 4), Signal.HIDDEN_STATES, "float32")


@pytest.mark.asyncio
async def test_three_teachers_in_the_room_of_one(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024}
    for seed, name in enumerate(NAMES):
        save_tiny_checkpoint(tmp_path / name, "llama", seed, **sizes)
    weights = (tmp_path / "a" / "model.safetensors").stat().st_size

    async def answers(pool: dict[str, object]) -> tuple[dict[str, np.ndarray], int]:
        value = {"teachers": {name: {"path": str(tmp_path / name)} for name in NAMES}, "device": "cuda", "pool": pool}
        config = parse_config(TeacherServerConfig, value, source="test")
        queue = open_catalogue(Catalogue(config), await asyncio.to_thread(load_engines, config))
        try:
            torch.cuda.reset_peak_memory_stats()
            said = [await queue.score(name, JOB) for _ in range(2) for name in NAMES]
            peak = torch.cuda.max_memory_allocated()
        finally:
            await queue.close()
        return {name: answer["hidden_states"] for name, answer in zip(NAMES, said, strict=False)}, peak

    whole, all_there = await answers({})
    few, one_there = await answers({"memory_bytes": weights, "cache_dir": str(tmp_path / "cache")})
    for name in NAMES:
        assert np.array_equal(whole[name], few[name])
    assert one_there < all_there - weights
