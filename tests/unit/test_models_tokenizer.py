"""Fingerprints, roles and first differences of tokenizers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import BOS_ID, CHAT_TEMPLATE, EOS_ID, PAD_ID, tiny_tokenizer

from opd_mesh.errors import InvalidInputError, ModelNotFoundError
from opd_mesh.models.tokenizer import (
    first_difference,
    load_tokenizer,
    role_differences,
    tokenizer_fingerprint,
    tokenizer_roles,
    valid_vocab_size,
)

VOCABS = st.dictionaries(st.text(max_size=6), st.integers(0, 40), max_size=12)


def test_fingerprint_is_the_documented_encoding() -> None:
    pairs = b""
    for token, token_id in (("a", 258), ("é", 0)):
        encoded = token.encode()
        pairs += len(encoded).to_bytes(8, "little") + encoded + token_id.to_bytes(8, "little")
    assert tokenizer_fingerprint({"é": 0, "a": 258}) == hashlib.sha256(pairs).hexdigest()


@given(VOCABS, VOCABS)
def test_fingerprints_agree_exactly_where_there_is_no_difference(a: dict[str, int], b: dict[str, int]) -> None:
    same = a == b
    assert (tokenizer_fingerprint(a) == tokenizer_fingerprint(b)) is same
    assert (first_difference(a, b) is None) is same
    assert tokenizer_fingerprint(dict(reversed(a.items()))) == tokenizer_fingerprint(a)


def test_borders_between_tokens_are_part_of_the_fingerprint() -> None:
    assert tokenizer_fingerprint({"ab": 1, "c": 2}) != tokenizer_fingerprint({"a": 1, "bc": 2})


def test_lone_surrogates_are_allowed_and_negative_ids_are_not() -> None:
    assert len(tokenizer_fingerprint({"\ud800": 0})) == 64
    with pytest.raises(InvalidInputError, match="negative"):
        tokenizer_fingerprint({"a": -1})


def test_first_difference_names_the_lowest_id_and_both_sides() -> None:
    a = {"x": 0, "y": 1, "z": 2, "w": 3}
    b = {"x": 0, "z": 1, "y": 2}
    text = first_difference(a, b, name_a="student", name_b="teacher math")
    assert text == "token id 1 is 'y' in student but 'z' in teacher math (4 against 3 tokens)"
    assert first_difference({"x": 0}, {"x": 0, "y": 1}) == (
        "token id 1 is absent in the first but 'y' in the second (1 against 2 tokens)"
    )
    assert "'a' and 'b'" in str(first_difference({"a": 0, "b": 0}, {"a": 0}))


@pytest.mark.parametrize("vocab_size", [97, 131, 211])
def test_tiny_tokenizer_round_trip(tmp_path: Path, vocab_size: int) -> None:
    made = tiny_tokenizer(vocab_size)
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert valid_vocab_size(tokenizer) == vocab_size == len(tokenizer.get_vocab())
    assert tokenizer_fingerprint(tokenizer.get_vocab()) == tokenizer_fingerprint(made.get_vocab())
    text = "what is 12 + 34 = ?\nyes  it's  46."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<s>user: 1+1\nassistant: "
    assert tokenizer(prompt, add_special_tokens=False).input_ids[0] == BOS_ID


def test_roles_and_their_differences() -> None:
    base, instruct = tiny_tokenizer(), tiny_tokenizer()
    instruct.eos_token = "<extra_0>"
    instruct.chat_template = CHAT_TEMPLATE + " "
    assert tokenizer_fingerprint(base.get_vocab()) == tokenizer_fingerprint(instruct.get_vocab())
    roles = tokenizer_roles(base)
    assert (roles.bos_token_id, roles.eos_token_id, roles.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)
    assert roles.chat_template_sha256 == hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    differences = role_differences(roles, tokenizer_roles(instruct))
    assert len(differences) == 2
    assert differences[0] == f"EOS token id: {EOS_ID} against {instruct.eos_token_id}"
    assert differences[1].startswith("chat template")
    assert role_differences(roles, roles) == []
    base.chat_template = None
    assert tokenizer_roles(base).chat_template_sha256 is None
    base.chat_template = {"default": "a", "tool": "b"}
    expected = hashlib.sha256(json.dumps({"default": "a", "tool": "b"}, sort_keys=True).encode()).hexdigest()
    assert tokenizer_roles(base).chat_template_sha256 == expected


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"absent does not exist"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"holds no tokenizer"):
        load_tokenizer(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ModelNotFoundError, match=r"holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_importing_the_module_imports_no_torch() -> None:
    code = "import sys, opd_mesh.models.tokenizer; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
