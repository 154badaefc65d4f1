"""One read of a row of each side: entropies, KL, log-probabilities and, but for JSD and TopK, the objective's value.

Each lane of the tile is an online softmax of its own over the ids that come its way, shifted by its own maximum before
anything else, so that logits of 1e4 cost no precision; lanes meet at the end. That spares a reduction across warps per
tile, and the lanes' maxima are the group maxima from which the top-16 overlap is found.

With s, t a row's logits over τ less their lane's (at the end: the row's) maxima, the lanes carry

    S = Σ e^s    A = Σ e^s s    Q = Σ e^t    B = Σ e^t t    D = Σ e^s (s − t)    F = Σ e^t (t − s)

    H(p) = log S − A/S      KL(p ‖ q) = D/S − log S + log Q      KL(q ‖ p) = F/Q − log Q + log S

When a lane's maximum rises by r, a sum of e^s · x is multiplied by e^−r after x has moved by r as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opd_kernels.triton_tiles import LOWEST, ids_of, mixture, read_logits, rows_top, values_of

# Rows of the moments [MOMENTS, C], which the gradient starts from. The target is the teacher, or ExOPD's mixture.
STUDENT_MAX = tl.constexpr(0)
STUDENT_SUM = tl.constexpr(1)
TARGET_MAX = tl.constexpr(2)
TARGET_SUM = tl.constexpr(3)
MEAN_DIFFERENCE = tl.constexpr(4)  # Σ p (s − target), both less their maxima
VALUE = tl.constexpr(5)
MOMENTS = 6


@triton.jit
def _advance(top, x):
    """Lanes' maxima move on to include x → the new maxima, how far they rose, e^−rise, x less the maxima, its e^."""
    gap = x - top
    small = tl.exp(-tl.abs(gap))  # one exponential serves both: one of the two is e^0
    rose = gap > 0
    return (
        tl.maximum(top, x),
        tl.maximum(gap, 0.0),
        tl.where(rose, small, 1.0),
        tl.minimum(gap, 0.0),
        tl.where(rose, 1.0, small),
    )


@triton.jit
def _meet(top):
    """→ the row's maximum, how far each lane is below it, and the lane's weight."""
    row_max = tl.max(top, axis=0)
    below = top - row_max
    return row_max, below, tl.exp(below)


@triton.jit(do_not_specialize=["teacher_stride"])
def statistics_kernel(
    student_ptr,
    student_bias_ptr,
    student_before,
    student_after,
    teacher_ptr,  # None: no whole distribution
    teacher_bias_ptr,
    teacher_before,
    teacher_after,
    reference_ptr,  # None: no ExOPD
    reference_bias_ptr,
    reference_before,
    reference_after,
    sampled_ids_ptr,
    token_logprobs_ptr,  # None: not given
    student_2C_ptr,
    teacher_6C_ptr,
    teacher_stride,
    moments_ptr,
    group_max_ptr,
    lam,
    logprob_floor,
    OBJECTIVE: tl.constexpr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    student = (student_ptr + row * STRIDE, student_bias_ptr, student_before, student_after)
    s_top = tl.full((BLOCK_V,), LOWEST, tl.float32)
    S = tl.zeros((BLOCK_V,), tl.float32)
    A = tl.zeros((BLOCK_V,), tl.float32)
    if teacher_ptr is not None:
        teacher = (teacher_ptr + row * STRIDE, teacher_bias_ptr, teacher_before, teacher_after)
        t_top = tl.full((BLOCK_V,), LOWEST, tl.float32)
        Q = tl.zeros((BLOCK_V,), tl.float32)
        B = tl.zeros((BLOCK_V,), tl.float32)
        D = tl.zeros((BLOCK_V,), tl.float32)
        F = tl.zeros((BLOCK_V,), tl.float32)
    if reference_ptr is not None:
        reference = (reference_ptr + row * STRIDE, reference_bias_ptr, reference_before, reference_after)
        x_top = tl.full((BLOCK_V,), LOWEST, tl.float32)
        X = tl.zeros((BLOCK_V,), tl.float32)
        DX = tl.zeros((BLOCK_V,), tl.float32)

    for start in range(0, V, BLOCK_V):
        ids = start + tl.arange(0, BLOCK_V)
        valid = ids < V
        s, _, _ = read_logits(student, ids, V, STUDENT_CAPPED)
        s_top, s_rise, s_decay, s, s_exp = _advance(s_top, tl.where(valid, s, LOWEST))
        s_exp = tl.where(valid, s_exp, 0.0)
        if teacher_ptr is not None:
            t, _, _ = read_logits(teacher, ids, V, TEACHER_CAPPED)
            if reference_ptr is not None:
                r, _, _ = read_logits(reference, ids, V, REFERENCE_CAPPED)
                x = tl.where(valid, mixture(t, r, lam), LOWEST)
                x_top, x_rise, x_decay, x, x_exp = _advance(x_top, x)
                X = X * x_decay + tl.where(valid, x_exp, 0.0)
                DX = s_decay * (DX - (s_rise - x_rise) * S) + s_exp * (s - x)
            t_top, t_rise, t_decay, t, t_exp = _advance(t_top, tl.where(valid, t, LOWEST))
            t_exp = tl.where(valid, t_exp, 0.0)
            D = s_decay * (D - (s_rise - t_rise) * S) + s_exp * (s - t)
            if OBJECTIVE == "forward_kl":
                F = t_decay * (F - (t_rise - s_rise) * Q) + t_exp * (t - s)
            B = t_decay * (B - t_rise * Q) + t_exp * t
            Q = t_decay * Q + t_exp
        A = s_decay * (A - s_rise * S) + s_exp * s
        S = s_decay * S + s_exp

    y = tl.load(sampled_ids_ptr + row)
    is_id = (y >= 0) & (y < V)  # NaN speaks up, an address beyond the row would not
    y = tl.where(is_id, y, 0)
    s_max, s_below, s_weight = _meet(s_top)
    s_sum = tl.sum(s_weight * S, axis=0)
    s_log_sum = tl.log(s_sum)
    s_y, _, _ = read_logits(student, y, V, STUDENT_CAPPED)
    logprob = tl.where(is_id, s_y - s_max - s_log_sum, float("nan"))
    tl.store(student_2C_ptr + row, s_log_sum - tl.sum(s_weight * (A + s_below * S), axis=0) / s_sum)
    tl.store(student_2C_ptr + rows + row, logprob)
    tl.store(moments_ptr + STUDENT_MAX * rows + row, s_max)
    tl.store(moments_ptr + STUDENT_SUM * rows + row, s_sum)

    value = logprob * 0.0
    if OBJECTIVE == "sampled_token":
        value += 1.0  # of no teacher: A = 1 makes the gradient that of log p_y
    if teacher_ptr is not None:
        t_max, t_below, t_weight = _meet(t_top)
        t_sum = tl.sum(t_weight * Q, axis=0)
        t_log_sum = tl.log(t_sum)
        t_y, _, _ = read_logits(teacher, y, V, TEACHER_CAPPED)
        teacher_logprob = tl.where(is_id, t_y - t_max - t_log_sum, float("nan"))
        mean = tl.sum(s_weight * (D + (s_below - t_below) * S), axis=0) / s_sum
        kl = mean - s_log_sum + t_log_sum
        entropy = t_log_sum - tl.sum(t_weight * (B + t_below * Q), axis=0) / t_sum
        tl.store(teacher_6C_ptr + teacher_stride + row, kl)
        tl.store(teacher_6C_ptr + 2 * teacher_stride + row, entropy)
        tl.store(teacher_6C_ptr + 3 * teacher_stride + row, teacher_logprob)
        lanes = tl.arange(0, BLOCK_V)
        tl.store(group_max_ptr + 2 * row * BLOCK_V + lanes, s_top)
        tl.store(group_max_ptr + (2 * row + 1) * BLOCK_V + lanes, t_top)
        value = kl
        if OBJECTIVE == "forward_kl":
            cross = tl.sum(t_weight * (F + (t_below - s_below) * Q), axis=0) / t_sum
            value = cross - t_log_sum + s_log_sum
        if OBJECTIVE == "sampled_token":
            value = logprob - teacher_logprob
        if reference_ptr is not None:
            x_max, x_below, x_weight = _meet(x_top)
            x_sum = tl.sum(x_weight * X, axis=0)
            mean = tl.sum(s_weight * (DX + (s_below - x_below) * S), axis=0) / s_sum
            value = mean - s_log_sum + tl.log(x_sum)
            tl.store(moments_ptr + TARGET_MAX * rows + row, x_max)
            tl.store(moments_ptr + TARGET_SUM * rows + row, x_sum)
        else:
            tl.store(moments_ptr + TARGET_MAX * rows + row, t_max)
            tl.store(moments_ptr + TARGET_SUM * rows + row, t_sum)
        tl.store(moments_ptr + MEAN_DIFFERENCE * rows + row, mean)
    if token_logprobs_ptr is not None:
        teacher_logprob = tl.maximum(tl.load(token_logprobs_ptr + row).to(tl.float32), logprob_floor)
        tl.store(teacher_6C_ptr + 3 * teacher_stride + row, teacher_logprob)
        value = logprob - teacher_logprob
    # JSD and TopK need sums that start from these; the gradient kernel writes their value.
    tl.store(teacher_6C_ptr + row, value)
    tl.store(moments_ptr + VALUE * rows + row, value)


@triton.jit(do_not_specialize=["teacher_stride"])
def overlap_kernel(
    student_ptr,
    student_bias_ptr,
    student_before,
    student_after,
    teacher_ptr,
    teacher_bias_ptr,
    teacher_before,
    teacher_after,
    moments_ptr,
    group_max_ptr,
    teacher_6C_ptr,
    teacher_stride,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP: tl.constexpr,
):
    """Ids among the TOP largest of both sides: their share, and the student's probability of them.

    A kernel of its own: chains of small reductions would stall the passes over the rows, and raise their registers.
    What it reads is a fiftieth of theirs.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    student = (student_ptr + row * STRIDE, student_bias_ptr, student_before, student_after)
    teacher = (teacher_ptr + row * STRIDE, teacher_bias_ptr, teacher_before, teacher_after)
    CAPPED: tl.constexpr = (STUDENT_CAPPED, TEACHER_CAPPED)
    student_keys, teacher_keys = rows_top(student, teacher, group_max_ptr + 2 * row * GROUPS, V, CAPPED, GROUPS, TOP)
    count: tl.constexpr = min(TOP, V)
    known = tl.arange(0, TOP) < count
    same = (ids_of(student_keys)[:, None] == ids_of(teacher_keys)[None, :]) & known[:, None] & known[None, :]
    in_both = tl.max(same.to(tl.int32), axis=1)
    s_max = tl.load(moments_ptr + STUDENT_MAX * rows + row)
    s_sum = tl.load(moments_ptr + STUDENT_SUM * rows + row)
    mass = tl.sum(tl.where(in_both > 0, tl.exp(values_of(student_keys) - s_max), 0.0), axis=0) / s_sum
    tl.store(teacher_6C_ptr + 4 * teacher_stride + row, tl.sum(in_both, axis=0).to(tl.float32) / count)
    tl.store(teacher_6C_ptr + 5 * teacher_stride + row, mass)
