"""Models that are made without training: random ones, means, merged adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_cases import WHOLE
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_checkpoint, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_mesh.config.pipeline import InitConfig
from opd_mesh.errors import ConfigError, PreconditionError, TokenizerMismatchError
from opd_mesh.models.checkpoint import load_causal_lm
from opd_mesh.pipeline.making import character_tokenizer, make, make_random, make_soup


def init(**changes: Any) -> InitConfig:
    return InitConfig.model_validate(WHOLE["model"]["init"] | changes)


# --- random ----------------------------------------------------------------------------------------------------
def test_a_character_tokenizer_keeps_every_text_and_adds_nothing() -> None:
    tokenizer = character_tokenizer("ab \n1", ["<think>", "</think>"])
    text = "<think>a b\n1</think>ba"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 9
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["<pad>", "<bos>", "<eos>", "<unk>", "a"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("x")["input_ids"] == [3]
    with pytest.raises(ConfigError, match="stands there twice"):
        character_tokenizer("ab", ["a"])


def test_with_numbers_a_run_of_digits_is_one_token() -> None:
    tokenizer = character_tokenizer("a -", ["<think>"], 1000)
    text = "<think>7a -999 10 0"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<think>", "7", "a", " ", "-", "999", " ", "10", " ", "0"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == init(characters="a -", extra_tokens=["<think>"], numbers=1000).tokenizer_size == 1008
    for unknown in ("1000", "07", "٣"):
        assert tokenizer(unknown)["input_ids"] == [3]


def test_digits_among_the_characters_are_refused_beside_numbers() -> None:
    with pytest.raises(ValueError, match="take 13 out"):
        init(characters="a31", numbers=10)


def test_a_random_model_is_that_of_its_seed(tmp_path: Path) -> None:
    config = init(extra_tokens=["<think>"], vocab_size=64)
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        make_random(config, seed, tmp_path / name)
    one, same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert one["lm_head.weight"].shape == (64, 32)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(tokenizer) == config.tokenizer_size == 45
    assert tokenizer.decode(tokenizer("1+2=<think>")["input_ids"]) == "1+2=<think>"
    model = load_causal_lm(tmp_path / "one").model
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 0)


def test_without_a_size_the_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    make_random(init(), 0, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 44


@pytest.mark.parametrize("config", [{"model_type": "no such"}, {"model_type": "llama", "num_attention_heads": "x"}])
def test_a_model_that_transformers_cannot_build_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot build"):
        make_random(init(config=config), 0, tmp_path)


# --- means -----------------------------------------------------------------------------------------------------
def test_a_soup_is_the_mean_in_double_precision_to_the_bit(tmp_path: Path) -> None:
    paths = [save_tiny_checkpoint(tmp_path / str(seed), "llama", seed) for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    make_soup(paths, weights, tmp_path / "soup")
    tensors = [load_file(path / "model.safetensors") for path in paths]
    soup = load_file(tmp_path / "soup" / "model.safetensors")
    assert soup.keys() == tensors[0].keys()
    for name, found in soup.items():
        expected = sum(weight * part[name].double() for weight, part in zip(weights, tensors, strict=True))
        assert torch.equal(found, expected.float()), name
    naive = sum(weight * part["lm_head.weight"] for weight, part in zip(weights, tensors, strict=True))
    assert not torch.equal(soup["lm_head.weight"], naive)  # so that the test above tells the two apart
    assert AutoTokenizer.from_pretrained(tmp_path / "soup").get_vocab() == (
        AutoTokenizer.from_pretrained(paths[0]).get_vocab()
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "soup")


def test_a_soup_of_one_model_is_that_model(tmp_path: Path) -> None:
    path = save_tiny_checkpoint(tmp_path / "one", "llama", 0)
    make_soup([path, path], [0.5, 0.5], tmp_path / "soup")
    one, soup = load_file(path / "model.safetensors"), load_file(tmp_path / "soup" / "model.safetensors")
    assert all(torch.equal(one[name], soup[name]) for name in one)


def test_shards_are_read(tmp_path: Path) -> None:
    whole = [save_tiny_checkpoint(tmp_path / f"whole{seed}", "llama", seed) for seed in (0, 1)]
    sharded = [
        save_tiny_checkpoint(tmp_path / f"sharded{seed}", "llama", seed, max_shard_size="20KB") for seed in (0, 1)
    ]
    assert len(list(sharded[0].glob("*.safetensors"))) > 1
    for name, paths in (("a", whole), ("b", sharded)):
        make_soup(paths, [0.5, 0.5], tmp_path / name)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_a_soup_refuses_what_has_no_mean(tmp_path: Path) -> None:
    one = save_tiny_checkpoint(tmp_path / "one", "llama", 0)

    def refused(other: Path, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            make_soup([one, other], [0.5, 0.5], tmp_path / "soup")
        assert not (tmp_path / "soup").exists()

    wide = save_tiny_checkpoint(tmp_path / "wide", "llama", 0, intermediate_size=64)
    refused(wide, PreconditionError, r"is \(48, 56\) in .*one, but \(48, 64\) in .*wide")
    deep = save_tiny_checkpoint(tmp_path / "deep", "llama", 0, num_hidden_layers=3)
    refused(deep, PreconditionError, r"only one of .* has the tensor model\.layers\.2")
    words = save_tiny_checkpoint(tmp_path / "words", "llama", 0, tokenizer_vocab_size=100)
    refused(words, TokenizerMismatchError, "token id 100")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", PreconditionError, "merge it into its base first")


def test_whole_numbers_must_agree(tmp_path: Path) -> None:
    one, other = (save_tiny_checkpoint(tmp_path / str(seed), "llama", seed) for seed in (0, 1))
    for path, value in ((one, 1), (other, 2)):
        tensors = load_file(path / "model.safetensors") | {"route": torch.tensor([value])}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PreconditionError, match="route holds whole numbers that differ"):
        make_soup([one, other], [0.5, 0.5], tmp_path / "soup")


# --- adapters --------------------------------------------------------------------------------------------------
def test_an_adapter_is_merged_into_a_plain_model(tmp_path: Path) -> None:
    import peft

    base = save_tiny_checkpoint(tmp_path / "base", "llama", 0)
    adapted = peft.get_peft_model(tiny_model("llama", 0), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    job = {"make": "merged", "base": str(base), "adapter": str(tmp_path / "adapter"), "dtype": "float32"}
    make(job, tmp_path / "merged")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        plain = load_causal_lm(base).model(input_ids=ids).logits
        found = load_causal_lm(tmp_path / "merged").model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_what_a_killed_attempt_left_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "half").write_text("x")
    make({"make": "random", "init": init().model_dump(mode="json"), "seed": 0}, tmp_path / "model")
    assert not (tmp_path / "model" / "half").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_an_unknown_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot make 'gold'"):
        make({"make": "gold"}, tmp_path / "model")
