"""``report.html``: one page, nothing loaded from elsewhere, readable while the run still goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mesh.report.accuracy import AccuracyRow, accuracy_rows, accuracy_verdict
from opd_mesh.report.data import RunData, load_run, mapping, median, number
from opd_mesh.report.page import flat, missing_package, render, sections, write
from opd_mesh.report.words import format_bytes, format_count, format_duration, signed_percent

# A change smaller than this share is called no change: held-out sets are small.
NOTICEABLE = 0.02
HEADLINE = "all fixed answers"
# What a page is about where it is not distillation.
OBJECTIVES = {"sft": "fine-tuning", **dict.fromkeys(("grpo", "dapo", "dr_grpo"), "reinforcement learning")}
STATUS_TONES = {
    "ok": ("completed", "complete", "finished", "done", "succeeded"),
    "bad": ("failed", "error", "diverged", "aborted", "crashed"),
    "busy": ("running", "in progress", "evaluating", "saving"),
}


@dataclass(frozen=True, slots=True)
class Change:
    """Before → after of one number; either may be unknown."""

    before: float | None
    after: float | None

    @classmethod
    def of(cls, value: Any) -> Change:
        pair = mapping(value)
        return cls(number(pair.get("before")), number(pair.get("after")))

    @property
    def known(self) -> bool:
        return self.before is not None or self.after is not None

    @property
    def ratio(self) -> float | None:
        """after / before; None where that says nothing."""
        if self.before is None or self.after is None or self.before <= 0:
            return None
        return self.after / self.before

    @property
    def percent(self) -> str:
        return "—" if self.ratio is None else signed_percent(self.ratio - 1)

    @property
    def tone(self) -> str:
        """Of a distance: falling is good."""
        if self.ratio is None or abs(self.ratio - 1) < NOTICEABLE:
            return "flat"
        return "good" if self.ratio < 1 else "bad"

    @property
    def bar(self) -> float:
        """What is left of the distance, in percent of the bar."""
        return 0.0 if self.ratio is None else max(0.0, min(100.0, 100.0 * self.ratio))


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One domain of the results table: held-out KL by fixed set, and what goes beside it."""

    name: str
    teachers: list[tuple[Any, str]]  # (legend key, weight in words)
    sets: list[tuple[str, Change]]
    on_policy: Change
    length: Change


def build_run_report(run_dir: Path) -> Path:
    """Write ``RUN_DIR/report.html`` (replacing it atomically) from what the run has left so far; returns its path.

    Raises:
        NotFoundError: no such folder, or no line of metrics in it.
        PreconditionError: matplotlib or Jinja is not installed.
    """
    run = load_run(Path(run_dir))
    try:
        from opd_mesh.report import figures
    except ImportError as error:
        raise missing_package(error) from error
    cast = _cast(run)
    heldout = figures.heldout_series(run)
    rows = _domain_rows(run, cast, heldout)
    accuracies = accuracy_rows(run)
    status, tone = _status(run)
    text = render(
        "template.html.j2",
        run_id=str(
            run.summary.get("run_id") or mapping(run.recipe.get("run")).get("name") or run.run_dir.resolve().name
        ),
        status=status,
        status_tone=tone,
        eyebrow=OBJECTIVES.get(str(mapping(run.recipe.get("objective")).get("name")), "distillation"),
        verdict=_whole_verdict(run, rows, accuracies),
        student=_student(run),
        teachers=_teachers(run, cast),
        tiles=_tiles(run),
        warnings=[str(item) for item in _listed(run.summary.get("warnings"))],
        notes=run.notes,
        accuracies=accuracies,
        accuracy_figures=figures.accuracy_figures(run, cast),
        rows=rows,
        show_on_policy=any(row.on_policy.known for row in rows),
        show_length=any(row.length.known for row in rows),
        heldout_keys=figures.heldout_keys(heldout),
        heldout_figures=figures.heldout_figures(run, heldout, cast),
        figures=figures.step_figures(run, cast),
        settings=[(section, flat(value)) for section, value in sections(run.recipe)],
        environment=flat(mapping(run.summary.get("environment"))),
        unfinished=not run.summary,
        run_dir=str(run.run_dir.resolve()),
    )
    return write(run.run_dir / "report.html", text)


# --- who ---------------------------------------------------------------------------------------------------------
def _cast(run: RunData) -> Any:
    from opd_mesh.report.figures import Cast

    domains = {
        name: {teacher: number(weight) or 1.0 for teacher, weight in mapping(mapping(domain).get("teachers")).items()}
        for name, domain in mapping(run.recipe.get("domains")).items()
    }
    named = [*mapping(run.recipe.get("teachers")), *mapping(run.summary.get("teachers"))]
    named += [teacher for prefix in ("kl/", "overlap/", "entropy/") for teacher in run.metrics.keys_under(prefix)]
    return Cast([teacher for teacher in dict.fromkeys(named) if teacher != "student"], domains)


def _student(run: RunData) -> str:
    student = mapping(run.recipe.get("student"))
    lora = mapping(student.get("lora"))
    what = f"LoRA of rank {lora['rank']} on " if "rank" in lora else ""
    return f"{what}{student['path']}" if "path" in student else "(not named in the recipe)"


def _teachers(run: RunData, cast: Any) -> list[dict[str, Any]]:
    cards = mapping(run.summary.get("teachers"))
    configured = mapping(run.recipe.get("teachers"))
    teachers = []
    for teacher in cast.teachers:
        addresses = _listed(mapping(configured.get(teacher)).get("addresses"))
        source = mapping(configured.get(teacher)).get("path") or ", ".join(str(item) for item in addresses)
        domains = [name for name, weights in cast.domains.items() if teacher in weights]
        teachers.append(
            {
                "key": cast.key(teacher),
                "source": str(source or ""),
                "domains": ", ".join(domains),
                "card": flat(mapping(cards.get(teacher))),
            }
        )
    return teachers


# --- what came of it ---------------------------------------------------------------------------------------------
def _domain_rows(run: RunData, cast: Any, heldout: dict[str, dict[str, Any]]) -> list[DomainRow]:
    """Before and after by domain; while there is no summary, the first and the latest evaluation."""
    from opd_mesh.report.figures import SET_LABELS, set_label

    before, after = mapping(run.summary.get("heldout_kl_before")), mapping(run.summary.get("heldout_kl_after"))
    sets_of, on_policy = mapping(run.summary.get("heldout")), mapping(run.summary.get("on_policy_kl"))
    lengths = mapping(run.summary.get("response_length"))

    def change(told: Any, key: str) -> Change:
        series = run.evaluations.series(key)
        measured = Change(series.values[0], series.values[-1] if len(series.values) > 1 else None) if series else None
        return Change.of(told) if Change.of(told).known or measured is None else measured

    rows = []
    for name in dict.fromkeys([*cast.domains, *before, *after, *sets_of, *heldout, *on_policy, *lengths]):
        told = mapping(sets_of.get(name))
        of_sets = {
            key: change(told.get(key), f"heldout_kl/{name}/{key}") for key in dict.fromkeys([*told, *SET_LABELS])
        }
        sets = [(set_label(key), value) for key, value in of_sets.items() if value.known]
        headline = change({"before": before.get(name), "after": after.get(name)}, f"heldout_kl/{name}")
        if headline.known and all(value != headline for _, value in sets):
            sets.insert(0, (HEADLINE if sets else "fixed answers", headline))
        weights = cast.domains.get(name, {})
        teachers = [
            (cast.key(teacher), f" × {weight:g}" if len(weights) > 1 or weight != 1 else "")
            for teacher, weight in weights.items()
            if teacher in cast.teachers
        ]
        fresh = change(on_policy.get(name), f"on_policy_kl/{name}")
        length = change(lengths.get(name), f"response_length/{name}")
        if sets or fresh.known or length.known:
            rows.append(DomainRow(name, teachers, sets or [("not measured", Change(None, None))], fresh, length))
    return rows


def _whole_verdict(run: RunData, rows: list[DomainRow], accuracies: list[AccuracyRow]) -> tuple[str, str]:
    """What became of right answers comes first, where that was measured; then the distance to the teachers."""
    told = accuracy_verdict(accuracies)
    distance = _verdict(run, rows)
    if told is None:
        return distance if rows or run.metrics.keys_under("kl/") else _loss_verdict(run)
    so_far = f"So far, at step {run.last_step}: " if not run.summary else ""
    if not any(row.sets[0][1].ratio is not None for row in rows):
        return so_far + told[0], told[1]
    return f"{so_far}{told[0]} {distance[0].removeprefix(so_far)}", told[1]


def _loss_verdict(run: RunData) -> tuple[str, str]:
    """Of a run without teachers and without evaluations."""
    values = run.metrics.series("loss").values
    if len(values) < 2 or mapping(run.recipe.get("objective")).get("name") != "sft":  # another's loss says little
        return "Nothing has been measured on held-out prompts.", "flat"
    share = max(1, len(values) // 10)
    first, last = sum(values[:share]) / share, sum(values[-share:]) / share
    tone = "good" if last < first * (1 - NOTICEABLE) else "flat"
    return f"The loss went from {first:.3f} to {last:.3f}; nothing has been measured on held-out prompts.", tone


def _verdict(run: RunData, rows: list[DomainRow]) -> tuple[str, str]:
    """One line, and its tone."""
    so_far = f"So far, at step {run.last_step}: " if not run.summary else ""
    changes = {row.name: row.sets[0][1] for row in rows if row.sets[0][1].ratio is not None}
    if not changes:
        return f"{so_far}{_on_policy_verdict(run)}", "flat"
    closer = {name: change for name, change in changes.items() if change.tone == "good"}
    away = {name: change for name, change in changes.items() if change.tone == "bad"}
    total = len(changes)
    domains = "the only domain" if total == 1 else f"all {total} domains" if len(closer) == total else ""
    if len(closer) == total:
        return f"{so_far}The student came closer to its teachers in {domains}: held-out KL {_spread(closer)}.", "good"
    if not closer and not away:
        return f"{so_far}The student is as far from its teachers as it was before, on held-out prompts.", "flat"
    if not closer:
        return f"{so_far}The student did not come closer in any domain: held-out KL {_spread(away)}.", "bad"
    rest = f"moved away in {', '.join(away)} ({_spread(away)})" if away else "no noticeable change in the others"
    return (
        f"{so_far}Closer to the teachers in {len(closer)} of {total} domains (held-out KL {_spread(closer)}); {rest}.",
        "mixed" if away else "good",
    )


def _spread(changes: dict[str, Change]) -> str:
    """Changes of one sign → "down 55 % to 74 %"."""
    shares = sorted((change.ratio - 1 for change in changes.values() if change.ratio is not None), key=abs)
    ends = [signed_percent(share).lstrip("+−") for share in (shares[0], shares[-1])]
    return f"{'down' if shares[0] < 0 else 'up'} {ends[0] if ends[0] == ends[1] else ' to '.join(ends)}"


def _on_policy_verdict(run: RunData) -> str:
    teachers = run.metrics.keys_under("kl/")
    first_last = []
    for teacher in teachers:
        values = run.metrics.series(f"kl/{teacher}").values
        if len(values) >= 2:
            share = max(1, len(values) // 10)
            first_last.append((sum(values[:share]) / share, sum(values[-share:]) / share))
    if not first_last:
        return "no held-out measurement yet, and too few steps to say more."
    count = sum(last < first * (1 - NOTICEABLE) for first, last in first_last)
    return (
        "no before and after on held-out prompts yet; on its own answers the student's distance has fallen for "
        f"{count} of {len(first_last)} teachers."
    )


def _status(run: RunData) -> tuple[str, str]:
    if not run.summary:
        return "in progress, or interrupted", "busy"
    status = str(run.summary.get("status") or "unknown")
    tones = [tone for tone, words in STATUS_TONES.items() if status.lower() in words]
    return status, tones[0] if tones else "flat"


def _tiles(run: RunData) -> list[tuple[str, str, str]]:
    """(what, figure, remark)"""
    tokens = number(run.summary.get("tokens_trained")) or sum(run.metrics.series("tokens").values) or None
    wall_s, rate = number(run.summary.get("wall_s")), median(run.metrics.series("tokens_per_s").values)
    planned = number(mapping(run.recipe.get("run")).get("steps"))
    staleness = run.metrics.series("staleness_mean").values or run.metrics.series("staleness").values
    wire = sum(run.metrics.series("wire_bytes").values)
    steps = number(run.summary.get("steps"))
    tiles = [
        ("Steps", format_count(steps if steps is not None else run.last_step), f"of {planned:,.0f}" if planned else ""),
        ("Tokens trained", format_count(tokens), "response tokens"),
        ("Wall time", format_duration(wall_s), ""),
        ("Speed", format_count(rate), "tokens / s, median"),
        ("Staleness", f"{sum(staleness) / len(staleness):.2g}" if staleness else "—", "policy versions, mean"),
        ("On the wire", format_bytes(wire), f"{format_bytes(wire / tokens)} per token" if wire and tokens else ""),
    ]
    return [tile for tile in tiles if tile[1] != "—"]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
