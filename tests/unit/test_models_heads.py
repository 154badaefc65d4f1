"""Heads: what is extracted reproduces the model's logits, and what forgets a part of it does not pass."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_kernels.head import LinearHead
from tiny_models import ARCHITECTURES, logits_of, save_tiny_checkpoint, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from opd_mesh.errors import ConfigError
from opd_mesh.models.checkpoint import load_causal_lm
from opd_mesh.models.heads import extract_head, head_digest, prove_head


@pytest.fixture(scope="module", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # two threads on shared cores wait for each other


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_architecture_is_proven(arch: str, dtype: torch.dtype) -> None:
    model = tiny_model(arch).to(dtype)
    assert logits_of(model, list(range(5, 70))).float().std() >= 5
    head = extract_head(model)
    assert head.weight is model.get_output_embeddings().weight
    proof = prove_head(model, head)
    assert proof.ok, proof.reason
    assert proof.max_abs_error <= proof.tolerance


def test_forms() -> None:
    forms = {arch: extract_head(tiny_model(arch)) for arch in ARCHITECTURES}
    assert {arch for arch, head in forms.items() if head.logit_scale != 1} == {"cohere", "granite"}
    assert forms["cohere"].logit_scale == 0.25
    assert forms["granite"].logit_scale == pytest.approx(1 / 3)
    assert {arch for arch, head in forms.items() if head.soft_cap is not None} == {"gemma2"}
    assert {arch for arch, head in forms.items() if head.bias is not None} == {"phi"}
    assert all(head.valid_vocab_size is None for head in forms.values())


MUTANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "soft cap left out": ("gemma2", {"soft_cap": None}, "soft cap"),
    "soft cap invented": ("llama", {"soft_cap": 30.0}, "soft cap"),
    "scale left out": ("cohere", {"logit_scale": 1.0}, "0.25 times"),
    "scale upside down": ("granite", {"logit_scale": 3.0}, "0.111111 times"),
    "bias left out": ("phi", {"bias": None}, "bias"),
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mutants_fail_and_the_reason_says_why(name: str, dtype: torch.dtype) -> None:
    arch, change, reason = MUTANTS[name]
    model = tiny_model(arch).to(dtype)
    proof = prove_head(model, dataclasses.replace(extract_head(model), **change))
    assert not proof.ok
    assert proof.max_abs_error > proof.tolerance
    if dtype is torch.float32:
        assert reason in proof.reason


def test_wrong_weights_and_wrong_shapes_fail() -> None:
    model = tiny_model("gpt2")
    head = extract_head(model)
    other = extract_head(tiny_model("gpt2", seed=1))
    assert "weights differ" in prove_head(model, dataclasses.replace(head, weight=other.weight)).reason
    short = prove_head(model, dataclasses.replace(head, weight=head.weight[:100]))
    assert not short.ok
    assert "131 logits, the head has 100 rows" in short.reason
    narrow = prove_head(model, dataclasses.replace(head, weight=head.weight[:, :40]))
    assert not narrow.ok
    assert "cannot be computed" in narrow.reason
    one_row = head.weight.detach().clone()
    one_row[77] *= 1.01
    assert not prove_head(model, dataclasses.replace(head, weight=one_row)).ok
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = float("nan")
    proof = prove_head(model, head)
    assert not proof.ok
    assert "not finite" in proof.reason


def test_a_trunk_that_is_not_the_whole_trunk_fails() -> None:
    """A model that works on the hidden states after its base model is found out."""
    model = tiny_model("llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] + 0.3 * args[0].roll(1, -1),))
    proof = prove_head(model, extract_head(model))
    assert not proof.ok
    assert "hidden states or the weights differ" in proof.reason


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("hyperclovax", {"logits_scaling": 0.3, "attention_multiplier": 0.3}),  # multiplies, where Granite divides
        (
            "minicpm3",
            {"dim_model_base": 20, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "v_head_dim": 8},
        ),
        ("nanochat", {"final_logit_softcapping": 1.0}),
        ("gemma3_text", {"final_logit_softcapping": 1.0, "head_dim": 12}),
        ("recurrent_gemma", {"logits_soft_cap": 1.0, "lru_width": 48}),
        ("cohere2", {"logit_scale": 0.3}),
        ("opt", {"word_embed_proj_dim": 24, "ffn_dim": 56}),  # the head is narrower than the trunk
        ("gptj", {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
        ("falcon_h1", {"lm_head_multiplier": 0.4, "mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12}),
        ("mpt", {"d_model": 48, "n_heads": 4, "n_layers": 2, "logit_scale": 0.5}),  # never read by its code
    ],
)
def test_other_architectures(model_type: str, fields: dict[str, Any]) -> None:
    common = {
        "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 56, "max_position_embeddings": 128, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if "d_model" in fields or "n_embd" in fields:
        common = {"vocab_size": 101, "initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(common | fields))).eval()
    head = extract_head(model)
    proof = prove_head(model, head)
    assert proof.ok, proof.reason
    mutant = dataclasses.replace(head, logit_scale=head.logit_scale * 1.1, soft_cap=None)
    assert not prove_head(model, mutant).ok


def test_padded_vocabulary() -> None:
    model = tiny_model("llama", vocab_size=131)
    head = extract_head(model, valid_vocab_size=120)
    assert (head.vocab_size, head.valid_vocab_size, head.weight.shape[0]) == (120, 120, 131)
    assert prove_head(model, head).ok
    assert extract_head(model, valid_vocab_size=131).valid_vocab_size is None
    with pytest.raises(ConfigError, match=r"132 ids, but the head only 131 rows"):
        extract_head(model, valid_vocab_size=132)


def test_proof_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.h[0].eval()
    assert prove_head(model, extract_head(model)).ok
    assert model.training
    assert model.transformer.h[1].training
    assert not model.transformer.h[0].attn.training


def test_adapters_and_heads(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = save_tiny_checkpoint(tmp_path / "base", "llama")
    torch.manual_seed(3)
    with_head = get_peft_model(
        load_causal_lm(base).model,
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    )
    with torch.no_grad():
        head = extract_head(with_head)
        head.weight.mul_(1.5)
    assert prove_head(with_head, extract_head(with_head)).ok
    assert head_digest(extract_head(with_head)) != head_digest(extract_head(load_causal_lm(base).model))
    trunk_only = get_peft_model(
        load_causal_lm(base).model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    assert prove_head(trunk_only, extract_head(trunk_only)).ok
    assert head_digest(extract_head(trunk_only)) == head_digest(extract_head(load_causal_lm(base).model))
    on_head = get_peft_model(load_causal_lm(base).model, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match=r"unmerged adapter"):
        extract_head(on_head)


def test_digest() -> None:
    weight, bias = torch.arange(6.0).reshape(3, 2), torch.ones(3)
    form = (
        b'{"dtype":"float32","has_bias":true,"logit_scale":0.5,"rows":3,"soft_cap":null,"valid_vocab_size":2,"width":2}'
    )
    expected = hashlib.sha256(
        len(form).to_bytes(8, "little") + form + weight.numpy().tobytes() + bias.numpy().tobytes()
    ).hexdigest()
    head = LinearHead(weight, bias, logit_scale=0.5, valid_vocab_size=2)
    assert head_digest(head) == expected
    assert head_digest(dataclasses.replace(head, weight=weight.T.contiguous().T)) == expected
    for change in (
        {"weight": weight.reshape(2, 3)}, {"weight": weight.bfloat16()}, {"bias": None}, {"bias": bias * 2},
        {"logit_scale": 0.25}, {"soft_cap": 30.0}, {"valid_vocab_size": None},
    ):  # fmt: skip
        assert head_digest(dataclasses.replace(head, **change)) != expected
