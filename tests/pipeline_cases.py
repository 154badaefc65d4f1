"""A pipeline's recipe for tests: small, and with every kind of stage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from opd_mesh.config.base import parse_config
from opd_mesh.config.pipeline import PipelineRecipe

_SPLITS = {"validation": 0.2, "test": 0.2}
WHOLE: dict[str, Any] = {
    "pipeline": {"name": "tiny", "jobs": 2},
    "model": {
        "init": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "tie_word_embeddings": False,
            },
            "characters": "0123456789 +-=abcdefghijklmnopqrstuvwxyz",
        }
    },
    "domains": {
        "add": {
            "reasoning_gym": {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "max_digits": 1}},
            "prompt": "{{ metadata.expression | replace(' ', '') }}=",
            "verifier": {"name": "reasoning_gym"},
            "splits": _SPLITS,
        },
        "reverse": {
            "reasoning_gym": {"task": "spell_backward", "params": {"min_word_len": 3, "max_word_len": 6}},
            "prompt": "{{ metadata.word }}=",
            "verifier": {"name": "reasoning_gym"},
            "splits": _SPLITS,
        },
    },
    "defaults": {
        "run": {"threads": 1, "deterministic": True},
        "rollout": {"max_new_tokens": 6, "engine": {"max_context_tokens": 64}},
        "optimizer": {"lr": 1e-3},
        "batch": {"prompts_per_step": 4},
        "checkpoint": {"every_steps": 1},
        "evaluation": {"prompts_per_domain": 0, "accuracy": {"prompts_per_domain": 4}},
    },
    "stages": {
        "base": {"kind": "base", "domains": {"add": {"share": 0.5}, "reverse": {}}, "recipe": {"run": {"steps": 2}}},
        "add": {"kind": "specialist", "from": "base", "domains": ["add"], "sft": {"run": {"steps": 2}}},
        "reverse": {
            "kind": "specialist",
            "from": "base",
            "domains": ["reverse"],
            "grpo": {"run": {"steps": 2}, "batch": {"responses_per_prompt": 2}},
        },
        "cold": {
            "kind": "cold_start",
            "from": "base",
            "teachers": {"add": "add", "reverse": "reverse"},
            "responses": {"prompts_per_domain": 6},
            "recipe": {"run": {"steps": 2}},
        },
        "opd": {
            "kind": "opd",
            "from": "cold",
            "teachers": {"add": {"add": 1.0}, "reverse": "reverse"},
            "recipe": {"run": {"steps": 2}},
        },
        "soup": {"kind": "soup", "of": ["add", "reverse"]},
        "evaluate": {
            "kind": "evaluate",
            "models": ["base", "add", "reverse", "opd", "soup"],
            "prompts_per_domain": 4,
        },
    },
}


def changed(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The recipe as plain values; ``changes`` are by dotted key, and one of None takes the key away."""
    value = copy.deepcopy(WHOLE)
    for path, setting in (changes or {}).items():
        *before, last = path.split(".")
        place = value
        for key in before:
            place = place.setdefault(key, {})
        if setting is None:
            place.pop(last)
        else:
            place[last] = setting
    return value


def pipeline(changes: dict[str, Any] | None = None) -> PipelineRecipe:
    """The recipe, validated."""
    return parse_config(PipelineRecipe, changed(changes), source="test")


def files_below(folder: Path) -> dict[str, int]:
    """Modification time (ns) of every file, by relative name."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
