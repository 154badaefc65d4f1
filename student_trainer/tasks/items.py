"""What sources give: a question, its gold answer where there is one, and facts about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opd_mesh.rendering import Messages

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt. Its item is found again by (domain, split, index)."""

    domain: str
    index: int  # in its split's stream; the cursor of the training prompts goes on behind it
    token_ids: tuple[int, ...]
    other: bool = False  # one of the domain's `others`: marked, never verified
    split: Split = "train"


@dataclass(frozen=True, slots=True)
class Item:
    """One task.

    Attributes:
        messages: the conversation to go on with; its last turn is the question. Empty where there are only ids.
        answer: the gold answer as the source has it.
        entry: what a scorer is given: question, answer, metadata, and whatever else the source's own item holds.
        prompt_ids, response_ids: of an item that is a trajectory.
        key: what its split is told by, where the source says so; of several items of one key, ``part`` is which.
    """

    messages: Messages
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    entry: Mapping[str, Any] = field(default_factory=dict)
    prompt_ids: Sequence[int] = ()
    response_ids: Sequence[int] = ()
    key: str | None = None
    part: int = 0

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return self.messages[-1]["content"] if self.messages else ""


# In the place of an item that cannot be used; compared by identity.
PASSED_OVER = Item([])


def item_of(messages: Messages, answer: str | None, metadata: Mapping[str, Any]) -> Item:
    """An item from a file; its entry is as reasoning-gym's are."""
    entry = {"question": messages[-1]["content"], "answer": answer, "metadata": metadata}
    return Item(messages, answer, metadata, entry)
