"""Verdicts as text: the grammar that a judge decodes under, and the strict parser of what it wrote.

Canonical form, version 1 (``form: lines``), criteria in the rubric's order, no line more:

    clarity: says what it does in one sentence | 4
    brevity: repeats itself twice | 2

Without reasons a line is ``clarity: 4``; with ``form: score`` the whole verdict is ``4``. Of a pair the scores are
``A``, ``B`` or ``tie``. What decodes under :func:`verdict_grammar` is canonical.

Text that was written freely may differ from it in what changes no meaning: white space around words and lines, empty
lines, CRLF, one fence of three backticks around the whole, and a score as another decimal of the same number (4.0).
Then it is read, and told to be repaired. Everything else is refused, never guessed: a line too many or too few, another
order, a score off the scale, a text before or behind.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from opd_mesh.config.rubrics import CHOICES, NUMBER, Criterion, Rubric, as_text, weighted_mean

VERDICT_FORMAT = 1
MAX_VERDICT_CHARS = 100_000
_SHARE_OF = dict(zip(CHOICES, (1.0, 0.0, 0.5), strict=True))  # of the first answer
_CHOICE_OF = {share: choice for choice, share in _SHARE_OF.items()}
_FENCE = re.compile(r"```[a-z]*\n(.*)\n```", re.DOTALL)


class VerdictError(ValueError):
    """The text is no verdict; says why."""


@dataclass(frozen=True, slots=True)
class ParsedVerdict:
    """What a judge wrote, once.

    Attributes:
        scores: criterion → point of its scale; of a pair, share of the first answer: 1 (A), 0.5 (tie) or 0 (B).
        reasons: criterion → as it was written; empty where the rubric wants none.
        overall: in [0, 1]; of a pair, of the first answer, and the second has the rest.
        repaired: the text was not canonical, but means only this.
    """

    scores: dict[str, float]
    reasons: dict[str, str]
    overall: float
    repaired: bool


def verdict_grammar(rubric: Rubric, *, pairwise: bool = False) -> str:
    """What is allowed, in llguidance's dialect of Lark. The end of the text comes right behind it."""
    rules = []
    for index, criterion in enumerate(rubric.criteria):
        points = " | ".join(json.dumps(point) for point in _points(criterion, pairwise))
        rules.append(f"score_{index}: {points}")
    if rubric.form == "score":
        return "start: score_0\n" + "\n".join(rules) + "\n"
    lines = []
    for index, criterion in enumerate(rubric.criteria):
        reason = 'REASON " | " ' if rubric.reasons == "brief" else ""
        lines.append(f'"{criterion.name}: " {reason}score_{index}')
    if rubric.reasons == "brief":
        # No space at either end, so that the canonical text is the only one, and nothing that Python takes for space.
        edge, inside = r"[^\s|\x00-\x1f\x7f]", r"[^|\x00-\x1f\x7f]"
        more = f"({inside}{{0,{rubric.max_reason_chars - 2}}}{edge})?" if rubric.max_reason_chars > 1 else ""
        rules.append(f"REASON: /{edge}{more}/")
    return "start: " + ' "\\n" '.join(lines) + "\n" + "\n".join(rules) + "\n"


def parse_verdict(rubric: Rubric, text: str, *, pairwise: bool = False) -> ParsedVerdict:
    """Read one. Raises :class:`VerdictError` where it is none, or not certain."""
    if len(text) > MAX_VERDICT_CHARS:
        raise VerdictError(f"{len(text)} characters are too many for a verdict")
    lines = _lines(text)
    if len(lines) != len(rubric.criteria):
        raise VerdictError(f"{len(lines)} lines for {len(rubric.criteria)} criteria")
    scores, reasons, canonical = {}, {}, []
    for criterion, line in zip(rubric.criteria, lines, strict=True):
        reason, score_text = _parts(rubric, criterion, line)
        point, scores[criterion.name] = _score(criterion, score_text, pairwise)
        if rubric.reasons == "brief":
            reasons[criterion.name] = reason
        canonical.append(_line(rubric, criterion, reason, point))
    overall = _preference(rubric, scores) if pairwise else rubric.overall(scores)
    return ParsedVerdict(scores, reasons, overall, repaired="\n".join(canonical) != text)


def write_verdict(
    rubric: Rubric, scores: dict[str, float], reasons: dict[str, str] | None = None, *, pairwise: bool = False
) -> str:
    """The canonical text of a verdict, for gold data and tests.

    Args:
        scores: by criterion, as :attr:`ParsedVerdict.scores`.

    Raises:
        VerdictError: a score is no point of its scale, or a reason cannot stand in a line.
    """
    lines = []
    for criterion in rubric.criteria:
        point = _point(criterion, scores[criterion.name], pairwise)
        lines.append(_line(rubric, criterion, (reasons or {}).get(criterion.name, ""), point))
    text = "\n".join(lines)
    parse_verdict(rubric, text, pairwise=pairwise)
    return text


def _point(criterion: Criterion, score: float, pairwise: bool) -> str:
    if pairwise:
        if score not in _CHOICE_OF:
            raise VerdictError(f"{criterion.name}: of a pair a score is 1, 0.5 or 0, got {score}")
        return _CHOICE_OF[score]
    point = criterion.scale.nearest(score)
    if point is None:
        raise VerdictError(f"{score} is no point of the scale of {criterion.name}")
    return as_text(point)


def _points(criterion: Criterion, pairwise: bool) -> list[str]:
    return list(CHOICES) if pairwise else [as_text(point) for point in criterion.scale.points]


def _lines(text: str) -> list[str]:
    text = text.replace("\r\n", "\n").strip()
    if (fenced := _FENCE.fullmatch(text)) is not None:
        text = fenced[1]
    # Not splitlines, which also breaks at characters that a reason may hold.
    return [stripped for line in text.split("\n") if (stripped := line.strip())]


def _parts(rubric: Rubric, criterion: Criterion, line: str) -> tuple[str, str]:
    """(reason, score), as they are written."""
    if rubric.form == "score":
        return "", line
    name, colon, rest = line.partition(":")
    if not colon or name.strip() != criterion.name:
        raise VerdictError(f"expected a line of {criterion.name}, found {_shown(line)}")
    if rubric.reasons == "none":
        return "", rest.strip()
    reason, *scores = (part.strip() for part in rest.split("|"))
    if len(scores) != 1:
        raise VerdictError(f"{criterion.name}: expected one | between reason and score, found {len(scores)}")
    if not reason:
        raise VerdictError(f"{criterion.name}: there is no reason before the score")
    if len(reason) > rubric.max_reason_chars:
        most = rubric.max_reason_chars
        raise VerdictError(f"{criterion.name}: the reason has {len(reason)} characters, at most {most} are allowed")
    if "\r" in reason:
        raise VerdictError(f"{criterion.name}: the reason holds a carriage return")
    return reason, scores[0]


def _score(criterion: Criterion, text: str, pairwise: bool) -> tuple[str, float]:
    """(canonical text, value)."""
    if pairwise:
        if text not in CHOICES:
            raise VerdictError(f"{criterion.name}: expected one of {', '.join(CHOICES)}, found {_shown(text)}")
        return text, _SHARE_OF[text]
    if NUMBER.fullmatch(text) is None:
        raise VerdictError(f"{criterion.name}: expected a score, found {_shown(text)}")
    point = criterion.scale.nearest(float(text))
    if point is None:
        scale = criterion.scale
        points = f"{as_text(scale.min)} to {as_text(scale.max)} by {as_text(scale.step)}"
        raise VerdictError(f"{criterion.name}: {text} is no point of the scale ({points})")
    return as_text(point), point


def _line(rubric: Rubric, criterion: Criterion, reason: str, score: str) -> str:
    if rubric.form == "score":
        return score
    return f"{criterion.name}: {reason} | {score}" if rubric.reasons == "brief" else f"{criterion.name}: {score}"


def _preference(rubric: Rubric, scores: dict[str, float]) -> float:
    """How much of the weight prefers the first answer; a hard requirement that tells them apart decides alone."""
    for criterion in rubric.criteria:
        if criterion.hard_requirement and scores[criterion.name] != 0.5:
            return scores[criterion.name]
    weights = [criterion.weight for criterion in rubric.criteria]
    return weighted_mean(weights, [scores[criterion.name] for criterion in rubric.criteria])


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
