"""Which figures the page has, what each shows, and what it means, in one plain sentence for a newcomer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from opd_mesh.report.data import Log, RunData, Series
from opd_mesh.report.plots import PALETTE_SIZE, Line, Panel, draw, drawable, line_style

# Not layers of a step: the whole of it, and the part of `policy` in which decoding stands still.
NOT_STACKED = frozenset({"step", "policy_swap", "wait_rollout"})
SET_LABELS = {
    "student_responses": "the first student's answers",
    "teacher_responses": "the teacher's answers",
}
WHOLE = "fixed answers"
FRESH = "the present student's own answers"
DASHES = ("-", "--", ":", "-.")
STYLES = {"student_responses": "-", WHOLE: "-", "teacher_responses": "--", FRESH: ":"}


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend: a CSS colour, and the line's style as matplotlib's."""

    label: str
    colour: str
    style: str = "-"


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
        return Key(teacher, css_colour(index), line_style(index))


def css_colour(index: int | None) -> str:
    return "var(--neutral)" if index is None else f"var(--s{index % PALETTE_SIZE})"


def set_label(name: str) -> str:
    """How a fixed set of answers is called on the page."""
    return SET_LABELS.get(name, name.replace("_", " "))


def heldout_series(run: RunData) -> dict[str, dict[str, Series]]:
    """domain → set of answers → KL over evaluations: by fixed set (or over both), and on fresh answers."""
    found: dict[str, dict[str, Series]] = {}
    log = run.evaluations
    for name in log.keys_under("heldout_kl/"):
        domain, _, set_name = name.rpartition("/")
        if domain and set_name in SET_LABELS:
            found.setdefault(domain, {})[set_name] = log.series(f"heldout_kl/{name}")
    for domain in log.keys_under("heldout_kl/"):
        if domain.rpartition("/")[2] not in SET_LABELS and domain not in found:
            found[domain] = {WHOLE: log.series(f"heldout_kl/{domain}")}
    for domain in log.keys_under("on_policy_kl/"):
        found.setdefault(domain, {})[FRESH] = log.series(f"on_policy_kl/{domain}")
    kept = {domain: {name: series for name, series in sets.items() if series} for domain, sets in found.items()}
    return {domain: sets for domain, sets in kept.items() if sets}


def heldout_keys(series_by_domain: dict[str, dict[str, Series]]) -> list[Key]:
    """The legend that all figures by domain share: the dash tells the sets apart, the colour the teachers."""
    names = dict.fromkeys(name for sets in series_by_domain.values() for name in sets)
    return [Key(set_label(name), css_colour(None), STYLES[name]) for name in sorted(names, key=list(STYLES).index)]


def heldout_figures(run: RunData, series_by_domain: dict[str, dict[str, Series]], cast: Cast) -> list[FigureCard]:
    """One small figure per domain: KL, all to one scale, and under it the length of the student's answers."""
    everything = [value for sets in series_by_domain.values() for series in sets.values() for value in series.values]
    cards = []
    for number, (domain, sets) in enumerate(series_by_domain.items()):
        colour = cast.domain_colour(domain)
        lines = [Line(name, series, colour, STYLES[name]) for name, series in sets.items()]
        length = Line("length", run.evaluations.series(f"response_length/{domain}"), colour)
        panels = [
            Panel(lines, "nats per token", top=max(everything) * 1.06, exact=True),
            Panel([length], "tokens per answer", exact=True),
        ]
        description = f"Held-out reverse KL and response length of the domain {domain} over optimizer steps"
        svg = draw(f"heldout{number}", [panel for panel in panels if drawable([panel])], description, small=True)
        cards.append(FigureCard(domain, "", Markup(svg)))
    return cards


def step_figures(run: RunData, cast: Cast) -> list[FigureCard]:
    """What is measured at every optimizer step; figures without any point are left out."""
    cards: list[FigureCard] = []
    log = run.metrics

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
            lines.append(Line(teacher, log.series(prefix + teacher), index, line_style(index)))
        return [line for line in lines if line.series]

    def keys_of(lines: Sequence[Line]) -> list[Key]:
        return [cast.key(line.label) for line in lines]

    def single(key: str) -> list[Line]:
        return [Line(key, log.series(key))]

    kl = per_teacher("kl/")
    add(
        "kl",
        "On-policy KL to each teacher",
        "How far the student is from the teacher on text that the student has just written; this is what training "
        "pushes down, and it is noisy because every step has other text.",
        [Panel(kl, "nats per token")],
        keys_of(kl),
    )
    by_domain = _by_domain(log, cast)
    # With one teacher of its own for every domain this would be the figure above once more.
    if any(len(cast.domains.get(line.label, {})) != 1 for line in by_domain) or len(by_domain) > len(kl):
        add(
            "kl_domain",
            "On-policy KL by domain",
            "The same distance, by the kind of prompt: a teacher of several domains may be easy to follow in one and "
            "hard in another.",
            [Panel(by_domain, "nats per token")],
            [Key(line.label, css_colour(line.colour), line.style) for line in by_domain],
        )
    gaps = _entropy_gaps(log, per_teacher("entropy/"))
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
        "Overlap",
        "The share of the student's likeliest next tokens that are also among the teacher's (1 means that both "
        "consider the same words), and the probability that the student gives to those they share.",
        [
            Panel(overlap, "share of the likeliest tokens", top=1.0),
            Panel(per_teacher("overlap_mass/"), "student's probability on them", top=1.0),
        ],
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
        "ahead",
        "Generation and training side by side",
        "Responses for later steps that are here before the trainer needs them, and the time that the rollout servers "
        "have nothing to do: with neither, generation is what to speed up first.",
        [Panel(single("backlog"), "responses ahead"), Panel(single("rollout_idle_s"), "idle seconds, all servers")],
    )
    add(
        "throughput",
        "Tokens per second",
        "Trained tokens divided by the time of the whole step.",
        [Panel(single("tokens_per_s"), "tokens / s")],
    )
    phases = [phase for phase in log.keys_under("seconds/") if phase not in NOT_STACKED]
    stack = [Line(phase, log.series(f"seconds/{phase}"), index) for index, phase in enumerate(phases)]
    add(
        "seconds",
        "Where the time goes",
        "Seconds of each step by phase; the tallest layer is what to speed up first.",
        [Panel(stack, "seconds per step", stacked=True)],
        [Key(phase.replace("_", " "), f"var(--p{index % PALETTE_SIZE})") for index, phase in enumerate(phases)],
    )
    return cards


def _by_domain(log: Log, cast: Cast) -> list[Line]:
    """Domains in their teacher's colour; the dash tells those of one colour apart."""
    lines: list[Line] = []
    for domain in log.keys_under("kl_domain/"):
        colour = cast.domain_colour(domain)
        before = sum(line.colour == colour for line in lines)
        lines.append(Line(domain, log.series(f"kl_domain/{domain}"), colour, DASHES[before % len(DASHES)]))
    return [line for line in lines if line.series]


def _entropy_gaps(log: Log, teachers: Sequence[Line]) -> list[Line]:
    student = log.series("entropy/student")
    entropy_at = dict(zip(student.steps, student.values, strict=True))
    lines = []
    for line in teachers:
        pairs = zip(line.series.steps, line.series.values, strict=True)
        gaps = [(step, entropy_at[step] - value) for step, value in pairs if step in entropy_at]
        if gaps:
            steps, values = [step for step, _ in gaps], [value for _, value in gaps]
            lines.append(Line(line.label, Series(steps, values), line.colour, line.style))
    return lines
