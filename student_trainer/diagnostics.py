"""The known signs of a run that is failing, read from its metrics as they are written, and what helps against them.

Sources: Li et al., "Rethinking On-Policy Distillation", arXiv 2604.13016 (overlap of the 16 likeliest tokens, cold
start, teacher-aligned prompts with a share of others); Yu et al., DAPO, arXiv 2503.14476 (entropy collapse, lengths).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from opd_mesh.config.sections import DiagnosticsConfig

Line = Mapping[str, float]


class Diagnostics:
    """Over the lines of ``metrics.jsonl``; each sign is told once per teacher or domain."""

    def __init__(self, config: DiagnosticsConfig) -> None:
        self._config = config
        self._series: dict[str, _Series] = {}  # of the metrics that a sign is read from
        self._told: set[str] = set()

    def take(self, line: Line) -> list[str]:
        """Warnings that the newest step gives rise to."""
        for key, value in line.items():
            if key.startswith(_READ):
                if key not in self._series:
                    self._series[key] = _Series(self._config.window_steps)
                self._series[key].add(value)
        found: list[str] = []
        for prefix, sign in _SIGNS.items():
            for key in [key for key in line if key.startswith(prefix) and key not in self._told]:
                if text := sign(key.removeprefix(prefix), self._windows, self._config):
                    self._told.add(key)
                    found.append(f"step {int(line['step'])}: {text}")
        return found

    def take_all(self, lines: Iterable[Line]) -> list[str]:
        """Of a run that is resumed."""
        return [text for line in lines for text in self.take(line)]

    def _windows(self, key: str) -> Windows | None:
        series = self._series.get(key)
        return None if series is None else series.windows()


@dataclass(frozen=True, slots=True)
class Windows:
    """Means of a metric: over its first steps, over the newest, and over as many before these."""

    first: float
    before: float
    now: float


class _Series:
    """What is kept of a metric: its first window's sum, and its newest two windows. Constant in the run's length."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._count = 0
        self._first = 0.0
        self._newest: deque[float] = deque(maxlen=2 * size)

    def add(self, value: float) -> None:
        if self._count < self._size:
            self._first += value
        self._count += 1
        self._newest.append(value)

    def windows(self) -> Windows | None:
        """None before there are two of them that do not overlap."""
        size = self._size
        if len(self._newest) < 2 * size:
            return None
        values = list(self._newest)
        return Windows(*(total / size for total in (self._first, sum(values[:size]), sum(values[size:]))))


Read = Callable[[str], Windows | None]


def _low_and_flat_overlap(teacher: str, read: Read, config: DiagnosticsConfig) -> str | None:
    """A low overlap alone is no sign: where two models agree on what is likely, their order of what is not is noise."""
    overlap, kl = read(f"overlap/{teacher}"), read(f"kl/{teacher}")
    if overlap is None or kl is None:
        return None
    rise = overlap.now - overlap.before
    is_flat = rise < config.flat_overlap and kl.now > (1 - config.flat_kl) * kl.before
    if overlap.now >= config.low_overlap or kl.now < config.high_kl or not is_flat:
        return None
    return (
        f"teacher {teacher}: only {overlap.now:.0%} of the 16 likeliest tokens are those of the student (overlap), "
        f"that rose by {rise:+.3f} over the last {2 * config.window_steps} steps, and the KL stays at {kl.now:.2f} "
        "nats a token: it writes in another way than the student, which OPD does not bridge. Begin with a cold start "
        "(SFT on the teacher's own responses: a cold_start stage), take a teacher trained from the student's base, or "
        "take prompts that the teacher was trained on"
    )


def _collapsed_entropy(domain: str, read: Read, config: DiagnosticsConfig) -> str | None:
    entropy = read(f"entropy_domain/{domain}")
    if entropy is None or entropy.now >= config.collapsed_entropy * entropy.first:
        return None
    return (
        f"domain {domain}: the student's entropy fell from {entropy.first:.3f} to {entropy.now:.3f} nats a token: it "
        f"has all but stopped trying other answers. Mix in prompts of another kind (domains.{domain}.others); under a "
        "policy gradient raise clip_high, add objective.kl or dynamic_sampling; or lower optimizer.lr"
    )


def _exploding_length(domain: str, read: Read, config: DiagnosticsConfig) -> str | None:
    length = read(f"response_length/{domain}")
    if length is None or length.now <= config.exploded_length * length.first:
        return None
    return (
        f"domain {domain}: responses grew from {length.first:.1f} to {length.now:.1f} tokens. See whether student and "
        "teacher end an answer with the same token (tokenizer_roles, rollout.stop_token_ids), set a length_penalty, or "
        "lower max_new_tokens"
    )


# Prefix of a metric → the sign that is looked for in it.
_SIGNS: dict[str, Callable[[str, Read, DiagnosticsConfig], str | None]] = {
    "overlap/": _low_and_flat_overlap,
    "entropy_domain/": _collapsed_entropy,
    "response_length/": _exploding_length,
}
_READ = (*_SIGNS, "kl/")
