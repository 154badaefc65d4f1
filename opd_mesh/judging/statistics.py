"""How far a judge can be trusted: agreement with gold, calibration, and what it is drawn by besides quality.

Figures are None where the data cannot tell: too few of them, or no variation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FIFTHS = 5
_DIGITS = 9  # to which two scores that are the same agree
_TINY = 1e-12
FloatArray = npt.NDArray[np.float64]


def as_values(figures: Any) -> dict[str, Any] | None:
    """Any figures of this package, a dataclass or None, as they are written down."""
    return None if figures is None else asdict(figures)


# --- rank correlation ------------------------------------------------------------------------------------------
def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None below three, or without variation."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}")
    if len(first) < 3:
        return None
    return _pearson(_ranks(first), _ranks(second))


def partial_spearman(first: Sequence[float], second: Sequence[float], given: Sequence[float]) -> float | None:
    """Spearman's correlation of what ``given`` does not explain; None below four triples or where it explains all."""
    if len(first) < 4:
        return None
    both, with_first, with_second = spearman(first, second), spearman(first, given), spearman(second, given)
    if both is None or with_first is None or with_second is None:
        return None if both is None else both  # what does not vary explains nothing
    rest = (1 - with_first**2) * (1 - with_second**2)
    return None if rest < _TINY else (both - with_first * with_second) / math.sqrt(rest)


def _ranks(values: Sequence[float]) -> FloatArray:
    """From 1; of equals, their mean."""
    array = np.round(np.asarray(values, np.float64), _DIGITS)
    _, place, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: FloatArray = (ends - (counts - 1) / 2)[place]
    return ranks


def _pearson(first: FloatArray, second: FloatArray) -> float | None:
    a, b = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return None if scale < _TINY else float(a @ b) / scale


# --- agreement with gold ---------------------------------------------------------------------------------------
def cohens_kappa(given: Sequence[Hashable], gold: Sequence[Hashable]) -> float | None:
    """Cohen's κ, unweighted: 0 is what chance would reach with the same shares of labels, 1 is all.

    None without labels, or where both sides have one and the same label throughout: chance reaches all then.
    """
    if len(given) != len(gold):
        raise ValueError(f"{len(given)} labels against {len(gold)}")
    if not given:
        return None
    total = len(given)
    observed = sum(a == b for a, b in zip(given, gold, strict=True)) / total
    shares = Counter(given), Counter(gold)
    chance = sum(shares[0][label] * shares[1][label] for label in shares[0]) / total**2
    return None if 1 - chance < _TINY else (observed - chance) / (1 - chance)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of scores in [0, 1] with gold ones.

    Attributes:
        exact: share of scores that are the gold one.
        kappa: with the scores as labels.
        distance: mean |s − s_gold|.
    """

    count: int
    exact: float
    kappa: float | None
    distance: float


def agreement(scores: Sequence[float], golds: Sequence[float]) -> Agreement | None:
    """None without scores."""
    if not scores:
        return None
    given, gold = [round(score, _DIGITS) for score in scores], [round(score, _DIGITS) for score in golds]
    return Agreement(
        count=len(scores),
        exact=sum(a == b for a, b in zip(given, gold, strict=True)) / len(scores),
        kappa=cohens_kappa(given, gold),
        distance=sum(abs(a - b) for a, b in zip(scores, golds, strict=True)) / len(scores),
    )


@dataclass(frozen=True, slots=True)
class Fifth:
    """Of the scores in [low, high), and of 1 in the last one."""

    low: float
    high: float
    count: int
    mean_score: float
    mean_gold: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Whether a score of s means that gold is s on average.

    Attributes:
        fifths: those that have a score.
        error: expected calibration error, |mean score − mean gold| weighted by counts.
    """

    fifths: tuple[Fifth, ...]
    error: float


def calibration(scores: Sequence[float], golds: Sequence[float]) -> Calibration | None:
    """None without scores."""
    if not scores:
        return None
    score_N, gold_N = np.asarray(scores, np.float64), np.asarray(golds, np.float64)
    # 0.6 is 3 / 5 and not a little less.
    fifth_N = np.clip(np.floor(np.round(score_N * FIFTHS, _DIGITS)), 0, FIFTHS - 1).astype(np.int64)
    fifths = []
    for index in range(FIFTHS):
        rows = fifth_N == index
        if rows.any():
            low, high = index / FIFTHS, (index + 1) / FIFTHS
            means = float(score_N[rows].mean()), float(gold_N[rows].mean())
            fifths.append(Fifth(low, high, int(rows.sum()), *means))
    error = sum(fifth.count * abs(fifth.mean_score - fifth.mean_gold) for fifth in fifths) / len(scores)
    return Calibration(tuple(fifths), error)


# --- what should not count -------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class LengthBias:
    """Rank correlation of score and answer length: alone, and beyond what gold explains (None: there is no gold)."""

    spearman: float | None
    partial: float | None


def length_bias(
    scores: Sequence[float], lengths: Sequence[float], golds: Sequence[float] | None = None
) -> LengthBias | None:
    """None without scores."""
    if not scores:
        return None
    partial = partial_spearman(scores, lengths, golds) if golds is not None else None
    return LengthBias(spearman(scores, lengths), partial)


@dataclass(frozen=True, slots=True)
class PositionBias:
    """Of a judge of pairs that are shown in both orders.

    Attributes:
        first: share of votes for whoever stood first, a tie counting half to each, minus 0.5: in [-0.5, 0.5].
        changes: how often the choice is another one when the two are swapped.
    """

    votes: int
    first: float
    changes: float | None


def position_bias(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> PositionBias | None:
    """None without votes.

    Args:
        pairs: of each pair the votes in the order given and in the other one: how much the vote prefers the answer that
            was *given* first, in [0, 1]. The k-th ones are compared with each other.
    """
    for_first = [vote for given, _ in pairs for vote in given]
    for_first += [1 - vote for _, swapped in pairs for vote in swapped]
    if not for_first:
        return None
    compared = [(a, b) for given, swapped in pairs for a, b in zip(given, swapped, strict=False)]
    changed = sum(_choice(a) != _choice(b) for a, b in compared)
    return PositionBias(
        votes=len(for_first),
        first=sum(for_first) / len(for_first) - 0.5,
        changes=changed / len(compared) if compared else None,
    )


def _choice(preference: float) -> int:
    """1: the first, −1: the second, 0: a tie."""
    return 0 if abs(preference - 0.5) < 10**-_DIGITS else (1 if preference > 0.5 else -1)
