"""A forward pass through the student that stays open until all that is said of it has been collected.

Letters: R response tokens of a pass, d hidden size.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from student_trainer.batch import Sample
from student_trainer.student import Student


@dataclass
class TokenMeans:
    """Sums over tokens by metric name, so that no mean of means arises."""

    _sums: dict[str, Tensor | float] = field(default_factory=lambda: defaultdict(float))
    _counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, name: str, values: Tensor) -> None:
        """Take one value per token (or whatever the metric is a mean over)."""
        self._sums[name] = self._sums[name] + values.double().sum()
        self._counts[name] += values.numel()

    def means(self) -> dict[str, float]:
        """Name → mean; nothing of what there was none of."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items() if self._counts[name]}


class OpenPass:
    """The student's hidden states of a pass, and the gradient at them as it is collected.

    Args:
        keep_graph: keep the trunk's activations; otherwise they are computed once more when the pass closes.

    Attributes:
        leaf_Rd: the hidden states that predict the response tokens, sample after sample. The loss sees a leaf, so that
            the gradients of all teachers are collected before the trunk's backward pass.
        lengths: R_i of each sample.
    """

    def __init__(self, batch: Sequence[Sample], student: Student, *, keep_graph: bool) -> None:
        self.batch = batch
        self._student = student
        self._rows_of_domain: Mapping[str, Tensor] | None = None
        with contextlib.nullcontext() if keep_graph else torch.no_grad():
            rows = self._forward()
        self.lengths = [len(part) for part in rows]
        hidden_Rd = torch.cat(rows)
        self._hidden_Rd = hidden_Rd if keep_graph else None
        self.leaf_Rd = hidden_Rd.detach().requires_grad_(hidden_Rd.requires_grad or not keep_graph)

    def _forward(self) -> list[Tensor]:
        return self._student.hidden_rows(
            [sample.trajectory.token_ids for sample in self.batch],
            [sample.trajectory.predicting_positions for sample in self.batch],
        )

    @property
    def device(self) -> torch.device:
        """Of the rows."""
        return self.leaf_Rd.device

    def by_domain(self, values_R: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The values of each domain's rows."""
        if self._rows_of_domain is None:
            self._rows_of_domain = rows_by_domain(self.batch, self.device)
        for domain, rows in self._rows_of_domain.items():
            yield domain, values_R[rows]

    def close(self) -> None:
        """Send the collected gradients through the trunk."""
        if self.leaf_Rd.grad is not None:
            hidden_Rd = torch.cat(self._forward()) if self._hidden_Rd is None else self._hidden_Rd
            if hidden_Rd.requires_grad:
                hidden_Rd.backward(self.leaf_Rd.grad)


def rows_by_domain(samples: Sequence[Sample], device: torch.device) -> dict[str, Tensor]:
    """Domain → [R_domain] int64, which of the samples' rows, one sample after the other, are its own."""
    rows: dict[str, list[int]] = defaultdict(list)
    start = 0
    for sample in samples:
        end = start + sample.trajectory.num_scored
        rows[sample.trajectory.domain].extend(range(start, end))
        start = end
    return {domain: torch.tensor(own, device=device) for domain, own in rows.items()}


def sampled_ids(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """[R] int64, the scored tokens of all samples, one after the other."""
    return torch.tensor([token for sample in samples for token in sample.trajectory.scored_token_ids], device=device)
