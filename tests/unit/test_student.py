"""The student: what it sends as its policy, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_checkpoint, tiny_model

from opd_mesh.config.base import parse_config
from opd_mesh.config.sections import StudentConfig
from opd_mesh.errors import ConfigError, PreconditionError
from opd_mesh.models.checkpoint import load_causal_lm, served_tensors
from student_trainer.student import Student

IDS = [5, 6, 7, 8, 9, 10, 11]


def student(folder: Path, arch: str = "llama", model: dict[str, Any] | None = None, **fields: Any) -> Student:
    path = save_tiny_checkpoint(folder / "model", arch, 0, **(model or {}))
    config = parse_config(StudentConfig, {"path": str(path), **fields}, source="test")
    return Student(config, device="cpu", deterministic=False, seed=0)


def shaken(learner: Student) -> Student:
    """Trainable parameters moved, as a step would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in learner.trainable():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return learner


def logits_of_policy(learner: Student) -> torch.Tensor:
    """What a rollout server with the plain architecture says under the policy."""
    plain = load_causal_lm(learner.config.path).model
    served = dict(served_tensors(plain))
    sent = dict(learner.policy_tensors())
    assert sent.keys() == served.keys()
    with torch.no_grad():
        for name, tensor in sent.items():
            served[name].copy_(tensor)
        return plain(input_ids=torch.tensor([IDS])).logits


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "deepseek_v4"])
def test_the_policy_is_the_student(tmp_path: Path, arch: str) -> None:
    learner = shaken(student(tmp_path, arch))
    with torch.no_grad():
        wanted = learner.model(input_ids=torch.tensor([IDS])).logits
    assert torch.equal(logits_of_policy(learner), wanted)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_the_policy_of_a_lora_student_holds_the_adapter(tmp_path: Path, arch: str) -> None:
    learner = student(tmp_path, arch, lora={"rank": 4})
    before = logits_of_policy(learner)
    assert all("lora_" in name for name, _ in learner.trainable())
    shaken(learner)
    with torch.no_grad():
        wanted = learner.model(input_ids=torch.tensor([IDS])).logits
    found = logits_of_policy(learner)
    assert (found - before).abs().max() > 1  # the adapter matters
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_an_adapter_on_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tied") as error:
        student(tmp_path, "gemma2", lora={"rank": 4, "target_modules": ["embed_tokens"]})
    assert error.value.field == "student.lora.target_modules"


def test_trained_weights_are_float32() -> None:
    with pytest.raises(ConfigError, match="would not move"):
        parse_config(StudentConfig, {"path": "x", "dtype": "bfloat16"}, source="test")
    parse_config(StudentConfig, {"path": "x", "dtype": "bfloat16", "lora": {}}, source="test")


def test_checkpointed_activations_change_no_gradient(tmp_path: Path) -> None:
    gradients = []
    for index, fields in enumerate(({}, {"activation_checkpointing": True})):
        learner = student(tmp_path / str(index), model={"attention_dropout": 0.3}, **fields)
        (rows,) = learner.hidden_rows([IDS], [[2, 3, 4]])
        rows.pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in learner.trainable() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_dropout_that_cannot_be_switched_off_is_refused(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    save_tiny_checkpoint(tmp_path / "tokenizer", "llama", 0)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=131, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        dropout=0.3,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "opt" / name).write_bytes((tmp_path / "tokenizer" / name).read_bytes())
    settings = parse_config(
        StudentConfig, {"path": str(tmp_path / "opt"), "activation_checkpointing": True}, source="test"
    )
    with pytest.raises(PreconditionError, match="train mode"):
        Student(settings, device="cpu", deterministic=False, seed=0)


def test_tiny_models_are_not_all_alike() -> None:
    assert not torch.equal(
        tiny_model("llama", 0).get_output_embeddings().weight, tiny_model("llama", 1).get_output_embeddings().weight
    )


@pytest.mark.parametrize(
    ("arch", "fields", "wanted"),
    [
        ("llama", {}, {"model.embed_tokens.weight", "lm_head.weight"}),
        ("gemma2", {}, {"model.embed_tokens.weight"}),  # the head is tied to it
        ("gpt2", {}, {"transformer.wte.weight", "transformer.wpe.weight"}),
        ("llama", {"lora": {"rank": 2}}, set()),  # adapters alone are trained, and they are matrices
    ],
)
def test_embeddings_and_head_are_known_by_name(
    tmp_path: Path, arch: str, fields: dict[str, Any], wanted: set[str]
) -> None:
    assert student(tmp_path, arch, **fields).embedding_names() == wanted
