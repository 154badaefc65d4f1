"""Reverse KL by chunks of rows on torch operations: loss, diagnostics and gradients in one pass, on CPU or CUDA.

A chunk of C rows is projected to two [C, V] buffers, student and teacher, which are used again for every chunk; that
is all that ever exists of [T, V]. As the loss is a sum over tokens, its gradient is known, up to the factor that
arrives in backward, as soon as a chunk is projected. So it is computed right there, in the teacher's buffer, and
multiplied out at once (the idea of Liger's fused linear losses): four GEMMs in all, and backward only scales.

With s = z/τ − max, t = y/τ − max, S = Σ exp(s), Q = Σ exp(t), and m = Σ exp(s)(s − t) / S the mean difference:

    KL         = m − log S + log Q
    ∂KL/∂s_v   = exp(s_v)/S · ((s_v − t_v) − m)        = p_v (log p_v − log q_v − KL), the two logs gone

Nothing here takes the logarithm of a probability, so a teacher's probability that underflows to 0 costs nothing.
1/S, the token's weight and the head's scale are factors of a row: they multiply the [C, D] side of the GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_kernels.divergence import Divergence, DivergenceInputs
from opd_kernels.head import LinearHead

CHUNK_BYTES = 64 << 20  # one [C, V] float32 buffer; fewer rows make the head's gradient GEMM wait for memory
# Elementwise work goes through a chunk by blocks, so that its two scratch tensors are of this size. Not smaller: each
# operation on a block is a barrier of all threads, and on a busy machine barriers cost more than cache misses.
BLOCK_BYTES = 32 << 20
TOP_K_GROUP = 64


def reverse_kl(inputs: DivergenceInputs) -> Divergence:
    """See :func:`opd_kernels.linear_divergence`."""
    head = inputs.student_head
    return Divergence(
        *_ReverseKL.apply(inputs.student_hidden_TD, head.weight, head.bias, inputs, torch.is_grad_enabled())
    )


def default_chunk_tokens(vocab_size: int) -> int:
    """Rows of a chunk. Depends on V alone: with T in it, a row's bits would depend on how many rows there are."""
    rows = CHUNK_BYTES // (4 * vocab_size)
    return max(1, rows if rows < 8 else min(rows // 8 * 8, 4096))


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        inputs: DivergenceInputs,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        # needs_input_grad does not know torch.no_grad().
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        # Autocast does not reach in: it leaves operations with an out= and in-place ones alone.
        loss, stats_KT, grads = _forward(inputs, *needs)
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.save_for_backward(*grads)
        stats = stats_KT.unbind(0)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 5
        # Never in place: with retain_graph the saved gradients are wanted again. The usual factor 1 is spared a second
        # [V, D] tensor, save on a GPU, where looking at it would wait for the device.
        keep = grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
        scaled = [
            None if grad is None else (grad if keep else grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _forward(
    inputs: DivergenceInputs, needs_hidden: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """→ loss, the seven diagnostics [7, T] in the order of :class:`Divergence`, gradients for a grad_output of 1."""
    hidden_TD, V, dtype = inputs.student_hidden_TD, inputs.vocab_size, inputs.result_dtype
    tokens, device = hidden_TD.shape[0], hidden_TD.device
    student = _Projection.of(inputs.student_head, inputs.temperature, dtype)
    teacher = None if inputs.teacher_head is None else _Projection.of(inputs.teacher_head, inputs.temperature, dtype)
    weights_T, ids_T = inputs.token_weights_T.to(dtype), inputs.sampled_ids_T.long()

    stats_KT = torch.empty(7, tokens, dtype=dtype, device=device)
    grad_hidden_TD = torch.empty(hidden_TD.shape, dtype=dtype, device=device) if needs_hidden else None
    grad_weight_VD = torch.zeros(inputs.student_head.weight.shape, dtype=dtype, device=device) if needs_weight else None
    grad_bias_V = torch.zeros(inputs.student_head.weight.shape[0], dtype=dtype, device=device) if needs_bias else None
    needs_any = needs_hidden or needs_weight or needs_bias

    chunk = min(inputs.chunk_tokens or default_chunk_tokens(V), tokens)
    # On a GPU a launch costs more than the cache saves.
    block = min(chunk, max(1, BLOCK_BYTES // (4 * V))) if device.type == "cpu" else chunk
    student_CV = torch.empty(chunk, V, dtype=dtype, device=device)
    teacher_CV = torch.empty(chunk, V, dtype=dtype, device=device)
    scratch_2BV = torch.empty(2, block, V, dtype=dtype, device=device)
    # GEMM operands are staged at the start of a buffer: a CPU GEMM's bits depend on the alignment of its operands, and
    # a row of 60 floats in the caller's tensor is aligned by its index.
    hidden_buffer_CD = torch.empty(chunk, hidden_TD.shape[1], dtype=dtype, device=device)
    grad_buffer_CD = torch.empty_like(hidden_buffer_CD)
    teacher_hidden_TE = inputs.teacher_hidden_TE
    teacher_buffer_CE = (
        None if teacher_hidden_TE is None else hidden_TD.new_empty(chunk, teacher_hidden_TE.shape[1], dtype=dtype)
    )

    for start in range(0, tokens, max(chunk, 1)):
        rows = slice(start, min(start + chunk, tokens))
        count = rows.stop - start
        hidden_CD = hidden_buffer_CD[:count].copy_(hidden_TD[rows])
        student_logits_CV, teacher_logits_CV = student_CV[:count], teacher_CV[:count]
        student.project_(hidden_CD, student_logits_CV)
        if teacher is not None:
            assert teacher_hidden_TE is not None
            assert teacher_buffer_CE is not None
            teacher.project_(teacher_buffer_CE[:count].copy_(teacher_hidden_TE[rows]), teacher_logits_CV)
        else:
            assert inputs.teacher_logits_TV is not None
            teacher_logits_CV.copy_(inputs.teacher_logits_TV[rows])
            if inputs.temperature != 1.0:
                teacher_logits_CV.mul_(1.0 / inputs.temperature)

        factor_C = torch.empty(count, dtype=dtype, device=device)
        for begin in range(0, count, block):
            part = slice(begin, min(begin + block, count))
            absolute = slice(start + part.start, start + part.stop)
            factor_C[part] = _rows_(
                student_logits_CV[part],
                teacher_logits_CV[part],
                scratch_2BV[:, : part.stop - begin],
                ids_T[absolute],
                stats_KT[:, absolute],
                inputs.overlap_k,
                student if needs_any else None,
            )
        if not needs_any:
            continue

        grad_CV = teacher_logits_CV
        factor_C.mul_(weights_T[rows]).mul_(student.slope)
        if grad_hidden_TD is not None:
            grad_CD = torch.mm(grad_CV, student.weight_VD, out=grad_buffer_CD[:count])
            torch.mul(grad_CD, factor_C[:, None], out=grad_hidden_TD[rows])
        if grad_weight_VD is not None:
            grad_weight_VD[:V].addmm_(grad_CV.T, hidden_CD.mul_(factor_C[:, None]))
        if grad_bias_V is not None:
            grad_bias_V[:V].addmv_(grad_CV.T, factor_C)

    loss = (weights_T * stats_KT[0]).sum()
    return loss, stats_KT, (grad_hidden_TD, grad_weight_VD, grad_bias_V)


def _rows_(
    s_BV: Tensor,
    t_BV: Tensor,
    scratch_2BV: Tensor,
    ids_B: Tensor,
    stats_KB: Tensor,
    k: int,
    student: _Projection | None,
) -> Tensor:
    """Statistics and gradient of a few rows, in place.

    Args:
        s_BV, t_BV: [B, V] logits of student and teacher over τ. Overwritten; t_BV by the gradient with respect to
            s_BV (through tanh where the student has a soft-cap), short of the factor of its row, if ``student`` is
            given.
        scratch_2BV: [2, B, V].
        ids_B: [B] sampled ids.
        stats_KB: [7, B], written, in the order of :class:`Divergence`.
        k: of the top-k overlap.

    Returns:
        [B]: 1/S, the part of the row's factor that is known here.
    """
    exp_BV, work_BV = scratch_2BV
    s_top, s_top_ids = _top_k(s_BV, k)
    t_top, t_top_ids = _top_k(t_BV, k)
    s_max_B1, t_max_B1 = s_top[:, :1], t_top[:, :1]
    s_BV.sub_(s_max_B1)
    t_BV.sub_(t_max_B1)
    s_sampled_B, t_sampled_B = s_BV.gather(1, ids_B[:, None])[:, 0], t_BV.gather(1, ids_B[:, None])[:, 0]

    torch.exp(t_BV, out=exp_BV)
    t_sum_B = exp_BV.sum(1)
    log_t_sum_B = t_sum_B.log()
    teacher_entropy_B = log_t_sum_B - torch.mul(exp_BV, t_BV, out=work_BV).sum(1) / t_sum_B

    torch.exp(s_BV, out=exp_BV)
    s_sum_B = exp_BV.sum(1)
    log_s_sum_B = s_sum_B.log()
    student_entropy_B = log_s_sum_B - torch.mul(exp_BV, s_BV, out=work_BV).sum(1) / s_sum_B

    difference_BV = torch.sub(s_BV, t_BV, out=t_BV)
    mean_B = torch.mul(exp_BV, difference_BV, out=work_BV).sum(1) / s_sum_B

    in_both_Bk = (s_top_ids[:, :, None] == t_top_ids[:, None, :]).any(-1)
    stats_KB[0] = mean_B - log_s_sum_B + log_t_sum_B
    stats_KB[1] = student_entropy_B
    stats_KB[2] = teacher_entropy_B
    stats_KB[3] = s_sampled_B - log_s_sum_B
    stats_KB[4] = t_sampled_B - log_t_sum_B
    stats_KB[5] = in_both_Bk.sum(-1) / k
    stats_KB[6] = ((s_top - s_max_B1).exp() * in_both_Bk).sum(-1) / s_sum_B

    if student is not None:
        difference_BV.sub_(mean_B[:, None]).mul_(exp_BV)
        if student.after_cap is not None:
            # tanh' = 1 − tanh², and tanh is the logit over what it was multiplied by.
            tanh_BV = torch.add(s_BV, s_max_B1, out=work_BV).div_(student.after_cap)
            difference_BV.addcmul_(difference_BV, tanh_BV.square_(), value=-1.0)
    return s_sum_B.reciprocal()


@dataclass(frozen=True, slots=True)
class _Projection:
    """A head, temperature folded in: after_cap · tanh(before · (h Wᵀ + b)), or before · (h Wᵀ + b) without a cap.

    Attributes:
        weight_VD: [V, D], padding sliced off. Half-precision heads are widened once per call: these operations offer
            no GEMM that keeps float32 logits of bfloat16 operands on every device, and rounding logits to 8 bits
            would be an error of 0.1 where they are 20.
        bias_V: [V] or None.
        before: logit_scale / soft_cap, or logit_scale / τ.
        after_cap: soft_cap / τ, or None without a soft-cap.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    before: float
    after_cap: float | None

    @classmethod
    def of(cls, head: LinearHead, temperature: float, dtype: torch.dtype) -> _Projection:
        V = head.vocab_size
        return cls(
            weight_VD=head.weight.detach()[:V].to(dtype),
            bias_V=None if head.bias is None else head.bias.detach()[:V].to(dtype),
            before=head.logit_scale / (temperature if head.soft_cap is None else head.soft_cap),
            after_cap=None if head.soft_cap is None else head.soft_cap / temperature,
        )

    @property
    def slope(self) -> float:
        """Derivative of the output by (h Wᵀ + b), tanh' left out."""
        return self.before * (1.0 if self.after_cap is None else self.after_cap)

    def project_(self, hidden_CD: Tensor, out_CV: Tensor) -> None:
        """[C, D] → [C, V], written to ``out_CV``, whatever it held."""
        if self.bias_V is None:
            torch.addmm(out_CV, hidden_CD, self.weight_VD.T, beta=0.0, alpha=self.before, out=out_CV)
        else:
            torch.addmm(self.bias_V, hidden_CD, self.weight_VD.T, beta=self.before, alpha=self.before, out=out_CV)
        if self.after_cap is not None:
            out_CV.tanh_().mul_(self.after_cap)


def _top_k(x_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their ids, [B, k] each, sorted: ``torch.topk`` at a twentieth of its time.

    The row is dealt into groups. The k largest entries lie in at most k groups, and the k groups with the largest
    maxima hold them (or their equals), so only k groups need a closer look.
    """
    vocab_size = x_BV.shape[1]
    groups = vocab_size // TOP_K_GROUP
    if groups <= 2 * k:
        values, ids = x_BV.topk(k, dim=1)
        return values, ids
    # Strided groups (ids g, g + groups, …): the maximum then runs over contiguous memory.
    dealt = groups * TOP_K_GROUP
    group_max_BG = x_BV[:, :dealt].unflatten(1, (TOP_K_GROUP, groups)).amax(1)
    group_Bk = group_max_BG.topk(k, dim=1).indices
    ids_BN = (group_Bk[:, :, None] + torch.arange(0, dealt, groups, device=x_BV.device)).flatten(1)
    rest_BN = torch.arange(dealt, vocab_size, device=x_BV.device).expand(x_BV.shape[0], -1)
    ids_BN = torch.cat([ids_BN, rest_BN], dim=1)
    values, where = x_BV.gather(1, ids_BN).topk(k, dim=1)
    return values, ids_BN.gather(1, where)


OBJECTIVES: dict[str, Callable[[DivergenceInputs], Divergence]] = {"reverse_kl": reverse_kl}
