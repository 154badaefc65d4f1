"""One optimizer step: passes over the mini-batch, one or a few heads at a time, gradients, clipping, the optimizer.

Letters: R response tokens of a pass, d hidden size, V vocabulary.

The data's way: samples ordered by teacher → passes under a token budget → the student's hidden states [R, d] of the
pass → for each teacher in turn its head and its rows → gradient at the hidden states, collected → one backward pass
through the trunk. No [tokens, V] tensor is kept at any point.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from opd_kernels import Divergence, Signal
from torch import Tensor

from opd_mesh.errors import DivergedError
from opd_mesh.torch_tensors import from_numpy
from student_trainer.batch import Mark, Sample, order_by_teacher, plan_shares, split_into_passes
from student_trainer.heads import HeadStore
from student_trainer.objective import BatchObjective
from student_trainer.optimizer import Optimizer
from student_trainer.student import Student

# Divergence field [N, R] → metric prefix, averaged over a teacher's tokens.
TEACHER_METRICS = {
    "kl_T": "kl",
    "teacher_entropy_T": "entropy",
    "overlap_ratio_T": "overlap",
    "overlap_mass_T": "overlap_mass",
}


@dataclass
class TokenMeans:
    """Sums over tokens by metric name, so that no mean of means arises."""

    _sums: dict[str, Tensor | float] = field(default_factory=lambda: defaultdict(float))
    _tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, name: str, values_R: Tensor) -> None:
        """Take one value per token."""
        self._sums[name] = self._sums[name] + values_R.double().sum()
        self._tokens[name] += values_R.numel()

    def take(self, teacher_ids: Sequence[str], divergence: Divergence) -> None:
        """All diagnostics of some teachers' tokens."""
        for attribute, prefix in TEACHER_METRICS.items():
            for teacher_id, values_R in zip(teacher_ids, getattr(divergence, attribute), strict=True):
                self.add(f"{prefix}/{teacher_id}", values_R)

    def means(self) -> dict[str, float]:
        """Name → mean over its tokens."""
        return {name: float(total) / self._tokens[name] for name, total in self._sums.items()}


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What a step did."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    metrics: dict[str, float]
    passes: int


def response_tokens(samples: Sequence[Sample]) -> int:
    """Of the whole mini-batch: what its loss is averaged over."""
    return sum(sample.trajectory.num_scored for sample in samples)


def compute_gradients(
    samples: Sequence[Sample],
    student: Student,
    objective: BatchObjective,
    heads: HeadStore,
    head_digests: Mapping[str, str],
    *,
    tokens_per_pass: int,
    heads_resident: int = 1,
) -> tuple[float, TokenMeans, int]:
    """Accumulate the gradient of the mini-batch's mean loss in the student's parameters.

    Returns:
        (loss in nats per token, diagnostics, number of passes).
    """
    total_tokens = response_tokens(samples)
    means = TokenMeans()
    loss = 0.0
    passes = split_into_passes(order_by_teacher(samples), tokens_per_pass)
    for batch in passes:
        rows = student.hidden_rows(
            [sample.trajectory.token_ids for sample in batch],
            [sample.trajectory.predicting_positions for sample in batch],
        )
        hidden_Rd = torch.cat(rows)
        # The loss sees a leaf, so that the gradients of all teachers are collected before the trunk's backward pass.
        leaf_Rd = hidden_Rd.detach().requires_grad_(hidden_Rd.requires_grad)
        # Of every token: Σ_i w_i KL_i, and the student's entropy, however many teachers mark it.
        kl_R = torch.zeros(len(leaf_Rd), dtype=torch.float64, device=leaf_Rd.device)
        entropy_R = torch.zeros_like(kl_R)
        for share in shares_of(batch, heads, head_digests, leaf_Rd.device, heads_resident=heads_resident):
            divergence = objective(
                leaf_Rd[share.index_R],
                student.head,
                share.teachers,
                reference=share.reference,
                sampled_ids_R=share.sampled_ids_R,
                token_weights_NR=share.weights_NR / total_tokens,
            )
            divergence.loss.backward()
            loss += float(divergence.loss.detach())
            means.take(share.teacher_ids, divergence)
            kl_R[share.index_R] += (share.weights_NR * divergence.kl_T.double()).sum(0)
            entropy_R[share.index_R] = divergence.student_entropy_T.double()
            del share  # its heads leave before the next ones arrive
        if leaf_Rd.grad is not None:
            hidden_Rd.backward(leaf_Rd.grad)
        means.add("entropy/student", entropy_R)
        for sample, sample_kl_R in zip(batch, kl_R.split([len(part) for part in rows]), strict=True):
            means.add(f"kl_domain/{sample.trajectory.domain}", sample_kl_R)
    return loss, means, len(passes)


@dataclass(frozen=True, slots=True)
class Share:
    """Rows of a pass that the same teachers mark in one go, and what these say of them."""

    teacher_ids: tuple[str, ...]
    index_R: Tensor  # into the pass's rows
    teachers: tuple[Signal, ...]
    reference: Signal | None
    sampled_ids_R: Tensor
    weights_NR: Tensor  # w_i of each row


def shares_of(
    batch: Sequence[Sample],
    heads: HeadStore,
    head_digests: Mapping[str, str],
    device: torch.device,
    *,
    heads_resident: int = 1,
) -> Iterator[Share]:
    """One share after the other; its heads are brought to the device when its turn comes."""
    starts = list(accumulate((sample.trajectory.num_scored for sample in batch), initial=0))

    def signal(marks: Sequence[Mark]) -> Signal:
        said = torch.cat([from_numpy(mark.rows) for mark in marks]).to(device)
        if marks[0].is_logits:
            return Signal(logits_TV=said)
        # A narrower wire is widened by the divergence, to the precision of its GEMM.
        return Signal(hidden_TE=said, head=heads.get(head_digests[marks[0].teacher_id]))

    for teacher_ids, indices in plan_shares(batch, heads_resident).items():
        samples = [batch[index] for index in indices]
        lengths = [sample.trajectory.num_scored for sample in samples]
        by_teacher = [[sample.mark_of(teacher_id) for sample in samples] for teacher_id in teacher_ids]
        references = [sample.reference for sample in samples if sample.reference is not None]
        yield Share(
            teacher_ids=teacher_ids,
            index_R=torch.cat([torch.arange(starts[index], starts[index + 1]) for index in indices]).to(device),
            teachers=tuple(signal(marks) for marks in by_teacher),
            reference=signal(references) if references else None,
            sampled_ids_R=torch.tensor(
                [token for sample in samples for token in sample.trajectory.scored_token_ids], device=device
            ),
            weights_NR=torch.tensor(
                [
                    [mark.weight for mark, rows in zip(marks, lengths, strict=True) for _ in range(rows)]
                    for marks in by_teacher
                ],
                device=device,
                dtype=torch.float32,
            ),
        )


def update(
    samples: Sequence[Sample],
    student: Student,
    optimizer: Optimizer,
    objective: BatchObjective,
    heads: HeadStore,
    head_digests: Mapping[str, str],
    *,
    tokens_per_pass: int,
    heads_resident: int = 1,
) -> UpdateResult:
    """Gradients, clipping, one optimizer step.

    Raises:
        DivergedError: loss or gradient is not finite; the weights are as before.
    """
    optimizer.zero_grad()
    loss, means, passes = compute_gradients(
        samples,
        student,
        objective,
        heads,
        head_digests,
        tokens_per_pass=tokens_per_pass,
        heads_resident=heads_resident,
    )
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
        tokens=response_tokens(samples),
        metrics=means.means(),
        passes=passes,
    )
