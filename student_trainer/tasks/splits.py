"""Which split an item belongs to: a function of its key alone, the same in every run, whatever the seed."""

from __future__ import annotations

import hashlib

from opd_mesh.config.tasks import SplitsConfig
from student_trainer.tasks.items import Split


def split_of(key: str, config: SplitsConfig) -> Split:
    """By SHA-256 of the key, read as a fraction in [0, 1): test, then validation, then train."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    # 53 bits, so that the fraction is exact and never 1.
    fraction = (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)
    if fraction < config.test:
        return "test"
    return "validation" if fraction < config.test + config.validation else "train"
