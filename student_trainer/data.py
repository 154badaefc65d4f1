"""Prompts: drawn from reasoning-gym or JSONL files, rendered once with the student's chat template.

A source is a pure function of (seed, index), so a run's place in its data is one cursor per domain. Held-out prompts
come from other seeds or lines, and a training prompt that equals one is passed over.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from opd_mesh.config.domains import DomainConfig, JsonlSource, ReasoningGymSource
from opd_mesh.config.recipe import Recipe
from opd_mesh.errors import ConfigError

# reasoning-gym makes item i of a dataset from seed + i: far enough apart, train and held-out never share a seed.
HELDOUT_SEED_OFFSET = 1 << 40
ENDLESS = 1 << 31
MAX_SKIPPED = 10_000

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt."""

    domain: str
    index: int  # in its source; the cursor goes on behind it
    token_ids: tuple[int, ...]


class Source(Protocol):
    """Conversations by index."""

    def train(self, index: int) -> Messages:
        """The conversation of an index, 0 and up without end."""
        ...

    def heldout(self, index: int) -> Messages | None:
        """The held-out conversation of an index, or None beyond the last."""
        ...


class ReasoningGym:
    """A procedural task family."""

    def __init__(self, source: ReasoningGymSource, seed: int, field: str) -> None:
        import reasoning_gym

        try:
            self._train = reasoning_gym.create_dataset(source.task, seed=seed, size=ENDLESS, **source.params)
            self._heldout = reasoning_gym.create_dataset(
                source.task, seed=seed + HELDOUT_SEED_OFFSET, size=ENDLESS, **source.params
            )
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"reasoning-gym refuses this: {error}", field=field) from error

    def train(self, index: int) -> Messages:
        """See :class:`Source`."""
        return [{"role": "user", "content": self._train[index]["question"]}]

    def heldout(self, index: int) -> Messages:
        """See :class:`Source`."""
        return [{"role": "user", "content": self._heldout[index]["question"]}]


class Jsonl:
    """Lines of ``{"prompt": text}`` or ``{"messages": [{"role", "content"}, …]}``.

    Every epoch is a permutation of the lines of its own. Without a held-out file the last ``heldout_count`` lines are
    held out.
    """

    def __init__(self, source: JsonlSource, seed: int, field: str, heldout_count: int) -> None:
        lines = read_conversations(source.path, f"{field}.path")
        if source.heldout is not None:
            self._heldout = read_conversations(source.heldout, f"{field}.heldout")
        else:
            if len(lines) <= heldout_count:
                raise ConfigError(
                    f"{source.path} has {len(lines)} prompts, and {heldout_count} are held out for evaluation: none is "
                    "left to train on; add prompts, name a heldout file, or lower evaluation.prompts_per_domain",
                    field=field,
                )
            lines, self._heldout = lines[: len(lines) - heldout_count], lines[len(lines) - heldout_count :]
        self._lines = lines
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def train(self, index: int) -> Messages:
        """See :class:`Source`."""
        epoch, place = divmod(index, len(self._lines))
        if epoch != self._epoch:
            self._order = list(range(len(self._lines)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._lines[self._order[place]]

    def heldout(self, index: int) -> Messages | None:
        """See :class:`Source`."""
        return self._heldout[index] if index < len(self._heldout) else None


def read_conversations(path: Path, field: str) -> list[Messages]:
    """All lines of a prompt file. Raises :class:`ConfigError` naming file, line and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field=field) from error
    conversations = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028 inside a text
        if line.strip():
            conversations.append(_conversation(line, f"{path}, line {number}", field))
    if not conversations:
        raise ConfigError(f"{path} holds no prompt", field=field)
    return conversations


def _conversation(line: str, where: str, field: str) -> Messages:
    def refuse(what: str) -> ConfigError:
        return ConfigError(f"{where}: {what}", field=field)

    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise refuse(f"not JSON: {error}") from error
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise refuse('needs exactly one of "prompt" (text) and "messages" (chat turns)')
    if "prompt" in value:
        if not isinstance(value["prompt"], str) or not value["prompt"].strip():
            raise refuse('"prompt" must be text that is not empty')
        return [{"role": "user", "content": value["prompt"]}]
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise refuse('"messages" must be a list of turns')
    for turn in messages:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise refuse('every turn needs "role" and "content" as text')
    if messages[-1]["role"] == "assistant":
        raise refuse("the last turn is the assistant's, so nothing is left to write")
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


def render(tokenizer: Any, messages: Messages, system_prompt: str | None) -> tuple[int, ...]:
    """Token ids of a conversation, ready for the student to go on. This is the one place where text becomes ids."""
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if tokenizer.chat_template is None:
        # A base model: the turns' text alone, with the special tokens the tokenizer itself puts before a text.
        return tuple(tokenizer("\n".join(turn["content"] for turn in messages))["input_ids"])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class Domain:
    """The prompts of one domain."""

    def __init__(
        self, name: str, config: DomainConfig, recipe: Recipe, tokenizer: Any, *, max_prompt_tokens: int
    ) -> None:
        self.name = name
        self.config = config
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        count = recipe.evaluation.prompts_per_domain
        seed = recipe.run.seed
        self._source: Source
        if config.reasoning_gym is not None:
            self._source = ReasoningGym(config.reasoning_gym, seed, f"domains.{name}.reasoning_gym")
        else:
            assert config.jsonl is not None  # the recipe has checked that there is one source
            self._source = Jsonl(config.jsonl, seed, f"domains.{name}.jsonl", count)
        self.heldout = list(self._heldout_prompts(count))
        self._heldout_ids = {prompt.token_ids for prompt in self.heldout}

    def _heldout_prompts(self, count: int) -> Iterator[Prompt]:
        seen: set[tuple[int, ...]] = set()
        index = 0
        while len(seen) < count and index < MAX_SKIPPED:
            messages = self._source.heldout(index)
            if messages is None:
                return
            prompt = self._rendered(index, messages)
            index += 1
            if prompt.token_ids not in seen:
                seen.add(prompt.token_ids)
                yield prompt

    def after(self, cursor: int, count: int) -> tuple[list[Prompt], int]:
        """The next ``count`` training prompts from ``cursor`` on, and the cursor behind them."""
        prompts: list[Prompt] = []
        for index in range(cursor, cursor + count + MAX_SKIPPED):
            if len(prompts) == count:
                return prompts, index
            prompt = self._rendered(index, self._source.train(index))
            if prompt.token_ids not in self._heldout_ids:
                prompts.append(prompt)
        raise ConfigError(
            f"{MAX_SKIPPED} prompts in a row are held out for evaluation: the source has too few different ones",
            field=f"domains.{self.name}",
        )

    def _rendered(self, index: int, messages: Messages) -> Prompt:
        token_ids = render(self._tokenizer, messages, self.config.system_prompt)
        if not 1 <= len(token_ids) <= self._max_prompt_tokens:
            raise ConfigError(
                f"prompt {index} renders to {len(token_ids)} tokens; between 1 and {self._max_prompt_tokens} fit "
                "beside the response (rollout.engine.max_context_tokens)",
                field=f"domains.{self.name}",
            )
        return Prompt(self.name, index, token_ids)


def allot(shares: Mapping[str, float], count: int, already: Mapping[str, int]) -> dict[str, int]:
    """How many of the next ``count`` prompts each domain gets, so that totals follow the shares at every step.

    A pure function: each prompt goes to the domain furthest behind its share of all prompts so far.
    """
    given = dict.fromkeys(shares, 0)
    total = sum(shares.values())
    drawn = sum(already.get(name, 0) for name in shares)
    for number in range(count):
        so_far = drawn + number + 1
        behind = {name: shares[name] / total * so_far - (already.get(name, 0) + given[name]) for name in shares}
        given[max(behind, key=lambda name: behind[name])] += 1
    return given


def next_prompts(
    domains: Sequence[Domain], count: int, cursors: Mapping[str, int], drawn: Mapping[str, int]
) -> tuple[list[Prompt], dict[str, int], dict[str, int]]:
    """The prompts of one step; returns (prompts, cursors behind them, prompts drawn so far by domain)."""
    portions = allot({domain.name: domain.config.share for domain in domains}, count, drawn)
    prompts: list[Prompt] = []
    new_cursors, new_drawn = dict(cursors), dict(drawn)
    for domain in domains:
        portion = portions[domain.name]
        taken, new_cursors[domain.name] = domain.after(cursors.get(domain.name, 0), portion)
        new_drawn[domain.name] = drawn.get(domain.name, 0) + portion
        prompts.extend(taken)
    return prompts, new_cursors, new_drawn


def open_domains(recipe: Recipe, tokenizer: Any) -> list[Domain]:
    """All domains of a recipe. Slow: prompts are read, and tokenized."""
    room = recipe.rollout.engine.max_context_tokens
    return [
        Domain(
            name,
            domain,
            recipe,
            tokenizer,
            max_prompt_tokens=room - (domain.max_new_tokens or recipe.rollout.max_new_tokens),
        )
        for name, domain in recipe.domains.items()
    ]
