"""What a checkpoint's files say before TensorRT-LLM loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_checkpoint

from opd_mesh.errors import ConfigError
from teacher_server.tensorrt_checkpoint import CheckpointFacts

VALID = 131


def test_a_quantized_head_is_not_served(tmp_path: Path) -> None:
    path = save_tiny_checkpoint(tmp_path / "head", "llama", 0)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"float8_e4m3fn .* is the head quantized"):
        CheckpointFacts.read(path).head(vocab_size=VALID, dtype=torch.bfloat16)
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="do not hold the head's weight"):
        CheckpointFacts.read(path).head(vocab_size=VALID, dtype=torch.bfloat16)


def test_the_digest_of_shards_is_that_of_one_file(tmp_path: Path) -> None:
    whole = save_tiny_checkpoint(tmp_path / "whole", "llama", 0)
    sharded = save_tiny_checkpoint(tmp_path / "shards", "llama", 0, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert CheckpointFacts.read(sharded).digest == CheckpointFacts.read(whole).digest


def test_the_cache_of_latent_attention_and_of_other_names() -> None:
    def kv_bytes(config: dict[str, Any]) -> int:
        return CheckpointFacts(Path("nowhere"), (), "", 0, "", "", 48, VALID, "", config, {}).kv_bytes_per_token(2)

    assert kv_bytes({"num_hidden_layers": 3, "kv_lora_rank": 16, "qk_rope_head_dim": 8}) == 3 * 24 * 2
    assert kv_bytes({"n_layer": 3, "n_head": 4}) == 2 * 3 * 4 * 12 * 2
    with pytest.raises(ConfigError, match="names no num_hidden_layers"):
        kv_bytes({})
