"""Prompt files: JSONL with a conversation, and perhaps its gold answer, on every line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opd_mesh.errors import ConfigError
from student_trainer.tasks.items import Item, Messages, item_of


class BadItemError(Exception):
    """What is wrong with a line or row; who reads it knows where it stands."""


def lines_of(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """(place for errors, value) of every line that is not blank. Raises :class:`ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field=field) from error
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028 inside a text
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where}: not JSON: {error}", field=field) from error


def read_items(path: Path, field: str, needs_answers: str = "") -> list[Item]:
    """All lines of a prompt file.

    Args:
        needs_answers: who needs gold answers, for errors; empty: nobody.

    Raises:
        ConfigError: naming file, line and key.
    """
    items = []
    for where, value in lines_of(path, field):
        try:
            item = _item(value)
            if needs_answers and item.answer is None:
                raise BadItemError(f'needs "answer", which {needs_answers} compares with')
        except BadItemError as error:
            raise ConfigError(f"{where}: {error}", field=field) from error
        items.append(item)
    if not items:
        raise ConfigError(f"{path} holds no prompt", field=field)
    return items


def _item(value: Any) -> Item:
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise BadItemError('needs exactly one of "prompt" (text) and "messages" (chat turns)')
    answer = answer_text(value.get("answer"))
    metadata = value.get("metadata")
    if not isinstance(metadata, dict | None):
        raise BadItemError('"metadata" must be a mapping')
    if "prompt" in value:
        return item_from_text(value["prompt"], answer, metadata or {})
    return item_from_turns(value["messages"], answer, metadata or {})


def answer_text(value: Any) -> str | None:
    """A gold answer, which may stand there as a number. Raises :class:`BadItemError`."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadItemError(f"the answer must be text or a number, found {type(value).__name__}")
    return str(value)


def item_from_text(text: Any, answer: str | None, metadata: Mapping[str, Any]) -> Item:
    """Raises :class:`BadItemError`."""
    if not isinstance(text, str) or not text.strip():
        raise BadItemError('"prompt" must be text that is not empty')
    return item_of([{"role": "user", "content": text}], answer, metadata)


def item_from_turns(turns: Any, answer: str | None, metadata: Mapping[str, Any]) -> Item:
    """A conversation; a last turn of the assistant's is the gold answer. Raises :class:`BadItemError`."""
    if not isinstance(turns, list) or not turns:
        raise BadItemError('"messages" must be a list of turns')
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise BadItemError('every turn needs "role" and "content" as text')
    messages: Messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    if messages[-1]["role"] == "assistant":
        if answer is not None:
            raise BadItemError(
                'the last turn is the assistant\'s, and there is an "answer", too: there can be one gold answer; put '
                'the other text into "metadata", and use it with the domain\'s `answer` template'
            )
        answer = messages.pop()["content"]
        if not messages or messages[-1]["role"] == "assistant":
            raise BadItemError("before the assistant's last turn there is nothing to answer")
    return item_of(messages, answer, metadata)
