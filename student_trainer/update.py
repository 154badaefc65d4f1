"""One optimizer step: passes over the mini-batch, gradients, clipping, the optimizer.

The data's way: samples ordered by their teachers' heads → passes under a token budget → the student's hidden states
[R, d] of the pass → what the objective says of them, for distillation one teacher's head after the other → gradient at
the hidden states, collected → one backward pass through the trunk. No [tokens, V] tensor is kept at any point, and
every head comes to the device once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opd_mesh.errors import DivergedError
from student_trainer.batch import BatchPlan, Sample
from student_trainer.heads import HeadStore
from student_trainer.objective import Objective, PassLoss
from student_trainer.optimizer import Optimizer
from student_trainer.passes import OpenPass, TokenMeans
from student_trainer.student import Student


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What a step did."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    metrics: dict[str, float]
    passes: int
    heads: int  # distinct, that the mini-batch needed


def response_tokens(samples: Sequence[Sample]) -> int:
    """Of the whole mini-batch."""
    return sum(sample.trajectory.num_scored for sample in samples)


def compute_gradients(
    plan: BatchPlan, student: Student, objective: Objective, heads: HeadStore
) -> tuple[float, TokenMeans]:
    """Accumulate the gradient of the mini-batch's loss in the student's parameters.

    Returns:
        (loss, diagnostics).

    Raises:
        OpdError: a teacher's answer did not come.
    """
    means = TokenMeans()
    batch_loss = objective.of_batch([sample for part in plan.passes for sample in part], student.head, heads, means)
    loss = 0.0
    opened: dict[int, tuple[OpenPass, PassLoss]] = {}
    for visit in plan.visits:
        if visit.opens:
            keep_graph = visit.pass_index not in plan.suspended
            current = OpenPass(plan.passes[visit.pass_index], student, keep_graph=keep_graph)
            opened[visit.pass_index] = current, batch_loss.of_pass(current)
        _, pass_loss = opened[visit.pass_index]
        loss += pass_loss.visit(plan.shares(visit))
        if visit.closes:
            current, pass_loss = opened.pop(visit.pass_index)
            pass_loss.close()
            current.close()
    return loss, means


def apply_gradients(optimizer: Optimizer, plan: BatchPlan, loss: float, means: TokenMeans) -> UpdateResult:
    """Clipping and one optimizer step.

    Raises:
        DivergedError: loss or gradient is not finite; the weights are as before.
    """
    grad_norm = optimizer.clip()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad()
        raise DivergedError(
            f"loss {loss}, gradient norm {grad_norm}: nothing was applied. Lower optimizer.lr, or resume from an older "
            "checkpoint"
        )
    lr = optimizer.step()
    return UpdateResult(
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        tokens=response_tokens([sample for part in plan.passes for sample in part]),
        metrics=means.means(),
        passes=len(plan.passes),
        heads=len(plan.head_digests),
    )
