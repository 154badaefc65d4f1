"""Texts of others, before they are put in a model's prompt: no token of the chat's own machinery in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# For a special token of one character, which cannot be taken apart.
REPLACEMENT = "\ufffd"


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """How a Hugging Face tokenizer spells what it makes one id of wherever it stands, longest first.

    Added tokens are, whether they are called special or not: several families' turns and thoughts are marked by tokens
    that are not. White space and single characters that are not called special end no turn, and are left out.
    """
    added = ((str(token), token.special) for token in tokenizer.added_tokens_decoder.values())
    found = {text for text, special in added if text and (special or (len(text) > 1 and not text.isspace()))}
    return tuple(sorted(found | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token)))


def taken_apart(text: str, special: Sequence[str]) -> str:
    """``text``, in which whatever is spelt like a special token has a space behind its first character; one of a single
    character is replaced.

    A tokenizer makes one id of ``<|im_end|>`` wherever it stands, and an answer that holds it would end its own turn in
    the judge's prompt. Taken apart it is text. Everything else stays as it is.
    """
    for token in special:
        text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else REPLACEMENT)
    return text


def all_taken_apart(texts: Iterable[str], special: Sequence[str]) -> list[str]:
    """Each of them."""
    return [taken_apart(text, special) for text in texts]
