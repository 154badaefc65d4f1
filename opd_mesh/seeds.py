"""Seeds derived from the run's one seed, so that every response has its own and none depends on what came before."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *key: int | str) -> int:
    """A 64-bit seed, a pure function of (seed, key): the first 8 bytes of SHA-256 over their text."""
    text = "\x1f".join([str(seed), *(str(part) for part in key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
