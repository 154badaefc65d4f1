"""The gradient of a row, from the moments that :mod:`opd_kernels.triton_statistics` left; the values of JSD and TopK.

One kernel with the objective as a compile-time constant: what differs is a few lines of arithmetic, what is the same is
how rows are read, scaled and written. The formulas are in :mod:`opd_kernels.objectives`. The gradient is the one to the
logits over τ, times 1 − tanh² of a capped student; scale / τ is left to the row's factor.

TopK's ids K are marked by −inf in the student's row. The launcher puts it there and keeps what it replaces in
``top_student``: so membership costs a pass nothing, and both tails are summed from their own entries. 1 − Σ_K would
lose a tail of 1e-7 to rounding, and with it the logarithm that the objective is about.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opd_kernels.triton_statistics import (
    MEAN_DIFFERENCE,
    STUDENT_MAX,
    STUDENT_SUM,
    TARGET_MAX,
    TARGET_SUM,
    VALUE,
)
from opd_kernels.triton_tiles import from_raw, mixture, read_logits

# float16's normal numbers are 2⁻¹⁴ … 2¹⁶: a row's largest gradient is brought to [2¹², 2¹³), with 26 bits below it.
LARGEST_EXPONENT = tl.constexpr(12)
# Rows whose largest gradient is below 2⁻⁵² are left smaller than that, so that the factor stays a normal number.
EXPONENT_LIMIT = tl.constexpr(64)


# --- sums that an objective starts from --------------------------------------------------------------------------
@triton.jit
def _jsd_logs(log_ratio, beta):
    """→ log p − log m and log q − log m from δ = log p − log q, for m = β q + (1 − β) p.

    They are n + min(δ, 0) and n − max(δ, 0) with n = −log(1 − c (1 − e^−|δ|)), c = β where δ ≥ 0 and 1 − β elsewhere:
    nothing overflows, and at δ = 0 all are 0.
    """
    share = tl.where(log_ratio >= 0, beta, 1.0 - beta)
    gain = -tl.log(1.0 - share * (1.0 - tl.exp(-tl.abs(log_ratio))))
    return gain + tl.minimum(log_ratio, 0.0), gain - tl.maximum(log_ratio, 0.0)


@triton.jit
def _jsd_sums(student, teacher, norms, beta, V: tl.constexpr, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr):
    """→ KL(p ‖ m) and KL(q ‖ m)."""
    s_max, s_log_sum, t_max, t_log_sum = norms
    student_part = tl.zeros((BLOCK_V,), tl.float32)
    teacher_part = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        ids = start + tl.arange(0, BLOCK_V)
        s, _, _ = read_logits(student, ids, V, CAPPED[0])
        t, _, _ = read_logits(teacher, ids, V, CAPPED[1])
        log_p, log_q = s - s_max - s_log_sum, t - t_max - t_log_sum
        log_p_m, log_q_m = _jsd_logs(log_p - log_q, beta)
        student_part += tl.where(ids < V, tl.exp(log_p) * log_p_m, 0.0)
        teacher_part += tl.where(ids < V, tl.exp(log_q) * log_q_m, 0.0)
    return tl.sum(student_part, axis=0), tl.sum(teacher_part, axis=0)


@triton.jit
def _top_k_logs(top, student, teacher, norms, place, V: tl.constexpr, CAPPED: tl.constexpr):
    """→ ids, log p, the student's 1 − tanh², and log q, at places of K. Beyond k: any value."""
    k, ids_ptr, student_ptr, logprobs_ptr, _tail_logprob = top
    s_max, s_log_sum, t_max, t_log_sum = norms
    valid = place < k
    ids = tl.load(ids_ptr + place, mask=valid, other=0)
    raw = tl.load(student_ptr + place, mask=valid, other=0.0)
    s, slope = from_raw(student, raw, ids, valid, CAPPED[0])
    if logprobs_ptr is not None:
        log_q = tl.load(logprobs_ptr + place, mask=valid, other=0.0)
    else:
        t, _, _ = read_logits(teacher, ids, V, CAPPED[1])
        log_q = t - t_max - t_log_sum
    return ids, s - s_max - s_log_sum, slope, log_q


@triton.jit
def _log_mass(exp_sum, log_total, floor):
    """Log of a share, not below the floor. An empty sum has no logarithm; any that is below the floor will do."""
    return tl.maximum(tl.log(tl.maximum(exp_sum, 1.2e-38)) - log_total, floor)


@triton.jit
def _top_k_sums(
    top,
    student,
    teacher,
    norms,
    floor,
    V: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """→ the value, and log P − log Q of the tail."""
    k, _ids_ptr, _student_ptr, logprobs_ptr, tail_logprob = top
    s_max, s_log_sum, t_max, t_log_sum = norms
    inside = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, k, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        _, log_p, _, log_q = _top_k_logs(top, student, teacher, norms, place, V, CAPPED)
        inside += tl.where(place < k, tl.exp(log_p) * (log_p - log_q), 0.0)
    student_tail = tl.zeros((BLOCK_V,), tl.float32)
    teacher_tail = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        ids = start + tl.arange(0, BLOCK_V)
        s, _, raw = read_logits(student, ids, V, CAPPED[0])
        outside = (ids < V) & (raw != float("-inf"))
        student_tail += tl.where(outside, tl.exp(s - s_max), 0.0)
        if logprobs_ptr is None:
            t, _, _ = read_logits(teacher, ids, V, CAPPED[1])
            teacher_tail += tl.where(outside, tl.exp(t - t_max), 0.0)
    log_p = _log_mass(tl.sum(student_tail, axis=0), s_log_sum, floor)
    log_q = tail_logprob
    if logprobs_ptr is None:
        log_q = _log_mass(tl.sum(teacher_tail, axis=0), t_log_sum, floor)
    return tl.sum(inside, axis=0) + tl.exp(log_p) * (log_p - log_q), log_p - log_q


# --- the gradient ------------------------------------------------------------------------------------------------
@triton.jit
def _gradient(
    student,
    teacher,
    reference,
    norms,
    known,
    ids,
    OBJECTIVE: tl.constexpr,
    V: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """→ the gradient at ids, and which of it to write: what is neither padding nor one of TopK's K."""
    s_max, s_log_sum, t_max, t_log_sum = norms
    # Of the row: the sampled id, what is subtracted or multiplied by, TopK's log P − log Q of the tail, β or λ.
    y, center, tail_ratio, parameter = known
    s, slope, raw = read_logits(student, ids, V, CAPPED[0])
    s -= s_max
    write = ids < V
    if OBJECTIVE == "top_k":
        write = write & (raw != float("-inf"))
        grad = tl.exp(s - s_log_sum) * (tail_ratio - center)
    elif OBJECTIVE == "sampled_token":
        grad = center * (tl.where(ids == y, 1.0, 0.0) - tl.exp(s - s_log_sum))
    else:
        t, _, _ = read_logits(teacher, ids, V, CAPPED[1])
        if OBJECTIVE == "exopd":
            r, _, _ = read_logits(reference, ids, V, CAPPED[2])
            t = mixture(t, r, parameter)
        t -= t_max
        p = tl.exp(s - s_log_sum)
        if OBJECTIVE == "forward_kl":
            grad = p - tl.exp(t - t_log_sum)
        elif OBJECTIVE == "jsd":
            log_p_m, _ = _jsd_logs((s - s_log_sum) - (t - t_log_sum), parameter)
            grad = (1.0 - parameter) * p * (log_p_m - center)
        else:
            grad = p * ((s - t) - center)
    return tl.where(write, grad * slope, 0.0), write


@triton.jit
def _power_of_two(largest):
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    n = tl.minimum(tl.maximum(LARGEST_EXPONENT - exponent, -EXPONENT_LIMIT), EXPONENT_LIMIT)
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["k"])
def gradient_kernel(
    student_ptr,
    student_bias_ptr,
    student_before,
    student_after,
    teacher_ptr,  # None: no whole distribution, or none needed
    teacher_bias_ptr,
    teacher_before,
    teacher_after,
    reference_ptr,  # None: no ExOPD
    reference_bias_ptr,
    reference_before,
    reference_after,
    sampled_ids_ptr,
    moments_ptr,
    value_ptr,  # JSD and TopK write it
    k,
    top_ids_ptr,  # None, as the next three: no TopK
    top_student_ptr,
    top_logprobs_ptr,  # None, as the next: the teacher's row tells
    tail_logprob_ptr,
    grad_ptr,  # None: only the value. May be the teacher's memory
    factor_ptr,
    slope,
    parameter,  # β or λ
    logprob_floor,
    OBJECTIVE: tl.constexpr,
    SCALED: tl.constexpr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    CAPPED: tl.constexpr = (STUDENT_CAPPED, TEACHER_CAPPED, REFERENCE_CAPPED)
    student = (student_ptr + row * STRIDE, student_bias_ptr, student_before, student_after)
    teacher = None
    if teacher_ptr is not None:
        teacher = (teacher_ptr + row * STRIDE, teacher_bias_ptr, teacher_before, teacher_after)
    reference = None
    if reference_ptr is not None:
        reference = (reference_ptr + row * STRIDE, reference_bias_ptr, reference_before, reference_after)
    s_max = tl.load(moments_ptr + STUDENT_MAX * rows + row)
    s_log_sum = tl.log(tl.load(moments_ptr + STUDENT_SUM * rows + row))
    norms = (s_max, s_log_sum, None, None)
    if teacher_ptr is not None:
        t_max = tl.load(moments_ptr + TARGET_MAX * rows + row)
        t_log_sum = tl.log(tl.load(moments_ptr + TARGET_SUM * rows + row))
        norms = (s_max, s_log_sum, t_max, t_log_sum)

    y = tl.load(sampled_ids_ptr + row)
    top = None
    tail_ratio = 0.0
    if OBJECTIVE == "jsd":
        student_part, teacher_part = _jsd_sums(student, teacher, norms, parameter, V, CAPPED, BLOCK_V)
        tl.store(value_ptr + row, (1.0 - parameter) * student_part + parameter * teacher_part)
        center = student_part
    elif OBJECTIVE == "top_k":
        top = (k, top_ids_ptr + row * k, top_student_ptr + row * k, None, None)
        if top_logprobs_ptr is not None:
            logprobs_ptr, tail_logprob = top_logprobs_ptr + row * k, tl.load(tail_logprob_ptr + row)
            top = (k, top_ids_ptr + row * k, top_student_ptr + row * k, logprobs_ptr, tail_logprob)
        center, tail_ratio = _top_k_sums(top, student, teacher, norms, logprob_floor, V, CAPPED, BLOCK_V, BLOCK_K)
        tl.store(value_ptr + row, center)
    elif OBJECTIVE == "sampled_token":
        center = tl.load(moments_ptr + VALUE * rows + row)
    else:
        center = tl.load(moments_ptr + MEAN_DIFFERENCE * rows + row)
    known = (y, center, tail_ratio, parameter)

    if grad_ptr is not None:
        scale = 1.0
        if SCALED:
            lanes = tl.zeros((BLOCK_V,), tl.float32)
            for start in range(0, V, BLOCK_V):
                ids = start + tl.arange(0, BLOCK_V)
                grad, _ = _gradient(student, teacher, reference, norms, known, ids, OBJECTIVE, V, CAPPED)
                lanes = tl.maximum(lanes, tl.abs(grad))
            largest = tl.max(lanes, axis=0)
            if OBJECTIVE == "top_k":
                for start in range(0, k, BLOCK_K):
                    place = start + tl.arange(0, BLOCK_K)
                    _, log_p, cap_slope, log_q = _top_k_logs(top, student, teacher, norms, place, V, CAPPED)
                    grad = tl.exp(log_p) * (log_p - log_q - center) * cap_slope
                    largest = tl.maximum(largest, tl.max(tl.where(place < k, tl.abs(grad), 0.0), axis=0))
            scale = _power_of_two(largest)
            tl.store(factor_ptr + row, slope / scale)
        out_ptr = grad_ptr + row * STRIDE
        # In place: a thread writes what it has read itself, and nothing is read again after that.
        for start in range(0, V, BLOCK_V):
            ids = start + tl.arange(0, BLOCK_V)
            grad, write = _gradient(student, teacher, reference, norms, known, ids, OBJECTIVE, V, CAPPED)
            if OBJECTIVE != "top_k":
                write = ids < (V + 15) // 16 * 16  # whole groups, as for reading; beyond V it is 0
            tl.store(out_ptr + ids, (grad * scale).to(out_ptr.dtype.element_ty), mask=write)
        if OBJECTIVE == "top_k":
            for start in range(0, k, BLOCK_K):
                place = start + tl.arange(0, BLOCK_K)
                ids, log_p, cap_slope, log_q = _top_k_logs(top, student, teacher, norms, place, V, CAPPED)
                grad = tl.exp(log_p) * (log_p - log_q - center) * cap_slope
                tl.store(out_ptr + ids, (grad * scale).to(out_ptr.dtype.element_ty), mask=place < k)


@triton.jit(do_not_specialize=["rows"])
def bias_kernel(
    grad_ptr,
    factor_ptr,
    accumulate_ptr,
    rows,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """accumulate += gradᵀ · factor, summed in float32 and in one order."""
    ids = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for start in range(0, rows, BLOCK_C):
        row = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        valid = (row < rows)[:, None] & (ids < V)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * STRIDE + ids[None, :], mask=valid, other=0.0)
        factor = tl.load(factor_ptr + row, mask=row < rows, other=0.0)
        total += grad.to(tl.float32) * factor[:, None]
    sums = tl.sum(total, axis=0) + tl.load(accumulate_ptr + ids, mask=ids < V, other=0.0)
    tl.store(accumulate_ptr + ids, sums, mask=ids < V)
