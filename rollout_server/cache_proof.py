"""Proof, on load, of which cache modes give the logits of a lone uncached forward pass for this architecture.

Compressed, windowed or recurrent attention may leak across neighbours or lose count of positions, so no list of
architectures decides: every mode runs the same short play with random probes (two read together, decoding, a longer
one joining in the middle, one leaving, another joining) and every row of logits is compared. A second play reads
sequences in pieces, some of them from a copy of what another has read. A mode that fails only that one is used
without: it reads every sequence whole, and no two share a prompt that either reads on.

Letters: T tokens, V vocabulary rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rollout_server.backends import Backend, OwnCache, PerRequestBackend, Reading, make_backend
from rollout_server.cache import CacheMode, LayerShape, batched_obstacle, bytes_per_token, layer_shapes
from rollout_server.forward import LastTokenForward

logger = logging.getLogger(__name__)
# (a new backend, probes, their reference logits) → the largest |logit − reference|
Play = Callable[[Backend[Any], Mapping[str, list[int]], Mapping[str, Tensor]], float]

# Relative to the largest |logit| of the reference. A wrong mask or position is off by 1e-2 and more.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
_MAX_PROBED_WINDOW = 256


@dataclass(frozen=True, slots=True)
class ModeResult:
    """What the proof found about one mode.

    Attributes:
        allowed: its logits are those of lone uncached passes.
        in_pieces: a sequence may be read in several passes, and go on from a copy of what was read.
        reason: for both, for people.
        max_error: relative to the largest |logit|, of whole sequences.
        tolerance: for either play.
    """

    allowed: bool
    in_pieces: bool
    reason: str
    max_error: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class CacheModeProof:
    """Result of :func:`prove_cache_modes`.

    Attributes:
        results: one entry per mode that was tried.
        layers: what the model's own cache keeps per layer (None for one that borrows another's); empty where its cache
            is not of plain keys and values.
        token_bytes: what a token takes in the model's own cache: see :func:`rollout_server.cache.bytes_per_token`.
        seconds: what the proof took.
    """

    results: Mapping[CacheMode, ModeResult]
    layers: tuple[LayerShape | None, ...]
    token_bytes: int
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


def candidate_modes(cache_mode: CacheMode | None, *, deterministic: bool) -> list[CacheMode]:
    """The modes that may serve, fastest first."""
    if cache_mode is not None:
        return [cache_mode]
    return [mode for mode in CacheMode if not (deterministic and mode is CacheMode.BATCHED)]


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

    layers, token_bytes, obstacle = _own_cache(model, probes["short"])
    results: dict[CacheMode, ModeResult] = {}
    for mode in first_of or CacheMode:
        if first_of and any(result.allowed for result in results.values()):
            break
        if mode is CacheMode.BATCHED and obstacle:
            results[mode] = ModeResult(False, False, obstacle, float("inf"), tolerance)
            continue

        def errors(play: Play, mode: CacheMode = mode) -> tuple[float, str]:
            backend = make_backend(mode, model, num_cache_layers=len(layers), token_bytes=token_bytes)
            try:
                error = play(backend, probes, reference) / scale
            except Exception as failure:  # whatever a model's code raises means: it cannot be used like that
                logger.info("cache mode %s: a play failed", mode, exc_info=True)
                return float("inf"), f"{type(failure).__name__}: {failure}"
            word = "equals" if error <= tolerance else "differs from"  # the latter for NaN too
            return error, f"{word} the lone uncached forward: largest relative error {error:.1e}"

        error, reason = errors(_play)
        close = error <= tolerance
        if mode is CacheMode.UNCACHED:
            in_pieces = False  # there are no pieces
            if not close:
                # Seen where a top-k choice inside the model (an indexer, a router) meets ties: no mode can pass then.
                reason = f"the reference; but passes over a prefix and over the whole text differ by {error:.1e}"
        else:
            error_in_pieces, why = errors(_play_in_pieces)
            in_pieces = close and error_in_pieces <= tolerance
            if close and not in_pieces:
                reason += f"; sequences are read whole, because what is read in pieces {why}"
        # There is nothing to fall back to from UNCACHED.
        results[mode] = ModeResult(close or mode is CacheMode.UNCACHED, in_pieces, reason, error, tolerance)
    proof = CacheModeProof(results, layers, token_bytes, time.perf_counter() - started)
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


def _own_cache(model: nn.Module, ids: list[int]) -> tuple[tuple[LayerShape | None, ...], int, str | None]:
    """(what the cache the model makes keeps per layer, bytes per token, why its rows cannot share one, if so)."""
    backend = PerRequestBackend(LastTokenForward(model))
    try:
        (context,), _ = backend.read([Reading(OwnCache(None, 0), ids)])
    except Exception as failure:
        logger.info("the model makes no cache", exc_info=True)
        return (), 0, f"{type(failure).__name__}: {failure}"
    obstacle = batched_obstacle(context.cache)
    return () if obstacle else layer_shapes(context.cache), bytes_per_token(context.cache, len(ids)), obstacle


def _play(backend: Backend[Any], probes: Mapping[str, list[int]], reference: Mapping[str, Tensor]) -> float:
    """The largest |logit − reference| over all steps."""
    done: dict[str, int] = {}
    error = 0.0

    def compare(keys: list[str], logits_BV: Tensor) -> None:
        nonlocal error
        for key, logits_V in zip(keys, logits_BV, strict=True):
            gap = float((logits_V - reference[key][done[key] - 1]).abs().max())
            error = gap if gap != gap else max(error, gap)

    def read(**lengths: int) -> None:
        done.update(lengths)
        readings = [Reading(backend.empty(), probes[key][:length]) for key, length in lengths.items()]
        contexts, logits_BV = backend.read(readings)
        compare(list(lengths), logits_BV)
        backend.join(dict(zip(lengths, contexts, strict=True)))

    def decode(steps: int) -> None:
        for _ in range(steps):
            tokens = {key: probes[key][length] for key, length in done.items()}
            for key in done:
                done[key] += 1
            compare(*backend.decode(tokens))

    def drop(*keys: str) -> None:
        backend.drop(keys)
        for key in keys:
            del done[key]

    short, middle, long, late = (len(probes[key]) for key in ("short", "middle", "long", "late"))
    read(short=short - 6, middle=middle - 6)
    decode(2)
    read(long=long - 6)  # longer than those running: they move
    decode(3)
    drop("short")  # a hole, filled by the last row
    read(late=late - 2)
    decode(1)
    drop("long")  # the view shrinks
    drop("middle")
    decode(1)
    backend.drop_all()
    return error


def _play_in_pieces(backend: Backend[Any], probes: Mapping[str, list[int]], reference: Mapping[str, Tensor]) -> float:
    """Sequences of several pieces, next to others of one; two go on from one prefix, then decode side by side."""
    error = 0.0

    def compare(keys: Sequence[str], ends: Sequence[int], logits_BV: Tensor) -> None:
        nonlocal error
        for key, end, logits_V in zip(keys, ends, logits_BV, strict=True):
            gap = float((logits_V - reference[key][end - 1]).abs().max())
            error = gap if gap != gap else max(error, gap)

    def read(**parts: tuple[Any, int]) -> list[Any]:
        readings = [Reading(context, probes[key][:end]) for key, (context, end) in parts.items()]
        contexts, logits_BV = backend.read(readings)
        compare(list(parts), [end for _, end in parts.values()], logits_BV)
        return contexts

    longest, middle = len(probes["long"]), len(probes["middle"])
    (prefix,) = read(long=(backend.empty(), longest // 2))
    (first,) = read(long=(backend.copy(prefix), longest // 2 + 1))
    first, other = read(long=(first, longest - 3), middle=(backend.empty(), middle - 4))
    (second,) = read(long=(prefix, longest - 2))  # the prefix is as it was
    backend.join({"first": first, "second": second, "other": other})
    ends = {"first": longest - 3, "second": longest - 2, "other": middle - 4}
    texts = {"first": "long", "second": "long", "other": "middle"}
    for _ in range(2):
        keys, logits_BV = backend.decode({key: probes[texts[key]][end] for key, end in ends.items()})
        ends = {key: end + 1 for key, end in ends.items()}
        compare([texts[key] for key in keys], [ends[key] for key in keys], logits_BV)
    return error
