"""Response → reasoning apart → answer → the scorer's form → score. Here in one process; the grader has its own.

What a verifier raises or returns beyond [0, 1] is a failure with its reason, and never a score of 0.
"""

from __future__ import annotations

import importlib
import math
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Any

from opd_mesh.config.rubrics import Rubric
from opd_mesh.config.tasks import (
    ExactVerifier,
    NumberVerifier,
    PythonVerifier,
    ReasoningGymSource,
    TemplateVerifier,
    VerdictVerifier,
    VerifierConfig,
)
from opd_mesh.errors import ConfigError
from opd_mesh.judging.verdict import VerdictError, parse_verdict
from opd_mesh.rendering import split_reasoning
from opd_mesh.templates import TextTemplate
from student_trainer.tasks.extraction import extract, parse_number
from student_trainer.tasks.items import Item
from student_trainer.tasks.sources import create_reasoning_gym
from student_trainer.tasks.templates import compiled

# (answer, item) → a score as the verifier gives it, or that the answer cannot be read.
Scorer = Callable[[str, Item], Any]
UNREADABLE = object()
# Sums of fractions miss 1 by less.
ROUNDING = 1e-9
MAX_REASON = 400  # characters


@dataclass(frozen=True, slots=True)
class Grade:
    """Of one response.

    Attributes:
        score: in [0, 1]; 0 where there is no answer to be read; None where there is no score: ``failure`` says why,
            and without one the prompt is not to be verified.
        parsed: an answer was found and could be read.
        said, gold: of a verdict, its overall score and the one that is right; ``said`` is None where it is none.
        judged_chars: length of the answer that it is about; None of a pair.
    """

    score: float | None
    parsed: bool
    failure: str | None = None
    said: float | None = None
    gold: float | None = None
    judged_chars: int | None = None


@dataclass(frozen=True, slots=True)
class VerifierSpec:
    """All that a process needs to grade a domain's answers. Pickles."""

    domain: str
    config: VerifierConfig
    closing: str  # of the effort: ends the reasoning
    reasoning_gym: ReasoningGymSource | None
    rubric: Rubric | None = None  # of a judging domain


class Verification:
    """A domain's verifier, ready. Raises :class:`ConfigError` naming the field."""

    def __init__(self, spec: VerifierSpec) -> None:
        self._config = spec.config
        self._closing = spec.closing
        field = f"domains.{spec.domain}.verifier"
        self._submit = compiled(spec.config.submit, f"{field}.submit")
        self._score = _scorer(spec, field)

    def grade(self, item: Item, text: str) -> Grade:
        """Of a response's text. May take for ever; never raises what a verifier raises."""
        grade = self._grade(item, text)
        if not isinstance(self._config, VerdictVerifier):
            return grade
        judged = item.metadata.get("answer")
        return replace(grade, gold=item.metadata["gold"], judged_chars=None if judged is None else len(judged))

    def _grade(self, item: Item, text: str) -> Grade:
        try:
            answer = split_reasoning(text, self._closing).answer
            answer = None if answer is None else extract(self._config.extract, answer)
            if answer is None:
                return Grade(0.0, parsed=False)
            if self._submit is not None:
                answer = self._submit.render(answer=answer, question=item.question, metadata=item.metadata)
            return self._checked(self._score(answer, item))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a verifier raises
            return _failure(f"the verifier raised {type(error).__name__}: {_shown(error)}")

    def _checked(self, score: Any) -> Grade:
        if score is UNREADABLE:
            return Grade(0.0, parsed=False)
        if isinstance(score, Said):
            return replace(self._checked(score.reward), said=score.overall)
        if not isinstance(score, numbers.Real):
            return _failure(f"the verifier returned {_shown(score)}, not a number")
        value = float(score)
        if not (math.isfinite(value) and -ROUNDING <= value <= 1 + ROUNDING):
            return _failure(f"the verifier returned {value}, outside [0, 1]")
        value = min(1.0, max(0.0, value))
        threshold = self._config.threshold
        if threshold is not None:
            value = float(value >= threshold - ROUNDING)
        return Grade(value, parsed=True)


def _shown(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - an object of a verifier's
        return f"a {type(value).__name__}"


def _failure(reason: str) -> Grade:
    return Grade(None, parsed=False, failure=reason[:MAX_REASON])


@dataclass(frozen=True, slots=True)
class Said:
    """What a verdict says and what it earns, each in [0, 1]."""

    overall: float
    reward: float


# --- scorers ---------------------------------------------------------------------------------------------------
def _scorer(spec: VerifierSpec, field: str) -> Scorer:
    match spec.config:
        case ExactVerifier(casefold=casefold):
            return _exact(casefold)
        case NumberVerifier(tolerance=tolerance):
            return _number(tolerance)
        case TemplateVerifier(score=template):
            return _template(template, f"{field}.score")
        case PythonVerifier(function=name):
            return _python(name, f"{field}.function")
        case VerdictVerifier():
            assert spec.rubric is not None  # of a judging domain
            return _verdict(spec.rubric)
    assert spec.reasoning_gym is not None  # the recipe has checked it
    return _reasoning_gym(spec.reasoning_gym, f"domains.{spec.domain}.reasoning_gym")


def _gold(item: Item) -> str:
    if item.answer is None:
        raise LookupError("the item has no gold answer")
    return item.answer.strip()


def _exact(casefold: bool) -> Scorer:
    def score(answer: str, item: Item) -> float:
        gold, said = _gold(item), answer.strip()
        return float(said.casefold() == gold.casefold() if casefold else said == gold)

    return score


def _number(tolerance: float) -> Scorer:
    # In decimal: 0.4 is within 0.1 of 0.3, which in binary it is not. No traps: an overflow is far away, that is all.
    context = Context(prec=60, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
    within = Decimal(str(tolerance))

    def score(answer: str, item: Item) -> Any:
        gold = parse_number(_gold(item))
        if gold is None:
            raise ValueError(f"the gold answer {item.answer!r} is not a number")
        said = parse_number(answer.strip())
        if said is None:
            return UNREADABLE
        return float(said == gold or context.abs(context.subtract(said, gold)) <= within)

    return score


# Families that compare with a tolerance find NaN within it, and whatever is greater than infinity nowhere.
_NOT_FINITE = re.compile(r"(?<!\w)(?:nan|inf|infinity)(?!\w)", re.IGNORECASE)


def _reasoning_gym(source: ReasoningGymSource, field: str) -> Scorer:
    dataset = create_reasoning_gym(source, 0, field)

    def score(answer: str, item: Item) -> Any:
        if _NOT_FINITE.search(answer) and not _NOT_FINITE.search(item.answer or ""):
            return UNREADABLE
        return dataset.score_answer(answer, item.entry)

    return score


def _verdict(rubric: Rubric) -> Scorer:
    def score(answer: str, item: Item) -> Any:
        try:
            said = parse_verdict(rubric, answer, pairwise="answers" in item.metadata).overall
        except VerdictError:
            return UNREADABLE
        return Said(said, 1.0 - abs(said - item.metadata["gold"]))

    return score


def _template(text: str, field: str) -> Scorer:
    template = TextTemplate(text, field)

    def score(answer: str, item: Item) -> float:
        gold = "" if item.answer is None else item.answer
        return float(template.render(answer=answer, question=item.question, gold=gold, metadata=item.metadata))

    return score


def _python(name: str, field: str) -> Scorer:
    module, _, path = name.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for part in path.split("."):
            function = getattr(function, part)
    except Exception as error:  # whatever the module raises when it is imported
        raise ConfigError(f"{field}: cannot import {name} ({type(error).__name__}: {error})", field=field) from error
    if not callable(function):
        raise ConfigError(f"{field}: {name} is no function", field=field)

    def score(answer: str, item: Item) -> Any:
        return function(answer, {"question": item.question, "answer": item.answer, "metadata": item.metadata})

    return score
