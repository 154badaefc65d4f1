"""What ``opd judge`` reads and writes: lines of JSON, each checked on its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opd.v1 import generative_reward_service_pb2 as pb

from opd_mesh.config.rubrics import Rubric
from opd_mesh.errors import ConfigError, InvalidInputError, OpdError, PreconditionError
from opd_mesh.judging.probes import probes_of

KEYS = ("id", "prompt", "answer", "answers", "reference", "gold")
TOLD_PROBLEMS = 20
BEGINNING = b'{"id": '  # of every line of an output


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input.

    Attributes:
        key: its id, or where it stands.
        answers: one, or a pair.
        gold: in [0, 1], of the answer, or of the first of the pair; None where it is not known.
        probe: what was done to the answer of the line ``probed``, see :mod:`opd_mesh.judging.probes`; empty: nothing.
    """

    number: int
    key: str
    prompt: str
    answers: tuple[str, ...]
    reference: str
    gold: float | None
    probe: str = ""
    probed: str = ""

    @property
    def pairwise(self) -> bool:
        """Two answers against each other."""
        return len(self.answers) == 2

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over what is judged: the same id with other texts is not the same line. Gold is not judged."""
        contents = [self.prompt, self.answers, self.reference]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def read_lines(path: Path, rubric: Rubric | None) -> list[Line]:
    """All of them.

    Args:
        rubric: turns gold scores by criterion into one; None where the server holds it and we do not.

    Raises:
        ConfigError: lines that cannot be judged, each with its number.
    """
    lines: list[Line] = []
    problems: list[str] = []
    first: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                line = parse_line(raw, number, rubric)
                if first.setdefault(line.key, number) != number:
                    raise InvalidInputError(f"{line.key!r} was on line {first[line.key]} already", field="id")
            except OpdError as error:
                problems.append(f"  {path}:{number}: {error}")
            else:
                lines.append(line)
    if problems:
        more = f"\n  … and {len(problems) - TOLD_PROBLEMS} more" if len(problems) > TOLD_PROBLEMS else ""
        told = "\n".join(problems[:TOLD_PROBLEMS]) + more
        raise ConfigError(f"nothing was judged, because {len(problems)} lines cannot be:\n{told}", field="input")
    return lines


def with_probes(lines: Sequence[Line], rubric: Rubric) -> list[Line]:
    """Every line, and behind a lone answer's its probes, whose keys are ``<key>#<probe>``."""
    found: list[Line] = []
    for line in lines:
        found.append(line)
        probes = {} if line.pairwise else probes_of(rubric, line.answers[0])
        found += [
            replace(line, key=f"{line.key}#{name}", answers=(text,), gold=None, probe=name, probed=line.key)
            for name, text in probes.items()
        ]
    given = {line.key for line in lines}
    if taken := sorted(given & {line.key for line in found if line.probe}):
        raise ConfigError(f"the id {taken[0]!r} is also that of a probe; give the line another one", field="id")
    return found


def parse_line(raw: bytes, number: int, rubric: Rubric | None) -> Line:
    """Raises :class:`InvalidInputError` naming the key."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"must be a JSON object, found {type(value).__name__}")
    if unknown := [key for key in value if key not in KEYS]:
        raise InvalidInputError(f"is no key of a line; known are {', '.join(KEYS)}", field=unknown[0])
    if ("answer" in value) == ("answers" in value):
        raise InvalidInputError("give one answer, or a pair as answers: [a, b]", field="answer")
    if "answers" in value:
        pair = value["answers"]
        if not isinstance(pair, list) or len(pair) != 2:
            raise InvalidInputError("must be a list of two", field="answers")
        answers = tuple(_text(answer, f"answers[{index}]") for index, answer in enumerate(pair))
    else:
        answers = (_text(value["answer"], "answer"),)
    line_id = value.get("id", f"line {number}")
    if not isinstance(line_id, (str, int)) or isinstance(line_id, bool):
        raise InvalidInputError("must be a text or a whole number", field="id")
    return Line(
        number=number,
        key=str(line_id),
        prompt=_text(value.get("prompt"), "prompt"),
        answers=answers,
        reference=_text(value.get("reference") or "", "reference"),
        gold=_gold(value.get("gold"), rubric, pairwise=len(answers) == 2),
    )


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidInputError("must be there, as text", field=field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInputError("holds half of a surrogate pair", field=field) from None
    return value


def _gold(value: Any, rubric: Rubric | None, *, pairwise: bool) -> float | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        if pairwise:
            raise InvalidInputError("of a pair is a number: how much the first is preferred, from 0 to 1", field="gold")
        return _gold_by_criterion(value, rubric)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InvalidInputError("must be an overall score from 0 to 1, or a score for each criterion", field="gold")
    return float(value)


def _gold_by_criterion(value: Mapping[str, Any], rubric: Rubric | None) -> float:
    if rubric is None:
        raise InvalidInputError("scores by criterion need the rubric here: give --rubric FILE", field="gold")
    names = [criterion.name for criterion in rubric.criteria]
    if value.keys() != set(names):
        raise InvalidInputError(f"must have the rubric's criteria: {', '.join(names)}", field="gold")
    for criterion in rubric.criteria:
        score, scale = value[criterion.name], criterion.scale
        is_number = isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score)
        if not is_number or not scale.min <= score <= scale.max:
            raise InvalidInputError(f"must be from {scale.min:g} to {scale.max:g}", field=f"gold.{criterion.name}")
    return rubric.overall(dict(value))


# --- output ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Way:
    """How all lines of one output are judged; an output is never continued in another way.

    Attributes:
        judge: digest of the weights that judge, where they stay the same; None: whatever the reward model has.
    """

    rubric_digest: str
    samples: int
    temperature: float
    seed: int
    judge: str | None = None


class JudgedLines:
    """The judgements of one output, appended as they come, and read again by the next run.

    Raises:
        ConfigError: the file holds lines that are none, or were judged in another way.
    """

    def __init__(self, out: Path, way: Way) -> None:
        self.path = out
        self.done: dict[str, dict[str, Any]] = {}  # by key
        self._way = asdict(way)
        if out.exists():
            self._take_up()

    def _take_up(self) -> None:
        whole = 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    if not _is_torn(raw):
                        raise self._foreign(number)
                    break
                self._check(raw, number)
                whole += len(raw)
        if whole < self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def _check(self, raw: bytes, number: int) -> None:
        try:
            value = json.loads(raw)
            key, way, _, _ = value["id"], value["way"], value["digest"], value["score"]
        except (ValueError, KeyError, TypeError):
            raise self._foreign(number) from None
        for name, expected in self._way.items():
            if way.get(name) != expected:
                raise ConfigError(
                    f"{self.path} holds judgements with {name} {way.get(name)}, not {expected}: give another --out, or "
                    "remove the file",
                    field="out",
                )
        self.done[key] = value  # of lines that were tried again the last one counts

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(
            f"{self.path}, line {number}, is no judgement of opd judge: give another --out, or remove it", field="out"
        )

    def known(self, line: Line) -> bool:
        """Whether it has a score already: what failed is tried again.

        Raises:
            ConfigError: other texts have one, under its id.
        """
        value = self.done.get(line.key)
        if value is None or value["score"] is None:
            return False
        if value["digest"] != line.digest:
            raise ConfigError(
                f"{self.path} has a judgement on other texts under id {line.key!r}; give another id or --out",
                field="id",
            )
        return True

    def add(self, line: Line, outcome: pb.JudgeResponse | OpdError) -> None:
        """Append one; handed to the operating system on return."""
        value = {"id": line.key, "digest": line.digest, "way": self._way, **_told(line, outcome)}
        if value == self.done.get(line.key):
            return  # it failed as it did before
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise PreconditionError(f"cannot write {self.path}: {error.strerror}") from error
        self.done[line.key] = value


def _is_torn(raw: bytes) -> bool:
    """Whether it is the beginning of a line of ours, cut off in the middle of a write."""
    if not (raw.startswith(BEGINNING) or BEGINNING.startswith(raw)):
        return False
    try:
        return "way" in json.loads(raw)
    except ValueError:
        return True


def _told(line: Line, outcome: pb.JudgeResponse | OpdError) -> dict[str, Any]:
    """One answer's verdict; of a pair the first one's, for the other has the rest."""
    if isinstance(outcome, OpdError):
        return {"score": None, "failure": str(outcome), "votes": []}
    verdict = outcome.verdicts[0]
    judged = not verdict.failure
    judge = outcome.judge
    return {
        "score": verdict.score if judged else None,
        "scores": {criterion.name: criterion.score for criterion in verdict.criteria},
        "reasons": {criterion.name: criterion.reason for criterion in verdict.criteria if criterion.reason},
        "variance": verdict.score_variance if judged else None,
        "agreement": verdict.agreement if judged else None,
        "votes": [
            {"swapped": vote.swapped, "score": None if vote.failure else vote.score, "failure": vote.failure or None}
            for vote in outcome.votes
        ],
        "judge": {"run_id": judge.run_id, "lineage": judge.lineage, "version": judge.version, "digest": judge.digest},
        "rubric_digest": outcome.rubric_digest,
        "failure": verdict.failure or None,
    }


def failures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Reason → how often, the most frequent first."""
    counts: dict[str, int] = {}
    for row in rows:
        if row["failure"]:
            counts[row["failure"]] = counts.get(row["failure"], 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
