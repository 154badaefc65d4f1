"""Grammars over tokenizers of several kinds: whatever is drawn matches, and what is allowed is exactly what fits."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd_mesh.errors import InvalidInputError, PreconditionError
from opd_mesh.grammar import GrammarMatcher, Grammars, TokenVocabulary
from opd_mesh.pipeline.making import character_tokenizer
from opd_mesh.sampling import sample_tokens
from opd_mesh.trajectory import MAX_GRAMMAR_BYTES, SamplingParams

CORPUS = ["score: 7 because the answer is good, helpful and clear é\n", "score: 10 because it is bad ✓\n"] * 8
# Grammar, and the same as a regular expression.
LANGUAGES = {
    "digits": (r"start: /[0-9]{1,3}/", r"[0-9]{1,3}"),
    "verdict": (
        'start: line{3}\nline: "score" ": " /[1-5]/ " because " /[a-z ]{0,12}/ "\\n"',
        r"(score: [1-5] because [a-z ]{0,12}\n){3}",
    ),
    "choice": (r'start: ("A" | "B" | "tie") "!"?', r"(A|B|tie)!?"),
    "nested": ('start: /[a-z]/ | "(" start ")"', r"\(*[a-z]\)*"),
    "anything": (r"start: /(.|\n){0,6}/", r"(.|\n){0,6}"),
}


def bpe() -> Any:
    """Byte-level, as GPT-2's: letters that stand for bytes, merges of several, characters cut in two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def fallback() -> Any:
    """As Llama's: a mark for spaces, one in front of every text, and tokens for the bytes of what is not known."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz0123456789.,:(){}[]\"'!AB", "▁because", "score", "be", "ca", "us"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(letters)]
    model = models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "characters": lambda: tiny_tokenizer(),
    "numbers": lambda: character_tokenizer(
        "abcdefghijklmnopqrstuvwxyz .:!()AB\n", ["<think>", "</think>"], numbers=130
    ),
    "byte-level": bpe,
    "byte fallback": fallback,
}


@cache
def tokenizer_of(kind: str) -> Any:
    return TOKENIZERS[kind]()


@cache
def vocabulary_of(kind: str) -> TokenVocabulary:
    tokenizer = tokenizer_of(kind)
    return TokenVocabulary.of(tokenizer, max(tokenizer.get_vocab().values()) + 1)


@cache
def grammars_of(kind: str) -> Grammars:
    return Grammars(vocabulary_of(kind))


def text_of(kind: str, ids: list[int]) -> str:
    return vocabulary_of(kind).tokens.decode_bytes(ids).decode()


def ids_of(matcher: GrammarMatcher) -> list[int]:
    return np.flatnonzero(matcher.allowed()).tolist()


def draw_response(kind: str, grammar: str, params: SamplingParams, logits: torch.Generator) -> tuple[list[int], bool]:
    """Tokens under logits at random, stop token left out, and whether one came."""
    vocabulary = vocabulary_of(kind)
    matcher = grammars_of(kind).matcher(grammar, params.stop_token_ids)
    ids: list[int] = []
    while len(ids) < params.max_new_tokens:
        row = 8 * torch.randn(1, vocabulary.size + 3, generator=logits)
        sampled = sample_tokens(row, [params], [len(ids)], vocabulary.size, [matcher.allowed()])
        assert sampled.errors == (None,)
        token = int(sampled.token_ids_B[0])
        matcher.advance(token)
        if token in params.stop_token_ids:
            return ids, True
        ids.append(token)
    return ids, False


# --- what is drawn ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("language", LANGUAGES)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**63),
    temperature=st.sampled_from([0.0, 0.6, 1.0, 100.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([0.5, 1.0]),
)
def test_whatever_the_logits_what_is_drawn_matches(
    kind: str, language: str, seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    grammar, pattern = LANGUAGES[language]
    eos = tokenizer_of(kind).eos_token_id
    params = SamplingParams(seed, temperature, top_p, top_k, max_new_tokens=120, stop_token_ids=(eos,))
    ids, complete = draw_response(kind, grammar, params, torch.Generator().manual_seed(seed))
    assert not set(ids) & set(tokenizer_of(kind).all_special_ids)
    if complete:
        assert re.fullmatch(pattern, text_of(kind, ids))
    else:
        assert language == "nested"  # every other language is of a bounded length


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_stop_tokens_are_allowed_exactly_where_the_grammar_is_complete(kind: str, language: str) -> None:
    """All of them, and no other special token anywhere."""
    grammar, pattern = LANGUAGES[language]
    tokenizer, generator = tokenizer_of(kind), torch.Generator().manual_seed(5)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    stops = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    assert special > stops
    seen = set()
    for _ in range(6):
        matcher, ids = grammars_of(kind).matcher(grammar, [*stops, 10**6]), []
        for _ in range(120):
            allowed = set(ids_of(matcher))
            try:
                complete = re.fullmatch(pattern, text_of(kind, ids)) is not None
                complete &= language != "nested" or text_of(kind, ids).count("(") == text_of(kind, ids).count(")")
            except UnicodeDecodeError:  # in the midst of a character
                complete = False
            assert allowed & special == (stops if complete else set())
            seen.add(complete)
            rest = sorted(allowed - stops)
            if not rest:
                break
            ids.append(rest[int(torch.randint(len(rest), (), generator=generator))])
            matcher.advance(ids[-1])
    assert seen == {True, False} or language == "anything"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_all_that_fits_is_allowed(kind: str) -> None:
    """Against the bytes of every token, where the grammar leaves a choice."""
    vocabulary = vocabulary_of(kind)
    texts = [vocabulary.tokens.decode_bytes([i]) if vocabulary.ordinary_V[i] else b"" for i in range(vocabulary.size)]
    wanted = [i for i, text in enumerate(texts) if re.fullmatch(rb"[a-e]{1,3}|[a-e]{0,3}\.", text)]
    assert len(wanted) > 5
    assert ids_of(grammars_of(kind).matcher(r'start: /[a-e]{0,3}/ "."', [2])) == wanted


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("characters", "score: 10\n"),
        ("numbers", "ab 100: 9"),
        ("numbers", "a 012"),  # the tokenizer itself calls 012 unknown: 0 and 12 it is
        ("byte-level", "score: because é✓ zzz"),
        ("byte fallback", "score: é because"),
    ],
)
def test_a_text_that_is_the_only_one_is_cut_as_the_tokenizer_cuts_it(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    matcher, ids = grammars_of(kind).matcher(f"start: {text!r}".replace("'", '"'), [tokenizer.eos_token_id]), []
    while True:
        (only,) = ids_of(matcher)
        matcher.advance(only)
        if only == tokenizer.eos_token_id:
            break
        ids.append(only)
    assert text_of(kind, ids) == text
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    if kind == "byte fallback":  # it puts a space in front of every text
        assert len(ids) == len(own) - 1
    elif text == "a 012":
        assert tokenizer.unk_token_id in own
        assert tokenizer.convert_ids_to_tokens(ids) == ["a", " ", "0", "12"]
    else:
        assert ids == own


def test_a_stop_token_may_be_text() -> None:
    """It then ends the response, and does nothing else."""
    tokenizer = tokenizer_of("characters")
    newline, a = tokenizer.convert_tokens_to_ids("\n"), tokenizer.convert_tokens_to_ids("a")
    matcher = grammars_of("characters").matcher(r"start: /[a\n]{1,2}/", [newline])
    assert ids_of(matcher) == [a]
    matcher.advance(a)
    assert ids_of(matcher) == sorted([newline, a])
    matcher.advance(newline)
    assert ids_of(matcher) == []
    with pytest.raises(InvalidInputError, match=f"token {a} at response token 2"):
        matcher.advance(a)


def test_where_no_token_fits_nothing_is_allowed_and_the_row_says_so() -> None:
    tokenizer = tokenizer_of("characters")
    grammars, a = grammars_of("characters"), tokenizer.convert_tokens_to_ids("a")
    assert ids_of(grammars.matcher(r'start: "a" | "é"', [2])) == [a]  # another way goes on
    matcher = grammars.matcher(r'start: /[ab]/ "é"', [2])
    matcher.advance(a)
    assert ids_of(matcher) == []
    assert ids_of(grammars.matcher("start: <s>", [2])) == []  # special tokens are none of a grammar's
    logits = torch.zeros(3, 131)
    free = np.ones(131, np.bool_)
    sampled = sample_tokens(logits, [SamplingParams()] * 3, [0, 1, 2], 131, [free, matcher.allowed(), None])
    assert [type(error) for error in sampled.errors] == [type(None), InvalidInputError, type(None)]
    assert sampled.errors[1] is not None
    assert sampled.errors[1].field == "sampling.grammar"
    assert "response token 1" in str(sampled.errors[1])
    assert sampled.token_ids_B[1] == -1


# --- matchers --------------------------------------------------------------------------------------------------
def test_matchers_of_one_grammar_do_not_see_each_other() -> None:
    tokenizer, grammars = tokenizer_of("characters"), grammars_of("characters")
    one, two = (grammars.matcher(r'start: "ab" | "ba"', [2]) for _ in range(2))
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    one.advance(a)
    assert ids_of(one) == [b]
    assert ids_of(two) == [a, b]
    assert ids_of(grammars.matcher(r'start: "ab" | "ba"', [2])) == [a, b]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_replay_finds_the_masks_of_the_drawing(kind: str) -> None:
    grammar, _ = LANGUAGES["verdict"]
    tokenizer, size = tokenizer_of(kind), vocabulary_of(kind).size
    params = SamplingParams(max_new_tokens=120, stop_token_ids=(tokenizer.eos_token_id,))
    ids, _ = draw_response(kind, grammar, params, torch.Generator().manual_seed(1))
    ids.append(tokenizer.eos_token_id)
    # As another process would, with nothing compiled yet.
    masks = Grammars(vocabulary_of(kind)).replay(grammar, params.stop_token_ids, ids)
    assert masks.index_R.tolist()[0] == 0
    assert len({row.tobytes() for row in masks.packed_MB}) == len(masks.packed_MB) < len(ids)
    matcher = grammars_of(kind).matcher(grammar, params.stop_token_ids)
    for token, index in zip(ids, masks.index_R, strict=True):
        mask_V = np.unpackbits(masks.packed_MB[index], count=size, bitorder="little").astype(np.bool_)
        assert np.array_equal(mask_V, matcher.allowed())
        matcher.advance(token)


def test_a_replay_refuses_what_was_not_drawn_so() -> None:
    tokenizer, grammars = tokenizer_of("characters"), grammars_of("characters")
    seven, a = tokenizer.convert_tokens_to_ids(["7", "a"])
    for ids, place in (([a], 0), ([seven, a], 1), ([2], 0), ([seven, 2, 2], 2), ([seven, 0], 1), ([131], 0), ([-1], 0)):
        with pytest.raises(InvalidInputError, match=f"token {ids[place]} at response token {place}") as caught:
            grammars.replay("start: /[0-9]{1,2}/", [2], ids)
        assert caught.value.field == "sampling.grammar"
    assert grammars.replay("start: /[0-9]{1,2}/", [2], [seven]).packed_MB.shape == (1, 17)  # cut off is no mistake


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_response_resumed_anywhere_goes_on_as_if_it_had_not_been_interrupted(kind: str) -> None:
    grammar, _ = LANGUAGES["verdict"]
    eos = tokenizer_of(kind).eos_token_id
    params = SamplingParams(max_new_tokens=120, stop_token_ids=(eos,))
    ids, _ = draw_response(kind, grammar, params, torch.Generator().manual_seed(2))
    whole = grammars_of(kind).matcher(grammar, [eos])
    for cut, token in enumerate([*ids, eos]):
        resumed = Grammars(vocabulary_of(kind)).matcher(grammar, [eos])
        resumed.resume(ids[:cut])
        assert np.array_equal(resumed.allowed(), whole.allowed())
        whole.advance(token)
    for wrong in (eos, vocabulary_of(kind).size, -1, ids[0]):
        matcher = grammars_of(kind).matcher(grammar, [eos])
        with pytest.raises(InvalidInputError, match=f"token {wrong} at response token 4"):
            matcher.resume([*ids[:4], wrong])


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("start: nowhere", 'unknown name: "nowhere"'),
        ("start: /[/", "invalid regex"),
        ("nothing", "does not compile"),
        ("start: <nosuch>", "unknown special token"),
    ],
)
def test_a_grammar_that_does_not_compile_is_told_why(grammar: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        grammars_of("characters").matcher(grammar, [2])
    assert caught.value.field == "sampling.grammar"
    assert len(str(caught.value)) < 700


def test_a_grammar_needs_a_stop_token_of_the_vocabulary() -> None:
    for stops in ((), (131, -1)):
        with pytest.raises(InvalidInputError) as caught:
            grammars_of("characters").matcher("start: /a/", stops)
        assert caught.value.field == "sampling.stop_token_ids"


def test_grammars_are_compiled_once_and_few_are_kept() -> None:
    grammars = Grammars(vocabulary_of("characters"), kept=2)
    texts = [f'start: "{letter}"' for letter in "abc"]
    grammars.matcher(texts[0], [2])
    first = grammars._compiled[texts[0]]
    grammars.matcher(texts[1], [2])
    grammars.matcher(texts[0], [2])
    grammars.matcher(texts[2], [2])
    assert list(grammars._compiled) == [texts[0], texts[2]]
    assert grammars._compiled[texts[0]] is first
    with pytest.raises(InvalidInputError):
        grammars.matcher("start: nowhere", [2])
    assert list(grammars._compiled) == [texts[0], texts[2]]


def test_the_longest_grammar() -> None:
    longest = "start: /a/ //" + "é" * ((MAX_GRAMMAR_BYTES - 13) // 2)
    SamplingParams(grammar=longest).validate()
    with pytest.raises(InvalidInputError, match="65538 bytes, but at most 65536") as caught:
        SamplingParams(grammar=longest + "éa").validate()
    assert caught.value.field == "sampling.grammar"


# --- vocabularies ----------------------------------------------------------------------------------------------
def test_an_engine_may_take_fewer_ids_than_the_tokenizer_has_and_more() -> None:
    tokenizer = tokenizer_of("characters")
    whole = ids_of(grammars_of("characters").matcher("start: /.+/", [2]))
    few = Grammars(TokenVocabulary.of(tokenizer, 40)).matcher("start: /.+/", [2])
    assert few.allowed().shape == (40,)
    assert ids_of(few) == [i for i in whole if i < 40]
    bytes_ = Grammars(TokenVocabulary.of(tokenizer_of("byte-level"), 400)).matcher("start: /.+/", [2])
    assert bytes_.allowed().shape == (400,)
    assert not bytes_.allowed()[320:].any()


def test_tokenizers_that_grammars_are_not_for() -> None:
    pieces = Tokenizer(
        models.WordPiece(
            {"<unk>": 0, "</s>": 1, **{c: i for i, c in enumerate("abcde", 2)}, "##b": 7}, unk_token="<unk>"
        )
    )
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.decoder = decoders.WordPiece()
    words = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>", unk_token="<unk>")
    for tokenizer, message in (
        (words, "reads back no text|cannot be told"),
        (PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>"), "no EOS token"),
    ):
        with pytest.raises(PreconditionError, match=message) as caught:
            TokenVocabulary.of(tokenizer, 8)
        assert caught.value.field == "tokenizer"
