"""Which tokens a grammar allows next: for drawing them, and for normalizing probabilities over the same ones later.

A grammar is text in Lark's notation, in the dialect of llguidance, over the bytes that tokens stand for. What it allows
at a response token is a function of the grammar and of the tokens before it, and of nothing else: an engine that draws
and a trainer that replays find the same masks.

Special tokens are never allowed, also where a grammar names them, but for the response's own stop tokens: those are
allowed where the grammar is complete, and there all of them. Where the grammar leaves one text only, the tokens are
those that the tokenizer would cut it into.

Letters: V ids of the vocabulary without padding, R response tokens, M distinct masks.
"""

from __future__ import annotations

import logging
import re
import string
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from opd_mesh.errors import InvalidInputError, PreconditionError

logger = logging.getLogger(__name__)
BoolArray = npt.NDArray[np.bool_]

# Compiled grammars that are kept: as many as a server's clients use at a time, and a judge has one per rubric.
GRAMMARS_KEPT = 64
# Texts whose cut into tokens is kept; a grammar forces the same ones again and again.
_FORCED_TEXTS_KEPT = 4096
_MAX_MESSAGE_CHARS = 500
_PROBES = (
    "The score is 7 of 10: good, not great.\n",
    'äé✓ {"a": [1, 2.5]}',
    *string.printable,
    *map("".join, pairwise(string.ascii_lowercase)),  # a piece in the midst of a word may bear a mark
)


# --- vocabulary ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False, slots=True)
class TokenVocabulary:
    """The bytes of every token, as grammars see them.

    Attributes:
        size: V.
        eos_token_id: stands for "complete" inside llguidance.
        ordinary_V: which ids are text: neither special nor of no token.
    """

    tokens: LLTokenizer
    size: int
    eos_token_id: int
    ordinary_V: BoolArray

    @classmethod
    def of(cls, tokenizer: Any, valid_vocab_size: int) -> TokenVocabulary:
        """Of a Hugging Face tokenizer.

        Raises:
            PreconditionError: it has no EOS token, or its tokens' bytes cannot be told: with the reason.
        """
        if tokenizer.eos_token_id is None:
            raise PreconditionError("no grammars: the tokenizer names no EOS token", field="tokenizer")
        ordinary_V = np.ones(valid_vocab_size, np.bool_)
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        ordinary_V[[i for i in {*special, *tokenizer.all_special_ids} if i < valid_vocab_size]] = False
        tokens = _byte_tokens(tokenizer)
        if tokens is None:
            # One whose tokens are stretches of text: no letters that stand for bytes, no marks for spaces.
            texts = _PlainTexts(tokenizer, ordinary_V)
            ordinary_V[[i for i, text in enumerate(texts.tokens) if not text]] = False
            tokens = LLTokenizer(TokenizerWrapper(texts))
        _prove(tokenizer, tokens, ordinary_V)
        return cls(tokens, valid_vocab_size, tokenizer.eos_token_id, ordinary_V)


def _byte_tokens(tokenizer: Any) -> LLTokenizer | None:
    """Of a tokenizer of bytes (byte-level BPE, byte fallback); None for others."""
    import llguidance.hf

    try:
        return llguidance.hf.from_tokenizer(tokenizer)
    except Exception as reason:  # noqa: BLE001 - whatever it is, it cannot be read so
        logger.debug("not a tokenizer of bytes: %s", reason)
        return None


class _PlainTexts:
    """What ``llguidance.TokenizerWrapper`` asks of a tokenizer; a token's bytes are its text."""

    def __init__(self, tokenizer: Any, ordinary_V: BoolArray) -> None:
        self._tokenizer = tokenizer
        self._ordinary_V = ordinary_V
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = np.flatnonzero(~ordinary_V).tolist()
        texts = tokenizer.convert_ids_to_tokens(list(range(len(ordinary_V))))
        # An id may have no token.
        self.tokens = [text.encode("utf-8", "surrogatepass") if text else b"" for text in texts]
        self._ids = {text: i for i, text in enumerate(self.tokens) if text and ordinary_V[i]}
        self._longest = max(map(len, self._ids), default=0)
        self._cut = lru_cache(_FORCED_TEXTS_KEPT)(self._cut_anew)

    def __call__(self, text: bytes) -> list[int]:
        """The ids that a text is cut into."""
        return list(self._cut(text))

    def _cut_anew(self, data: bytes) -> tuple[int, ...]:
        ids = self._tokenizer(data.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"]
        known = all(i < len(self.tokens) and self._ordinary_V[i] for i in ids)
        if known and b"".join(self.tokens[i] for i in ids) == data:
            return tuple(ids)
        # The tokenizer itself would write "unknown" somewhere: the longest token each time, as far as there is one.
        longest, start = [], 0
        while start < len(data):
            sizes = range(min(self._longest, len(data) - start), 0, -1)
            size = next((size for size in sizes if data[start : start + size] in self._ids), None)
            if size is None:
                break
            longest.append(self._ids[data[start : start + size]])
            start += size
        return tuple(longest)


def _prove(tokenizer: Any, tokens: LLTokenizer, ordinary_V: BoolArray) -> None:
    """Whatever the tokenizer reads back as it was, the bytes must say, too."""
    told = 0
    for text in _PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or not all(i < len(ordinary_V) and ordinary_V[i] for i in ids) or tokenizer.decode(ids) != text:
            continue
        found = tokens.decode_bytes(ids)
        if found not in (text.encode(), b" " + text.encode()):  # some begin every text with a space
            raise PreconditionError(
                f"no grammars: the bytes of this tokenizer's tokens cannot be told ({text!r} comes out as {found!r}); "
                "what can be read are byte-level BPE, byte fallback, and tokens that are plain text",
                field="tokenizer",
            )
        told += 1
    if not told:
        raise PreconditionError("no grammars: the tokenizer reads back no text that it is given", field="tokenizer")


# --- grammars --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False, slots=True)
class TokenMasks:
    """The ids that were allowed at each token of a response.

    Attributes:
        packed_MB: [M, ⌈V / 8⌉] uint8, distinct masks; bit i % 8 of byte i // 8 is id i.
        index_R: [R] int64, which of them.
    """

    packed_MB: npt.NDArray[np.uint8]
    index_R: npt.NDArray[np.int64]


class Grammars:
    """Compiled grammars over one vocabulary; any thread.

    Args:
        kept: of which the one that was not used for longest goes first.
    """

    def __init__(self, vocabulary: TokenVocabulary, kept: int = GRAMMARS_KEPT) -> None:
        self._vocabulary = vocabulary
        self._kept = kept
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: str, stop_token_ids: Sequence[int]) -> GrammarMatcher:
        """One that stands before the first token of a response.

        Raises:
            InvalidInputError: the grammar does not compile, or no stop token is in the vocabulary.
        """
        stops = sorted({token for token in stop_token_ids if 0 <= token < self._vocabulary.size})
        if not stops:
            raise InvalidInputError(
                "a response by a grammar ends with a stop token: give the tokenizer's EOS, or another",
                field="sampling.stop_token_ids",
            )
        return GrammarMatcher(self._copy(grammar), self._vocabulary, stops)

    def replay(self, grammar: str, stop_token_ids: Sequence[int], token_ids: Sequence[int]) -> TokenMasks:
        """The masks that a whole response was drawn under.

        Raises:
            InvalidInputError: as :meth:`matcher`, or a token that the grammar does not allow.
        """
        matcher = self.matcher(grammar, stop_token_ids)
        places: dict[bytes, int] = {}
        index = []
        for token in token_ids:
            packed = np.packbits(matcher.allowed(), bitorder="little").tobytes()
            index.append(places.setdefault(packed, len(places)))
            matcher.advance(token)
        packed_MB = np.frombuffer(b"".join(places), np.uint8).reshape(len(places), -(-self._vocabulary.size // 8))
        return TokenMasks(packed_MB, np.array(index, np.int64))

    def _copy(self, grammar: str) -> LLMatcher:
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is None:
                compiled = LLMatcher(self._vocabulary.tokens, LLMatcher.grammar_from_lark(grammar), log_level=0)
                if compiled.is_error():
                    raise InvalidInputError(f"does not compile: {_message(compiled)}", field="sampling.grammar")
                self._compiled[grammar] = compiled
                if len(self._compiled) > self._kept:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return compiled.deep_copy()


class GrammarMatcher:
    """Where one response stands in its grammar. One thread at a time; made by :meth:`Grammars.matcher`."""

    def __init__(self, matcher: LLMatcher, vocabulary: TokenVocabulary, stops: list[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._stops = stops
        self._written = 0
        self._ended = False
        self._allowed: BoolArray | None = None  # of the next token, once it is known

    def allowed(self) -> BoolArray:
        """[V] the ids that may come next; not to be written to.

        None may behind a stop token, where what the grammar wants is said by no token of the vocabulary, and where it
        has become too complex to go on.
        """
        if self._allowed is None:
            self._allowed = self._find_allowed()
        return self._allowed

    def _find_allowed(self) -> BoolArray:
        vocabulary = self._vocabulary
        if self._ended:
            return np.zeros(vocabulary.size, np.bool_)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little").view(np.bool_)
        if self._matcher.is_error():  # there the bits say "complete"
            return np.zeros(vocabulary.size, np.bool_)
        complete = bits[vocabulary.eos_token_id]
        # Either may be longer: bits come by the byte, and an engine may take fewer ids than the tokenizer has.
        shared = min(len(bits), vocabulary.size)
        allowed_V = np.zeros(vocabulary.size, np.bool_)
        np.logical_and(bits[:shared], vocabulary.ordinary_V[:shared], out=allowed_V[:shared])
        allowed_V[self._stops] = complete
        return allowed_V

    def advance(self, token_id: int) -> None:
        """The next token is this one.

        Raises:
            InvalidInputError: the grammar does not allow it there.
        """
        if not (0 <= token_id < self._vocabulary.size and self.allowed()[token_id]):
            raise self._refusal(token_id)
        if token_id in self._stops:
            self._ended = True
        else:
            self._matcher.consume_token(token_id)  # where that fails, nothing is allowed any more
        self._written += 1
        self._allowed = None

    def resume(self, token_ids: Sequence[int]) -> None:
        """The next tokens are these, none of them a stop token: quickly, for no mask is made.

        So only their bytes are looked at, and a forced text may be cut in other ways than it would be drawn.

        Raises:
            InvalidInputError: the bytes of one do not fit; this matcher is of no use then.
        """
        for token in token_ids:
            ordinary = 0 <= token < self._vocabulary.size and self._vocabulary.ordinary_V[token]
            if not ordinary or token in self._stops or not self._matcher.consume_token(token):
                raise self._refusal(token)
            self._written += 1
        self._allowed = None

    def _refusal(self, token: int) -> InvalidInputError:
        return InvalidInputError(
            f"does not allow token {token} at response token {self._written}", field="sampling.grammar"
        )


def _message(matcher: LLMatcher) -> str:
    """Why, without the parser's state or the stack that llguidance adds."""
    return re.split(r"\s*<(?:state|backtrace)>", matcher.get_error(), maxsplit=1)[0][:_MAX_MESSAGE_CHARS]
