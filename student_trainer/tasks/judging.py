"""Sources of judging domains: prompts that show an answer to a judge, and the verdict that is right (gold).

Gold comes from a file, or from another domain of the recipe: of every item of that one the right answer and a wrong one
are judged, so that the classes are balanced exactly. Its verifier has found the one right and the other wrong.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from opd_mesh.config.judging import Corruption, JudgingSource
from opd_mesh.config.recipe import Recipe
from opd_mesh.config.rubrics import Rubric, load_rubric
from opd_mesh.errors import ConfigError, InternalError
from opd_mesh.judging.plain import all_taken_apart
from opd_mesh.judging.probes import probes_of
from opd_mesh.judging.prompt import judge_prompt
from opd_mesh.judging.verdict import VerdictError, verdict_grammar, write_verdict
from student_trainer.tasks.items import PASSED_OVER, Item, Split
from student_trainer.tasks.jsonl import BadItemError, lines_of
from student_trainer.tasks.sources import Source, lines
from student_trainer.tasks.verifiers import ROUNDING, Verification, VerifierSpec

RIGHT, WRONG = 0, 1  # parts of an item that is judged
TRIES = 16  # of one sort of corruption; what is swapped or changed may be right again
NEIGHBOURS = 32  # items before and behind, whose answers are taken for another's
ALPHABET_ITEMS = 64  # whose answers tell which characters such answers have
ITEMS_KEPT = 512


def open_rubric(path: Path, field: str) -> Rubric:
    """A rubric of a recipe. Raises :class:`ConfigError` naming its key there."""
    try:
        return load_rubric(path)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error.message}", field=field) from error


def shows_prompt(rubric: Rubric, *, pairwise: bool = False) -> bool:
    """Whether a judge's prompt holds the whole prompt of what is judged, so that it tells which one that is."""
    probe = "What  is\nThis? " * 64 + "."  # as long as no template's excerpt, and as no filter leaves it
    return probe in judge_prompt(rubric, probe, ["an answer"] * (1 + pairwise), "a reference")


def verdict_grammars(recipe: Recipe) -> dict[str, str]:
    """By domain, of those whose verdicts are constrained: what its responses are drawn under.

    Raises:
        ConfigError: a rubric cannot be read.
    """
    return {
        name: verdict_grammar(
            open_rubric(domain.judging.rubric, f"domains.{name}.judging.rubric"), pairwise=domain.judging.pairwise
        )
        for name, domain in recipe.domains.items()
        if domain.judging is not None and domain.judging.constrained
    }


def judging_item(
    rubric: Rubric,
    prompt: str,
    answers: Sequence[str],
    *,
    reference: str,
    gold: float,
    verdict: str | None,
    part: int,
    key: str,
    facts: Mapping[str, Any] | None = None,
    special: Sequence[str] = (),
) -> Item:
    """What is to be judged: one answer, or two side by side.

    Args:
        gold: the overall score that is right; of a pair, of the first.
        verdict: its text, where that is known.
        part: which of the answers under one key.
        key: of all answers to one prompt, which belong to one split.
        special: of the judge's tokenizer, see :func:`~opd_mesh.judging.plain.special_tokens`; taken apart as the reward
            model does it, so that what is learned is what is asked.
    """
    shown_prompt, shown_reference, *shown = all_taken_apart((prompt, reference, *answers), special)
    text = judge_prompt(rubric, shown_prompt, shown, shown_reference)
    judged = {"answer": answers[0]} if len(answers) == 1 else {"answers": list(answers)}
    metadata = {**(facts or {}), **judged, "prompt": prompt, "gold": gold}
    return Item([{"role": "user", "content": text}], verdict, metadata, key=key, part=part)


# --- from a file -----------------------------------------------------------------------------------------------
def read_gold(path: Path, rubric: Rubric, field: str, special: Sequence[str] = ()) -> list[Item]:
    """All lines of a file of answers with gold verdicts. Raises :class:`ConfigError` naming file, line and key."""
    items: list[Item] = []
    shown = shows_prompt(rubric)
    for where, value in lines_of(path, field):
        try:
            item = _gold_item(value, rubric, len(items), special)
            # Where the prompt is not shown, answers to different ones may be the same to the judge.
            items.append(item if shown else replace(item, key=item.question))
        except (BadItemError, VerdictError) as error:
            raise ConfigError(f"{where}: {error}", field=field) from error
    if not items:
        raise ConfigError(f"{path} holds no answer to judge", field=field)
    return items


def _gold_item(value: Any, rubric: Rubric, number: int, special: Sequence[str]) -> Item:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("prompt", "answer")):
        raise BadItemError('needs "prompt" and "answer" as text, and "gold"')
    reference, reasons = value.get("reference", ""), value.get("reasons")
    if not isinstance(reference, str):
        raise BadItemError('"reference" must be text')
    if reasons is not None and not (
        isinstance(reasons, dict) and all(isinstance(one, str) for one in reasons.values())
    ):
        raise BadItemError('"reasons" must be a mapping from criteria to text')
    gold, scores = _gold_of(value.get("gold"), rubric)
    verdict = None
    if scores is not None and (reasons or rubric.reasons == "none"):
        verdict = write_verdict(rubric, scores, reasons)
    prompt, answer = value["prompt"], value["answer"]
    return judging_item(
        rubric,
        prompt,
        [answer],
        reference=reference,
        gold=gold,
        verdict=verdict,
        part=number,
        key=prompt,
        special=special,
    )


def _gold_of(gold: Any, rubric: Rubric) -> tuple[float, dict[str, float] | None]:
    """(overall, by criterion where that is known)."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    if isinstance(gold, dict):
        names = [criterion.name for criterion in rubric.criteria]
        if sorted(gold) != sorted(names) or not all(map(is_number, gold.values())):
            raise BadItemError(f'"gold" must hold a number for each of {", ".join(names)}, and nothing else')
        for criterion in rubric.criteria:
            if criterion.scale.nearest(gold[criterion.name]) is None:
                raise BadItemError(f'"gold": {gold[criterion.name]:g} is no point of the scale of {criterion.name}')
        scores = {name: float(score) for name, score in gold.items()}
        return rubric.overall(scores), scores
    if not is_number(gold) or not 0 <= gold <= 1:
        raise BadItemError('"gold" must be the overall score in [0, 1], or a mapping from criteria to scores')
    if len(rubric.criteria) > 1:
        return float(gold), None
    (criterion,) = rubric.criteria
    point = criterion.scale.nearest(criterion.scale.min + gold * (criterion.scale.max - criterion.scale.min))
    return float(gold), None if point is None else {criterion.name: point}


# --- from another domain ---------------------------------------------------------------------------------------
class Answering(Protocol):
    """The domain whose answers are judged."""

    @property
    def heldout_keys(self) -> frozenset[str]:
        """Of items that are kept out of its training without ``splits``."""
        ...

    @property
    def verifier_spec(self) -> VerifierSpec:
        """Says which answers are right."""
        ...

    def source_item(self, index: int, *, heldout: bool) -> Item | None:
        """Of its source; None beyond the last."""
        ...

    def question(self, item: Item) -> str:
        """What is asked."""
        ...

    def gold_answer(self, item: Item) -> str | None:
        """The right answer, without reasoning."""
        ...

    def key(self, item: Item) -> str:
        """What its split is told by."""
        ...

    def split(self, item: Item) -> Split | None:
        """None without ``splits``."""
        ...


@dataclass(frozen=True, slots=True)
class _Answered:
    """An item of the other domain."""

    item: Item
    gold: str | None
    key: str
    split: Split | None


class RightAndWrong:
    """Items 2k and 2k + 1 show the right answer to item k of another domain, and a wrong one; or, of pairs, both in
    either order. A :class:`Source`, a pure function of (seed, index); held-out items are the same under every seed
    where the other domain's are.

    Where no corruption makes the answer wrong, or the verifier does not find the gold answer right, both are passed
    over.
    """

    def __init__(
        self, config: JudgingSource, rubric: Rubric, answering: Answering, seed: int, special: Sequence[str] = ()
    ) -> None:
        self._config = config
        self._special = special
        self._rubric = rubric
        self._answering = answering
        self._seed = seed
        spec = answering.verifier_spec
        self._closing = spec.closing
        self._field = f"domains.{spec.domain}.verifier"
        self._verification = Verification(spec)
        self._pair = lru_cache(maxsize=ITEMS_KEPT)(self._pair_of)
        self._answered = lru_cache(maxsize=ITEMS_KEPT)(self._answered_of)
        self._alphabet = lru_cache(maxsize=2)(self._alphabet_of)

    def train(self, index: int) -> Item:
        """See :class:`Source`."""
        pair = self._pair(index // 2, heldout=False)
        assert pair is not None  # training items have no end
        return pair[index % 2]

    def heldout(self, index: int) -> Item | None:
        """See :class:`Source`."""
        pair = self._pair(index // 2, heldout=True)
        return None if pair is None else pair[index % 2]

    def _pair_of(self, index: int, *, heldout: bool) -> tuple[Item, Item] | None:
        answered = self._answered(index, heldout=heldout)
        if answered is None:
            return None
        gold = answered.gold
        if gold is None or not self._is(answered.item, gold, right=True):
            return PASSED_OVER, PASSED_OVER
        found = self._wrong(index, heldout, answered.item, gold)
        if found is None:
            return PASSED_OVER, PASSED_OVER
        wrong, corruption = found
        facts = {"corruption": corruption}
        if self._config.pairwise:
            first = self._shown(answered, [gold, wrong], RIGHT, facts)
            return first, self._shown(answered, [wrong, gold], WRONG, facts)
        return self._shown(answered, [gold], RIGHT, {}), self._shown(answered, [wrong], WRONG, facts)

    def _answered_of(self, index: int, *, heldout: bool) -> _Answered | None:
        domain = self._answering
        item = domain.source_item(index, heldout=heldout)
        if item is None:
            return None
        return _Answered(item, domain.gold_answer(item), domain.key(item), domain.split(item))

    def _shown(self, answered: _Answered, answers: Sequence[str], part: int, facts: dict[str, Any]) -> Item:
        """The answer is right, or of a pair the first one is, where ``part`` says so."""
        rubric, config, right = self._rubric, self._config, part == RIGHT
        if config.pairwise:
            scores, gold = dict.fromkeys([one.name for one in rubric.criteria], float(right)), float(right)
        else:
            scores = {one.name: one.scale.max if right else one.scale.min for one in rubric.criteria}
            gold = rubric.overall(scores)
        if config.probe is not None:
            answers = [probes_of(rubric, answer)[config.probe] for answer in answers]
        reason = ("right" if right else "wrong")[: rubric.max_reason_chars]
        reasons = {one.name: reason for one in rubric.criteria}
        return judging_item(
            rubric,
            self._answering.question(answered.item),
            answers,
            reference=(answered.gold or "") if config.reference == "answer" else "",
            gold=gold,
            verdict=write_verdict(rubric, scores, reasons, pairwise=config.pairwise),
            part=part,
            key=answered.key,
            facts=facts,
            special=self._special,
        )

    # --- wrong answers -----------------------------------------------------------------------------------------
    def _is(self, item: Item, answer: str, *, right: bool) -> bool:
        grade = self._verification.grade(item, self._closing + answer)
        if right and grade.failure is not None:
            raise ConfigError(
                f"{self._field}: of the gold answer {answer[:60]!r}, to be judged as right, {grade.failure}",
                field=self._field,
            )
        return grade.score is not None and (grade.score >= 1 - ROUNDING) == right

    def _wrong(self, index: int, heldout: bool, item: Item, gold: str) -> tuple[str, Corruption] | None:
        rng = random.Random(f"held out:{index}" if heldout else f"{self._seed}:{index}")
        kinds = list(self._config.corruptions)
        rng.shuffle(kinds)
        for kind in kinds:
            for answer in itertools.islice(self._corrupted(kind, index, heldout, gold, rng), TRIES):
                if answer.strip() and self._is(item, answer, right=False):
                    return answer, kind
        return None

    def _corrupted(self, kind: Corruption, index: int, heldout: bool, gold: str, rng: random.Random) -> Iterator[str]:
        match kind:
            case "swap":
                places = [place for place in range(len(gold) - 1) if gold[place] != gold[place + 1]]
                for place in rng.sample(places, len(places)):
                    yield gold[:place] + gold[place + 1] + gold[place] + gold[place + 2 :]
            case "exchange":
                for _ in range(TRIES if len(gold) > 1 else 0):
                    first, second = sorted(rng.sample(range(len(gold)), 2))
                    between = gold[first + 1 : second]
                    yield gold[:first] + gold[second] + between + gold[first] + gold[second + 1 :]
            case "change":
                pairs = [
                    (place, to)
                    for place, character in enumerate(gold)
                    if not character.isspace()
                    for to in self._alphabet(heldout)
                    if to != character
                ]
                for place, to in rng.sample(pairs, min(TRIES, len(pairs))):
                    yield gold[:place] + to + gold[place + 1 :]
            case "other":
                offsets = [*range(-NEIGHBOURS, 0), *range(1, NEIGHBOURS + 1)]
                for offset in rng.sample(offsets, len(offsets)):
                    if (answer := self._answer_to(index + offset, heldout, index)) is not None:
                        yield answer

    def _answer_to(self, index: int, heldout: bool, like: int) -> str | None:
        """The gold answer to another item, where that belongs to the same split."""
        other, own = (
            self._answered(index, heldout=heldout) if index >= 0 else None,
            self._answered(like, heldout=heldout),
        )
        if other is None or own is None or other.split != own.split:
            return None
        return None if not heldout and other.key in self._answering.heldout_keys else other.gold

    def _alphabet_of(self, heldout: bool) -> tuple[str, ...]:
        found: set[str] = set()
        for index in range(ALPHABET_ITEMS):
            if (answered := self._answered(index, heldout=heldout)) is None:
                break
            found.update(answered.gold or "")
        return tuple(sorted(character for character in found if not character.isspace()))


def open_judging(
    source: JudgingSource,
    rubric: Rubric,
    answering: Answering | None,
    *,
    field: str,
    seed: int,
    heldout_count: int,
    trained: bool,
    by_key: bool,
    special: Sequence[str] = (),
) -> Source:
    """Open what a recipe names; arguments as of :func:`~student_trainer.tasks.sources.open_source`.

    Args:
        answering: the domain whose answers are judged, where the source names one.
        special: as of :func:`judging_item`.
    """
    if source.path is not None:
        items = read_gold(source.path, rubric, f"{field}.path", special)
        return lines(
            items,
            source.path,
            f"{field}.path",
            seed=seed,
            heldout_count=heldout_count,
            trained=trained,
            by_key=by_key,
        )
    if answering is None:
        raise InternalError(f"{field}: opened without the domain that is judged")
    return RightAndWrong(source, rubric, answering, seed, special)
