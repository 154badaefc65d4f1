"""From logits to what was asked for; every engine that has logits answers every signal by this.

Letters: R scored tokens, V vocabulary, k ids of a top-k signal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from opd_mesh.errors import DivergedError, OpdError
from opd_mesh.torch_tensors import TORCH_DTYPES, to_numpy
from teacher_server.engine import ScoreJob, Signal

# Rows of logits at a time where only something narrow is kept of them.
CHUNK_ROWS = 256
FROM_LOGITS = (Signal.LOGITS, Signal.TOP_K_LOGPROBS, Signal.TOKEN_LOGPROBS)


def answer_of(
    teacher_id: str, job: ScoreJob, hidden_Rd: Callable[[], Tensor], logits_of: Callable[[slice], Tensor]
) -> dict[str, np.ndarray] | OpdError:
    """What an engine answers to a job.

    Args:
        hidden_Rd: of all scored rows; called where they are asked for.
        logits_of: as for :func:`tensors_of_logits`.
    """
    try:
        if job.signal is Signal.HIDDEN_STATES:
            return {"hidden_states": finite(teacher_id, job, hidden_Rd())}
        return tensors_of_logits(teacher_id, job, len(job.predicting_positions), logits_of)
    except OpdError as error:
        return error


def tensors_of_logits(
    teacher_id: str, job: ScoreJob, rows: int, logits_of: Callable[[slice], Tensor]
) -> dict[str, np.ndarray]:
    """The tensors of an answer, by name (see ``opd.v1.Signal``).

    Args:
        logits_of: [≤ R, V] of a slice of the scored rows, padding sliced off.

    Raises:
        DivergedError: what was computed, or what it is in the dtype asked for, is NaN or infinite.
    """
    if job.signal is Signal.LOGITS:
        return {"logits": finite(teacher_id, job, logits_of(slice(0, rows)))}
    parts = [
        _narrowed(job, slice(start, min(start + CHUNK_ROWS, rows)), logits_of) for start in range(0, rows, CHUNK_ROWS)
    ]
    tensors = {"logprobs": finite(teacher_id, job, torch.cat([logprobs for _, logprobs in parts]))}
    if job.signal is Signal.TOP_K_LOGPROBS:
        tensors = {"token_ids": to_numpy(torch.cat([ids for ids, _ in parts])), **tensors}
    return tensors


def _narrowed(job: ScoreJob, rows: slice, logits_of: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor]:
    """(ids [r, k], log-probabilities [r, k] or [r]) of some rows."""
    logprobs_rV = logits_of(rows).float().log_softmax(dim=-1)
    if job.signal is Signal.TOKEN_LOGPROBS:
        ids = torch.tensor([job.token_ids[position + 1] for position in job.predicting_positions[rows]])
        ids_rk = ids.to(logprobs_rV.device)[:, None]
        return ids_rk, logprobs_rV.gather(1, ids_rk)[:, 0]
    if job.candidate_ids is not None:
        ids_rk = torch.from_numpy(job.candidate_ids[rows]).to(logprobs_rV.device)
        return ids_rk, logprobs_rV.gather(1, ids_rk)
    best = logprobs_rV.topk(job.top_k, dim=-1)
    return best.indices, best.values


def finite(teacher_id: str, job: ScoreJob, tensor: Tensor) -> np.ndarray:
    """In the dtype asked for. Raises :class:`DivergedError`."""
    tensor = tensor.to(TORCH_DTYPES[job.dtype])
    if not torch.isfinite(tensor).all():
        raise DivergedError(
            f"teacher {teacher_id!r} gave NaN or infinity for this sequence as {job.dtype}; "
            "ask for a wider dtype, or check the teacher's weights"
        )
    return to_numpy(tensor)
