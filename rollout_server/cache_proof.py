"""Proof, on load, of which cache modes give the logits of a lone uncached forward pass for this architecture.

Compressed, windowed or recurrent attention may leak across neighbours or lose count of positions, so no list of
architectures decides: every mode runs the same short play with random probes (two prefilled together, decoding, a
longer one admitted in the middle, one leaving, another admitted) and every row of logits is compared.

Letters: T tokens, V vocabulary rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rollout_server.backends import Backend, LastTokenForward, PerRequestBackend, make_backend
from rollout_server.cache import CacheMode, batched_obstacle

logger = logging.getLogger(__name__)

# Relative to the largest |logit| of the reference. A wrong mask or position is off by 1e-2 and more.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
_MAX_PROBED_WINDOW = 256


@dataclass(frozen=True, slots=True)
class ModeResult:
    """What the proof found about one mode: ``max_error`` and ``tolerance`` relative to the largest |logit|."""

    allowed: bool
    reason: str
    max_error: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class CacheModeProof:
    """Result of :func:`prove_cache_modes`.

    Attributes:
        results: one entry per mode that was tried.
        num_cache_layers: layers of the model's own cache (0 where it makes none).
        seconds: what the proof took.
    """

    results: Mapping[CacheMode, ModeResult]
    num_cache_layers: int
    seconds: float

    def allowed(self, mode: CacheMode) -> bool:
        """Whether the mode was proved."""
        return mode in self.results and self.results[mode].allowed

    @property
    def fastest(self) -> CacheMode:
        """The first proved mode in the order of :class:`CacheMode`; UNCACHED is always allowed."""
        return next(mode for mode in CacheMode if self.allowed(mode))

    @property
    def fastest_deterministic(self) -> CacheMode:
        """The fastest proved mode whose shapes do not depend on other requests."""
        return CacheMode.PER_REQUEST if self.allowed(CacheMode.PER_REQUEST) else CacheMode.UNCACHED


@torch.inference_mode()
def prove_cache_modes(
    model: nn.Module,
    *,
    valid_vocab_size: int,
    max_probe_tokens: int = 64,
    first_of: Sequence[CacheMode] = (),
) -> CacheModeProof:
    """Run the play in every mode against full uncached forward passes.

    Args:
        model: a causal language model in eval mode.
        valid_vocab_size: probes are drawn from the ids below it.
        max_probe_tokens: length of the longest probe. It is raised to cross a sliding window of up to 256 tokens; a
            longer window is crossed by the same index arithmetic, but is not probed.
        first_of: try these in order and stop at the first that passes; empty: try all. On a large model every mode
            costs seconds.
    """
    started = time.perf_counter()
    longest = max(max_probe_tokens, _window_to_cross(model) + 16)
    probes = _probes(valid_vocab_size, longest)
    # One full pass per probe: the trainer scores whole sequences, so this is what the logits must agree with.
    reference = {key: _all_logits(model, ids) for key, ids in probes.items()}
    scale = max(float(logits_TV.abs().max()) for logits_TV in reference.values()) or 1.0
    tolerance = _TOLERANCES.get(next(model.parameters()).dtype, 4e-2)

    num_layers, obstacle = _own_cache(model, probes["short"])
    results: dict[CacheMode, ModeResult] = {}
    for mode in first_of or CacheMode:
        if first_of and any(result.allowed for result in results.values()):
            break
        if mode is CacheMode.BATCHED and obstacle:
            results[mode] = ModeResult(False, obstacle, float("inf"), tolerance)
            continue
        try:
            error = _play(make_backend(mode, model, num_cache_layers=num_layers), probes, reference) / scale
        except Exception as failure:  # whatever a model's code raises means: this mode is not for it
            logger.info("cache mode %s is not for this model", mode, exc_info=True)
            results[mode] = ModeResult(False, f"{type(failure).__name__}: {failure}", float("inf"), tolerance)
            continue
        close = error <= tolerance  # False for NaN too
        word = "equals" if close else "differs from"
        reason = f"{word} the lone uncached forward: largest relative error {error:.1e}, tolerance {tolerance:.0e}"
        if mode is CacheMode.UNCACHED and not close:
            # Seen where a top-k choice inside the model (an indexer, a router) meets ties: no mode can pass then.
            reason = f"the reference; but passes over a prefix and over the whole text differ by {error:.1e}"
        # There is nothing to fall back to from UNCACHED.
        results[mode] = ModeResult(close or mode is CacheMode.UNCACHED, reason, error, tolerance)
    proof = CacheModeProof(results, num_layers, time.perf_counter() - started)
    for mode, result in results.items():
        logger.info("cache mode %s: %s (%s)", mode, "allowed" if result.allowed else "not allowed", result.reason)
    return proof


def _window_to_cross(model: nn.Module) -> int:
    window = getattr(getattr(model, "config", None), "sliding_window", None) or 0
    return window if window <= _MAX_PROBED_WINDOW else 0


def _probes(valid_vocab_size: int, longest: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = {"short": 9, "middle": max(12, longest // 2), "long": longest, "late": max(10, longest // 3)}
    return {
        key: torch.randint(valid_vocab_size, (length,), generator=generator).tolist() for key, length in lengths.items()
    }


def _all_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """fp32 [T, V] by one lone pass without a cache."""
    forward = LastTokenForward(model)
    return model(input_ids=torch.tensor([ids], device=forward.device), use_cache=False).logits[0].float()


def _own_cache(model: nn.Module, ids: list[int]) -> tuple[int, str | None]:
    """Layers of the cache the model makes, and why its rows cannot share one, if so."""
    backend = PerRequestBackend(LastTokenForward(model))
    try:
        backend.prefill({"probe": ids})
    except Exception as failure:
        logger.info("the model makes no cache", exc_info=True)
        return 0, f"{type(failure).__name__}: {failure}"
    cache = backend.cache_of("probe")
    obstacle = batched_obstacle(cache)
    return (0 if obstacle else len(cache)), obstacle


def _play(backend: Backend, probes: Mapping[str, list[int]], reference: Mapping[str, Tensor]) -> float:
    """The largest |logit − reference| over all steps."""
    done: dict[str, int] = {}
    error = 0.0

    def compare(keys: list[str], logits_BV: Tensor) -> None:
        nonlocal error
        for key, logits_V in zip(keys, logits_BV, strict=True):
            gap = float((logits_V - reference[key][done[key] - 1]).abs().max())
            error = gap if gap != gap else max(error, gap)

    def prefill(**lengths: int) -> None:
        done.update(lengths)
        compare(list(lengths), backend.prefill({key: probes[key][:length] for key, length in lengths.items()}))

    def decode(steps: int) -> None:
        for _ in range(steps):
            tokens = {key: probes[key][length] for key, length in done.items()}
            for key in done:
                done[key] += 1
            compare(*backend.decode(tokens))

    def drop(key: str) -> None:
        backend.drop(key)
        del done[key]

    short, middle, long, late = (len(probes[key]) for key in ("short", "middle", "long", "late"))
    prefill(short=short - 6, middle=middle - 6)
    decode(2)
    prefill(long=long - 6)  # longer than those running: they move
    decode(3)
    drop("short")  # a hole, filled by the last row
    prefill(late=late - 2)
    decode(1)
    drop("long")  # the view shrinks
    backend.drop("middle")
    del done["middle"]
    decode(1)
    backend.drop_all()
    return error
