"""Which class runs which ``engine`` of the configuration: where a further engine is named."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opd_mesh.config.services import RolloutServerConfig
from opd_mesh.errors import PreconditionError
from opd_mesh.grammar import Grammars, TokenVocabulary
from opd_mesh.models.checkpoint import LoadedModel, load_causal_lm, served_tensors
from opd_mesh.models.runtime import configure_torch
from opd_mesh.models.tokenizer import load_tokenizer, tokenizer_fingerprint, valid_vocab_size
from opd_mesh.torch_tensors import TORCH_DTYPES
from rollout_server.decode_engine import DecodeEngine
from rollout_server.engine import RolloutEngine
from rollout_server.vllm_engine import VllmEngine
from rollout_server.vllm_runtime import require_vllm

log = logging.getLogger("rollout_server")


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that holds the checkpoint, proved, and what its service must know of it.

    Attributes:
        vocab_size: ids of the tokenizer; the model's own may be padded.
        base_digest: SHA-256 of the checkpoint's weights in the dtype served.
        base: those weights, which adapters change.
    """

    engine: RolloutEngine
    tokenizer_fingerprint: str
    vocab_size: int
    base_digest: str
    base: Mapping[str, Tensor] | None


def build_engine(config: RolloutServerConfig) -> LoadedEngine:
    """Load and prove the engine that the configuration names. Its weights are served only once a policy is given.

    Raises:
        ConfigError: what the engine needs is missing here, or it cannot do what is configured: with the remedy.
        ModelNotFoundError, CorruptWeightsError: the checkpoint's files.
        PreconditionError, InternalError: the engine's constructor.
    """
    settings = config.engine
    if settings.engine == "vllm":
        require_vllm(settings, deterministic=config.deterministic)  # before gigabytes are read
        device = "cpu"
    else:
        device = configure_torch(settings.device, threads=settings.threads, deterministic=config.deterministic)
    tokenizer = load_tokenizer(config.model)
    loaded = load_causal_lm(config.model, dtype=TORCH_DTYPES[settings.dtype], device=device)
    vocab_size = valid_vocab_size(tokenizer)
    # Not copied: an engine exchanges weights, it never writes into them.
    base = {name: tensor.detach() for name, tensor in served_tensors(loaded.model)}
    engine = _make(config, loaded, tokenizer, vocab_size)
    log.info("student %s (%s), %s", config.model, loaded.model_type, engine.cache_mode)
    return LoadedEngine(engine, tokenizer_fingerprint(tokenizer.get_vocab()), vocab_size, loaded.weights_digest, base)


def _make(config: RolloutServerConfig, loaded: LoadedModel, tokenizer: Any, vocab_size: int) -> RolloutEngine:
    settings = config.engine
    match settings.engine:
        case "transformers":
            return DecodeEngine(
                loaded.model,
                policy_version=0,
                valid_vocab_size=vocab_size,
                max_slots=settings.max_slots,
                max_context_tokens=settings.max_context_tokens,
                deterministic=config.deterministic,
                prefill_token_budget=settings.prefill_token_budget,
                cache_bytes=settings.cache_bytes,
                keep_kv_on_update=settings.keep_kv_on_update,
                grammars=_grammars(tokenizer, vocab_size),
            )
        case "vllm":
            return VllmEngine(
                loaded,
                settings=settings,
                policy_version=0,
                valid_vocab_size=vocab_size,
                deterministic=config.deterministic,
            )


def _grammars(tokenizer: Any, vocab_size: int) -> Grammars | None:
    """None where the tokenizer's bytes cannot be told: everything else is served."""
    try:
        return Grammars(TokenVocabulary.of(tokenizer, vocab_size))
    except PreconditionError as reason:
        log.warning("requests with a grammar are refused: %s", reason)
        return None
