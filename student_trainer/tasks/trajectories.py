"""Trajectories as a source: what a model has written, as token ids, for SFT (cold start from teachers' rollouts)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_mesh.convert import trajectory_from_json
from opd_mesh.errors import ConfigError, TokenizerMismatchError, TrajectoryError
from opd_mesh.models.tokenizer import tokenizer_fingerprint, valid_vocab_size
from opd_mesh.trajectory import FinishReason, Trajectory
from student_trainer.tasks.items import Item
from student_trainer.tasks.jsonl import lines_of

FINGERPRINT = "tokenizer_fingerprint"


class TrajectoryItems(Sequence[Item]):
    """Items made of stored ids when they are asked for: four bytes a token meanwhile."""

    def __init__(self) -> None:
        self._rows: list[tuple[dict[str, Any], array[int], int]] = []

    def add(self, trajectory: Trajectory, facts: dict[str, Any]) -> None:
        """Keep one that has been checked."""
        self._rows.append((facts, array("i", trajectory.token_ids), trajectory.scored_spans[0][0]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        facts, ids, start = self._rows[index]
        return Item([], metadata=facts, prompt_ids=tuple(ids[:start]), response_ids=tuple(ids[start:]))


def read_trajectories(path: Path, field: str, tokenizer: Any) -> TrajectoryItems:
    """All lines of a trajectories file but those that were cancelled; what is no list in a line is the item's metadata.

    Args:
        tokenizer: the student's.

    Raises:
        ConfigError: naming file, line and key.
        TokenizerMismatchError: ids of another tokenizer.
    """
    items = TrajectoryItems()
    fingerprint, vocab_size = tokenizer_fingerprint(tokenizer.get_vocab()), valid_vocab_size(tokenizer)
    for where, value in lines_of(path, field):
        if isinstance(value, dict) and value.get("finish_reason") == FinishReason.CANCELLED:
            continue  # cut short anywhere: nothing to learn
        try:
            trajectory = _trajectory(value, fingerprint, vocab_size)
        except TrajectoryError as error:
            raise ConfigError(f"{where}: {error}", field=field) from error
        except TokenizerMismatchError as error:
            raise TokenizerMismatchError(f"{where}: {error}", field=field) from error
        items.add(trajectory, {key: part for key, part in value.items() if not isinstance(part, list | dict)})
    if not len(items):
        raise ConfigError(f"{path} holds no trajectory", field=field)
    return items


def _trajectory(value: Any, fingerprint: str, vocab_size: int) -> Trajectory:
    if not isinstance(value, dict):
        raise TrajectoryError(f"must be a JSON object, found {type(value).__name__}")
    said = value.get(FINGERPRINT)
    if not isinstance(said, str) or not said:
        raise TrajectoryError("is required: the SHA-256 of the tokenizer that made the ids", field=FINGERPRINT)
    if said != fingerprint:
        raise TokenizerMismatchError(
            f"the ids come from another tokenizer ({said[:16]}…) than the student's ({fingerprint[:16]}…); write the "
            "trajectories with a model of the student's tokenizer"
        )
    spans = value.get("scored_spans")
    if isinstance(spans, list):  # pairs are as good as objects
        spans = [{"start": s[0], "end": s[1]} if isinstance(s, list) and len(s) == 2 else s for s in spans]
    # What else stands there (log-probabilities, scores, text) is not learned from.
    needed = {key: value[key] for key in ("trajectory_id", "domain", "token_ids") if key in value}
    trajectory = trajectory_from_json(needed | {"scored_spans": spans})
    trajectory.validate(vocab_size=vocab_size)
    if len(trajectory.scored_spans) != 1 or trajectory.scored_spans[0][1] != len(trajectory.token_ids):
        raise TrajectoryError("must be one span that ends with the sequence: the response", field="scored_spans")
    return trajectory
