"""Sources: items as a pure function of (seed, index), so that a run's place in its data is one cursor per domain."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from opd_mesh.config.tasks import DatasetSource, JsonlSource, ReasoningGymSource, TrajectoriesSource
from opd_mesh.errors import ConfigError
from student_trainer.tasks.hf_dataset import open_dataset
from student_trainer.tasks.items import Item
from student_trainer.tasks.jsonl import read_items
from student_trainer.tasks.trajectories import read_trajectories

# reasoning-gym makes item i of a dataset from seed + i: far enough apart, train and held-out never share a seed.
HELDOUT_SEED_OFFSET = 1 << 40
ENDLESS = 1 << 31
SourceConfig = ReasoningGymSource | JsonlSource | DatasetSource | TrajectoriesSource


class Source(Protocol):
    """Items by index."""

    def train(self, index: int) -> Item:
        """The item of an index, 0 and up without end."""
        ...

    def heldout(self, index: int) -> Item | None:
        """The held-out item of an index, or None beyond the last."""
        ...


def create_reasoning_gym(source: ReasoningGymSource, seed: int, field: str) -> Any:
    """A family's dataset. Raises :class:`ConfigError` with what reasoning-gym says."""
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(source.task, seed=seed, size=ENDLESS, **source.params)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"reasoning-gym refuses this: {error}", field=field) from error


class ReasoningGym:
    """A procedural task family.

    Args:
        heldout_seed: of the stream that held-out prompts come from; unset: the seed, offset.
    """

    def __init__(self, source: ReasoningGymSource, seed: int, field: str, heldout_seed: int | None = None) -> None:
        if heldout_seed is None:
            heldout_seed = seed + HELDOUT_SEED_OFFSET
        self._train = create_reasoning_gym(source, seed, field)
        self._heldout = create_reasoning_gym(source, heldout_seed, field)

    def train(self, index: int) -> Item:
        """See :class:`Source`."""
        return _item(self._train[index])

    def heldout(self, index: int) -> Item:
        """See :class:`Source`."""
        return _item(self._heldout[index])


def _item(entry: dict[str, Any]) -> Item:
    answer = entry.get("answer")
    messages = [{"role": "user", "content": entry["question"]}]
    return Item(messages, None if answer is None else str(answer), entry.get("metadata", {}), entry)


class Lines:
    """Finitely many items. Every epoch is a permutation of the items of its own."""

    def __init__(self, items: Sequence[Item], heldout: Sequence[Item], seed: int) -> None:
        self._items = items
        self._heldout = heldout
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._order_of)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self._items)))
        random.Random(f"{self._seed}:{epoch}").shuffle(order)
        return order

    def train(self, index: int) -> Item:
        """See :class:`Source`."""
        epoch, place = divmod(index, len(self._items))
        return self._items[self._order(epoch)[place]]

    def heldout(self, index: int) -> Item | None:
        """See :class:`Source`."""
        return self._heldout[index] if index < len(self._heldout) else None


class Part(Sequence[Item]):
    """Items ``start`` to ``stop`` of others, without reading them."""

    def __init__(self, items: Sequence[Item], start: int, stop: int) -> None:
        self._items = items
        self._range = range(start, stop)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        return self._items[self._range[index]]


def _without_the_last(
    items: Sequence[Item], count: int, path: object, field: str, *, trained: bool
) -> tuple[Part, Part]:
    """(items to train on, the last ``count``)."""
    if trained and count and len(items) <= count:
        raise ConfigError(
            f"{path} has {len(items)} prompts, and {count} are held out for evaluation: none is left to train on; add "
            "prompts, lower evaluation.accuracy.prompts_per_domain and evaluation.prompts_per_domain (the larger "
            "counts), or hold out others: a heldout file or split, or the domain's splits",
            field=field,
        )
    end = max(0, len(items) - count)
    return Part(items, 0, end), Part(items, end, len(items))


def open_source(
    source: SourceConfig,
    *,
    seed: int,
    field: str,
    tokenizer: Any,
    heldout_count: int,
    trained: bool = True,
    by_key: bool = False,
    needs_answers: str = "",
) -> Source:
    """Open what a recipe names.

    Args:
        field: its key in the recipe, for errors.
        tokenizer: the student's.
        heldout_count: how many of the last items are held out where the source names no others.
        trained: something must be left to train on.
        by_key: keys tell which items are held out, so both streams hold all of them; the held-out one is then the same
            under every seed.
        needs_answers: who needs gold answers, for errors; empty: nobody.

    Raises:
        ConfigError: it cannot be read.
        TokenizerMismatchError: trajectories of another tokenizer.
    """
    items: Sequence[Item]
    other: Sequence[Item] | None = None
    match source:
        case ReasoningGymSource():
            return ReasoningGym(source, seed, field, HELDOUT_SEED_OFFSET if by_key else None)
        case JsonlSource(path=path, heldout=named):
            items = read_items(path, f"{field}.path", needs_answers)
            if named is not None:
                other = read_items(named, f"{field}.heldout", needs_answers)
        case DatasetSource(path=path, heldout_split=split):
            items = open_dataset(source, source.split, field, needs_answers)
            if split is not None:
                other = open_dataset(source, split, field, needs_answers)
        case TrajectoriesSource(path=path):
            items = read_trajectories(path, f"{field}.path", tokenizer)
    if other is not None and not by_key:
        return Lines(items, other, seed)
    return lines(items, path, field, seed=seed, heldout_count=heldout_count, trained=trained, by_key=by_key)


def lines(
    items: Sequence[Item], path: object, field: str, *, seed: int, heldout_count: int, trained: bool, by_key: bool
) -> Lines:
    """Of a file, all of which is one: see :func:`open_source`."""
    if by_key:
        return Lines(items, items, seed)
    return Lines(*_without_the_last(items, heldout_count, path, field, trained=trained), seed)
