"""One optimizer step: passes over the mini-batch, one head at a time, gradients, clipping, AdamW.

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
from opd_kernels.divergence import Divergence
from torch import Tensor

from opd_mesh.errors import DivergedError
from opd_mesh.torch_tensors import from_numpy
from student_trainer.batch import Sample, order_by_teacher, split_into_passes, teachers_in_order
from student_trainer.heads import HeadStore
from student_trainer.objective import Objective, TeacherRows
from student_trainer.optimizer import Optimizer
from student_trainer.student import Student

# Divergence field → metric prefix, averaged over a teacher's tokens.
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

    def take(self, teacher_id: str, divergence: Divergence) -> None:
        """All diagnostics of one teacher's tokens."""
        for attribute, prefix in TEACHER_METRICS.items():
            self.add(f"{prefix}/{teacher_id}", getattr(divergence, attribute))

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
    objective: Objective,
    heads: HeadStore,
    head_digests: Mapping[str, str],
    *,
    tokens_per_pass: int,
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
        for share in marks_by_teacher(batch, heads, head_digests, leaf_Rd.device):
            divergence = objective(
                leaf_Rd[share.index_R],
                student.head,
                share.rows,
                sampled_ids_R=share.sampled_ids_R,
                token_weights_R=share.weights_R / total_tokens,
            )
            divergence.loss.backward()
            loss += float(divergence.loss.detach())
            means.take(share.teacher_id, divergence)
            kl_R[share.index_R] += share.weights_R * divergence.kl_T.double()
            entropy_R[share.index_R] = divergence.student_entropy_T.double()
        if leaf_Rd.grad is not None:
            hidden_Rd.backward(leaf_Rd.grad)
        means.add("entropy/student", entropy_R)
        for sample, sample_kl_R in zip(batch, kl_R.split([len(part) for part in rows]), strict=True):
            means.add(f"kl_domain/{sample.trajectory.domain}", sample_kl_R)
    return loss, means, len(passes)


@dataclass(frozen=True, slots=True)
class TeacherShare:
    """The rows of a pass that one teacher marks, and what it says of them."""

    teacher_id: str
    index_R: Tensor  # into the pass's rows
    rows: TeacherRows
    sampled_ids_R: Tensor
    weights_R: Tensor  # w_i of each row


def marks_by_teacher(
    batch: Sequence[Sample], heads: HeadStore, head_digests: Mapping[str, str], device: torch.device
) -> Iterator[TeacherShare]:
    """One teacher after the other; its head is brought to the device when its turn comes."""
    starts = list(accumulate((sample.trajectory.num_scored for sample in batch), initial=0))
    for teacher_id in teachers_in_order(batch):
        index: list[int] = []
        ids: list[int] = []
        weights: list[float] = []
        parts: list[Tensor] = []
        is_logits = False
        for start, sample in zip(starts, batch, strict=False):
            for mark in sample.marks:
                if mark.teacher_id != teacher_id:
                    continue
                rows = sample.trajectory.num_scored
                index.extend(range(start, start + rows))
                ids.extend(sample.trajectory.scored_token_ids)
                weights.extend([mark.weight] * rows)
                parts.append(from_numpy(mark.rows))
                is_logits = mark.is_logits
        said = torch.cat(parts).to(device)
        if is_logits:
            teacher = TeacherRows(logits_RV=said)
        else:
            teacher = TeacherRows(hidden_RE=said, head=heads.get(head_digests[teacher_id]))
        yield TeacherShare(
            teacher_id=teacher_id,
            index_R=torch.tensor(index, device=device),
            rows=teacher,
            sampled_ids_R=torch.tensor(ids, device=device),
            weights_R=torch.tensor(weights, device=device, dtype=torch.float32),
        )


def update(
    samples: Sequence[Sample],
    student: Student,
    optimizer: Optimizer,
    objective: Objective,
    heads: HeadStore,
    head_digests: Mapping[str, str],
    *,
    tokens_per_pass: int,
) -> UpdateResult:
    """Gradients, clipping, one AdamW step.

    Raises:
        DivergedError: loss or gradient is not finite; the weights are as before.
    """
    optimizer.zero_grad()
    loss, means, passes = compute_gradients(
        samples, student, objective, heads, head_digests, tokens_per_pass=tokens_per_pass
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
