"""Hugging Face datasets on this machine: no download, and no code of theirs is run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opd_mesh.config.tasks import DatasetSource
from opd_mesh.errors import ConfigError
from student_trainer.tasks.items import Item
from student_trainer.tasks.jsonl import BadItemError, answer_text, item_from_text, item_from_turns


class Rows(Sequence[Item]):
    """Items of a table, read when they are asked for.

    Args:
        read: row by index.
        needs_answers: who needs gold answers, for errors; empty: nobody.
    """

    def __init__(
        self, source: DatasetSource, count: int, read: Callable[[int], dict[str, Any]], field: str, needs_answers: str
    ) -> None:
        self._source = source
        self._count = count
        self._read = read
        self._field = field
        self._needs_answers = needs_answers

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        try:
            return self._item(self._read(index))
        except BadItemError as error:
            raise ConfigError(f"{self._source.path}, row {index}: {error}", field=self._field) from error

    def _item(self, row: dict[str, Any]) -> Item:
        source = self._source
        used = {source.prompt_field, source.messages_field, source.answer_field}
        metadata = {key: value for key, value in row.items() if key not in used}
        answer = None if source.answer_field is None else answer_text(row[source.answer_field])
        if self._needs_answers and answer is None:
            raise BadItemError(f"holds no answer, which {self._needs_answers} compares with; name answer_field")
        if source.prompt_field is not None:
            return item_from_text(row[source.prompt_field], answer, metadata)
        return item_from_turns(row[source.messages_field or ""], answer, metadata)


def open_dataset(source: DatasetSource, split: str | None, field: str, needs_answers: str = "") -> Rows:
    """Open one split.

    Raises:
        ConfigError: there is no such dataset, split or column, or its first row is no prompt.
    """
    path = source.path
    if not path.exists():
        raise ConfigError(f"{path} does not exist", field=f"{field}.path")
    if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        count, columns, read = _saved(path, split, field)
    else:
        count, columns, read = _parquet(path, split, field)
    for key in ("prompt_field", "messages_field", "answer_field"):
        column = getattr(source, key)
        if column is not None and column not in columns:
            raise ConfigError(f"{path} has no column {column!r}, only {', '.join(columns)}", field=f"{field}.{key}")
    if not count:
        raise ConfigError(f"{path} holds no prompt", field=field)
    rows = Rows(source, count, read, field, needs_answers)
    _ = rows[0]  # what is wrong with all rows is told before the first step
    return rows


Table = tuple[int, list[str], Callable[[int], dict[str, Any]]]


def _saved(path: Path, split: str | None, field: str) -> Table:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # Arrow and datasets raise many kinds
        raise ConfigError(f"cannot read {path}: {type(error).__name__}: {error}", field=f"{field}.path") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            named = "no split is named" if split is None else f"there is no split {split!r}"
            raise ConfigError(f"{named}; {path} has {', '.join(found)}", field=f"{field}.split")
        found = found[split]
    elif split is not None:
        raise ConfigError(f"{path} has no splits; leave {split!r} out", field=f"{field}.split")
    # As Arrow, so that a column of images or sound stays what it is on disk.
    table = found.with_format("arrow")
    return len(found), list(found.column_names), lambda index: table[index : index + 1].to_pylist()[0]


def _parquet(path: Path, split: str | None, field: str) -> Table:
    from pyarrow import ArrowException, parquet

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(
            f"{path} is neither a dataset of save_to_disk nor a folder of Parquet files", field=f"{field}.path"
        )
    if split is not None:
        chosen = [file for file in files if _is_of(file, split)]
        if not chosen:
            names = ", ".join(str(file.relative_to(path)) if path.is_dir() else file.name for file in files[:8])
            raise ConfigError(f"{path} has no files of split {split!r}, only {names}", field=f"{field}.split")
        files = chosen
    elif len(several := sorted({name for file in files if (name := _split_named(file))})) > 1:
        raise ConfigError(f"{path} has files of the splits {', '.join(several)}; name one", field=f"{field}.split")
    try:
        table = parquet.ParquetDataset(files).read()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field=f"{field}.path") from error
    return table.num_rows, list(table.column_names), lambda index: table.slice(index, 1).to_pylist()[0]


_USUAL_SPLIT = re.compile(r"(train|validation|valid|val|dev|test|eval)(?![a-z])")


def _split_named(file: Path) -> str | None:
    """What :func:`_is_of` would find, where a name is plainly that of a split."""
    if shard := re.fullmatch(r"(.+)-\d+-of-\d+", file.stem):
        return shard[1]
    found = _USUAL_SPLIT.match(file.stem) or _USUAL_SPLIT.fullmatch(file.parent.name)
    return found[1] if found else None


def _is_of(file: Path, split: str) -> bool:
    """As the hub lays datasets out: ``train.parquet``, ``train-00000-of-00002.parquet``, ``train/0000.parquet``."""
    return file.stem == split or file.stem.startswith(f"{split}-") or file.parent.name == split
