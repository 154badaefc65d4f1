"""Tiny causal language models of real architectures, made to be awkward, and a real tokenizer for them.

Random initialisation as transformers does it (std 0.02) makes attention nearly uniform, logits nearly flat, biases and
sinks zero: a test on it passes with half of the model missing. Here every tensor is random and matters, and logits have
a standard deviation of 5 and more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen3", "gemma2", "cohere", "granite", "gpt2", "phi", "deepseek_v4")
DEFAULT_VOCAB_SIZE = 131
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3

_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.16,
}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 12},
    # The window is shorter than a packed batch, so that a mask built from packed positions shows.
    "gemma2": {
        **_COMMON,
        "head_dim": 12,
        "sliding_window": 9,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 20.0,
    },
    "cohere": {**_COMMON, "logit_scale": 0.25, "use_qk_norm": False},
    "granite": {
        **_COMMON,
        "logits_scaling": 3.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
    },
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.16},
    "phi": {**_COMMON, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},  # its head has a bias
    "deepseek_v4": {
        "hidden_size": 40,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "sliding_window": 6,
        "num_attention_heads": 4,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 20,
        "o_groups": 2,
        "o_lora_rank": 12,
        # With few heads all of an entry's ReLU scores are exactly 0 for many queries, and top-k among equals depends
        # on how many entries there are: what the model says of a prefix then depends on what comes after it.
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 3,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.16,
    },
}
_FINAL_NORMS = {"gpt2": "transformer.ln_f", "phi": "model.final_layernorm"}


def tiny_config(arch: str, *, vocab_size: int = DEFAULT_VOCAB_SIZE, logit_std: float = 6.0, **changes: Any) -> Any:
    """The configuration of a tiny model. ``changes`` are configuration fields."""
    fields = {"vocab_size": vocab_size, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    fields |= _SPECIFIC[arch]
    if arch == "gemma2":
        fields["final_logit_softcapping"] = 4 * logit_std  # bends the larger logits by a third
    return AutoConfig.for_model(arch, **(fields | changes))


def tiny_model(
    arch: str,
    seed: int = 0,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    logit_std: float = 6.0,
    attn_implementation: str | None = None,
    **changes: Any,
) -> Any:
    """A model in eval mode, float32, the same for the same arguments; logits' std is near logit_std."""
    config = tiny_config(arch, vocab_size=vocab_size, logit_std=logit_std, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
        for name, tensor in model.named_parameters():
            # Norms, biases, sinks, gates of hyper-connections: at their initial 0 or 1 they hide what forgets them.
            if tensor.ndim == 1 or name.endswith("position_bias"):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("tid2eid"):
                # All zeros as transformers makes it: expert 0 twice for every token.
                rank = torch.rand(vocab_size, config.n_routed_experts, generator=generator)
                buffer.copy_(rank.argsort(dim=-1)[:, : buffer.shape[1]])
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias.copy_(0.4 * logit_std * torch.randn(bias.shape, generator=generator))
        _scale_final_norm(model, arch, logit_std, generator)
    return model


def _scale_final_norm(model: Any, arch: str, logit_std: float, generator: torch.Generator) -> None:
    # The final norm, because a tied head cannot be scaled without the embedding. It is linear in the hidden states.
    probe = torch.randint(model.config.vocab_size, (1, 64), generator=generator)
    hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
    scale = {"cohere": lambda c: c.logit_scale, "granite": lambda c: 1 / c.logits_scaling}.get(arch, lambda _: 1.0)
    std = float((hidden @ model.get_output_embeddings().weight.T).std()) * scale(model.config)
    factor = 1.3 * logit_std / std  # a little more, because the soft cap takes some away
    norm: nn.Module = model.get_submodule(_FINAL_NORMS.get(arch, "model.norm"))
    if arch == "gemma2":  # its norm multiplies by 1 + weight
        norm.weight.copy_((1 + norm.weight) * factor - 1)
    else:
        for parameter in norm.parameters():
            parameter.mul_(factor)


def logits_of(model: Any, token_ids: list[int]) -> Tensor:
    """[T, V] logits of one sequence, without grad."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits


# --- tokenizer -------------------------------------------------------------------------------------------------
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
# By usefulness: a smaller vocabulary loses the last ones, a larger one is filled with words that no text holds.
_CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz+-*/=().,:?!<>'\"_ABCDEFGHIJKLMNOPQRSTUVWXYZ;[]{}%&#@|\\^~$`"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer(vocab_size: int = DEFAULT_VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """One token per character, exactly ``vocab_size`` ids; text from the vocabulary survives encode and decode."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = (_SPECIAL + list(_CHARACTERS))[:vocab_size]
    tokens += [f"<extra_{i}>" for i in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_checkpoint(
    folder: str | Path,
    arch: str = "llama",
    seed: int = 0,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    tokenizer_vocab_size: int | None = None,
    max_shard_size: str = "1GB",
    **options: Any,
) -> Path:
    """Write model and tokenizer; returns the folder.

    Args:
        tokenizer_vocab_size: smaller than ``vocab_size`` for a padded vocabulary; default: the same.
        options: passed to :func:`tiny_model`.
    """
    path = Path(folder)
    tiny_model(arch, seed, vocab_size=vocab_size, **options).save_pretrained(path, max_shard_size=max_shard_size)
    tiny_tokenizer(tokenizer_vocab_size or vocab_size).save_pretrained(path)
    return path
