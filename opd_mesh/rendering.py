"""Text to ids, exactly once, and a response's ids back to text; with the marks of a reasoning effort in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_mesh.config.tasks import EffortConfig

Messages = list[dict[str, str]]
PLAIN = EffortConfig()  # adds nothing


def render(
    tokenizer: Any, messages: Messages, system_prompt: str | None, effort: EffortConfig = PLAIN
) -> tuple[int, ...]:
    """Token ids of a conversation, ready for the student to go on. This is the one place where prompts become ids."""
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if tokenizer.chat_template is None:
        # A base model: the turns' text alone, with the special tokens the tokenizer itself puts before a text.
        text = "\n".join(turn["content"] for turn in messages)
        return tuple(tokenizer(effort.prefix + text + effort.opening)["input_ids"])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if effort.prefix:
        bos = tokenizer.bos_token or ""
        start = len(bos) if text.startswith(bos) else 0
        text = text[:start] + effort.prefix + text[start:]
    if effort.opening and not text.rstrip().endswith(effort.opening.rstrip()):  # some templates open it themselves
        text += effort.opening
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_answer(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of what the student is to write, without EOS."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class ResponseDecoder:
    """Ids of responses → text, without special tokens, among which the effort's marks do not count."""

    def __init__(self, tokenizer: Any, effort: EffortConfig) -> None:
        self._tokenizer = tokenizer
        marks = [mark for mark in (effort.opening, effort.closing) if mark]
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        self._dropped = {
            token_id
            for token_id in special
            if not any(tokenizer.convert_ids_to_tokens(token_id) in mark for mark in marks)
        }

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a response."""
        kept = [token_id for token_id in token_ids if token_id not in self._dropped]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


@dataclass(frozen=True, slots=True)
class Response:
    """A response in its parts. ``answer`` is None where the reasoning never ends."""

    reasoning: str
    answer: str | None


def split_reasoning(text: str, closing: str) -> Response:
    """At the first ``closing``; where that is empty all of the text is the answer."""
    if not closing:
        return Response("", text)
    reasoning, found, answer = text.partition(closing)
    return Response(reasoning, answer if found else None)
