"""What ``opd score`` reads: trajectories as lines of JSON, each checked on its own.

Letters: R scored tokens of a trajectory, K ids asked about at each of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mesh.convert import trajectory_from_json
from opd_mesh.errors import TrajectoryError
from opd_mesh.trajectory import Trajectory

CANDIDATES = "candidate_token_ids"


@dataclass(frozen=True, slots=True)
class Item:
    """One good line of the input.

    Attributes:
        place: "FILE:LINE: trajectory ID".
        candidate_token_ids: [R · K], row by row: the ids whose log-probabilities are asked for; empty: the teacher's
            own choice.
    """

    place: str
    trajectory: Trajectory
    candidate_token_ids: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over ids, spans and candidates: the same id with other contents is not the same item."""
        contents: list[Any] = [self.trajectory.token_ids, self.trajectory.scored_spans]
        if self.candidate_token_ids:
            contents.append(self.candidate_token_ids)
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def parse_line(raw: bytes) -> tuple[Trajectory, Any]:
    """→ the trajectory, and the value of ``candidate_token_ids`` as it stands there (None: absent).

    Raises:
        TrajectoryError: not a JSON object, or not a trajectory.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TrajectoryError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TrajectoryError(f"must be a JSON object, found {type(value).__name__}")
    candidates = value.pop(CANDIDATES, None)
    spans = value.get("scored_spans", value.get("scoredSpans"))
    if isinstance(spans, list):
        pairs = [
            {"start": span[0], "end": span[1]} if isinstance(span, list) and len(span) == 2 else span for span in spans
        ]
        value = {key: item for key, item in value.items() if key != "scoredSpans"} | {"scored_spans": pairs}
    return trajectory_from_json(value), candidates


def candidates_of(value: Any, *, rows: int, top_k: int, vocab_size: int) -> tuple[int, ...]:
    """R lists of K ids → [R · K], row by row; of None, nothing.

    Args:
        rows: R.
        top_k: K; 0: the signal asked for takes no candidates.

    Raises:
        TrajectoryError: saying what to give instead.
    """
    if value is None:
        return ()
    if not top_k:
        raise TrajectoryError("goes with --signal top_k_logprobs alone", field=CANDIDATES)
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise TrajectoryError(f"must be a list of {rows} lists of {top_k} ids", field=CANDIDATES)
    if len(value) != rows:
        raise TrajectoryError(f"{len(value)} lists of ids for {rows} scored tokens; give one each", field=CANDIDATES)
    for index, row in enumerate(value):
        name = f"{CANDIDATES}[{index}]"
        if len(row) != top_k:
            raise TrajectoryError(f"{len(row)} ids, but --top-k is {top_k}; both must be the same", field=name)
        for token in row:
            if type(token) is not int:
                raise TrajectoryError(f"{json.dumps(token)} is no token id", field=name)
            if not 0 <= token < vocab_size:
                raise TrajectoryError(f"token id {token} is outside the vocabulary of {vocab_size}", field=name)
    return tuple(token for row in value for token in row)


def count_lines(path: Path) -> int:
    """Lines that are not blank."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
