"""Which figures the page has, what each shows, and what it means, in one plain sentence for a newcomer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from opd_mesh.report.data import RunData, Series
from opd_mesh.report.plots import PALETTE_SIZE, Line, Panel, draw, drawable, line_style

# Sums of the other phases, where a run writes them too.
SUM_PHASES = frozenset({"total", "step", "wall"})
SET_LABELS = {
    "student_responses": "the first student's answers",
    "teacher_responses": "the teacher's answers",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend: a CSS colour and whether the line is dashed."""

    label: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class FigureCard:
    """One figure of the page."""

    title: str
    meaning: str
    svg: Markup
    keys: list[Key] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cast:
    """Who takes part: ``teachers`` in the order of their colours, and the teachers (with weights) of each domain."""

    teachers: list[str]
    domains: dict[str, dict[str, float]]

    def index(self, teacher: str) -> int:
        return self.teachers.index(teacher)

    def domain_colour(self, domain: str) -> int | None:
        """Its only teacher's colour; none when several (or no known) teachers mark it."""
        teachers = [teacher for teacher in self.domains.get(domain, {}) if teacher in self.teachers]
        return self.index(teachers[0]) if len(teachers) == 1 else None

    def key(self, teacher: str) -> Key:
        index = self.index(teacher)
        return Key(teacher, css_colour(index), dashed=index >= PALETTE_SIZE)


def css_colour(index: int | None) -> str:
    return "var(--neutral)" if index is None else f"var(--s{index % PALETTE_SIZE})"


def set_label(name: str) -> str:
    """How a fixed set of answers is called on the page."""
    return SET_LABELS.get(name, name.replace("_", " "))


def heldout_series(run: RunData) -> dict[str, dict[str, Series]]:
    """domain → fixed set → KL over steps, from the metrics ``heldout_kl/<domain>/<set>``."""
    found: dict[str, dict[str, Series]] = {}
    for name in run.keys_under("heldout_kl/"):
        domain, _, set_name = name.rpartition("/")
        series = run.series(f"heldout_kl/{name}")
        if series and domain:
            found.setdefault(domain, {})[set_name] = series
        elif series:
            found.setdefault(set_name, {})["fixed answers"] = series
    return found


def heldout_keys(series_by_domain: dict[str, dict[str, Series]]) -> list[Key]:
    """The legend that all held-out figures share: the dash tells the fixed sets apart, the colour the teachers."""
    return [
        Key(set_label(name), css_colour(None), dashed=position > 0)
        for position, name in enumerate(_set_names(series_by_domain))
    ]


def _set_names(series_by_domain: dict[str, dict[str, Series]]) -> list[str]:
    return list(dict.fromkeys(name for sets in series_by_domain.values() for name in sets))


def heldout_figures(series_by_domain: dict[str, dict[str, Series]], cast: Cast) -> list[FigureCard]:
    """One small figure per domain, all to one scale."""
    everything = [value for sets in series_by_domain.values() for series in sets.values() for value in series.values]
    styles = dict(zip(_set_names(series_by_domain), itertools.cycle(("-", "--", ":", "-.")), strict=False))
    cards = []
    for number, (domain, sets) in enumerate(series_by_domain.items()):
        colour = cast.domain_colour(domain)
        lines = [Line(name, series, colour, styles[name]) for name, series in sets.items()]
        panel = Panel(lines, "nats per token", top=max(everything) * 1.06, exact=True)
        if drawable([panel]):
            description = f"Held-out reverse KL of the domain {domain} over optimizer steps"
            svg = Markup(draw(f"heldout{number}", [panel], description, small=True))
            cards.append(FigureCard(domain, "", svg))
    return cards


def step_figures(run: RunData, cast: Cast) -> list[FigureCard]:
    """What is measured at every optimizer step; figures without any point are left out."""
    cards: list[FigureCard] = []

    def add(name: str, title: str, meaning: str, panels: Sequence[Panel], keys: list[Key] | None = None) -> None:
        shown = [panel for panel in panels if drawable([panel])]
        if shown:
            # The markup is our own; the description is escaped in draw().
            svg = Markup(draw(name, shown, f"{title} over optimizer steps"))
            cards.append(FigureCard(title, meaning, svg, keys or []))

    def per_teacher(prefix: str) -> list[Line]:
        lines = []
        for teacher in cast.teachers:
            index = cast.index(teacher)
            lines.append(Line(teacher, run.series(prefix + teacher), index, line_style(index)))
        return [line for line in lines if line.series]

    def keys_of(lines: Sequence[Line]) -> list[Key]:
        return [cast.key(line.label) for line in lines]

    def single(key: str) -> list[Line]:
        return [Line(key, run.series(key))]

    kl = per_teacher("kl/")
    add(
        "kl",
        "On-policy KL to each teacher",
        "How far the student is from the teacher on text that the student has just written; this is what training "
        "pushes down, and it is noisy because every step has other text.",
        [Panel(kl, "nats per token")],
        keys_of(kl),
    )
    gaps = _entropy_gaps(run, per_teacher("entropy/"))
    add(
        "entropy",
        "Entropy gap",
        "The student's uncertainty minus the teacher's: above zero the student is less decided than its teacher, below "
        "zero it is too sure of itself.",
        [Panel(gaps, "nats, student − teacher", from_zero=False, zero_line=True)],
        keys_of(gaps),
    )
    overlap = per_teacher("overlap/")
    add(
        "overlap",
        "Overlap ratio",
        "The share of the student's likeliest next tokens that are also among the teacher's: 1 means that both "
        "consider the same words.",
        [Panel(overlap, "share of the likeliest tokens", top=1.0)],
        keys_of(overlap),
    )
    add(
        "length",
        "Response length",
        "Tokens per answer; a sudden rise or collapse means that the student has found a shortcut rather than a skill.",
        [Panel(single("response_length"), "tokens")],
    )
    add(
        "loss",
        "Loss and gradient norm",
        "The loss is what the optimizer minimizes; the gradient norm is how hard it pulls, and spikes there are the "
        "first sign of trouble.",
        [Panel(single("loss"), "loss", from_zero=False), Panel(single("grad_norm"), "gradient norm")],
    )
    add(
        "freshness",
        "Staleness and learning rate",
        "Staleness counts the updates since the oldest token in a batch was written: 0 means learning from fresh text "
        "only. The learning rate is the size of a step.",
        [Panel(single("staleness"), "policy versions", top=1.1), Panel(single("lr"), "learning rate", exact=True)],
    )
    add(
        "throughput",
        "Tokens per second",
        "Trained tokens divided by the time of the whole step.",
        [Panel(single("tokens_per_s"), "tokens / s")],
    )
    phases = [phase for phase in run.keys_under("seconds/") if phase not in SUM_PHASES]
    stack = [Line(phase, run.series(f"seconds/{phase}"), index) for index, phase in enumerate(phases)]
    add(
        "seconds",
        "Where the time goes",
        "Seconds of each step by phase; the tallest layer is what to speed up first.",
        [Panel(stack, "seconds per step", stacked=True)],
        [Key(phase.replace("_", " "), f"var(--p{index % PALETTE_SIZE})") for index, phase in enumerate(phases)],
    )
    return cards


def _entropy_gaps(run: RunData, teachers: Sequence[Line]) -> list[Line]:
    student = run.series("entropy/student")
    entropy_at = dict(zip(student.steps, student.values, strict=True))
    lines = []
    for line in teachers:
        pairs = zip(line.series.steps, line.series.values, strict=True)
        gaps = [(step, entropy_at[step] - value) for step, value in pairs if step in entropy_at]
        if gaps:
            steps, values = [step for step, _ in gaps], [value for _, value in gaps]
            lines.append(Line(line.label, Series(steps, values), line.colour, line.style))
    return lines
