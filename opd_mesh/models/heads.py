"""A model's head as data: extracting it, naming it by digest, proving that nothing else comes after the trunk.

Letters: T tokens, V rows of the head, d width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from opd_kernels.head import LinearHead
from torch import Tensor

from opd_mesh.errors import ConfigError
from opd_mesh.models.checkpoint import tensor_bytes
from opd_mesh.models.forward import evaluation, input_device, last_hidden_states

# By model type, because names mislead: ``logits_scaling`` divides in Granite and multiplies in HyperCLOVA X, and MPT
# has a ``logit_scale`` that its code never reads. A type that is missing here fails the proof: its teacher then offers
# LOGITS only.
_LOGIT_SCALES: Mapping[str, Callable[[Any], float]] = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "cohere_compass"), lambda c: c.logit_scale),
    **dict.fromkeys(
        (
            "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
            # MiniCPM3 divides the hidden states, which is the same for a head without bias.
            "minicpm3",
        ),
        lambda c: 1.0 / c.logits_scaling,
    ),
    "hyperclovax": lambda c: c.logits_scaling,
    "falcon_h1": lambda c: c.lm_head_multiplier,
    "inkling": lambda c: 1.0 / c.logits_mup_width_multiplier,
    **dict.fromkeys(
        ("muse_glimmer", "muse_glimmer_text", "muse_spark", "muse_spark_text"), lambda c: c.output_multiplier
    ),
}  # fmt: skip
# Gemma 2, 3, 3n, 4, VaultGemma, nanochat, …; RecurrentGemma; xLSTM.
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# In standard deviations of the logits. Ours are computed in float32 from the model's own hidden states, so the bound
# covers the roundings of the model's side: product, scale and cap, each half a unit in the last place.
HEAD_TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
HEAD_TOLERANCES_DEFAULT = 1e-4


@dataclass(frozen=True, slots=True)
class HeadProof:
    """Whether hidden × head is the model's logits.

    Attributes:
        max_abs_error: largest |difference| of a logit; infinite if the two cannot be compared.
        tolerance: the bound it was held to: a fraction, by dtype, of the logits' standard deviation.
        reason: what was measured, or what differs.
    """

    ok: bool
    max_abs_error: float
    tolerance: float
    reason: str


def extract_head(model: Any, valid_vocab_size: int | None = None) -> LinearHead:
    """The head of any Hugging Face causal LM. Its tensors are the model's own, not copies.

    Args:
        valid_vocab_size: ids at or above it are padding; None or V: every row is a token.

    Raises:
        ConfigError: there is no output embedding, it carries an unmerged adapter, or ``valid_vocab_size`` exceeds V.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise ConfigError(f"{type(model).__name__} has no output embedding; is it a causal language model?")
    if isinstance(getattr(output, "base_layer", None), torch.nn.Module):
        raise ConfigError("the head carries an unmerged adapter; merge it, or name the head in modules_to_save instead")
    config = model.config.get_text_config()
    rows = output.weight.shape[0]
    # Inkling's own forward drops the padded rows.
    valid = min(
        size for size in (valid_vocab_size, getattr(config, "unpadded_vocab_size", None), rows) if size is not None
    )
    if valid_vocab_size is not None and not 1 <= valid_vocab_size <= rows:
        raise ConfigError(
            f"the tokenizer has {valid_vocab_size} ids, but the head only {rows} rows", field="valid_vocab_size"
        )
    scale = _LOGIT_SCALES.get(config.model_type)
    caps = [cap for name in _SOFT_CAPS if (cap := getattr(config, name, None))]
    return LinearHead(
        weight=output.weight,
        bias=getattr(output, "bias", None),
        logit_scale=1.0 if scale is None else float(scale(config)),
        soft_cap=float(caps[0]) if caps else None,
        valid_vocab_size=None if valid == rows else valid,
    )


def head_digest(head: LinearHead) -> str:
    """SHA-256 (hex) of the head as served: ``len(form) as 8 bytes little-endian ‖ form ‖ weight bytes ‖ bias bytes``.

    form is JSON with sorted keys, no spaces: dtype (``"bfloat16"``), rows V, width d, has_bias, logit_scale, soft_cap,
    valid_vocab_size. Padding rows are part of the bytes.
    """
    form = {
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "rows": head.weight.shape[0],
        "width": head.weight.shape[1],
        "has_bias": head.bias is not None,
        "logit_scale": float(head.logit_scale),
        "soft_cap": None if head.soft_cap is None else float(head.soft_cap),
        "valid_vocab_size": head.valid_vocab_size,
    }
    encoded = json.dumps(form, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    digest = hashlib.sha256(len(encoded).to_bytes(8, "little"))
    digest.update(encoded)
    digest.update(tensor_bytes(head.weight))
    if head.bias is not None:
        digest.update(tensor_bytes(head.bias))
    return digest.hexdigest()


def prove_head(model: Any, head: LinearHead, *, seed: int = 0, tokens: int = 33) -> HeadProof:
    """Compare ``hidden × head`` with the model's own logits on ``tokens`` random token ids.

    Never raises for a model that does not fit: the proof says what differed, and such a teacher offers LOGITS only.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight.shape[0]
    input_ids = torch.randint(embeddings, (1, tokens), generator=generator).to(input_device(model))
    try:
        with evaluation(model):
            logits_TV = model(input_ids=input_ids, use_cache=False, return_dict=True).logits[0].float()
            hidden_TD = last_hidden_states(model, input_ids)[0].float()
            ours_TV = in_float32(head).logits(hidden_TD)
    except Exception as error:  # noqa: BLE001  whatever it is, this model does not factor into trunk and head
        return HeadProof(False, math.inf, 0.0, f"cannot be computed: {type(error).__name__}: {error}")
    if logits_TV.shape[-1] < head.vocab_size:
        reason = f"the model returns {logits_TV.shape[-1]} logits, the head {head.vocab_size}"
        return HeadProof(False, math.inf, 0.0, reason)
    if head.valid_vocab_size is None and logits_TV.shape[-1] != head.vocab_size:
        reason = (
            f"the model returns {logits_TV.shape[-1]} logits, the head has {head.vocab_size} rows and names no padding"
        )
        return HeadProof(False, math.inf, 0.0, reason)
    logits_TV = logits_TV[:, : head.vocab_size]
    std = float(logits_TV.std())
    relative = HEAD_TOLERANCES.get(model.dtype, HEAD_TOLERANCES_DEFAULT)
    error_max = float((ours_TV - logits_TV).abs().max())
    measured = (
        f"largest difference {error_max:.1e}, {error_max / max(std, 1e-30):.1e} of the logits' standard deviation"
    )
    # `not <=` also refuses NaN; constant logits prove nothing.
    if std > 0 and error_max <= relative * std:
        return HeadProof(True, error_max, relative * std, f"{measured}; at most {relative:.0e} allowed")
    return HeadProof(False, error_max, relative * std, f"{_diagnosis(ours_TV, logits_TV, 10 * relative)} ({measured})")


def in_float32(head: LinearHead) -> LinearHead:
    """A copy, whose logits are computed without rounding to the model's dtype."""
    bias = None if head.bias is None else head.bias.float()
    return LinearHead(head.weight.float(), bias, head.logit_scale, head.soft_cap, head.valid_vocab_size)


def _diagnosis(ours_TV: Tensor, model_TV: Tensor, tolerance: float) -> str:
    """What kind of difference it is, by fitting the usual ones. ``tolerance`` in standard deviations of the logits."""
    if not (torch.isfinite(model_TV).all() and torch.isfinite(ours_TV).all()):
        return "the model's logits are not finite" if torch.isfinite(ours_TV).all() else "hidden × head is not finite"
    bound = tolerance * float(model_TV.std())
    difference_TV = model_TV - ours_TV
    if float((difference_TV - difference_TV.mean(dim=0)).abs().max()) <= bound:
        return "a bias per token differs"
    ratio = float((model_TV * ours_TV).sum() / (ours_TV * ours_TV).sum())
    if float((model_TV - ratio * ours_TV).abs().max()) <= bound * max(1.0, abs(ratio)):
        return f"the logit scale differs: the model's logits are {ratio:.6g} times ours"
    # A cap is a rising function of the logit: sorting ours must sort the model's, up to rounding.
    sorted_TV = model_TV.flatten()[ours_TV.flatten().argsort()]
    if float((sorted_TV.cummax(dim=0).values - sorted_TV).max()) <= bound:
        return "a soft cap differs: the model's logits are a rising function of ours, but not a multiple"
    return "the hidden states or the weights differ: this head is not what follows the trunk"
