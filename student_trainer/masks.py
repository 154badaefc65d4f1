"""Which ids each response token could be: what a policy gradient normalizes the present policy's probabilities over.

A response tells it itself (``kept_token_ids``: what grammar, top-k and top-p left; DeepSeek-V3.2, arXiv 2512.02556,
section 3.1, "Keep Sampling Mask"), or its grammar is replayed. Letters: V ids of the vocabulary, M distinct masks,
R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from opd_mesh.errors import InternalError, InvalidInputError, TrajectoryError
from opd_mesh.grammar import Grammars, TokenMasks
from opd_mesh.trajectory import Trajectory


def require_mask(trajectory: Trajectory) -> None:
    """Raises :class:`TrajectoryError` where top-k or top-p cut ids off, and which ones is not told."""
    if trajectory.sampling.truncates and not trajectory.kept_token_ids:
        raise TrajectoryError(
            f"response {trajectory.trajectory_id} was drawn with top_p below 1 or a top_k, and what was cut off has no "
            "ratio of policies unless the ids that were left are told: ask for them (sampling.keep_mask), or set top_p "
            "to 1 and top_k to 0",
            field="kept_token_ids",
        )


def is_masked(trajectory: Trajectory) -> bool:
    """Not every id could be drawn at each of its tokens."""
    return bool(trajectory.kept_token_ids or trajectory.sampling.grammar)


def token_masks(
    trajectories: Sequence[Trajectory], vocab_size: int, grammars: Callable[[], Grammars] | None
) -> TokenMasks:
    """Of all tokens of masked responses, in order; equal sets of kept ids are packed once.

    Args:
        trajectories: validated against ``vocab_size``.
        grammars: of the student's tokenizer; asked for where a grammar has to be replayed.

    Raises:
        TrajectoryError: a response does not fit its grammar.
        InternalError: a grammar has to be replayed, and there is no tokenizer to read it by.
    """
    places: dict[tuple[int, ...], int] = {}
    replayed: list[npt.NDArray[np.uint8]] = []
    num_replayed = 0
    parts: list[tuple[bool, npt.NDArray[np.int64]]] = []  # kept, and where among those that are kept or replayed
    for one in trajectories:
        if one.kept_token_ids:
            index = [places.setdefault(ids, len(places)) for ids in one.kept_token_ids]
            parts.append((True, np.array(index, np.int64)))
            continue
        if grammars is None:
            raise InternalError("a response with a grammar, and no tokenizer to read it by")
        masks = _replayed(one, grammars())
        replayed.append(masks.packed_MB[:, : -(-vocab_size // 8)])  # the head may have fewer ids than the tokenizer
        parts.append((False, masks.index_R + num_replayed))
        num_replayed += len(masks.packed_MB)
    packed_MB = _packed(list(places), vocab_size)  # large: not copied without need
    if replayed:
        packed_MB = np.concatenate([packed_MB, *replayed])
    return TokenMasks(packed_MB, np.concatenate([index_R + (0 if kept else len(places)) for kept, index_R in parts]))


def _packed(sets: Sequence[tuple[int, ...]], vocab_size: int) -> npt.NDArray[np.uint8]:
    """[M, ⌈V / 8⌉], laid out as :class:`TokenMasks` says."""
    packed_MB = np.zeros((len(sets), -(-vocab_size // 8)), np.uint8)
    rows = np.repeat(np.arange(len(sets)), [len(ids) for ids in sets])
    ids = np.fromiter(chain.from_iterable(sets), np.int64, count=len(rows))
    np.bitwise_or.at(packed_MB, (rows, ids // 8), np.left_shift(1, ids % 8).astype(np.uint8))
    return packed_MB


def _replayed(trajectory: Trajectory, grammars: Grammars) -> TokenMasks:
    sampling = trajectory.sampling
    try:
        return grammars.replay(sampling.grammar, sampling.stop_token_ids, trajectory.scored_token_ids)
    except InvalidInputError as error:
        raise TrajectoryError(
            f"response {trajectory.trajectory_id} was not drawn under its grammar: {error}", field="sampling.grammar"
        ) from error
