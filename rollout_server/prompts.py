"""Prompts and prefixes that have been read, kept for other requests that begin with them under the same weights."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class PromptKey:
    """Tokens that contexts begin with, and how they are read. Hashed once: they are long, and looked up in every step.

    Attributes:
        ids: all of them.
        boundary: a pass over them ends here before the last one does; 0: nowhere. Other boundaries give other bits.
    """

    __slots__ = ("_hash", "boundary", "ids")

    def __init__(self, ids: tuple[int, ...], boundary: int = 0) -> None:
        self.ids = ids
        self.boundary = boundary
        self._hash = hash((ids, boundary))

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptKey) and (self.boundary, self.ids) == (other.boundary, other.ids)


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """Attributes:
    context: the backend's, of exactly the key's tokens. It must be copied before it is read on.
    logits_V: fp32 [V], of the token after it.
    num_bytes: what keeping it takes.
    """

    context: Any
    logits_V: Tensor
    num_bytes: int


class PromptStore:
    """The prompts used last.

    Args:
        max_prompts: of which the one that was not used for longest goes first.
    """

    def __init__(self, max_prompts: int) -> None:
        self._max_prompts = max_prompts
        self._prompts: OrderedDict[PromptKey, ReadPrompt] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def find(self, key: PromptKey) -> ReadPrompt | None:
        """A prompt, which counts as used."""
        prompt = self._prompts.get(key)
        if prompt is not None:
            self._prompts.move_to_end(key)
        return prompt

    def put(self, key: PromptKey, prompt: ReadPrompt, *, max_bytes: int) -> bool:
        """Keep a prompt if all together take no more than ``max_bytes`` then; older ones go for it."""
        if key in self._prompts or prompt.num_bytes > max_bytes:
            return False
        while self._prompts and (
            len(self._prompts) == self._max_prompts or self.num_bytes + prompt.num_bytes > max_bytes
        ):
            self.drop_oldest()
        self._prompts[key] = prompt
        self.num_bytes += prompt.num_bytes
        return True

    def drop_oldest(self) -> None:
        """Forget the prompt that was not used for longest."""
        _, dropped = self._prompts.popitem(last=False)
        self.num_bytes -= dropped.num_bytes

    def clear(self) -> None:
        """Forget all."""
        self._prompts.clear()
        self.num_bytes = 0
