"""Prompts that have been read, kept for the other answers drawn to them under the same weights."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """Attributes:
    context: the backend's, of exactly the prompt. It must be copied before it is read on.
    logits_V: fp32 [V], of the token after it.
    num_bytes: what keeping it takes.
    """

    context: Any
    logits_V: Tensor
    num_bytes: int


class PromptStore:
    """The prompts used last, by their ids.

    Args:
        max_prompts: of which the one that was not used for longest goes first.
    """

    def __init__(self, max_prompts: int) -> None:
        self._max_prompts = max_prompts
        self._prompts: OrderedDict[tuple[int, ...], ReadPrompt] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def find(self, prompt_ids: tuple[int, ...]) -> ReadPrompt | None:
        """A prompt, which counts as used."""
        prompt = self._prompts.get(prompt_ids)
        if prompt is not None:
            self._prompts.move_to_end(prompt_ids)
        return prompt

    def put(self, prompt_ids: tuple[int, ...], prompt: ReadPrompt, *, max_bytes: int) -> bool:
        """Keep a prompt if all together take no more than ``max_bytes`` then; older ones go for it."""
        if prompt_ids in self._prompts or prompt.num_bytes > max_bytes:
            return False
        while self._prompts and (
            len(self._prompts) == self._max_prompts or self.num_bytes + prompt.num_bytes > max_bytes
        ):
            self.drop_oldest()
        self._prompts[prompt_ids] = prompt
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
