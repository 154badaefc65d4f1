"""Drawing the next token: counter-based randomness, truncation, inverse CDF, and both log-probabilities.

Letters: B rows, V vocabulary rows of the head (padding included).

A draw depends on (logits of the row, ids allowed, sampling parameters, position) and on nothing else: not on the batch
around it, not on torch's or numpy's global generators, not on what was drawn before. The randomness is Philox4x32-10
(Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) with the seed as key and the position as counter;
it is part of the protocol, so known-answer tests pin it for ever.

The work runs in numpy, row by row: a row of 49k fp32 logits stays in the second-level cache, numpy's loops are
vectorised, and one thread on one row cannot depend on its neighbours. Torch's kernels would wait for their thread
team at every one of a dozen small operations. Rows of a small vocabulary that nothing truncates are drawn together, by
the same operations on the same numbers in the same order, so to the same bits. Where a grammar allows some ids only,
the others' logits are −inf for the draw, and as they are for the policy's log-probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_mesh.errors import DivergedError, InvalidInputError, OpdError
from opd_mesh.trajectory import SamplingParams

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
UInt64Array = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_PHILOX_ROUNDS = 10
# The CDF is walked in two levels: sums over blocks of this many ids, then the ids of one block.
_CDF_BLOCK = 256
# Up to this many ids a row costs more in numpy calls than in arithmetic, and rows are drawn together, so many at a time
# that they stay in the cache.
_SMALL_VOCAB = 4096
_CELLS_TOGETHER = 1 << 18
_NEVER = np.float32(-np.inf)  # the logit of what is not allowed


def philox4x32(counter: Sequence[UInt64Array], key: Sequence[UInt64Array]) -> tuple[UInt64Array, ...]:
    """Philox4x32-10: four 32-bit words of counter and two of key (in uint64 arrays) → four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        product0 = c0 * _PHILOX_MULTIPLIERS[0]
        product1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> _SHIFT32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK32
        k1 = (k1 + _PHILOX_KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> Float64Array:
    """[B] seeds and [B] positions (unsigned 64-bit) → [B] float64 in [0, 1), multiples of 2⁻⁵³.

    Key = (low, high) word of the seed, counter = (low, high) word of the position, 0, 0; the result is the top 53
    bits of output words 1 and 0.
    """
    key = np.asarray(seeds, dtype=np.uint64)
    counter = np.asarray(positions, dtype=np.uint64)
    zero = np.zeros_like(counter)
    low, high, _, _ = philox4x32((counter & _MASK32, counter >> _SHIFT32, zero, zero), (key & _MASK32, key >> _SHIFT32))
    bits = ((high << _SHIFT32) | low) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def uniform(seed: int, position: int) -> float:
    """The uniform number of (seed, position), in [0, 1)."""
    return float(uniforms([seed], [position])[0])


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One drawn token per row.

    Attributes:
        token_ids_B: int64 [B]; −1 where the row failed.
        sampling_logprobs_B: fp32 [B], nats, under the distribution drawn from (ids allowed, temperature, top-k, top-p
            applied); 0 when greedy; NaN where the row failed.
        policy_logprobs_B: fp32 [B], nats, log-softmax of the raw logits over the valid vocabulary; NaN where failed.
        errors: per row None, or why nothing could be drawn.
        kept_ids: per row with ``keep_mask`` the ids that the token was drawn from, ascending: allowed, and left by
            top-k and top-p; the token alone when greedy. None for other rows, and for those that failed.
    """

    token_ids_B: Tensor
    sampling_logprobs_B: Tensor
    policy_logprobs_B: Tensor
    errors: tuple[OpdError | None, ...]
    kept_ids: tuple[tuple[int, ...] | None, ...]


def sample_tokens(
    logits_BV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    valid_vocab_size: int,
    allowed: Sequence[BoolArray | None] | None = None,
) -> SampledTokens:
    """Draw one token per row.

    Ids that are not allowed have no probability. Temperature first, then top-k, then top-p over what top-k left; ties
    at a cut are kept from the lowest id upwards, and the nucleus always keeps a token. The draw inverts the CDF in
    order of id, summed in float64, so that a last-bit change of a logit moves the boundaries by some 1e-7 and seldom
    changes the token. Temperature 0 takes the largest logit, the lowest id among equals.

    Args:
        logits_BV: [B, V] raw logits, any float dtype and device; ids ≥ ``valid_vocab_size`` are never read.
        params: per row.
        positions: per row, index of the token in its response.
        valid_vocab_size: ids at or above it are padding.
        allowed: per row [valid_vocab_size] the ids that may be drawn, or None for all of them.

    Raises:
        InvalidInputError: the arguments do not fit each other. A row whose logits are not finite (NaN, +inf, or all
            −inf, also of those allowed alone), or that is allowed no id, raises nothing: it gets an error of its own in
            the result.
    """
    rows, width = logits_BV.shape
    if not 1 <= valid_vocab_size <= width:
        raise InvalidInputError(f"must be from 1 to {width}, got {valid_vocab_size}", field="valid_vocab_size")
    if len(params) != rows or len(positions) != rows:
        raise InvalidInputError(f"{rows} rows, {len(params)} params, {len(positions)} positions", field="params")
    allowed = [None] * rows if allowed is None else allowed
    if len(allowed) != rows or any(mask is not None and mask.shape != (valid_vocab_size,) for mask in allowed):
        raise InvalidInputError(f"must be one mask of {valid_vocab_size} ids, or None, per row", field="allowed")
    logits: Float32Array = logits_BV[:, :valid_vocab_size].detach().to("cpu", torch.float32).numpy()
    draws_B = uniforms([row.seed for row in params], positions)
    token_ids, sampling, policy = np.full(rows, -1, np.int64), np.full(rows, np.nan), np.full(rows, np.nan)
    errors: list[OpdError | None] = [None] * rows
    kept: list[tuple[int, ...] | None] = [None] * rows
    # exp underflows to 0 for hopeless tokens, and a tiny temperature overflows to −inf before it: both are meant.
    with np.errstate(over="ignore", under="ignore"):
        alone = list(range(rows))
        if rows > 1 and valid_vocab_size <= _SMALL_VOCAB:
            largest_B = logits.max(axis=1)
            finite_B = np.isfinite(largest_B)
            truncates = [row.temperature != 0 and (0 < row.top_k < valid_vocab_size or row.top_p < 1) for row in params]
            together = [
                row for row in range(rows) if finite_B[row] and not truncates[row] and not params[row].keep_mask
            ]
            free = [row for row in together if allowed[row] is None]
            masked = [row for row in together if allowed[row] is not None]
            masked_BV = logits[:0]
            if masked:
                mask_BV = np.stack([mask for row in masked if (mask := allowed[row]) is not None])
                masked_BV = np.where(mask_BV, logits[masked], _NEVER)
                drawable_B = np.isfinite(masked_BV.max(axis=1))
                masked_BV = masked_BV[drawable_B]
                masked = [row for row, drawable in zip(masked, drawable_B, strict=True) if drawable]
            alone = sorted({*range(rows)} - {*free, *masked})
            step = max(1, _CELLS_TOGETHER // valid_vocab_size)
            for group, group_BV in ((free, None), (masked, masked_BV)):
                for start in range(0, len(group), step):
                    some = group[start : start + step]
                    token_ids[some], sampling[some], policy[some] = _draw_together(
                        logits if len(some) == rows else logits[some],
                        largest_B[some],
                        np.array([params[row].temperature for row in some], dtype=np.float64),
                        draws_B[some],
                        None if group_BV is None else group_BV[start : start + step],
                    )
        for row in alone:
            # NaN and +inf reach the maximum, so one pass over the row finds every bad one.
            largest, mask = logits[row].max(), allowed[row]
            masked_V = None if mask is None else np.where(mask, logits[row], _NEVER)
            best = largest if masked_V is None or not np.isfinite(largest) else masked_V.max()
            if mask is not None and not mask.any():
                errors[row] = InvalidInputError(
                    f"allows nothing at response token {positions[row]} that a token says, or is too complex to go on",
                    field="sampling.grammar",
                )
            elif not np.isfinite(best):
                errors[row] = DivergedError(
                    f"the logits for response token {positions[row]} are not finite (largest is {best})"
                )
            else:
                token_ids[row], sampling[row], policy[row], kept[row] = _draw(
                    logits[row], largest, params[row], float(draws_B[row]), masked_V
                )
    return SampledTokens(
        token_ids_B=torch.from_numpy(token_ids),
        sampling_logprobs_B=torch.from_numpy(sampling).float(),
        policy_logprobs_B=torch.from_numpy(policy).float(),
        errors=tuple(errors),
        kept_ids=tuple(kept),
    )


def _draw(
    logits_V: Float32Array, largest: np.float32, params: SamplingParams, draw: float, masked_V: Float32Array | None
) -> tuple[int, float, float, tuple[int, ...] | None]:
    """One row → (token id, sampling log-probability, policy log-probability, ids that were kept, where that is asked).

    Args:
        masked_V: −inf where an id is not allowed; None: all are.
    """
    shifted_V = logits_V - largest
    mass_V = np.exp(shifted_V)
    cdf = _BlockedCdf(mass_V)
    log_normalizer = float(np.log(cdf.total))
    if params.temperature == 0:
        token = int((logits_V if masked_V is None else masked_V).argmax())
        return token, 0.0, float(shifted_V[token]) - log_normalizer, (token,) if params.keep_mask else None

    # What is drawn from, before temperature and truncation.
    open_V = shifted_V if masked_V is None else masked_V - masked_V.max()
    scaled_V = open_V
    truncated = 0 < params.top_k < logits_V.size or params.top_p < 1
    kept_V = _kept(open_V, params) if truncated else None
    if params.temperature != 1 or truncated or masked_V is not None:
        if params.temperature != 1:
            # In float64 before rounding: a temperature of 1e-40 is 0 in fp32 and would give 0 / 0.
            scaled_V = (open_V / np.float64(params.temperature)).astype(np.float32)
        if scaled_V is not shifted_V:
            mass_V = np.exp(scaled_V)
        if kept_V is not None:
            mass_V = np.where(kept_V, mass_V, np.float32(0))
        cdf = _BlockedCdf(mass_V)
    token = cdf.invert(draw)
    kept_ids = None
    if params.keep_mask:
        possible_V = np.isfinite(open_V)  # where top_k is more than these, the cut is at −∞
        kept_ids = tuple(np.flatnonzero(possible_V if kept_V is None else possible_V & kept_V).tolist())
    sampling_logprob = float(scaled_V[token]) - float(np.log(cdf.total))
    return token, sampling_logprob, float(shifted_V[token]) - log_normalizer, kept_ids


def _draw_together(
    logits_BV: Float32Array,
    largest_B: Float32Array,
    temperatures_B: Float64Array,
    draws_B: Float64Array,
    masked_BV: Float32Array | None,
) -> tuple[npt.NDArray[np.int64], Float64Array, Float64Array]:
    """:func:`_draw` for rows that nothing truncates: [B] token ids, sampling and policy log-probabilities."""
    rows = np.arange(len(draws_B))
    shifted_BV = logits_BV - largest_B[:, None]
    mass_BV = np.exp(shifted_BV)
    cumulative_BK = _block_sums(mass_BV)
    log_normalizer_B = np.log(cumulative_BK[:, -1])
    open_BV = shifted_BV if masked_BV is None else masked_BV - masked_BV.max(axis=1)[:, None]
    scaled_BV = open_BV
    if (temperatures_B != 1).any():
        # 0 draws nothing: any other number will do.
        divisor_B = np.where(temperatures_B == 0, 1.0, temperatures_B)
        scaled_BV = (open_BV / divisor_B[:, None]).astype(np.float32)
    if scaled_BV is not shifted_BV:
        mass_BV = np.exp(scaled_BV)
        cumulative_BK = _block_sums(mass_BV)
    totals_B = cumulative_BK[:, -1]
    targets_B = draws_B * totals_B
    blocks_B = (cumulative_BK <= targets_B[:, None]).sum(axis=1)
    before_B = np.where(blocks_B > 0, cumulative_BK[rows, blocks_B - 1], 0.0)
    # Beyond the last id there is no mass, which changes no sum before it.
    columns_BI = blocks_B[:, None] * _CDF_BLOCK + np.arange(min(_CDF_BLOCK, mass_BV.shape[1]))
    inside_BI = np.where(
        columns_BI < mass_BV.shape[1], mass_BV[rows[:, None], np.minimum(columns_BI, mass_BV.shape[1] - 1)], 0
    ).astype(np.float64)
    offsets_B = (np.cumsum(inside_BI, axis=1) <= (targets_B - before_B)[:, None]).sum(axis=1)
    for row in np.flatnonzero(offsets_B == inside_BI.shape[1]):  # as in _BlockedCdf.invert
        offsets_B[row] = np.flatnonzero(inside_BI[row])[-1]
    greedy_B = temperatures_B == 0
    tokens_B = np.where(
        greedy_B, (logits_BV if masked_BV is None else masked_BV).argmax(axis=1), blocks_B * _CDF_BLOCK + offsets_B
    )
    sampling_B = np.where(greedy_B, 0.0, scaled_BV[rows, tokens_B].astype(np.float64) - np.log(totals_B))
    return tokens_B, sampling_B, shifted_BV[rows, tokens_B].astype(np.float64) - log_normalizer_B


def _block_sums(mass_BV: Float32Array) -> Float64Array:
    """[B, K] mass up to the end of each block, in float64."""
    wide_BV = mass_BV.astype(np.float64)
    whole = wide_BV.shape[1] // _CDF_BLOCK * _CDF_BLOCK
    sums_BK = wide_BV[:, :whole].reshape(len(wide_BV), -1, _CDF_BLOCK).sum(axis=2)
    if whole < wide_BV.shape[1]:
        sums_BK = np.concatenate([sums_BK, wide_BV[:, whole:].sum(axis=1)[:, None]], axis=1)
    cumulative_BK: Float64Array = np.cumsum(sums_BK, axis=1)
    return cumulative_BK


def _kept(shifted_V: Float32Array, params: SamplingParams) -> BoolArray:
    """The ids that survive top-k, then top-p. ``shifted_V`` holds logits minus their maximum, before temperature.

    Values alone are sorted, not ids: the cut is a value and a count, and ids are needed only among ties at the cut.
    """
    descending_V = np.sort(shifted_V)[::-1]
    keep = min(params.top_k, shifted_V.size) if params.top_k else shifted_V.size
    if params.top_p < 1:
        cumulative = np.cumsum(np.exp(descending_V[:keep] / np.float64(params.temperature)))
        # The smallest number of tokens whose mass reaches top_p.
        keep = min(int(np.searchsorted(cumulative, params.top_p * cumulative[-1], side="left")) + 1, keep)
    cut = descending_V[keep - 1]
    kept = shifted_V > cut
    ties = np.flatnonzero(shifted_V == cut)
    kept[ties[: keep - int(kept.sum())]] = True
    return kept


class _BlockedCdf:
    """Cumulative mass in order of id, in float64, kept per block of ids until a draw says which block matters."""

    def __init__(self, mass_V: Float32Array) -> None:
        self._mass_V = mass_V
        whole = mass_V.size // _CDF_BLOCK * _CDF_BLOCK
        sums = mass_V[:whole].reshape(-1, _CDF_BLOCK).sum(axis=1, dtype=np.float64)
        if whole < mass_V.size:
            sums = np.append(sums, mass_V[whole:].sum(dtype=np.float64))
        self._cumulative = np.cumsum(sums)
        self.total = self._cumulative[-1]

    def invert(self, draw: float) -> int:
        """The first id whose cumulative mass exceeds ``draw`` × total; its own mass is above zero."""
        target = draw * self.total
        block = int(np.searchsorted(self._cumulative, target, side="right"))
        before = self._cumulative[block - 1] if block else 0.0
        ids_mass = self._mass_V[block * _CDF_BLOCK : (block + 1) * _CDF_BLOCK]
        inside = np.cumsum(ids_mass, dtype=np.float64)
        offset = int(np.searchsorted(inside, target - before, side="right"))
        if offset == ids_mass.size:
            # The block's sum was added up in another order and is a last bit larger than its running sum.
            offset = int(np.flatnonzero(ids_mass)[-1])
        return block * _CDF_BLOCK + offset
