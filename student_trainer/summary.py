"""``summary.json``: what the run came to, for people, reports and checks."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from opd.v1 import teacher_service_pb2

from opd_mesh import __version__
from opd_mesh.tensors import dtype_name
from student_trainer.evaluation import SET_NAMES


def summarize(
    *,
    run_id: str,
    status: str,
    error: str,
    steps: int,
    tokens_trained: int,
    wall_s: float,
    domains: Mapping[str, object],
    evaluations: list[dict[str, float]],
    cards: Mapping[str, teacher_service_pb2.TeacherCard],
    warnings: list[str],
) -> dict[str, Any]:
    """The summary as plain values; "after" values are absent until there is an evaluation behind the first."""
    first = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else {}
    last = evaluations[-1] if len(evaluations) > 1 else {}

    def before_after(key: str) -> dict[str, float]:
        return {name: line[key] for name, line in (("before", first), ("after", last)) if key in line}

    return {
        "run_id": run_id,
        "status": status,
        "error": error,
        "steps": steps,
        "heldout_kl_before": {name: first[f"heldout_kl/{name}"] for name in domains if f"heldout_kl/{name}" in first},
        "heldout_kl_after": {name: last[f"heldout_kl/{name}"] for name in domains if f"heldout_kl/{name}" in last},
        "heldout": {name: {part: before_after(f"heldout_kl/{name}/{part}") for part in SET_NAMES} for name in domains},
        "on_policy_kl": {name: before_after(f"on_policy_kl/{name}") for name in domains},
        "response_length": {name: before_after(f"response_length/{name}") for name in domains},
        "tokens_trained": tokens_trained,
        "wall_s": wall_s,
        "teachers": {teacher_id: _teacher(card) for teacher_id, card in cards.items()},
        "warnings": warnings,
        "environment": {
            "opd_mesh": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
    }


def _teacher(card: teacher_service_pb2.TeacherCard) -> dict[str, Any]:
    return {
        "model_type": card.model_type,
        "vocab_size": card.vocab_size,
        "hidden_size": card.hidden_size,
        "dtype": dtype_name(card.dtype),
        "digest": card.teacher_digest,
        "head_digest": card.head.digest,
        "head_error": card.head_error,
        "batch_layout": card.batch_layout,
        "engine": card.engine,
        "note": card.note,
    }


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    partial = run_dir / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    partial.replace(run_dir / "summary.json")
