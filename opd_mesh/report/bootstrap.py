"""Accuracies of several models on several domains, resampled together: means, recovered gain, paired differences.

Accuracy is the share of right answers among graded ones, the mean over seeds. Intervals are 95% percentile intervals of
a hierarchical bootstrap: seeds are drawn with replacement, then prompts. Both draws are common to all systems, so that
a difference between two of them is paired by prompt and seed, and to all seeds (their prompts are crossed with them,
not nested: the same item is as hard under every seed). Few seeds tell little about the spread between seeds: with three
that differ much the intervals are too narrow, with three that do not they are too wide, with one they are about prompts
alone. Where all answers are right, or all are wrong, an interval has no width.

Letters: R resamples, S systems, D domains, N seeds, P prompts of a domain.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_mesh.errors import NotFoundError, PreconditionError
from opd_mesh.seeds import derive_seed

RESAMPLES = 10_000
TAIL = 0.025  # on either side of an interval
CORRECT = 1.0 - 1e-9  # scores are shares of a right answer; as the trainer counts
CHUNK = 2_000  # resamples at a time, for memory

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds, with its interval; none where it cannot be told."""

    mean: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """As in docs/experiment.json."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Answers:
    """One system's answers to one domain under one seed, by ``prompt_index``.

    Attributes:
        correct, graded: answers to a prompt that are right, and that have a score.
        unparsed, ungraded: graded answers from which nothing could be taken, and those that could not be graded.
    """

    correct: Mapping[int, int]
    graded: Mapping[int, int]
    unparsed: int = 0
    ungraded: int = 0

    @property
    def accuracy(self) -> float | None:
        """Of graded answers; None where there are none."""
        total = sum(self.graded.values())
        return sum(self.correct.values()) / total if total else None

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Answers:
        """From the lines of an answers file (see ``student_trainer.answering``)."""
        correct: Counter[int] = Counter()
        graded: Counter[int] = Counter()
        unparsed = ungraded = 0
        for line in lines:
            prompt, score = int(line["prompt_index"]), line["score"]
            graded[prompt] += score is not None  # a prompt whose answer has no grade was asked all the same
            correct[prompt] += score is not None and score >= CORRECT
            ungraded += line.get("failure") is not None
            unparsed += score is not None and line.get("parsed") is False
        return cls(correct, graded, unparsed, ungraded)


def read_answers(path: Path) -> Answers:
    """Raises :class:`NotFoundError` (no such file) and :class:`PreconditionError` (no answers in it)."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        return Answers.of(lines)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"the answers {path} are not there; run the evaluate stage again", field="answers"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise PreconditionError(f"{path} does not hold answers ({error!r}): remove it, and evaluate again") from error


# --- the bootstrap -----------------------------------------------------------------------------------------------
class Comparison:
    """All systems on all domains, resampled together.

    Args:
        answers: by (system, domain, seed); what was not evaluated is absent.
    """

    def __init__(
        self, answers: Mapping[tuple[str, str, int], Answers], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        self._answers = answers
        self.systems = list(dict.fromkeys(system for system, _, _ in answers))
        self.domains = list(dict.fromkeys(domain for _, domain, _ in answers))
        self.seeds = sorted({one for _, _, one in answers})
        drawn_RN = np.ones((resamples, 1))
        if len(self.seeds) > 1:
            generator = np.random.default_rng(derive_seed(seed, "seeds"))
            drawn_RN = _counts(generator, resamples, len(self.seeds))
        self._measured_SDN = np.full((len(self.systems), len(self.domains), len(self.seeds)), np.nan)
        self._drawn_RSD = np.full((resamples, len(self.systems), len(self.domains)), np.nan)
        for place, domain in enumerate(self.domains):
            # A generator of its own: what else was evaluated does not change a domain's intervals.
            generator = np.random.default_rng(derive_seed(seed, "prompts", domain))
            self._resample(place, drawn_RN, generator)

    def _resample(self, place: int, drawn_RN: Floats, generator: np.random.Generator) -> None:
        domain = self.domains[place]
        cells = {(s, n): self._answers.get((system, domain, seed))
                 for s, system in enumerate(self.systems) for n, seed in enumerate(self.seeds)}  # fmt: skip
        prompts = sorted({prompt for cell in cells.values() if cell for prompt in cell.graded})
        if not prompts:
            return  # nobody has answered anything
        at = {prompt: row for row, prompt in enumerate(prompts)}
        correct_PSN = np.zeros((len(prompts), len(self.systems), len(self.seeds)))
        graded_PSN = np.zeros_like(correct_PSN)
        for (s, n), cell in cells.items():
            for prompt, count in (cell.graded if cell else {}).items():
                assert cell is not None  # it has prompts
                correct_PSN[at[prompt], s, n] = cell.correct.get(prompt, 0)
                graded_PSN[at[prompt], s, n] = count
        self._measured_SDN[:, place] = _ratio(correct_PSN.sum(0), graded_PSN.sum(0))
        flat = correct_PSN.reshape(len(prompts), -1), graded_PSN.reshape(len(prompts), -1)
        for start in range(0, len(drawn_RN), CHUNK):
            seeds_R1N = drawn_RN[start : start + CHUNK, None, :]
            counts_RP = _counts(generator, len(seeds_R1N), len(prompts))
            right_RK, graded_RK = (counts_RP @ values_PK for values_PK in flat)
            accuracy_RSN = _ratio(right_RK, graded_RK).reshape(len(seeds_R1N), *correct_PSN.shape[1:])
            there = np.isfinite(accuracy_RSN)
            total = np.where(there, accuracy_RSN * seeds_R1N, 0.0).sum(-1)
            self._drawn_RSD[start : start + CHUNK, :, place] = _ratio(total, (there * seeds_R1N).sum(-1))

    # --- one system ----------------------------------------------------------------------------------------------
    def by_seed(self, system: str, domain: str) -> dict[int, float]:
        """Its accuracy under each seed."""
        values_N = self._measured_SDN[self.systems.index(system), self.domains.index(domain)]
        return {seed: float(value) for seed, value in zip(self.seeds, values_N, strict=True) if np.isfinite(value)}

    def mean_by_seed(self, system: str, domains: Sequence[str]) -> dict[int, float]:
        """The mean over domains under each seed that has them all."""
        values = [self.by_seed(system, domain) for domain in domains]
        return {seed: _mean(one[seed] for one in values) for seed in self.seeds if all(seed in one for one in values)}

    def counts(self, system: str, domain: str) -> dict[str, int]:
        """Answers over all seeds: how many, and how many of them graded, unparsed, ungraded."""
        cells = [cell for (name, where, _), cell in self._answers.items() if (name, where) == (system, domain)]
        graded, ungraded = sum(sum(cell.graded.values()) for cell in cells), sum(cell.ungraded for cell in cells)
        unparsed = sum(cell.unparsed for cell in cells)
        return {"answers": graded + ungraded, "graded": graded, "unparsed": unparsed, "ungraded": ungraded}

    def accuracy(self, system: str, domain: str) -> Estimate | None:
        """None where nothing was graded."""
        return _estimate(self._measured(system, domain), self._drawn(system, domain))

    def mean_accuracy(self, system: str, domains: Sequence[str]) -> Estimate | None:
        """The mean over domains; None where one is missing."""
        return self._mean_of(domains, lambda domain: (self._measured(system, domain), self._drawn(system, domain)))

    def mean_of_experts(self, experts: Mapping[str, str]) -> Estimate | None:
        """The mean over the domains of ``experts`` (domain → expert), each by its own expert."""
        return self._mean_of(
            list(experts),
            lambda domain: (self._measured(experts[domain], domain), self._drawn(experts[domain], domain)),
        )

    def _known(self, system: str, domain: str) -> bool:
        return system in self.systems and domain in self.domains

    def _measured(self, system: str, domain: str) -> float:
        if not self._known(system, domain):
            return float("nan")
        values = list(self.by_seed(system, domain).values())
        return _mean(values) if values else float("nan")

    def _drawn(self, system: str, domain: str) -> Floats:
        """[R]"""
        if not self._known(system, domain):
            return np.full(len(self._drawn_RSD), np.nan)
        return self._drawn_RSD[:, self.systems.index(system), self.domains.index(domain)]

    @staticmethod
    def _mean_of(domains: Sequence[str], of: Any) -> Estimate | None:
        pairs = [of(domain) for domain in domains]
        if not pairs:
            return None
        return _estimate(_mean(point for point, _ in pairs), np.mean([draws for _, draws in pairs], axis=0))

    # --- several -------------------------------------------------------------------------------------------------
    def _gain(self, student: str, base: str, expert: str, domain: str) -> tuple[float, Floats]:
        low, high = self._measured(base, domain), self._measured(expert, domain)
        low_R, high_R = self._drawn(base, domain), self._drawn(expert, domain)
        point = (self._measured(student, domain) - low) / (high - low) if high > low else float("nan")
        # An expert that did not gain in a resample has nothing to be recovered there.
        gained_R = np.where(high_R > low_R, high_R - low_R, np.nan)
        return point, (self._drawn(student, domain) - low_R) / gained_R

    def recovered(self, student: str, base: str, expert: str, domain: str) -> Estimate | None:
        """(student − base) / (expert − base); None where the expert is not better than the base. No interval where its
        gain might as well be nothing."""
        return _estimate(*self._gain(student, base, expert, domain))

    def mean_recovered(self, student: str, base: str, experts: Mapping[str, str]) -> Estimate | None:
        """The mean over the domains of ``experts`` (domain → expert); None where one has no value."""
        return self._mean_of(list(experts), lambda domain: self._gain(student, base, experts[domain], domain))

    def difference(self, a: str, b: str, domains: Sequence[str]) -> Estimate:
        """a − b, the mean over domains, paired by prompt and seed.

        Raises:
            PreconditionError: they did not answer the same prompts under the same seeds.
        """
        for domain in domains:
            self._check_pairs(a, b, domain)
        found = self._mean_of(
            domains,
            lambda domain: (
                self._measured(a, domain) - self._measured(b, domain),
                self._drawn(a, domain) - self._drawn(b, domain),
            ),
        )
        if found is None:
            raise PreconditionError(f"{a} and {b} have no graded answers to compare", field=f"systems.{a}")
        return found

    def _check_pairs(self, a: str, b: str, domain: str) -> None:
        place, again = f"systems.{b}.domains.{domain}", "evaluate both in the same evaluate stage"
        for seed in self.seeds:
            first, second = self._answers.get((a, domain, seed)), self._answers.get((b, domain, seed))
            if (first is None) != (second is None):
                missing = a if first is None else b
                raise PreconditionError(f"{missing} did not answer {domain} under seed {seed}: {again}", field=place)
            if first is not None and second is not None and first.graded.keys() != second.graded.keys():
                other = len(first.graded.keys() ^ second.graded.keys())
                raise PreconditionError(
                    f"{a} and {b} did not answer the same prompts of {domain} under seed {seed} ({other} were answered "
                    f"by one of them only): {again}",
                    field=place,
                )
        if not any((a, domain, seed) in self._answers for seed in self.seeds):
            raise PreconditionError(f"neither {a} nor {b} has answered {domain}: {again}", field=place)


def _counts(generator: np.random.Generator, rows: int, size: int) -> Floats:
    """[rows, size], how often each of ``size`` things is among ``size`` draws with replacement."""
    drawn = generator.integers(size, size=(rows, size)) + np.arange(rows)[:, None] * size
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """NaN where there is nothing to divide by."""
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _estimate(point: float, draws_R: Floats) -> Estimate | None:
    if not np.isfinite(point):
        return None
    known_R = draws_R[np.isfinite(draws_R)]
    if len(known_R) < (1 - TAIL) * len(draws_R):  # an end of the interval may be where there is no value
        return Estimate(float(point))
    low, high = np.quantile(known_R, [TAIL, 1 - TAIL])
    return Estimate(float(point), float(low), float(high))
