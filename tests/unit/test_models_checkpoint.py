"""Loading checkpoints: what is served is what was saved, or an error that names what is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import logits_of, save_tiny_checkpoint, tiny_model

from opd_mesh.errors import ConfigError, CorruptWeightsError, ModelNotFoundError
from opd_mesh.models.checkpoint import load_causal_lm, served_tensors, state_digest

PROBE = [5, 9, 40, 7, 7, 96, 20]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # two threads on shared cores wait for each other


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {arch: save_tiny_checkpoint(root / arch, arch) for arch in ("llama", "gpt2", "deepseek_v4", "gemma2")}


@pytest.fixture
def llama(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved["llama"], tmp_path / "llama"))


def edit_weights(folder: Path, **changes: Any) -> None:
    """Replace tensors (None removes) in model.safetensors; ``__`` stands for a dot."""
    tensors = load_file(folder / WEIGHTS)
    for key, value in changes.items():
        name = key.replace("__", ".")
        assert name in tensors
        tensors.pop(name)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# --- good ones -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["llama", "gpt2", "deepseek_v4", "gemma2"])
def test_round_trip(saved: dict[str, Path], arch: str) -> None:
    loaded = load_causal_lm(saved[arch])
    made = tiny_model(arch)
    assert loaded.model_type == arch
    assert not loaded.model.training
    assert torch.equal(logits_of(loaded.model, PROBE), logits_of(made, PROBE))
    assert loaded.weights_digest == state_digest(served_tensors(made))
    assert load_causal_lm(saved[arch], expected_digest=loaded.weights_digest).weights_digest == loaded.weights_digest


def test_sharded_is_the_same_model(saved: dict[str, Path], tmp_path: Path) -> None:
    sharded = save_tiny_checkpoint(tmp_path, "llama", max_shard_size="60KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert load_causal_lm(sharded).weights_digest == load_causal_lm(saved["llama"]).weights_digest
    next(iter(sorted(sharded.glob("model-*.safetensors")))).unlink()
    with pytest.raises(CorruptWeightsError, match=r"model-00001.* is named in .* but missing"):
        load_causal_lm(sharded)


def test_dtype_and_attention(saved: dict[str, Path]) -> None:
    loaded = load_causal_lm(saved["llama"], dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.weights_digest != load_causal_lm(saved["llama"]).weights_digest


def test_digest_is_the_documented_encoding_and_ignores_order() -> None:
    tensors = [
        ("b", torch.tensor(3.0)),
        ("a", torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T),
        ("c", torch.empty(0)),
    ]
    expected = hashlib.sha256()
    for name, dtype, shape, data in (
        ("a", "bfloat16", [3, 2], tensors[1][1].contiguous().view(torch.uint8).numpy().tobytes()),
        ("b", "float32", [], b"\x00\x00\x40\x40"),
        ("c", "float32", [0], b""),
    ):
        header = json.dumps([name, dtype, shape]).encode()
        expected.update(len(header).to_bytes(8, "little") + header + data)
    assert state_digest(tensors) == state_digest(reversed(tensors)) == expected.hexdigest()
    assert state_digest([("a", torch.zeros(2, 3))]) != state_digest([("a", torch.zeros(3, 2))])
    with pytest.raises(ValueError, match="twice"):
        state_digest([("a", torch.zeros(1)), ("a", torch.zeros(1))])


def test_served_tensors_hold_ties_once_and_routing_tables() -> None:
    gpt2 = [name for name, _ in served_tensors(tiny_model("gpt2"))]
    assert "transformer.wte.weight" in gpt2
    assert "lm_head.weight" not in gpt2
    deepseek = [name for name, _ in served_tensors(tiny_model("deepseek_v4"))]
    assert any(name.endswith("tid2eid") for name in deepseek)
    assert not any("inv_freq" in name for name in deepseek)


# --- bad ones --------------------------------------------------------------------------------------------------
def test_missing_path_and_files(llama: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"absent does not exist; give"):
        load_causal_lm(llama / "absent")
    (llama / WEIGHTS).rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"pytorch_model.bin is a pickle, which is never loaded; write"):
        load_causal_lm(llama)
    (llama / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no config.json"):
        load_causal_lm(llama)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated(llama: Path, keep: int) -> None:
    data = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(CorruptWeightsError, match=r"truncated") as caught:
        load_causal_lm(llama)
    assert WEIGHTS in str(caught.value)


def test_trailing_bytes(llama: Path) -> None:
    with (llama / WEIGHTS).open("ab") as file:
        file.write(b"\x00" * 8)
    with pytest.raises(CorruptWeightsError):
        load_causal_lm(llama)


def test_missing_tensor(llama: Path) -> None:
    edit_weights(llama, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CorruptWeightsError, match=r"model.layers.1.mlp.up_proj.weight is missing; it would be filled"):
        load_causal_lm(llama)


def test_missing_head_of_an_untied_model(llama: Path) -> None:
    edit_weights(llama, lm_head__weight=None)
    with pytest.raises(CorruptWeightsError, match=r"lm_head.weight is missing"):
        load_causal_lm(llama)


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        # DeepSeek-V4 is stored under upstream's names; transformers renames, and stacks the experts into one tensor.
        ("layers.0.ffn.gate.tid2eid", "tid2eid"),
        ("layers.1.attn.attn_sink", "sinks"),
        ("layers.1.ffn.experts.3.w2.weight", "experts.down_proj"),
        ("layers.1.ffn.experts.1.w1.weight", "load report"),
    ],
)
def test_missing_part_of_a_converted_checkpoint(
    saved: dict[str, Path], tmp_path: Path, stored: str, named: str
) -> None:
    folder = Path(shutil.copytree(saved["deepseek_v4"], tmp_path / "copy"))
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"model.{stored}"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CorruptWeightsError) as caught:
        load_causal_lm(folder)
    assert named in str(caught.value)


def test_misshapen_tensor(llama: Path) -> None:
    edit_weights(llama, lm_head__weight=torch.zeros(131, 47))
    with pytest.raises(CorruptWeightsError, match=r"lm_head.weight has shape \[131, 47\], but .* \[131, 48\]"):
        load_causal_lm(llama)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_finite(llama: Path, poison: float) -> None:
    weight = load_file(llama / WEIGHTS)["model.layers.0.mlp.down_proj.weight"]
    weight[-1, -1] = poison
    edit_weights(llama, model__layers__0__mlp__down_proj__weight=weight)
    with pytest.raises(CorruptWeightsError, match=r"model.layers.0.mlp.down_proj.weight holds NaN or infinity"):
        load_causal_lm(llama)


def test_overflow_of_the_narrower_dtype_is_found(llama: Path) -> None:
    weight = load_file(llama / WEIGHTS)["model.norm.weight"]
    weight[0] = 1e5
    edit_weights(llama, model__norm__weight=weight)
    load_causal_lm(llama)
    with pytest.raises(CorruptWeightsError, match=r"float16: model.norm.weight"):
        load_causal_lm(llama, dtype=torch.float16)


def test_wrong_digest(saved: dict[str, Path]) -> None:
    with pytest.raises(CorruptWeightsError, match=r"expected 0000") as caught:
        load_causal_lm(saved["llama"], expected_digest="0" * 64)
    assert load_causal_lm(saved["llama"]).weights_digest in str(caught.value)


def test_unusable_config(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "wonder", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(ConfigError, match=r"config.json cannot be used"):
        load_causal_lm(llama)
    (llama / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match=r"no causal language model"):
        load_causal_lm(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(ConfigError):
        load_causal_lm(llama)


# --- adapters --------------------------------------------------------------------------------------------------
def save_adapter(base: Path, folder: Path, **options: Any) -> torch.Tensor:
    """Save a LoRA adapter with random weights; returns the logits of the unmerged model, which are the truth."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=False, **options)
        model = get_peft_model(load_causal_lm(base).model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder, save_embedding_layers=False)
    return logits_of(model.eval(), PROBE)


TIED = {
    "trunk only": ({}, True),
    "head to save": ({"modules_to_save": ["lm_head"]}, False),
    "embedding to save": ({"modules_to_save": ["embed_tokens"]}, False),
    "head by LoRA": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "embedding by LoRA": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "both to save, tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "both by LoRA, tied": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
}


@pytest.mark.parametrize("case", TIED)
def test_adapter_on_a_tied_model(saved: dict[str, Path], tmp_path: Path, case: str) -> None:
    options, stays_tied = TIED[case]
    base = saved["gemma2"]
    truth = save_adapter(base, tmp_path / "adapter", **({"target_modules": ["q_proj"]} | options))
    loaded = load_causal_lm(base, adapter=tmp_path / "adapter")
    merged = logits_of(loaded.model, PROBE)
    assert (truth - logits_of(load_causal_lm(base).model, PROBE)).abs().max() > 0.5
    torch.testing.assert_close(merged, truth, rtol=1e-4, atol=1e-4)
    tied = loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert tied == stays_tied == loaded.model.config.tie_word_embeddings
    assert not any("lora" in name or "modules_to_save" in name for name, _ in loaded.model.named_parameters())
    # And it survives being saved as a checkpoint of its own.
    loaded.model.save_pretrained(tmp_path / "merged")
    again = load_causal_lm(tmp_path / "merged")
    assert again.weights_digest == loaded.weights_digest
    assert torch.equal(logits_of(again.model, PROBE), merged)


def test_adapter_on_transposed_weights(saved: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2 keeps its projections as [in, out]."""
    truth = save_adapter(
        saved["gpt2"], tmp_path, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"]
    )
    merged = load_causal_lm(saved["gpt2"], adapter=tmp_path).model
    torch.testing.assert_close(logits_of(merged, PROBE), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_adapter_on_an_untied_model(saved: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    truth = save_adapter(saved["llama"], tmp_path, target_modules=["q_proj", "down_proj"], **options)
    loaded = load_causal_lm(saved["llama"], adapter=tmp_path)
    torch.testing.assert_close(logits_of(loaded.model, PROBE), truth, rtol=1e-4, atol=1e-4)
    assert loaded.model.config.tie_word_embeddings is False


def test_bad_adapters(saved: dict[str, Path], tmp_path: Path) -> None:
    base, folder = saved["llama"], tmp_path / "adapter"
    weights = folder / "adapter_model.safetensors"
    with pytest.raises(ModelNotFoundError, match=r"no adapter_config.json"):
        load_causal_lm(base, adapter=folder)
    save_adapter(base, folder, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ModelNotFoundError, match=r"is a PEFT adapter; give its base model"):
        load_causal_lm(folder)
    good = weights.read_bytes()
    tensors = load_file(weights)
    for end in ("lora_B.weight", "lm_head.weight"):
        save_file({name: tensor for name, tensor in tensors.items() if not name.endswith(end)}, weights)
        with pytest.raises(CorruptWeightsError, match=r"is missing from the adapter"):
            load_causal_lm(base, adapter=folder)
    extra = {name.replace("layers.0", "layers.7"): tensor.clone() for name, tensor in tensors.items()}
    save_file(extra | tensors, weights)
    with pytest.raises(CorruptWeightsError, match=r"layers.7.* has no place"):
        load_causal_lm(base, adapter=folder)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file(tensors | {name: torch.zeros(3, 47)}, weights)
    with pytest.raises(CorruptWeightsError, match=r"does not fit the base model"):
        load_causal_lm(base, adapter=folder)
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, weights)
    with pytest.raises(CorruptWeightsError, match=r"q_proj.weight holds NaN"):
        load_causal_lm(base, adapter=folder)
    weights.write_bytes(good[:-3])
    with pytest.raises(CorruptWeightsError, match=r"truncated"):
        load_causal_lm(base, adapter=folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"pickles are never loaded"):
        load_causal_lm(base, adapter=folder)
    weights.write_bytes(good)
    with pytest.raises(ConfigError, match=r"does not fit"):
        load_causal_lm(saved["gpt2"], adapter=folder)
