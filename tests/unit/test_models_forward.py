"""Hidden states of several sequences, and which layouts and caches each architecture permits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from opd_mesh.errors import InvalidInputError
from opd_mesh.models.forward import (
    BatchLayout,
    evaluation,
    last_hidden_states,
    prove_cached,
    prove_layouts,
    sequence_hidden_states,
)

SHARED, PACKED, PADDED, LONE = BatchLayout.SHARED, BatchLayout.PACKED, BatchLayout.PADDED, BatchLayout.LONE
# Gemma 2 attends within windows, which the shared layout's mask does not know. DeepSeek-V4's compressors fold
# neighbouring tokens of a row into one entry, whichever sequence they are of.
PERMITTED = dict.fromkeys(ARCHITECTURES, (SHARED, PACKED, PADDED, LONE)) | {
    "gemma2": (PACKED, PADDED, LONE),
    "deepseek_v4": (PADDED, LONE),
}


@pytest.fixture(scope="module", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # two threads on shared cores wait for each other


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layouts_permitted(arch: str) -> None:
    proof = prove_layouts(tiny_model(arch))
    assert proof.allowed == PERMITTED[arch], proof.reason
    for layout, error in proof.errors.items():
        # Far from the bound on both sides: 1e-3 is not a matter of taste.
        assert error < 5e-5 if layout in proof.allowed else error > 0.1, proof.reason
    assert proof.errors[LONE] == 0
    assert len(proof.reason.splitlines()) == 4


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_layouts_do_not_depend_on_the_attention_kernel(implementation: str) -> None:
    assert prove_layouts(tiny_model("qwen3", attn_implementation=implementation)).allowed == (
        SHARED,
        PACKED,
        PADDED,
        LONE,
    )


def test_layouts_in_bfloat16() -> None:
    assert prove_layouts(tiny_model("llama").bfloat16()).allowed == (SHARED, PACKED, PADDED, LONE)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_caches_permitted(arch: str) -> None:
    proof = prove_cached(tiny_model(arch))
    assert proof, proof.reason
    assert proof.max_rel_error < 5e-5


def test_an_indexer_with_ties_is_found_out() -> None:
    """Two index heads score many entries exactly 0; which of them top-k keeps depends on how many there are."""
    proof = prove_cached(tiny_model("deepseek_v4", index_n_heads=2))
    assert not proof
    assert "differs from the uncached forward" in proof.reason


@pytest.mark.parametrize(
    "layer_type", ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
)
def test_deepseek_layer_types(layer_type: str) -> None:
    """Windows alone may be packed; either compressor forbids it."""
    model = tiny_model("deepseek_v4", num_hidden_layers=1, layer_types=[layer_type], mlp_layer_types=["moe"])
    proof = prove_layouts(model)
    assert (PACKED in proof.allowed) == (layer_type == "sliding_attention"), proof.reason
    assert PADDED in proof.allowed
    assert prove_cached(model)


def test_recurrent_states_leak_between_packed_neighbours() -> None:
    config = AutoConfig.for_model(
        "mamba", vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    proof = prove_layouts(model)
    assert PACKED not in proof.allowed
    assert "leak" in proof.reason
    assert not prove_cached(model)  # its cache goes by another name


# --- a naive trunk, so that a proof can be shown to fail for each reason -----------------------------------------
class Stub(nn.Module):
    """A causal running mean of embeddings, with a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        nn.init.normal_(self.embedding.weight, generator=torch.Generator().manual_seed(0))
        self.fault = fault
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(to_dict=dict))
        self.dtype = torch.float32

    @property
    def base_model(self) -> Any:
        return self.run

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def run(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if self.fault == "no position_ids" and position_ids is not None:
            raise TypeError("unexpected position_ids\nsecond line")
        hidden = self.embedding(input_ids)
        if self.fault == "nan" and input_ids.shape[0] > 1:
            hidden = hidden * float("nan")
        if self.fault == "batch mean":
            hidden = hidden + 0.1 * hidden.mean(dim=0, keepdim=True)
        if self.fault == "scaled" and position_ids is not None:
            hidden = hidden * 1.1
        return SimpleNamespace(last_hidden_state=hidden, past_key_values=None)


@pytest.mark.parametrize(
    ("fault", "allowed", "reason"),
    [
        ("", (SHARED, PACKED, PADDED, LONE), "packed: ok"),
        ("no position_ids", (PADDED, LONE), "packed: refused, TypeError"),
        ("nan", (PACKED, LONE), "padded: refused"),
        ("batch mean", (PACKED, LONE), "padded: refused, neighbours leak"),
        ("batch mean", (PACKED, LONE), "shared: refused, its rows stand beside each other as padded ones do"),
        ("scaled", (PADDED, LONE), "packed: refused, differs from a lone sequence"),
    ],
)
def test_reasons(fault: str, allowed: tuple[BatchLayout, ...], reason: str) -> None:
    model = Stub(fault)
    proof = prove_layouts(model)
    assert proof.allowed == allowed
    assert reason in proof.reason
    assert "no cache" in prove_cached(model).reason


def test_long_windows_are_named() -> None:
    model = tiny_model("gemma2", num_hidden_layers=1, sliding_window=100)
    proof = prove_layouts(model, max_probe_tokens=64)
    assert "windows of [100] tokens are longer than the probe" in proof.reason
    assert max(proof.probe_lengths) <= 64
    assert "[100]" in prove_cached(model, max_probe_tokens=64).reason
    assert max(prove_layouts(model).probe_lengths) > 200


# --- the states themselves -------------------------------------------------------------------------------------
def random_sequences(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(131, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def gemma2() -> Any:
    return tiny_model("gemma2")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 23), min_size=1, max_size=5), st.sampled_from([PACKED, PADDED]))
def test_any_lengths(gemma2: Any, lengths: list[int], layout: BatchLayout) -> None:
    sequences = random_sequences(tuple(lengths))
    with torch.no_grad():
        found = sequence_hidden_states(gemma2, sequences, layout)
        wanted = sequence_hidden_states(gemma2, sequences, LONE)
    assert [tuple(hidden.shape) for hidden in found] == [(length, 48) for length in lengths]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=6))
def test_what_is_shared_stands_once(llama: Any, sequences: list[list[int]]) -> None:
    """Two ids alone: most of these begin alike, and many are the beginning of another, or the same."""
    widths = []
    hook = llama.get_input_embeddings().register_forward_hook(lambda *call: widths.append(call[-1].shape[1]))
    with torch.no_grad():
        found = sequence_hidden_states(llama, sequences, SHARED)
        hook.remove()
        wanted = sequence_hidden_states(llama, sequences, LONE)
    assert widths == [len({tuple(ids[: n + 1]) for ids in sequences for n in range(len(ids))})]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=9))
def test_more_than_fits_a_row_is_dealt_out_to_several(llama: Any, sequences: list[list[int]]) -> None:
    """Rows of at most 8 tokens, or twice the longest sequence; each holds what is shared within it once."""
    shapes = []
    hook = llama.get_input_embeddings().register_forward_hook(lambda *call: shapes.append(call[-1].shape[:2]))
    with torch.no_grad(), patch("opd_mesh.models.forward.SHARED_ROW_TOKENS", 8):
        found = sequence_hidden_states(llama, sequences, SHARED)
        hook.remove()
        wanted = sequence_hidden_states(llama, sequences, LONE)
    ((rows, width),) = shapes
    limit = max(8, 2 * max(map(len, sequences)))
    assert width <= limit
    distinct = len({tuple(ids[: n + 1]) for ids in sequences for n in range(len(ids))})
    assert -(-distinct // limit) <= rows <= -(-sum(map(len, sequences)) // (limit // 2))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_gradients_go_through_several_shared_rows(llama: Any) -> None:
    """Six answers to each of three prompts, of 342 tokens in all, so that borders part what is shared."""
    prompts = random_sequences((11, 8, 14), seed=2)
    sequences = [prompt + answer for prompt in prompts for answer in random_sequences((21, 12, 9, 4, 1, 1), seed=3)]
    shapes = []
    hook = llama.get_input_embeddings().register_forward_hook(lambda *call: shapes.append(call[-1].shape[0]))
    found = gradients(llama, sequences, SHARED)
    hook.remove()
    assert shapes[0] > 1
    for name, gradient in gradients(llama, sequences, LONE).items():
        assert float((found[name] - gradient).abs().max()) <= 2e-4 * float(gradient.abs().max()) + 1e-9, name


def gradients(model: Any, sequences: list[list[int]], layout: BatchLayout) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = torch.cat(sequence_hidden_states(model, sequences, layout))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weights).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_do_not_depend_on_a_permitted_layout(arch: str) -> None:
    model = tiny_model(arch)
    # Padded rows are longer than any window: their masked cells must not be NaN.
    sequences = random_sequences((13, 1, 29, 6))
    sequences += [sequences[0], sequences[2][:10], sequences[0][:5] + sequences[2][:9]]
    wanted = gradients(model, sequences, LONE)
    assert len(wanted) >= 0.8 * len(list(model.parameters()))
    for layout in PERMITTED[arch][:-1]:
        found = gradients(model, sequences, layout)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            scale = float(gradient.abs().max()) + 1e-12
            assert float((found[name] - gradient).abs().max()) <= 2e-4 * scale + 1e-9, (layout, name)


def test_positions_start_again_in_a_pack() -> None:
    """GPT-2's positions are a table: the same sequence twice in a pack gives the same states."""
    model = tiny_model("gpt2")
    (sequence,) = random_sequences((9,))
    with torch.no_grad():
        first, second = sequence_hidden_states(model, [sequence, sequence], PACKED)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequences", [[], [[1, 2], []]])
def test_empty_input_is_refused(sequences: list[list[int]], gemma2: Any) -> None:
    with pytest.raises(InvalidInputError, match="sequences"):
        sequence_hidden_states(gemma2, sequences, LONE)


def test_a_model_without_a_trunk_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidInputError, match="no base model"):
        last_hidden_states(model.model, torch.tensor([[1]]))


def test_a_peft_model_is_seen_through() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        hidden = last_hidden_states(model, ids)
        torch.testing.assert_close(model.lm_head(hidden), model(input_ids=ids).logits)
        with model.disable_adapter():
            assert not torch.allclose(last_hidden_states(model, ids), hidden)


def test_evaluation_restores_every_mode() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    with evaluation(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="inside"), evaluation(model):
        raise RuntimeError("inside")
    assert model.training
    assert model[0].training
    assert not model[1][0].training
    assert torch.is_grad_enabled()
