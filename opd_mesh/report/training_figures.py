"""The figures of training itself: rewards, distance to teachers, and what the responses are like."""

from __future__ import annotations

from collections.abc import Sequence

from opd_mesh.report.data import Log, Series
from opd_mesh.report.figures import Cards, keys_of
from opd_mesh.report.plots import Line, Panel


def add_rewards(cards: Cards, evaluations: Log) -> None:
    """Of policy gradients: what responses earn, and how much of them teaches."""
    reward, score = cards.by_domain("reward/"), cards.by_domain("score/")
    versions = cards.by_domain("judge_version/")
    told = {line.label for line in versions} & set(evaluations.keys_under("accuracy/"))
    whose = "verifier, or of the judge" if versions else "verifier"
    panels = [Panel(reward, "mean reward", from_zero=False), Panel(score, f"mean score of the {whose}", top=1.0)]
    if _same(reward, score):  # without length penalties
        panels = panels[1:]
    cards.add(
        "rewards",
        "Rewards by domain",
        "What the responses of a step earn on average: the verifier's score, less penalties for length where there are "
        "any. This is what training pushes up."
        + (" Where a judge gives the score, the truth is in the accuracies above." if told else ""),
        panels,
        keys_of(reward, score),
    )
    variance, unparsed = (
        [line for line in cards.by_domain(f"judge_{name}/") if any(line.series.values)]
        for name in ("variance", "unparsed")
    )
    cards.add(
        "judge",
        "The judge",
        "Which policy judges, how far the votes on one answer are apart, and the share of votes that were no verdict.",
        [
            Panel(versions, "policy version that judges", exact=True),
            Panel(variance, "variance of the votes"),
            Panel(unparsed, "share of votes", top=1.0),
        ],
        keys_of(versions),
    )
    groups = cards.named(("groups_taught", "taught"), ("groups_equal", "all alike"), ("groups_single", "one response"))
    lost = cards.named(("samples_dropped", "dropped"), ("ungraded", "not graded"), ("unparsed", "not parsed"), first=3)
    lost = [line for line in lost if any(line.series.values)]
    cards.add(
        "groups",
        "Groups of responses",
        "The responses to one prompt teach by their differences: a group whose rewards are all alike (everything "
        "right, or everything wrong) teaches nothing. When few groups teach, prompts are too easy or too hard.",
        [Panel(groups, "groups per step"), Panel(lost, "responses per step")],
        keys_of(groups, lost),
    )
    shares = cards.named(("clip_fraction", "clipped"), ("mask_fraction", "masked"))
    moved = cards.named(("kl_behaviour", "from the writing policy"), ("kl_reference", "from the reference"), first=2)
    cards.add(
        "clipping",
        "Clipping and drift",
        "The share of tokens whose gradient is cut off because the policy has moved too far since they were written, "
        "and how far it has moved, from the policy that wrote and from the reference.",
        [Panel(shares, "share of tokens"), Panel(moved, "nats per token", from_zero=False, zero_line=True)],
        keys_of(shares, moved),
    )
    nll = cards.by_domain("nll_domain/")
    cards.add(
        "nll",
        "Surprise by domain",
        "How improbable the answers that are being learned still are to the student, per token (the negative "
        "log-likelihood); this is what fine-tuning pushes down.",
        [Panel(nll, "nats per token")],
        keys_of(nll),
    )


def add_distillation(cards: Cards) -> None:
    """The student beside its teachers."""
    kl = cards.per_teacher("kl/")
    cards.add(
        "kl",
        "On-policy KL to each teacher",
        "How far the student is from the teacher on text that the student has just written; this is what training "
        "pushes down, and it is noisy because every step has other text.",
        [Panel(kl, "nats per token")],
        cards.teacher_keys(*kl),
    )
    by_domain = cards.by_domain("kl_domain/")
    # With one teacher of its own for every domain this would be the figure above once more.
    if not _are_teachers(cards, by_domain):
        cards.add(
            "kl_domain",
            "On-policy KL by domain",
            "The same distance, by the kind of prompt: a teacher of several domains may be easy to follow in one and "
            "hard in another.",
            [Panel(by_domain, "nats per token")],
            keys_of(by_domain),
        )
    gaps = entropy_gaps(cards.log, cards.per_teacher("entropy/"))
    cards.add(
        "entropy",
        "Entropy gap",
        "The student's uncertainty minus the teacher's: above zero the student is less decided than its teacher, below "
        "zero it is too sure of itself.",
        [
            Panel(gaps, "nats, student − teacher", from_zero=False, zero_line=True),
            Panel(cards.per_teacher("entropy_gap/"), "nats, mean distance token by token"),
        ],
        cards.teacher_keys(*gaps),
    )
    overlap = cards.per_teacher("overlap/")
    cards.add(
        "overlap",
        "Overlap",
        "The share of the student's likeliest next tokens that are also among the teacher's (1 means that both "
        "consider the same words), and the probability that the student gives to those they share.",
        [
            Panel(overlap, "share of the likeliest tokens", top=1.0),
            Panel(cards.per_teacher("overlap_mass/"), "student's probability on them", top=1.0),
        ],
        cards.teacher_keys(*overlap),
    )
    ratio, mass = cards.by_domain("overlap_domain/"), cards.by_domain("overlap_mass_domain/")
    gap = cards.by_domain("entropy_gap_domain/")
    if _are_teachers(cards, ratio):
        return
    cards.add(
        "overlap_domain",
        "Overlap and entropy gap by domain",
        "The same by the kind of prompt: overlap that stays low in one domain asks for a cold start on that domain.",
        [
            Panel(ratio, "share of the likeliest tokens", top=1.0),
            Panel(mass, "student's probability on them", top=1.0),
            Panel(gap, "nats, mean distance of entropies"),
        ],
        keys_of(ratio, mass, gap),
    )


def _are_teachers(cards: Cards, by_domain: Sequence[Line]) -> bool:
    """Whether each domain has a teacher of its own, so that a figure by domain repeats the one by teacher."""
    teachers = [tuple(cards.cast.domains.get(line.label, {})) for line in by_domain]
    return all(len(one) == 1 for one in teachers) and len(set(teachers)) == len(teachers)


def add_responses(cards: Cards) -> None:
    """How sure the student is, and how much it writes."""
    student = [Line("student", line.series) for line in cards.single("entropy/student") if line.series]
    teachers, domains = cards.per_teacher("entropy/"), cards.by_domain("entropy_domain/")
    domains = domains if len(domains) > 1 else []
    cards.add(
        "entropies",
        "Entropy",
        "How undecided a model is about the next token: 0 means that it sees one way only. A student whose entropy "
        "falls towards 0 early has stopped trying other answers.",
        [Panel([*student, *teachers], "nats, by model"), Panel(domains, "nats of the student, by domain")],
        keys_of(student, teachers, domains) if teachers or domains else [],
    )
    lengths, cut = cards.by_domain("response_length/"), cards.by_domain("truncated/")
    if len(lengths) <= 1:
        lengths, cut = cards.single("response_length"), [Line(line.label, line.series) for line in cut]
    cut = cut if any(any(line.series.values) for line in cut) else []
    cards.add(
        "length",
        "Response length",
        "Tokens per answer; a sudden rise or collapse means that the student has found a shortcut rather than a skill.",
        [
            Panel(lengths, "tokens"),
            Panel(cut, "share cut off at the longest allowed", top=1.0),
        ],
        keys_of(lengths) if len(lengths) > 1 else [],
    )


def _same(first: Sequence[Line], second: Sequence[Line]) -> bool:
    return [line.series for line in first] == [line.series for line in second]


def entropy_gaps(log: Log, teachers: Sequence[Line]) -> list[Line]:
    """Student − teacher, step by step."""
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
