"""Fused divergences and log-probabilities on torch operations: for the CPU, and for devices that Triton does not serve.

Elementwise work goes through a chunk by blocks of rows that fit the cores' caches, so that the dozen passes over a
block (:mod:`opd_kernels.torch_rows`) read and write memory once. 1/S, the token's weight and the head's scale are
factors of a row: they multiply the [C, D] side of the GEMMs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from opd_kernels.fused import Rows, compute_fused
from opd_kernels.fused_likelihood import fused_token_logprobs
from opd_kernels.head import Form, LinearHead
from opd_kernels.inputs import LOGPROB_FLOOR, Divergence, DivergenceInputs, TokenLogprobs
from opd_kernels.objectives import ReverseKL
from opd_kernels.row_workers import for_each_share
from opd_kernels.torch_rows import Block, Side, kl, value_and_gradient

CHUNK_BYTES = 32 << 20  # one [C, V] float32 buffer
MIN_CHUNK_TOKENS = 96  # with fewer rows the GEMMs, which go through all of [V, D] for each chunk, wait for memory
DETERMINISTIC_CHUNK_TOKENS = 96  # every call pays for whole chunks there
# MKL deals a GEMM's rows out to threads evenly, and each thread takes 4, 6 or 12 of them at a time, by the instruction
# set. A remainder goes through other kernels, which add up in another order; so shares are whole multiples of them all.
# With many threads it splits the sums of few rows, too, and not all rows' sums alike: 12 per thread are too few.
ROWS_PER_THREAD = 24
# One [B, V] tensor of a block. Smaller ones would fit a core's second-level cache, but Python's lock, which every
# operation is started under, costs more than that saves.
BLOCK_BYTES = 5 << 20
# Half-precision heads are widened as a whole up to this size, a tile at a time above it.
WIDEN_BYTES = 256 << 20


def compute(inputs: DivergenceInputs) -> Divergence:
    """See :func:`opd_kernels.linear_divergence`."""
    return compute_fused(inputs, TorchBackend(inputs))


def token_logprobs(inputs: DivergenceInputs) -> TokenLogprobs:
    """See :func:`opd_kernels.token_logprobs`."""
    return fused_token_logprobs(inputs, TorchBackend)


def default_chunk_tokens(vocab_size: int) -> int:
    """Rows of a chunk where none are asked for."""
    rows = CHUNK_BYTES // (4 * vocab_size)
    return max(MIN_CHUNK_TOKENS, min(rows // 8 * 8, 4096))


class TorchBackend:
    """See :class:`opd_kernels.fused.Backend`. ``project`` leaves nothing of the head's form to ``rows``."""

    def __init__(self, inputs: DivergenceInputs) -> None:
        self._inputs = inputs
        self._dtype = inputs.result_dtype
        self._device = inputs.student_hidden_TD.device
        self._student = Form.of(inputs.student_head, inputs.temperature)
        self._widened: dict[int, Tensor] = {}

    def default_chunk_tokens(self) -> int:
        if not self._inputs.deterministic:
            return default_chunk_tokens(self._inputs.vocab_size)
        rows = ROWS_PER_THREAD * torch.get_num_threads()
        return rows * max(1, DETERMINISTIC_CHUNK_TOKENS // rows)

    def logits_buffer(self, chunk: int) -> Tensor:
        return torch.empty(chunk, self._inputs.vocab_size, dtype=self._dtype, device=self._device)

    def gradient_buffer(self, chunk: int, teacher_CV: Tensor | None) -> Tensor:
        return self.logits_buffer(chunk) if teacher_CV is None else teacher_CV

    def operand(self, grad_CV: Tensor) -> tuple[Tensor, Tensor]:
        return grad_CV, torch.ones(len(grad_CV), dtype=self._dtype, device=self._device)

    # --- GEMMs -------------------------------------------------------------------------------------------------
    def project(self, head: LinearHead, hidden_CD: Tensor, out_CV: Tensor) -> None:
        form, hidden_CD = Form.of(head, self._inputs.temperature), hidden_CD.to(self._dtype)
        for ids, weight_VD in self._tiles(head.weight):
            tile_CV = out_CV[:, ids]
            if head.bias is None:
                torch.addmm(tile_CV, hidden_CD, weight_VD.T, beta=0.0, alpha=form.before, out=tile_CV)
            else:
                bias_V = head.bias.detach()[ids].to(self._dtype)
                torch.addmm(bias_V, hidden_CD, weight_VD.T, beta=form.before, alpha=form.before, out=tile_CV)
        if form.after_cap is not None:
            out_CV.tanh_().mul_(form.after_cap)

    def take_logits(self, logits_CV: Tensor, out_CV: Tensor) -> None:
        out_CV.copy_(logits_CV)
        if self._inputs.temperature != 1.0:
            out_CV.mul_(1.0 / self._inputs.temperature)

    def grad_hidden(self, grad_CV: Tensor, factor_C: Tensor, head: LinearHead, out_CD: Tensor) -> None:
        beta = 0.0
        for ids, weight_VD in self._tiles(head.weight):
            out_CD.addmm_(grad_CV[:, ids], weight_VD, beta=beta)
            beta = 1.0
        out_CD.mul_(factor_C[:, None])

    def grad_weight(self, grad_CV: Tensor, factor_C: Tensor, hidden_CD: Tensor, accumulate_VD: Tensor) -> None:
        accumulate_VD.addmm_(grad_CV.T, hidden_CD.to(self._dtype) * factor_C[:, None])

    def grad_bias(self, grad_CV: Tensor, factor_C: Tensor, accumulate_V: Tensor) -> None:
        accumulate_V.addmv_(grad_CV.T, factor_C)

    def _tiles(self, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The head's rows, padding left out, in the dtype of the logits.

        These operations offer no GEMM that keeps float32 logits of bfloat16 operands on every device, and rounding
        logits to 8 bits would be an error of 0.1 where they are 20.
        """
        # Not the address: W and views of it may share that. The inputs keep the object, and so its id, alive.
        V, key, weight_VD = self._inputs.vocab_size, id(weight_VD), weight_VD.detach()
        if weight_VD.dtype == self._dtype:
            yield slice(0, V), weight_VD[:V]
            return
        width = weight_VD.shape[1] * self._dtype.itemsize
        if V * width <= WIDEN_BYTES:
            if key not in self._widened:
                self._widened[key] = weight_VD[:V].to(self._dtype)
            yield slice(0, V), self._widened[key]
            return
        tile = max(1, WIDEN_BYTES // width)
        for start in range(0, V, tile):
            ids = slice(start, min(start + tile, V))
            yield ids, weight_VD[ids].to(self._dtype)

    # --- rows --------------------------------------------------------------------------------------------------
    def rows(self, rows: Rows) -> Tensor:
        count, V = rows.student_logits_CV.shape
        factor_C = torch.empty(count, dtype=self._dtype, device=self._device)
        largest = max(1, BLOCK_BYTES // (self._dtype.itemsize * V))

        def go_through(share: int, shares: int) -> None:
            rounds = math.ceil(count / (shares * largest)) if self._device.type == "cpu" else 1
            block = math.ceil(count / (shares * rounds))  # all alike, so that no thread waits for another
            scratch_BV = torch.empty(3 if rows.keep_student else 2, block, V, dtype=self._dtype, device=self._device)
            for begin in range(share * block, count, shares * block):
                part = slice(begin, min(begin + block, count))
                factor_C[part] = self._block(rows, part, *scratch_BV[:, : part.stop - begin])

        if self._device.type == "cpu":
            for_each_share(go_through)
        else:  # there a launch costs more than a cache saves
            go_through(0, 1)
        return factor_C.mul_(self._student.slope)

    def _block(
        self, rows: Rows, part: slice, exp_BV: Tensor, work_BV: Tensor, shifted_BV: Tensor | None = None
    ) -> Tensor:
        """Statistics and gradient of a few rows → [B], what is known here of each row's factor."""
        inputs, ids_B1 = self._inputs, rows.sampled_ids_C[part, None]
        k = 1 if rows.teacher.logits_CV is None else inputs.overlap_k  # the maximum is wanted whatever the signal
        student_2B, teacher_6B = rows.student_2C[:, part], rows.teacher_6C[:, part]
        logits_BV = rows.student_logits_CV[part]
        student = Side.of(logits_BV, k, logits_BV if shifted_BV is None else shifted_BV, exp_BV, work_BV)
        student_2B[0] = student.log_sum_B - student.mean_B
        student_2B[1] = student.logprob(ids_B1)[:, 0]
        teacher = None
        if rows.teacher.logits_CV is not None:
            logits_BV = rows.teacher.logits_CV[part]
            teacher = Side.of(logits_BV, k, logits_BV, work_BV, work_BV)
            in_both_Bk = (student.top_ids_Bk[:, :, None] == teacher.top_ids_Bk[:, None, :]).any(-1)
            teacher_6B[2] = teacher.log_sum_B - teacher.mean_B
            teacher_6B[3] = teacher.logprob(ids_B1)[:, 0]
            teacher_6B[4] = in_both_Bk.sum(-1) / k
            teacher_6B[5] = (student.top_exp_Bk * in_both_Bk).sum(-1) / student.sum_B
        elif rows.teacher.token_logprobs_C is not None:
            teacher_6B[3] = rows.teacher.token_logprobs_C[part].clamp(min=LOGPROB_FLOOR)
        block = Block(
            student=student,
            exp_BV=exp_BV,
            teacher=teacher,
            reference_BV=_part(None if rows.reference is None else rows.reference.logits_CV, part),
            top_k_ids_BK=_part(rows.teacher.top_k_ids_CK, part),
            top_k_logprobs_BK=_part(rows.teacher.top_k_logprobs_CK, part),
            token_logprobs_B=_part(rows.teacher.token_logprobs_C, part),
            sampled_ids_B1=ids_B1,
            work_BV=work_BV,
            grad_BV=_part(rows.grad_CV, part),
        )
        is_reverse_kl = isinstance(inputs.objective, ReverseKL)
        if teacher is not None and not is_reverse_kl:
            teacher_6B[1] = kl(block)
        teacher_6B[0] = value_and_gradient(inputs.objective, block)
        if is_reverse_kl:
            teacher_6B[1] = teacher_6B[0]
        if block.grad_BV is not None and self._student.after_cap is not None:
            # tanh' = 1 − tanh², and tanh is the logit over what it was multiplied by.
            tanh_BV = torch.add(student.shifted_BV, student.max_B1, out=work_BV).div_(self._student.after_cap)
            block.grad_BV.addcmul_(block.grad_BV, tanh_BV.square_(), value=-1.0)
        return student.sum_B.reciprocal()


def _part(x_C: Tensor | None, part: slice) -> Tensor | None:
    return None if x_C is None else x_C[part]
