"""Truncated importance weights: what corrects, token by token, for a response of an older policy.

A token was drawn from the behaviour policy μ, the student of the version that wrote it, and is trained on by the
present student π. Its loss is weighted by min(truncate_at, π(token) / μ(token)), a number without a gradient, with both
probabilities at the temperature that was sampled with (truncated importance sampling; Ionides 2008, Espeholt et al.
2018). Letters: R response tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from opd_kernels import LinearHead
from torch import Tensor

from opd_mesh.errors import TrajectoryError
from opd_mesh.trajectory import Trajectory
from student_trainer.masks import require_mask

ROWS = 64  # of logits [rows, V] at a time
ABOVE_ZERO = 1e-3  # nats, that a log-probability may be by rounding


def check_behaviour(trajectory: Trajectory, *, masks_applied: bool = True) -> None:
    """Raises :class:`TrajectoryError` where the ratio of probabilities is not known exactly.

    Args:
        masks_applied: the present student's probabilities, too, will be over the ids that could be drawn, as policy
            gradients take them. Distillation's are over the whole vocabulary.
    """
    sampling = trajectory.sampling
    if not trajectory.sampling_logprobs:
        raise TrajectoryError("required: the objective has ratios of policies in it", field="sampling_logprobs")
    if sampling.temperature <= 0:
        raise TrajectoryError("ratios of policies need a temperature above 0", field="sampling.temperature")
    if sampling.truncates and not masks_applied:
        raise TrajectoryError(
            "ratios of policies over the whole vocabulary need top_p 1 and top_k 0: what was cut off has none",
            field="sampling",
        )
    require_mask(trajectory)
    if sampling.grammar and not masks_applied:
        raise TrajectoryError(
            "ratios of policies over the whole vocabulary are not known of a response that was drawn under a grammar; "
            "set objective.importance to null",
            field="sampling.grammar",
        )
    for index, logprob in enumerate(trajectory.sampling_logprobs):
        if not (math.isfinite(logprob) and logprob <= ABOVE_ZERO):
            raise TrajectoryError(f"{logprob} at scored token {index} is no log-probability", field="sampling_logprobs")


@torch.no_grad()
def importance_ratios(
    hidden_Rd: Tensor, head: LinearHead, token_ids_R: Tensor, temperatures_R: Tensor, behaviour_logprobs_R: Tensor
) -> Tensor:
    """[R] float64, π(token) / μ(token).

    Args:
        hidden_Rd: the present student's rows that predict the tokens.
        behaviour_logprobs_R: log μ(token), nats, at the same temperatures.
    """
    ratios = []
    for start in range(0, len(hidden_Rd), ROWS):
        part = slice(start, start + ROWS)
        logits_CV = head.logits(hidden_Rd[part]).float() / temperatures_R[part, None]
        chosen_C = logits_CV.gather(1, token_ids_R[part, None])[:, 0]
        logprobs_C = chosen_C.double() - logits_CV.logsumexp(1).double()
        ratios.append((logprobs_C - behaviour_logprobs_R[part].double()).exp())
    return torch.cat(ratios)
