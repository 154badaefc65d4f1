"""One optimizer step: passes over the mini-batch, one or a few heads at a time, gradients, clipping, the optimizer.

Letters: R response tokens of a pass, d hidden size, V vocabulary.

The data's way: samples ordered by their teachers' heads → passes under a token budget → the student's hidden states
[R, d] of the pass → for each teacher in turn its head and its rows → gradient at the hidden states, collected → one
backward pass through the trunk. No [tokens, V] tensor is kept at any point, and every head comes to the device once.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from opd_kernels import Divergence, Signal
from torch import Tensor

from opd_mesh.config.training import ImportanceConfig
from opd_mesh.errors import DivergedError
from opd_mesh.signals import SignalKind
from opd_mesh.torch_tensors import from_numpy
from student_trainer.batch import BatchPlan, Mark, Sample
from student_trainer.heads import HeadStore
from student_trainer.importance import importance_ratios
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
    heads: int  # distinct, that the mini-batch needed


def response_tokens(samples: Sequence[Sample]) -> int:
    """Of the whole mini-batch: what its loss is averaged over."""
    return sum(sample.trajectory.num_scored for sample in samples)


def compute_gradients(
    plan: BatchPlan,
    student: Student,
    objective: BatchObjective,
    heads: HeadStore,
    importance: ImportanceConfig | None = None,
) -> tuple[float, TokenMeans]:
    """Accumulate the gradient of the mini-batch's mean loss in the student's parameters.

    Args:
        importance: weigh each token's loss by it, see :mod:`student_trainer.importance`.

    Returns:
        (loss in nats per token, diagnostics).

    Raises:
        OpdError: a teacher's answer did not come.
    """
    total_tokens = response_tokens([sample for part in plan.passes for sample in part])
    means = TokenMeans()
    loss = 0.0
    opened: dict[int, _OpenPass] = {}
    for visit in plan.visits:
        batch = plan.passes[visit.pass_index]
        if visit.opens:
            keep_graph = visit.pass_index not in plan.suspended
            opened[visit.pass_index] = _OpenPass(batch, student, keep_graph=keep_graph)
            if importance is not None:
                opened[visit.pass_index].weigh(importance.truncate_at, means)
        current = opened[visit.pass_index]
        for share in shares_of(batch, plan.shares(visit), heads, current.leaf_Rd.device):
            divergence = objective(
                current.leaf_Rd[share.index_R],
                student.head,
                share.teachers,
                reference=share.reference,
                sampled_ids_R=share.sampled_ids_R,
                token_weights_NR=current.weighted(share) / total_tokens,
            )
            divergence.loss.backward()
            loss += float(divergence.loss.detach())
            means.take(share.teacher_ids, divergence)
            current.kl_R[share.index_R] += (share.weights_NR * divergence.kl_T.double()).sum(0)
            current.entropy_R[share.index_R] = divergence.student_entropy_T.double()
            share.release()
            del share  # its heads leave before the next ones arrive
        if visit.closes:
            opened.pop(visit.pass_index).close(means)
    return loss, means


class _OpenPass:
    """A pass between its first and its last visit.

    Args:
        keep_graph: keep the trunk's activations; otherwise they are computed once more when the pass closes.
    """

    def __init__(self, batch: Sequence[Sample], student: Student, *, keep_graph: bool) -> None:
        self._batch = batch
        self._student = student
        with contextlib.nullcontext() if keep_graph else torch.no_grad():
            rows = self._forward()
        self._lengths = [len(part) for part in rows]
        hidden_Rd = torch.cat(rows)
        self._hidden_Rd = hidden_Rd if keep_graph else None
        # The loss sees a leaf, so that the gradients of all teachers are collected before the trunk's backward pass.
        self.leaf_Rd = hidden_Rd.detach().requires_grad_(hidden_Rd.requires_grad or not keep_graph)
        # Of every token: Σ_i w_i KL_i, and the student's entropy, however many teachers mark it.
        self.kl_R = torch.zeros(len(self.leaf_Rd), dtype=torch.float64, device=self.leaf_Rd.device)
        self.entropy_R = torch.zeros_like(self.kl_R)
        self._importance_R: Tensor | None = None

    def _forward(self) -> list[Tensor]:
        return self._student.hidden_rows(
            [sample.trajectory.token_ids for sample in self._batch],
            [sample.trajectory.predicting_positions for sample in self._batch],
        )

    def weigh(self, truncate_at: float, means: TokenMeans) -> None:
        """Importance weights of all tokens, from the rows that are here anyway."""
        trajectories = [sample.trajectory for sample in self._batch]
        tokens = [token for one in trajectories for token in one.scored_token_ids]
        temperatures = [one.sampling.temperature for one in trajectories for _ in range(one.num_scored)]
        logprobs = [value for one in trajectories for value in one.sampling_logprobs]
        device = self.leaf_Rd.device
        ratios_R = importance_ratios(
            self.leaf_Rd.detach(),
            self._student.head,
            torch.tensor(tokens, device=device),
            torch.tensor(temperatures, device=device),
            torch.tensor(logprobs, device=device),
        )
        self._importance_R = ratios_R.clamp(max=truncate_at)
        means.add("importance/mean", self._importance_R)
        means.add("importance/truncated", (ratios_R > truncate_at).double())

    def weighted(self, share: Share) -> Tensor:
        """w_i of each of its rows, times the row's importance weight where there is one."""
        if self._importance_R is None:
            return share.weights_NR
        return share.weights_NR * self._importance_R[share.index_R].to(share.weights_NR.dtype)

    def close(self, means: TokenMeans) -> None:
        """Send the collected gradients through the trunk."""
        if self.leaf_Rd.grad is not None:
            hidden_Rd = torch.cat(self._forward()) if self._hidden_Rd is None else self._hidden_Rd
            if hidden_Rd.requires_grad:
                hidden_Rd.backward(self.leaf_Rd.grad)
        means.add("entropy/student", self.entropy_R)
        for sample, kl_R in zip(self._batch, self.kl_R.split(self._lengths), strict=True):
            means.add(f"kl_domain/{sample.trajectory.domain}", kl_R)
            if sample.reference is not None:
                sample.reference.answer.release()


@dataclass(frozen=True, slots=True)
class Share:
    """Rows of a pass that the same teachers mark in one go, and what these say of them."""

    teacher_ids: tuple[str, ...]
    index_R: Tensor  # into the pass's rows
    teachers: tuple[Signal, ...]
    reference: Signal | None
    sampled_ids_R: Tensor
    weights_NR: Tensor  # w_i of each row
    marks: tuple[Mark, ...]

    def release(self) -> None:
        """Nobody asks for what these marks say again."""
        for mark in self.marks:
            mark.answer.release()


def shares_of(
    batch: Sequence[Sample], shares: Mapping[tuple[str, ...], Sequence[int]], heads: HeadStore, device: torch.device
) -> Iterator[Share]:
    """One share after the other; its heads are brought to the device when its turn comes.

    Args:
        shares: indices into ``batch`` by teachers, see :func:`student_trainer.batch.plan_shares`.
    """
    starts = list(accumulate((sample.trajectory.num_scored for sample in batch), initial=0))
    for teacher_ids, indices in shares.items():
        samples = [batch[index] for index in indices]
        lengths = [sample.trajectory.num_scored for sample in samples]
        by_teacher = [[sample.mark_of(teacher_id) for sample in samples] for teacher_id in teacher_ids]
        references = [sample.reference for sample in samples if sample.reference is not None]
        yield Share(
            teacher_ids=teacher_ids,
            index_R=torch.cat([torch.arange(starts[index], starts[index + 1]) for index in indices]).to(device),
            teachers=tuple(signal_of(marks, heads, device) for marks in by_teacher),
            reference=signal_of(references, heads, device) if references else None,
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
            # What is the reference's, too, is asked for again, until the pass is closed.
            marks=tuple(
                mark
                for marks in by_teacher
                for mark, sample in zip(marks, samples, strict=True)
                if sample.reference is None or mark.answer is not sample.reference.answer
            ),
        )


def signal_of(marks: Sequence[Mark], heads: HeadStore, device: torch.device) -> Signal:
    """What one teacher says of several samples, one after the other."""
    said = [mark.answer.tensors() for mark in marks]

    def joined(name: str) -> Tensor:
        return torch.cat([from_numpy(tensors[name]) for tensors in said]).to(device)

    match marks[0].signal:
        case SignalKind.HIDDEN_STATES:
            digest = marks[0].head_digest
            assert digest is not None  # hidden states always come with one
            # A narrower wire is widened by the divergence, to the precision of its GEMM.
            return Signal(hidden_TE=joined("hidden_states"), head=heads.get(digest))
        case SignalKind.LOGITS:
            return Signal(logits_TV=joined("logits"))
        case SignalKind.TOP_K_LOGPROBS:
            return Signal(top_k_ids_TK=joined("token_ids"), top_k_logprobs_TK=joined("logprobs"))
        case SignalKind.TOKEN_LOGPROBS:
            return Signal(token_logprobs_T=joined("logprobs"))


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
