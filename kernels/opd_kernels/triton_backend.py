"""Fused divergences and log-probabilities on a GPU: projections and gradients by the vendor's GEMM, rows by Triton.

Operands of a GEMM keep their dtype and products are summed in float32: logits of bfloat16 operands are float32 logits.
Where the hidden states and the head differ, both are promoted, never rounded down. float32 operands are multiplied in
float32, not TensorFloat-32, whatever the process has set. The gradient to the logits is written in the dtype of the
student's operands, so that its GEMMs run at that dtype's speed; float16, which has 5 bits of exponent, gets it scaled
by a power of two a row, which the row's factor undoes.

With ``deterministic``, every GEMM is :mod:`opd_kernels.triton_gemm`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor

from opd_kernels import triton_gemm, triton_rows
from opd_kernels.fused import Rows, RowSignal, compute_fused
from opd_kernels.fused_likelihood import fused_token_logprobs
from opd_kernels.head import Form, LinearHead
from opd_kernels.inputs import LOGPROB_FLOOR, Divergence, DivergenceInputs, TokenLogprobs
from opd_kernels.objectives import JSD, ExOPD, TopK
from opd_kernels.torch_rows import given_top_k, top_k
from opd_kernels.triton_statistics import MOMENTS

# Of one float32 [C, V] buffer; there are two, and one in 16 bits. The gradient to the head does 2·C·V·D operations for
# the 8·V·D bytes of its float32 accumulator, which are read and written once a chunk: C/4 operations a byte. A H100
# does 989 T/s in bfloat16 and moves 3.35 TB/s, so below C = 1180 that GEMM waits for memory. 512 MiB are 1024 rows at
# V = 129k and 896 at V = 152k: three quarters of the peak, which no GEMM of that size reaches anyway. Twice as much
# would be gigabytes taken from activations.
CHUNK_BYTES = 512 << 20
CHUNK_MULTIPLE = 128  # a tile of a GEMM
MAX_CHUNK_TOKENS = 4096
DETERMINISTIC_CHUNK_TOKENS = 256  # every call pays for whole chunks there
# What a tile of a widened head, or of a gradient that is yet to be scaled, may take.
TILE_BYTES = 256 << 20
HALF = (torch.bfloat16, torch.float16)
# Rows, bias, and two factors, as :mod:`opd_kernels.triton_tiles` says.
_Side: TypeAlias = tuple[Tensor | None, Tensor | None, float, float]
# (factor · hidden) is a GEMM's operand; in float16 its largest entry is brought to [2¹³, 2¹⁴).
OPERAND_EXPONENT = 14


def compute(inputs: DivergenceInputs) -> Divergence:
    """See :func:`opd_kernels.linear_divergence`.

    Raises:
        ValueError: what was given is not on a device that Triton compiles for, or is float64.
    """
    _check(inputs)
    return compute_fused(inputs, TritonBackend(inputs))


def token_logprobs(inputs: DivergenceInputs) -> TokenLogprobs:
    """See :func:`opd_kernels.token_logprobs`; raises as ``compute`` does."""
    _check(inputs)
    return fused_token_logprobs(inputs, TritonBackend)


def default_chunk_tokens(vocab_size: int) -> int:
    """Rows of a chunk where none are asked for."""
    wanted = round(CHUNK_BYTES / (4 * vocab_size * CHUNK_MULTIPLE)) * CHUNK_MULTIPLE
    return max(CHUNK_MULTIPLE, min(wanted, MAX_CHUNK_TOKENS))


def _check(inputs: DivergenceInputs) -> None:
    device = inputs.student_hidden_TD.device
    if device.type != "cuda" and isinstance(triton_rows.statistics_kernel, triton.JITFunction):
        raise ValueError(
            f"implementation: 'triton' compiles for GPUs, the tensors are on {device}; choose 'torch', or set "
            "TRITON_INTERPRET=1 before Triton is imported to debug its kernels"
        )
    if inputs.has_float64:
        raise ValueError(
            "implementation: 'triton' computes in float32 and would round float64; choose 'torch' or 'reference'"
        )


class TritonBackend:
    """See :class:`opd_kernels.fused.Backend`. ``project`` leaves all of the head's form to ``rows``."""

    def __init__(self, inputs: DivergenceInputs) -> None:
        self._inputs = inputs
        self._device = inputs.student_hidden_TD.device
        self._dtype = _operands(inputs.student_head, inputs.student_hidden_TD)
        self._objective = triton_rows.OBJECTIVES[type(inputs.objective)]

    def default_chunk_tokens(self) -> int:
        rows = default_chunk_tokens(self._inputs.vocab_size)
        return min(rows, DETERMINISTIC_CHUNK_TOKENS) if self._inputs.deterministic else rows

    def logits_buffer(self, chunk: int) -> Tensor:
        return self._buffer(chunk, torch.float32)

    def gradient_buffer(self, chunk: int, teacher_CV: Tensor | None) -> Tensor:
        """Gradients of several teachers are added up, in float32, before they are an operand."""
        if self._dtype in HALF and len(self._inputs.teachers) == 1:
            return self._buffer(chunk, self._dtype)
        return self.logits_buffer(chunk) if teacher_CV is None else teacher_CV

    def _buffer(self, chunk: int, dtype: torch.dtype) -> Tensor:
        stride = triton_rows.stride_of(self._inputs.vocab_size)
        return torch.empty(chunk, stride, dtype=dtype, device=self._device)[:, : self._inputs.vocab_size]

    # --- GEMMs -------------------------------------------------------------------------------------------------
    def project(self, head: LinearHead, hidden_CD: Tensor, out_CV: Tensor) -> None:
        dtype = _operands(head, hidden_CD)
        for ids, weight_VD in _tiles(head.weight, self._inputs.vocab_size, dtype):
            self._multiply(hidden_CD.to(dtype), weight_VD.T, out_CV[:, ids])

    def take_logits(self, logits_CV: Tensor, out_CV: Tensor) -> None:
        out_CV.copy_(logits_CV)

    def grad_hidden(self, grad_CV: Tensor, factor_C: Tensor, head: LinearHead, out_CD: Tensor) -> None:
        for ids, weight_VD in _tiles(head.weight, self._inputs.vocab_size, self._dtype):
            self._multiply(grad_CV[:, ids], weight_VD, out_CD, accumulate=ids.start > 0)
        out_CD.mul_(factor_C[:, None])

    def grad_weight(self, grad_CV: Tensor, factor_C: Tensor, hidden_CD: Tensor, accumulate_VD: Tensor) -> None:
        scaled_CD = hidden_CD.float() * factor_C[:, None]
        if self._dtype != torch.float16:
            self._multiply(grad_CV.T, scaled_CD.to(self._dtype), accumulate_VD, accumulate=True)
            return
        # A factor is a token's weight over a power of two, 1e-6 or 1e-12, and float16's least is 6e-8. All rows are
        # brought into range by one power of two, which is known on the device alone: cuBLAS cannot undo it, so a
        # product is added by an operation of its own.
        exponent = torch.frexp(scaled_CD.abs().amax()).exponent.clamp(min=-100)
        one = torch.ones((), dtype=torch.float32, device=self._device)
        operand_CD = (scaled_CD * torch.ldexp(one, OPERAND_EXPONENT - exponent)).to(self._dtype)
        undo = torch.ldexp(one, exponent - OPERAND_EXPONENT)
        vocab_size, width = accumulate_VD.shape
        rows = max(16, TILE_BYTES // (4 * width) // 16 * 16)
        product_VD = torch.empty(min(rows, vocab_size), width, dtype=torch.float32, device=self._device)
        for start in range(0, vocab_size, rows):
            ids = slice(start, min(start + rows, vocab_size))
            tile_VD = product_VD[: ids.stop - start]
            self._multiply(grad_CV[:, ids].T, operand_CD, tile_VD)
            accumulate_VD[ids].addcmul_(tile_VD, undo)

    def grad_bias(self, grad_CV: Tensor, factor_C: Tensor, accumulate_V: Tensor) -> None:
        vocab_size = self._inputs.vocab_size
        programs = triton.cdiv(vocab_size, triton_rows.BIAS_TILE["BLOCK_V"])
        with triton_gemm.on_device(self._device):
            triton_rows.bias(vocab_size)(programs, grad_CV, factor_C, accumulate_V, len(factor_C))

    def operand(self, grad_CV: Tensor) -> tuple[Tensor, Tensor]:
        one_C = torch.ones(len(grad_CV), dtype=torch.float32, device=self._device)
        if self._dtype not in HALF:
            return grad_CV, one_C
        operand_CV = self._buffer(len(grad_CV), self._dtype)
        if self._dtype == torch.bfloat16:
            return operand_CV.copy_(grad_CV), one_C
        exponent_C = torch.frexp(torch.linalg.vector_norm(grad_CV, float("inf"), dim=1)).exponent
        exponent_C = (13 - exponent_C).clamp(-64, 64)  # as triton_gradient does
        torch.mul(grad_CV, torch.ldexp(one_C, exponent_C)[:, None], out=operand_CV)
        return operand_CV, torch.ldexp(one_C, -exponent_C)

    def _multiply(self, a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, accumulate: bool = False) -> None:
        """out = a · b, or out += a · b; out is float32 whatever a and b are, and so is the sum."""
        if self._inputs.deterministic:
            triton_gemm.mm(a_MK, b_KN, out_MN, accumulate=accumulate)
        elif a_MK.dtype in HALF and a_MK.is_cuda:
            if accumulate:
                torch.addmm(out_MN, a_MK, b_KN, out_dtype=torch.float32, out=out_MN)
            else:
                torch.mm(a_MK, b_KN, out_dtype=torch.float32, out=out_MN)
        else:  # half precision on a CPU: products of two such numbers are float32 numbers
            with _full_float32():
                out_MN.addmm_(a_MK.float(), b_KN.float(), beta=float(accumulate))

    # --- rows --------------------------------------------------------------------------------------------------
    def rows(self, rows: Rows) -> Tensor:
        inputs, head, count = self._inputs, self._inputs.student_head, len(rows.sampled_ids_C)
        teacher, reference = rows.teacher, rows.reference
        sides = [
            self._side(rows.student_logits_CV, head),
            self._side(teacher.logits_CV, teacher.head),
            self._side(None, None) if reference is None else self._side(reference.logits_CV, reference.head),
        ]
        capped = (_capped(head), _capped(teacher.head), reference is not None and _capped(reference.head))
        float32: dict[str, Any] = {"dtype": torch.float32, "device": self._device}
        moments_6C = torch.empty(MOMENTS, count, **float32)
        groups = triton_rows.statistics_block(inputs.vocab_size)
        group_max_C2G = None if teacher.logits_CV is None else torch.empty(count, 2, groups, **float32)
        factor_C = torch.full((count,), head.logit_scale / inputs.temperature, **float32)
        lam = float(inputs.objective.lam) if isinstance(inputs.objective, ExOPD) else 0.0
        parameter = inputs.objective.beta if isinstance(inputs.objective, JSD) else lam
        with triton_gemm.on_device(self._device):
            triton_rows.statistics(inputs.vocab_size, self._objective, capped)(
                count,
                *sides[0],
                *sides[1],
                *sides[2],
                rows.sampled_ids_C,
                teacher.token_logprobs_C,
                rows.student_2C,
                rows.teacher_6C,
                rows.teacher_6C.stride(0),
                moments_6C,
                group_max_C2G,
                lam,
                LOGPROB_FLOOR,
            )
            if teacher.logits_CV is not None:
                triton_rows.overlap(inputs.vocab_size, capped)(
                    count, *sides[0], *sides[1], moments_6C, group_max_C2G, rows.teacher_6C, rows.teacher_6C.stride(0)
                )
            if rows.grad_CV is None and not isinstance(inputs.objective, triton_rows.TWO_STEP):
                return factor_C
            with self._top_k(rows) as (k, *top):
                dtype = torch.float32 if rows.grad_CV is None else rows.grad_CV.dtype
                triton_rows.gradient(inputs.vocab_size, self._objective, capped, dtype, k)(
                    count,
                    *sides[0],
                    *sides[1],
                    *sides[2],
                    rows.sampled_ids_C,
                    moments_6C,
                    rows.teacher_6C,
                    k,
                    *top,
                    rows.grad_CV,
                    factor_C,
                    head.logit_scale / inputs.temperature,
                    parameter,
                    LOGPROB_FLOOR,
                )
        return factor_C

    def _side(self, logits_CV: Tensor | None, head: LinearHead | None) -> _Side:
        tau = self._inputs.temperature
        assert logits_CV is None or logits_CV.stride(0) == triton_rows.stride_of(self._inputs.vocab_size)
        if logits_CV is None or head is None:
            return logits_CV, None, 1.0 / tau, 1.0
        bias_V = None if head.bias is None else head.bias.detach().contiguous()
        form = Form.of(head, tau)
        return logits_CV, bias_V, form.before, 1.0 if form.after_cap is None else form.after_cap

    @contextlib.contextmanager
    def _top_k(self, rows: Rows) -> Iterator[tuple[int, Tensor | None, Tensor | None, Tensor | None, Tensor | None]]:
        """k, ids, the student's entries there, and, if given, the teacher's log-probabilities and that of its tail.

        As long as this lasts, the student's row is −inf at those ids.
        """
        if not isinstance(self._inputs.objective, TopK):
            yield 1, None, None, None, None
            return
        logprobs_CK = tail_C = None
        if rows.teacher.top_k_ids_CK is not None and rows.teacher.top_k_logprobs_CK is not None:
            ids_CK = rows.teacher.top_k_ids_CK
            logprobs_CK, tail_C = given_top_k(rows.teacher.top_k_logprobs_CK, torch.float32)
        else:
            ids_CK = self._teacher_top_k(rows.teacher, self._inputs.objective.k)
        student_CK = rows.student_logits_CV.gather(1, ids_CK)
        rows.student_logits_CV.scatter_(1, ids_CK, float("-inf"))
        yield ids_CK.shape[1], ids_CK, student_CK, logprobs_CK, tail_C
        if rows.keep_student:
            rows.student_logits_CV.scatter_(1, ids_CK, student_CK)

    def _teacher_top_k(self, teacher: RowSignal, k: int) -> Tensor:
        """[C, K] ids. A soft-cap and a scale keep the order, so what was projected will do, a bias added."""
        assert teacher.logits_CV is not None
        order_CV, head = teacher.logits_CV, teacher.head
        if head is not None and head.bias is not None:
            order_CV = order_CV + head.bias.detach()[: self._inputs.vocab_size]
        if head is not None and head.logit_scale < 0:
            order_CV = -order_CV
        return top_k(order_CV, min(k, self._inputs.vocab_size))[1].contiguous()


def _operands(head: LinearHead, hidden: Tensor) -> torch.dtype:
    """Of a GEMM of the two: that of both, or the wider one; float16 and bfloat16 only fit into float32 together."""
    return torch.promote_types(hidden.dtype, head.weight.dtype)


def _capped(head: LinearHead | None) -> bool:
    return head is not None and head.soft_cap is not None


def _tiles(weight_VD: Tensor, vocab_size: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head's rows, padding left out: at once where they are operands already, else widened a tile at a time."""
    weight_VD = weight_VD.detach()[:vocab_size]
    rows = vocab_size
    if weight_VD.dtype != dtype:
        rows = max(16, TILE_BYTES // (dtype.itemsize * weight_VD.shape[1]) // 16 * 16)
    for start in range(0, vocab_size, rows):
        ids = slice(start, min(start + rows, vocab_size))
        yield ids, weight_VD[ids].to(dtype)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TensorFloat-32. The setting is the process's: it is put back at once, but another thread may see it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
