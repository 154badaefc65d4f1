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
JUDGING = (
    "Of a domain that judges, right is the verdict that is known to be (gold), and κ is its agreement with that beyond "
    "chance: 0 is guessing, 1 is all."
)
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
        """Its only teacher's colour; none when several (or no known) teachers mark it. Without teachers its own."""
        if not any(self.domains.values()):
            return list(self.domains).index(domain) if domain in self.domains else None
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


def accuracy_figures(run: RunData, cast: Cast) -> list[FigureCard]:
    """The share of right answers over evaluations, in all domains."""
    cards = Cards(run.evaluations, cast)
    _add_accuracy(cards, "accuracy", "Accuracy")
    unparsed = cards.by_domain("unparsed/")
    lengths = cards.by_domain("answer_length/")
    shown = [line for line in unparsed if any(line.series.values)]
    cards.add(
        "answers",
        "Answers to these prompts",
        "Their length, and the share of them from which no answer could be taken: they count as wrong.",
        [
            Panel(lengths, "tokens per answer", exact=True),
            Panel(shown, "share without an answer", top=1.0, exact=True),
        ],
        keys_of(lengths, shown),
    )
    return cards.cards


def judging_figure(run: RunData, number: int, title: str) -> FigureCard | None:
    """Accuracy of answering and of judging in one run, of several on a page; None where it judges nothing."""
    if not run.evaluations.keys_under("kappa/"):
        return None
    cast = Cast([], {name: {} for name in run.evaluations.keys_under("accuracy/")})
    cards = Cards(run.evaluations, cast)
    _add_accuracy(cards, f"judging{number}", title)
    return cards.cards[0] if cards.cards else None


def _add_accuracy(cards: Cards, name: str, title: str) -> None:
    lines = [Line(one.label, _times(one.series, 100.0), one.colour, one.style) for one in cards.by_domain("accuracy/")]
    kappas = cards.by_domain("kappa/")
    colours = {line.label: (line.colour, line.style) for line in lines}
    kappas = [Line(one.label, one.series, *colours.get(one.label, (one.colour, one.style))) for one in kappas]
    cards.add(
        name,
        title,
        "Right answers to prompts kept out of training, in percent; domains that are not trained on show what is "
        "forgotten, or comes along." + (f" {JUDGING}" if kappas else ""),
        [
            Panel(lines, "% right", top=100.0, exact=True),
            Panel(kappas, "Cohen's κ of verdicts", from_zero=False, zero_line=True, exact=True),
        ],
        keys_of(lines),
    )


def _times(series: Series, factor: float) -> Series:
    return Series(series.steps, [value * factor for value in series.values])


class Cards:
    """The cards of a page's figures over optimizer steps, as they are added; those without any point are left out."""

    def __init__(self, log: Log, cast: Cast) -> None:
        self.log = log
        self.cast = cast
        self.cards: list[FigureCard] = []

    def add(self, name: str, title: str, meaning: str, panels: Sequence[Panel], keys: list[Key] | None = None) -> None:
        """``name`` is unique in the page; panels stand under each other."""
        shown = [panel for panel in panels if drawable([panel])]
        if shown:
            # The markup is our own; the description is escaped in draw().
            svg = Markup(draw(name, shown, f"{title} over optimizer steps"))
            self.cards.append(FigureCard(title, meaning, svg, keys or []))

    def per_teacher(self, prefix: str) -> list[Line]:
        """A line for each teacher that has the metric, in its colour."""
        lines = []
        for teacher in self.cast.teachers:
            index = self.cast.index(teacher)
            lines.append(Line(teacher, self.log.series(prefix + teacher), index, line_style(index)))
        return [line for line in lines if line.series]

    def by_domain(self, prefix: str) -> list[Line]:
        """Domains in their teacher's colour; the dash tells those of one colour apart."""
        lines: list[Line] = []
        for domain in self.log.keys_under(prefix):
            colour = self.cast.domain_colour(domain)
            before = sum(line.colour == colour for line in lines)
            lines.append(Line(domain, self.log.series(f"{prefix}{domain}"), colour, DASHES[before % len(DASHES)]))
        return [line for line in lines if line.series]

    def single(self, key: str) -> list[Line]:
        """One line in neutral ink."""
        return [Line(key, self.log.series(key))]

    def named(self, *names: tuple[str, str], first: int = 0) -> list[Line]:
        """Metrics beside each other as (metric, label), in the palette's colours from the ``first`` on."""
        lines = [Line(label, self.log.series(key), index) for index, (key, label) in enumerate(names, start=first)]
        return [line for line in lines if line.series]

    def teacher_keys(self, *lines: Line) -> list[Key]:
        """The legend of teachers' lines."""
        return [self.cast.key(line.label) for line in lines]


def keys_of(*groups: Sequence[Line]) -> list[Key]:
    """The legend of lines, each label once."""
    found = {line.label: Key(line.label, css_colour(line.colour), line.style) for lines in groups for line in lines}
    return list(found.values())


def step_figures(run: RunData, cast: Cast) -> list[FigureCard]:
    """What is measured at every optimizer step; figures without any point are left out."""
    from opd_mesh.report.training_figures import add_distillation, add_responses, add_rewards

    cards = Cards(run.metrics, cast)
    add_rewards(cards, run.evaluations)
    add_distillation(cards)
    add_responses(cards)
    _add_machinery(cards)
    return cards.cards


def _add_machinery(cards: Cards) -> None:
    """What the trainer and the mesh do."""
    add, single, log = cards.add, cards.single, cards.log
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
