"""Rows of a pass that the same teachers mark, with what these say, and their heads on the device.

Letters: R rows of a share, N teachers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from opd_kernels import Signal
from torch import Tensor

from opd_mesh.signals import SignalKind
from opd_mesh.torch_tensors import from_numpy
from student_trainer.batch import Mark, Sample
from student_trainer.heads import HeadStore
from student_trainer.passes import rows_by_domain, sampled_ids


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
    rows_of_domain: Mapping[str, Tensor]  # which of the R are a domain's

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
            sampled_ids_R=sampled_ids(samples, device),
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
            rows_of_domain=rows_by_domain(samples, device),
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
