"""What the row kernels share: how a row is read, and how its largest entries are found.

A side (student, teacher, reference) is passed about as the tuple (row pointer, bias pointer or None, before, after):
the pointer is to the row's raw projection h · Wᵀ, or to logits that were given, and the side's logits over τ are

    after · tanh(before · (raw + bias))     if CAPPED          before = scale / cap,  after = cap / τ
    before · (raw + bias)                   otherwise          before = scale / τ

so that no pass over [C, V] is spent on the head's form. Both have the derivative scale / τ to the projection, times
1 − tanh² if CAPPED.

Rows are STRIDE elements apart, a multiple of 16, whatever V is. So every row begins at an address that is good for
loads of 16 bytes, and a mask of whole groups of 16 keeps them wide: what lies between V and STRIDE may be read, and is
masked after that.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every logit, and finite: differences of two of them are numbers.
LOWEST = tl.constexpr(-3.0e38)
# What a row holds beyond V, as it is read: its probability is 0, and a head's form leaves it finite.
BEYOND = tl.constexpr(-1.0e30)
# Below the key of every entry of a row, the lowest included.
LEAST_KEY = tl.constexpr(-(1 << 63))


@triton.jit
def from_raw(side, raw, ids, valid, CAPPED: tl.constexpr):
    """→ logits over τ, and 1 − tanh² (1 if not capped), of raw values that belong to ids."""
    x = raw
    if side[1] is not None:
        x += tl.load(side[1] + ids, mask=valid, other=0.0).to(tl.float32)
    x *= side[2]
    slope = 1.0
    if CAPPED:
        # By e^(−2|x|) nothing overflows, and the derivative does not cancel where the cap saturates. The value does
        # near 0, where a large cap has its logits: there, tanh's series, whose next term is 1e-8 of it at most.
        size = tl.abs(x)
        small = tl.exp(-2.0 * size)
        slope = 4.0 * small / ((1.0 + small) * (1.0 + small))
        near = tl.minimum(size, 0.25)
        square = near * near
        terms = -1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0)))
        bounded = tl.where(size < 0.25, near + near * square * terms, (1.0 - small) / (1.0 + small))
        x = tl.where(x < 0, -bounded, bounded) * side[3]
    return x, slope


@triton.jit
def read_logits(side, ids, V: tl.constexpr, CAPPED: tl.constexpr):
    """→ logits over τ, 1 − tanh² (1 if not capped), and what was read, at ids."""
    raw = tl.load(side[0] + ids, mask=ids < (V + 15) // 16 * 16, other=BEYOND)
    if V % 16 != 0:
        raw = tl.where(ids < V, raw, BEYOND)
    x, slope = from_raw(side, raw, ids, ids < V, CAPPED)
    return x, slope, raw


@triton.jit
def mixture(teacher_logits, reference_logits, lam):
    """ExOPD's target: log q_λ up to a constant."""
    return lam * teacher_logits + (1.0 - lam) * reference_logits


# --- the largest entries -----------------------------------------------------------------------------------------
@triton.jit
def to_keys(x, ids):
    """int64 that sort as (x, id) do: a float32's bits sort as an integer once those of negative numbers are flipped."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | ids.to(tl.int64)


@triton.jit
def ids_of(keys):
    return (keys & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def values_of(keys):
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def largest_keys(keys_N2, COUNT: tl.constexpr):
    """[COUNT, 2]: of each column, descending. Keys are distinct, LEAST_KEY excepted.

    COUNT reductions. A sorting network would do fewer comparisons, but its steps cross warps one after the other.
    """
    place = tl.arange(0, COUNT)[:, None]
    found = tl.full((COUNT, 2), LEAST_KEY, tl.int64)
    for i in range(COUNT):
        best = tl.max(keys_N2, axis=0)[None, :]
        found = tl.where(place == i, best, found)
        keys_N2 = tl.where(keys_N2 == best, LEAST_KEY, keys_N2)
    return found


@triton.jit
def _keys_of_groups(side, groups, V: tl.constexpr, CAPPED: tl.constexpr, GROUPS: tl.constexpr):
    SIZE: tl.constexpr = triton.next_power_of_2((V + GROUPS - 1) // GROUPS)
    ids = groups[:, None] + GROUPS * tl.arange(0, SIZE)[None, :]
    x, _, _ = read_logits(side, ids, V, CAPPED)
    return tl.where(ids < V, to_keys(x, ids), LEAST_KEY)


@triton.jit
def rows_top(
    student, teacher, group_max_ptr, V: tl.constexpr, CAPPED: tl.constexpr, GROUPS: tl.constexpr, TOP: tl.constexpr
):
    """Keys [TOP] of the largest entries of student and teacher, descending; LEAST_KEY where V has fewer.

    Group g holds the ids g, g + GROUPS, … The TOP largest entries lie in the TOP groups of the largest maxima, or
    equals of them do, so only those are read again.
    """
    groups = tl.arange(0, GROUPS)[:, None]
    group_max = tl.load(group_max_ptr + groups + GROUPS * tl.arange(0, 2)[None, :])
    student_groups, teacher_groups = tl.split(ids_of(largest_keys(to_keys(group_max, groups), TOP)))
    student_keys = _keys_of_groups(student, student_groups, V, CAPPED[0], GROUPS)
    teacher_keys = _keys_of_groups(teacher, teacher_groups, V, CAPPED[1], GROUPS)
    keys = tl.join(student_keys, teacher_keys)
    return tl.split(largest_keys(tl.reshape(keys, (student_keys.numel, 2)), TOP))
