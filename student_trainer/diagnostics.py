"""The known signs of a run that is failing, read from its metrics as they are written, and what helps against them.

Sources: Li et al., "Rethinking On-Policy Distillation", arXiv 2604.13016 (overlap of the 16 likeliest tokens, cold start,
teacher-aligned prompts with a share of others); Yu et al., DAPO, arXiv 2503.14476 (entropy collapse, lengths).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from opd_mesh.config.recipe import DiagnosticsConfig

Line = Mapping[str, float]


class Diagnostics:
    """Over the lines of ``metrics.jsonl``; each sign is told once per teacher or domain."""

    def __init__(self, config: DiagnosticsConfig) -> None:
        self._config = config
        self._lines: list[Line] = []
        self._told: set[str] = set()

    def take(self, line: Line) -> list[str]:
        """Warnings that the newest step gives rise to."""
        self._lines.append(line)
        found: list[str] = []
        if len(self._lines) < 2 * self._config.window_steps:
            return found
        for prefix, sign in _SIGNS:
            for key in [key for key in line if key.startswith(prefix)]:
                if key in self._told:
                    continue
                values = [one[key] for one in self._lines if key in one]
                if len(values) < 2 * self._config.window_steps:
                    continue
                if text := sign(key.removeprefix(prefix), values, self._config):
                    self._told.add(key)
                    found.append(f"step {int(line['step'])}: {text}")
        return found

    def take_all(self, lines: Iterable[Line]) -> list[str]:
        """Of a run that is resumed."""
        return [text for line in lines for text in self.take(line)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _low_and_flat_overlap(teacher: str, values: list[float], config: DiagnosticsConfig) -> str | None:
    window = config.window_steps
    before, now = _mean(values[-2 * window : -window]), _mean(values[-window:])
    if now >= config.low_overlap or now - before >= config.flat_overlap:
        return None
    return (
        f"teacher {teacher}: only {now:.0%} of the likeliest 16 tokens are those of the student (overlap), and over the "
        f"last {2 * window} steps that rose by {now - before:+.3f}: it writes in another way than the student, which OPD "
        "does not bridge. Begin with a cold start (SFT on the teacher's own responses: a cold_start stage), take a "
        "teacher trained from the student's base, or take prompts that the teacher was trained on"
    )


def _collapsed_entropy(domain: str, values: list[float], config: DiagnosticsConfig) -> str | None:
    first, now = _mean(values[: config.window_steps]), _mean(values[-config.window_steps :])
    if now >= config.collapsed_entropy * first:
        return None
    return (
        f"domain {domain}: the student's entropy fell from {first:.3f} to {now:.3f} nats a token: it has all but stopped trying "
        "other answers. Mix in prompts of another kind (domains.….others), raise clip_high or add objective.kl under a "
        "policy gradient, or lower optimizer.lr"
    )


def _exploding_length(domain: str, values: list[float], config: DiagnosticsConfig) -> str | None:
    first, now = _mean(values[: config.window_steps]), _mean(values[-config.window_steps :])
    if now <= config.exploded_length * first:
        return None
    return (
        f"domain {domain}: responses grew from {first:.1f} to {now:.1f} tokens. See whether student and teacher end an "
        "answer with the same token (tokenizer_roles, rollout.stop_token_ids), set a length_penalty, or lower "
        "max_new_tokens"
    )


# Prefix of the metric → the sign that is looked for in it.
_SIGNS: tuple[tuple[str, Callable[[str, list[float], DiagnosticsConfig], str | None]], ...] = (
    ("overlap/", _low_and_flat_overlap),
    ("entropy_domain/", _collapsed_entropy),
    ("response_length/", _exploding_length),
)
