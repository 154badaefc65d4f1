"""Tokenizers: one fingerprint for one token ↔ id map, and the roles that may differ above the same map.

DESIGN §4, "Same tokenizer or no run". Nothing here needs torch, so that a service can compare fingerprints without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from opd_mesh.errors import InvalidInputError, ModelNotFoundError

_ROLE_TITLES = {
    "bos_token_id": "BOS token id",
    "eos_token_id": "EOS token id",
    "pad_token_id": "pad token id",
    "chat_template_sha256": "chat template (SHA-256)",
}


def tokenizer_fingerprint(vocab: Mapping[str, int]) -> str:
    """SHA-256 (hex) over the (token, id) pairs, sorted by token.

    Each pair is hashed as ``len(token) as 8 bytes ‖ token in UTF-8 ‖ id as 8 bytes``, integers unsigned little-endian.
    The length prefix makes the encoding unambiguous. Tokens are sorted by their UTF-8 bytes, also Python's order of
    strings; a lone surrogate (some byte-fallback vocabularies hold them) is encoded as WTF-8.

    Raises:
        InvalidInputError: an id is negative.
    """
    digest = hashlib.sha256()
    for encoded, token_id in sorted(
        (token.encode("utf-8", "surrogatepass"), token_id) for token, token_id in vocab.items()
    ):
        if token_id < 0:
            raise InvalidInputError(f"token {encoded!r} has the negative id {token_id}", field="vocab")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
        digest.update(token_id.to_bytes(8, "little"))
    return digest.hexdigest()


def _tokens_by_id(vocab: Mapping[str, int]) -> dict[int, list[str]]:
    # Two tokens may share an id, so an id names a list.
    tokens: dict[int, list[str]] = {}
    for token in sorted(vocab):
        tokens.setdefault(vocab[token], []).append(token)
    return tokens


def first_difference(
    vocab_a: Mapping[str, int], vocab_b: Mapping[str, int], *, name_a: str = "the first", name_b: str = "the second"
) -> str | None:
    """The lowest id whose token differs, for people; None if the maps are the same.

    Example: ``token id 17 is 'x' in student but 'y' in teacher math (131 against 131 tokens)``.
    """
    tokens_a, tokens_b = _tokens_by_id(vocab_a), _tokens_by_id(vocab_b)
    differing = [i for i in tokens_a.keys() | tokens_b.keys() if tokens_a.get(i) != tokens_b.get(i)]
    if not differing:
        return None
    token_id = min(differing)

    def side(tokens: dict[int, list[str]]) -> str:
        return " and ".join(repr(token) for token in tokens[token_id]) if token_id in tokens else "absent"

    return (
        f"token id {token_id} is {side(tokens_a)} in {name_a} but {side(tokens_b)} in {name_b} "
        f"({len(vocab_a)} against {len(vocab_b)} tokens)"
    )


def load_tokenizer(path: str | Path) -> Any:
    """The Hugging Face tokenizer in a local folder; no network, no remote code.

    Raises:
        ModelNotFoundError: the folder does not exist, or holds no tokenizer that can be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelNotFoundError(f"tokenizer folder {folder} does not exist; give the folder of a local checkpoint")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a parser in Rust raises bare Exception on a broken tokenizer.json
        raise ModelNotFoundError(
            f"{folder} holds no tokenizer that can be read ({type(error).__name__}: {error}); it needs tokenizer.json "
            "and tokenizer_config.json: copy them from the base model, or write them with tokenizer.save_pretrained"
        ) from error


@dataclass(frozen=True, slots=True)
class TokenizerRoles:
    """What a tokenizer says about its tokens beyond the map. None: the tokenizer sets no such role."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    chat_template_sha256: str | None


def tokenizer_roles(tokenizer: Any) -> TokenizerRoles:
    """The roles of a Hugging Face tokenizer. Several named chat templates are hashed as canonical JSON."""
    template = tokenizer.chat_template
    text = template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)
    return TokenizerRoles(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        chat_template_sha256=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
    )


def role_differences(a: TokenizerRoles, b: TokenizerRoles) -> list[str]:
    """One sentence per role that differs, such as ``EOS token id: 2 against 7``; empty if none does."""
    return [
        f"{_ROLE_TITLES[role.name]}: {getattr(a, role.name)} against {getattr(b, role.name)}"
        for role in fields(TokenizerRoles)
        if getattr(a, role.name) != getattr(b, role.name)
    ]


def valid_vocab_size(tokenizer: Any) -> int:
    """One more than the highest id of the map, added tokens included: model rows at or above it are padding."""
    return max(tokenizer.get_vocab().values()) + 1
