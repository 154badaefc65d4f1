"""One pass over chunks of rows: projections, loss, diagnostics and gradients, whatever computes them.

A chunk of C rows is projected to [C, V] buffers, which are used again for every chunk; that is all that ever exists of
[T, V]. As the loss is a sum over tokens, its gradient is known, up to the factor that arrives in backward, as soon as a
chunk is projected. So it is computed right there, in the teacher's buffer, and multiplied out at once (the idea of
Liger's fused linear losses): with one teacher four GEMMs in all, and backward only scales.

    logits_CV  = hidden_CD · W_VDᵀ      of the student, once for all teachers
    logits_CV  = hidden_CE · W_VEᵀ      of each teacher (and of ExOPD's reference)
    grad_CV    = rows(…)                elementwise and row reductions: everything else
    grad_CD    = grad_CV · W_VD
    grad_VD   += grad_CVᵀ · hidden_CD
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from opd_kernels.head import LinearHead
from opd_kernels.inputs import Divergence, DivergenceInputs
from opd_kernels.signals import Signal


@dataclass(frozen=True, slots=True)
class RowSignal:
    """What a model says of the C rows of a chunk: logits of its whole distribution, log-probabilities, or nothing.

    Attributes:
        logits_CV: what the backend's ``project`` or ``take_logits`` wrote; may be overwritten.
        head: whose form (bias, scale, soft-cap) ``logits_CV`` has or, if the backend leaves it to ``rows``, is to get;
            None where logits were given.
        top_k_ids_CK, top_k_logprobs_CK, token_logprobs_C: as in :class:`Signal`.
    """

    logits_CV: Tensor | None = None
    head: LinearHead | None = None
    top_k_ids_CK: Tensor | None = None
    top_k_logprobs_CK: Tensor | None = None
    token_logprobs_C: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """One chunk and one teacher: what ``Backend.rows`` reads, and the statistics and gradient that it writes.

    Attributes:
        student_logits_CV: what ``project`` wrote; kept if ``keep_student``, for another teacher needs it.
        reference: kept, too.
        sampled_ids_C: int64.
        student_2C, teacher_6C: in the order of ``STUDENT_STATS`` and ``TEACHER_STATS``. What the signal does not tell
            is to stay as it is (NaN).
        grad_CV: where the gradient goes, or None where nothing requires one. May be the memory of the teacher's logits.
    """

    student_logits_CV: Tensor
    keep_student: bool
    teacher: RowSignal
    reference: RowSignal | None
    sampled_ids_C: Tensor
    student_2C: Tensor
    teacher_6C: Tensor
    grad_CV: Tensor | None


class Backend(Protocol):
    """A device's way to multiply and to go through rows. One object serves one pass over the chunks."""

    def default_chunk_tokens(self) -> int:
        """Rows of a chunk. Must not depend on T: with T in it, a row's bits would depend on how many rows there are."""
        ...

    def logits_buffer(self, chunk: int) -> Tensor:
        """[chunk, V] for projections, uninitialised."""
        ...

    def gradient_buffer(self, chunk: int, teacher_CV: Tensor | None) -> Tensor:
        """[chunk, V] for the gradient of one teacher: the buffer of its logits where that is possible."""
        ...

    def operand(self, grad_CV: Tensor) -> tuple[Tensor, Tensor]:
        """A sum of gradients as the GEMMs and ``grad_bias`` take it, and the factor [C] of its rows."""
        ...

    def project(self, head: LinearHead, hidden_CD: Tensor, out_CV: Tensor) -> None:
        """Hidden rows of any floating dtype to logits; what of the head's form is left to ``rows`` is open."""
        ...

    def take_logits(self, logits_CV: Tensor, out_CV: Tensor) -> None:
        """Logits that were given instead of hidden states, to where ``rows`` reads them."""
        ...

    def rows(self, rows: Rows) -> Tensor:
        """Fill the statistics, and write the gradient to the student's *projection* (h Wᵀ + b), short of a row factor.

        Returns:
            [C] in the result's dtype: the factor. The caller multiplies it by the token's weight.
        """
        ...

    def grad_hidden(self, grad_CV: Tensor, factor_C: Tensor, head: LinearHead, out_CD: Tensor) -> None:
        """out = factor · (grad · W), in the result's dtype."""
        ...

    def grad_weight(self, grad_CV: Tensor, factor_C: Tensor, hidden_CD: Tensor, accumulate_VD: Tensor) -> None:
        """accumulate += gradᵀ · (factor · hidden); ``accumulate_VD`` is of the result's dtype, without padding rows."""
        ...

    def grad_bias(self, grad_CV: Tensor, factor_C: Tensor, accumulate_V: Tensor) -> None:
        """accumulate += gradᵀ · factor."""
        ...


def compute_fused(inputs: DivergenceInputs, backend: Backend) -> Divergence:
    """See :func:`opd_kernels.linear_divergence`."""
    head = inputs.student_head
    loss, student_2T, teachers_6NT = _Fused.apply(
        inputs.student_hidden_TD, head.weight, head.bias, inputs, backend, torch.is_grad_enabled()
    )
    return inputs.result(loss, student_2T, teachers_6NT)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        inputs: DivergenceInputs,
        backend: Backend,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # needs_input_grad does not know torch.no_grad().
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        # Autocast does not reach in: it leaves operations with an out= and in-place ones alone.
        loss, student_2T, teachers_6NT, grads = go_through_chunks(inputs, backend, *needs)
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(student_2T, teachers_6NT)
        ctx.set_materialize_grads(False)
        return loss, student_2T, teachers_6NT

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        # The saved gradients are constants to autograd: what is differentiated again would lack, in silence, all that
        # they owe to the student. (once_differentiable objects only where grad_loss requires a gradient.)
        if torch.is_grad_enabled():
            raise RuntimeError("linear_divergence has no second derivatives: call backward without create_graph")
        if grad_loss is None:
            return (None,) * 6
        # Never in place: with retain_graph the saved gradients are wanted again. The usual factor 1 is spared a second
        # [V, D] tensor, save on a GPU, where looking at it would wait for the device; there, products are written in
        # their last dtype at once.
        keep = grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
        scaled = [
            grad
            if grad is None
            else (grad.to(dtype) if keep else torch.mul(grad, grad_loss, out=torch.empty_like(grad, dtype=dtype)))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


def go_through_chunks(
    inputs: DivergenceInputs, backend: Backend, needs_hidden: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """→ loss, statistics [2, T] and [6, N, T], gradients for a grad_output of 1."""
    hidden_TD, head, dtype = inputs.student_hidden_TD, inputs.student_head, inputs.result_dtype
    tokens, device, V = hidden_TD.shape[0], hidden_TD.device, inputs.vocab_size
    weights_NT = inputs.token_weights_NT.to(dtype)
    student_2T = torch.empty(2, tokens, dtype=dtype, device=device)
    teachers_6NT = torch.full((6, len(inputs.teachers), tokens), torch.nan, dtype=dtype, device=device)
    grad_hidden_TD = torch.empty(hidden_TD.shape, dtype=dtype, device=device) if needs_hidden else None
    grad_weight_VD = torch.zeros(head.weight.shape, dtype=dtype, device=device) if needs_weight else None
    grad_bias_V = torch.zeros(head.weight.shape[0], dtype=dtype, device=device) if needs_bias else None

    chunk = inputs.chunk_tokens or backend.default_chunk_tokens()
    if not inputs.deterministic:  # there, one row fills a whole chunk, too: the shape of a GEMM decides its bits
        chunk = max(1, min(chunk, tokens))
    buffers = _Buffers.of(inputs, backend, chunk, needs_grad=needs_hidden or needs_weight or needs_bias)
    if not inputs.deterministic:
        chunk = _even_chunk(tokens, chunk)
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        part = _Chunk(start, count, chunk if inputs.deterministic else count)
        rows = slice(start, start + count)
        hidden_CD = part.take(hidden_TD)
        backend.project(head, hidden_CD, buffers.student_CV[: part.size])
        weights_NC = part.take(weights_NT.T).T
        student_2C, teachers_6NC, grad_CV, factor_C = _all_teachers(inputs, backend, buffers, part, weights_NC)
        student_2T[:, rows], teachers_6NT[:, :, rows] = student_2C[:, :count], teachers_6NC[:, :, :count]
        if grad_CV is None:
            continue
        if grad_hidden_TD is not None:
            grad_CD = torch.empty(hidden_CD.shape, dtype=dtype, device=device)
            backend.grad_hidden(grad_CV, factor_C, head, grad_CD)
            grad_hidden_TD[rows] = grad_CD[:count]
        if grad_weight_VD is not None:
            backend.grad_weight(grad_CV, factor_C, hidden_CD, grad_weight_VD[:V])
        if grad_bias_V is not None:
            backend.grad_bias(grad_CV, factor_C, grad_bias_V[:V])
    return (weights_NT * teachers_6NT[0]).sum(), student_2T, teachers_6NT, (grad_hidden_TD, grad_weight_VD, grad_bias_V)


def _even_chunk(tokens: int, limit: int) -> int:
    """Rows of chunks that are all alike: for the head's gradient a small last one would cost as much as a whole one."""
    rows = math.ceil(tokens / math.ceil(tokens / limit)) if tokens else 1
    return min(limit, math.ceil(rows / 8) * 8, max(tokens, 1))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows start … start + count of the call, padded by zeros to ``size``."""

    start: int
    count: int
    size: int

    def take(self, x: Tensor) -> Tensor:
        """[T, …] → [size, …] in memory of its own.

        A CPU GEMM's bits depend on the alignment of its operands, and a row of 60 floats in the caller's tensor is
        aligned by its index.
        """
        out = x.new_empty((self.size, *x.shape[1:]))
        out[: self.count] = x[self.start : self.start + self.count]
        out[self.count :] = 0
        return out


@dataclass(frozen=True, slots=True)
class _Buffers:
    """All that there is of [tokens, V], used again for every chunk.

    Attributes:
        grad_CV: of one teacher; usually the memory of ``teacher_CV``.
        total_CV: of all teachers, where there are several.
    """

    student_CV: Tensor
    teacher_CV: Tensor | None
    reference_CV: Tensor | None
    grad_CV: Tensor | None
    total_CV: Tensor | None

    @classmethod
    def of(cls, inputs: DivergenceInputs, backend: Backend, chunk: int, *, needs_grad: bool) -> _Buffers:
        several = len(inputs.teachers) > 1
        teacher_CV = backend.logits_buffer(chunk) if any(teacher.is_full for teacher in inputs.teachers) else None
        return cls(
            student_CV=backend.logits_buffer(chunk),
            teacher_CV=teacher_CV,
            reference_CV=backend.logits_buffer(chunk) if inputs.reference is not None else None,
            grad_CV=backend.gradient_buffer(chunk, teacher_CV) if needs_grad else None,
            total_CV=backend.logits_buffer(chunk) if needs_grad and several else None,
        )


def _all_teachers(
    inputs: DivergenceInputs, backend: Backend, buffers: _Buffers, part: _Chunk, weights_NC: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """All teachers on one chunk, whose student logits are in their buffer.

    Returns:
        Statistics [2, C] and [6, N, C], the gradient to the student's projection [C, V], short of the factor [C].
    """
    teachers, dtype, device = inputs.teachers, inputs.result_dtype, inputs.student_hidden_TD.device
    student_2C = torch.empty(2, part.size, dtype=dtype, device=device)
    teachers_6NC = torch.full((6, len(teachers), part.size), torch.nan, dtype=dtype, device=device)
    grad_CV, total_CV = (None if x is None else x[: part.size] for x in (buffers.grad_CV, buffers.total_CV))
    reference = None if inputs.reference is None else _row_signal(backend, inputs.reference, part, buffers.reference_CV)
    ids_C = part.take(inputs.sampled_ids_T).long()
    for i, teacher in enumerate(teachers):
        factor_C = backend.rows(
            Rows(
                student_logits_CV=buffers.student_CV[: part.size],
                keep_student=i + 1 < len(teachers),
                teacher=_row_signal(backend, teacher, part, buffers.teacher_CV),
                reference=reference,
                sampled_ids_C=ids_C,
                student_2C=student_2C,
                teacher_6C=teachers_6NC[:, i],
                grad_CV=grad_CV,
            )
        ).mul_(weights_NC[i])
        if total_CV is not None and grad_CV is not None:
            if i == 0:
                total_CV.zero_()
            total_CV.addcmul_(grad_CV, factor_C[:, None])
    if total_CV is not None:
        return student_2C, teachers_6NC, *backend.operand(total_CV)
    return student_2C, teachers_6NC, grad_CV, factor_C


def _row_signal(backend: Backend, signal: Signal, part: _Chunk, buffer_CV: Tensor | None) -> RowSignal:
    if signal.top_k_ids_TK is not None and signal.top_k_logprobs_TK is not None:
        ids_CK, logprobs_CK = part.take(signal.top_k_ids_TK).long(), part.take(signal.top_k_logprobs_TK)
        return RowSignal(top_k_ids_CK=ids_CK, top_k_logprobs_CK=logprobs_CK)
    if signal.token_logprobs_T is not None:
        return RowSignal(token_logprobs_C=part.take(signal.token_logprobs_T))
    if not signal.is_full:  # LogLikelihood has no teacher
        return RowSignal()
    assert buffer_CV is not None
    logits_CV = buffer_CV[: part.size]
    if signal.logits_TV is not None:
        backend.take_logits(signal.logits_TV[part.start : part.start + part.count], logits_CV[: part.count])
        logits_CV[part.count :] = 0
        return RowSignal(logits_CV=logits_CV)
    assert signal.hidden_TE is not None
    assert signal.head is not None
    backend.project(signal.head, part.take(signal.hidden_TE), logits_CV)
    return RowSignal(logits_CV=logits_CV, head=signal.head)
