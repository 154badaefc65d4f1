"""What the length of a response costs. R: its tokens."""

from __future__ import annotations

from opd_mesh.config.tasks import LengthPenalty, LinearLengthPenalty


def penalty(config: LengthPenalty, num_tokens: int, max_new_tokens: int) -> float:
    """At most 0, added to the verifier's score.

    ``linear``: −min(limit, per_token · max(0, R − free_tokens)).

    ``soft_overlong`` (DAPO, arXiv 2503.14476, eq. 13), L_max = max_new_tokens, L_cache = buffer_tokens: 0 up to
    L_max − L_cache, then ((L_max − L_cache) − R) / L_cache, and −1 beyond L_max.
    """
    if isinstance(config, LinearLengthPenalty):
        return 0.0 - min(config.limit, config.per_token * max(0, num_tokens - config.free_tokens))
    over = num_tokens - (max_new_tokens - config.buffer_tokens)
    return 0.0 - min(1.0, max(0, over) / config.buffer_tokens)
