"""Texts of others, before they are put in a model's prompt: no token of the chat's own machinery in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """How a Hugging Face tokenizer spells its special tokens, longest first."""
    found = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(found | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token)))


def taken_apart(text: str, special: Sequence[str]) -> str:
    """``text``, in which whatever is spelt like a special token has a space behind its first character.

    A tokenizer makes one id of ``<|im_end|>`` wherever it stands, and an answer that holds it would end its own turn in
    the judge's prompt. Taken apart it is text. Everything else stays as it is.
    """
    for token in special:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def all_taken_apart(texts: Iterable[str], special: Sequence[str]) -> list[str]:
    """Each of them."""
    return [taken_apart(text, special) for text in texts]
