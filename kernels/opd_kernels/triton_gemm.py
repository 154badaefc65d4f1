"""A matrix product whose rows do not know of each other: same bits for a row whatever else is in the batch.

    out_MN = a_MK · b_KN        or    out_MN += a_MK · b_KN

A library picks its tiles, and whether to split K, by the shape; so the sum that makes one element of the output is
added up in another order as soon as M changes. Here the tile and the order of the sum depend on nothing but the dtype:
one program sums all of an element, over K from 0 to K − 1 in steps of ``Tile.k``, in float32. There is no tuning, no
split of K, and no atomic addition.

Letters: M, N, K as above; BM, BN, BK a tile.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_kernels.aot import AotSpec, int_type


@dataclass(frozen=True, slots=True)
class Tile:
    """How one program works: its piece of the output, its step in K, and what it is launched with."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


# The accumulators take 128 of a thread's 255 registers, the most that leaves room for the rest. A step in K multiplies
# 128 · 256 · 64 pairs for (128 + 256) · 64 operands: 85 FLOPs for each byte from L2, and that traffic is what bounds
# it; tiles of 128 × 128 would need a third more. A stage is 48 KiB. sm_80, which has 163 KiB, holds one less than it is
# told: multiplying from registers, it needs no buffer for the step at hand.
HALF = Tile(m=128, n=256, k=64, num_warps=8, num_stages=4)
# float32 goes through the ordinary units: 8 × 8 elements a thread, which reads 16 numbers from shared memory for 64
# multiply-adds, just what keeps up with them.
FULL = Tile(m=128, n=128, k=16, num_warps=8, num_stages=3)
TILES = {torch.bfloat16: HALF, torch.float16: HALF, torch.float32: FULL}
GROUP_M = 8
# Multiply-adds of tl.dot are fused whatever this says. Elsewhere the compiler would choose what to fuse, differently
# for each variant of a kernel and each architecture; without it the arithmetic is what is written.
FP_FUSION = False


@triton.jit(do_not_specialize=["M", "K"])
def _mm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_om,
    stride_on,
    A_READS_GROUPS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs that run at the same time share GROUP_M rows of tiles, so that what they read of b is still in L2.
    programs_n = tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP_M * programs_n)
    in_group = tl.program_id(0) % (GROUP_M * programs_n)
    group_m = tl.minimum(tl.cdiv(M, BM) - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + in_group % group_m
    tile_n = in_group // group_m

    # Offsets are int64 throughout: [C, V] and [V, D] may have more than 2³¹ elements.
    m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    n = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK).to(tl.int64)
    in_m, in_n = m < M, n < N
    read_m = (m // 16 * 16 < M) if A_READS_GROUPS else in_m
    # The pointers that move are scalars, the offsets of a tile stay: fewer registers than moving every pointer.
    a_offsets = m[:, None] * stride_am + k[None, :] * stride_ak
    b_offsets = k[:, None] * stride_bk + n[None, :] * stride_bn
    a_step = BK * tl.cast(stride_ak, tl.int64)
    b_step = BK * tl.cast(stride_bk, tl.int64)

    sum_mn = tl.zeros((BM, BN), dtype=tl.float32)
    # Whole steps need no mask along K, without which loads along K are 16 bytes wide whatever K is.
    for _ in range(K // BK):
        a = tl.load(a_ptr + a_offsets, mask=read_m[:, None], other=0.0)
        b = tl.load(b_ptr + b_offsets, mask=in_n[None, :], other=0.0)
        sum_mn = _multiply(a, b, sum_mn, WIDEN)
        a_ptr += a_step
        b_ptr += b_step
    if K % BK != 0:
        in_k = k < K % BK
        a = tl.load(a_ptr + a_offsets, mask=in_m[:, None] & in_k[None, :], other=0.0)
        b = tl.load(b_ptr + b_offsets, mask=in_k[:, None] & in_n[None, :], other=0.0)
        sum_mn = _multiply(a, b, sum_mn, WIDEN)

    # A quarter of the columns at a time: the accumulators leave no registers for as many addresses and old values.
    row_ptrs = out_ptr + m[:, None] * stride_om
    left, right = _halves(sum_mn, BM, BN)
    first_n = tile_n.to(tl.int64) * BN
    _store_halves(left, row_ptrs, in_m, first_n, N, stride_on, ACCUMULATE, BM, BN // 2)
    _store_halves(right, row_ptrs, in_m, first_n + BN // 2, N, stride_on, ACCUMULATE, BM, BN // 2)


@triton.jit
def _multiply(a, b, sum_mn, WIDEN: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum_mn, input_precision="ieee")


@triton.jit
def _halves(x_mn, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x_mn, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _store_halves(
    x_mn, row_ptrs, in_m, first_n, N, stride_on, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    left, right = _halves(x_mn, BM, BN)
    _store(left, row_ptrs, in_m, first_n, N, stride_on, ACCUMULATE, BN // 2)
    _store(right, row_ptrs, in_m, first_n + BN // 2, N, stride_on, ACCUMULATE, BN // 2)


@triton.jit
def _store(x_mn, row_ptrs, in_m, first_n, N, stride_on, ACCUMULATE: tl.constexpr, BN: tl.constexpr):
    n = first_n + tl.arange(0, BN)
    ptrs = row_ptrs + n[None, :] * stride_on
    mask = in_m[:, None] & (n < N)[None, :]
    if ACCUMULATE:
        x_mn += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, x_mn.to(row_ptrs.dtype.element_ty), mask=mask)


def mm(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, accumulate: bool = False) -> None:
    """``out = a · b``, or ``out += a · b`` if ``accumulate``.

    Args:
        a_MK, b_KN: bfloat16, float16 or float32, both the same; any strides, so transposed views cost no copy.
        out_MN: float32 or the operands' dtype, any strides, no memory of ``a_MK`` or ``b_KN``. Sums are float32 until
            they are stored. Not read without ``accumulate``; with it, the product is summed first, then added.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    (M, K), N = a_MK.shape, b_KN.shape[1]
    _check(a_MK, b_KN, out_MN)
    if M == 0 or N == 0:
        return
    tile = TILES[a_MK.dtype]
    grid = (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)
    strides = (*a_MK.stride(), *b_KN.stride(), *out_MN.stride())
    with on_device(a_MK.device):
        _mm_kernel[grid](
            a_MK,
            b_KN,
            out_MN,
            M,
            N,
            K,
            *strides,
            **_constexprs(tile, _may_read_groups(a_MK), accumulate),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=FP_FUSION,
        )


def _check(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    if a_MK.dtype not in TILES or b_KN.dtype != a_MK.dtype:
        raise ValueError(f"a, b: {a_MK.dtype} and {b_KN.dtype} are not the same one of {list(map(str, TILES))}")
    if out_MN.dtype not in (torch.float32, a_MK.dtype):
        raise ValueError(f"out: {out_MN.dtype} is neither float32 nor that of the operands, {a_MK.dtype}")
    if a_MK.shape[1] != b_KN.shape[0] or out_MN.shape != (a_MK.shape[0], b_KN.shape[1]):
        raise ValueError(f"a, b, out: {[tuple(x.shape) for x in (a_MK, b_KN, out_MN)]} are not [M, K], [K, N], [M, N]")
    if not a_MK.device == b_KN.device == out_MN.device:
        raise ValueError(f"a, b, out: on {a_MK.device}, {b_KN.device} and {out_MN.device}")


def _may_read_groups(a_MK: Tensor) -> bool:
    """Whether the 16 elements along M that contain a valid one are all memory of ``a``'s, if M is its dense dimension.

    Then a mask along M may go by groups and loads stay wide though M (a vocabulary) is no multiple of 16. What is read
    beyond M makes only rows of the output that are not stored.
    """
    (M, K), (stride_m, stride_k) = a_MK.shape, a_MK.stride()
    if stride_m != 1 or K == 0:
        return False
    end = a_MK.storage_offset() + (K - 1) * stride_k + -(-M // 16) * 16
    return end <= a_MK.untyped_storage().nbytes() // a_MK.itemsize


def _constexprs(tile: Tile, a_reads_groups: bool, accumulate: bool) -> dict[str, Any]:
    return {
        "A_READS_GROUPS": a_reads_groups,
        "ACCUMULATE": accumulate,
        # Triton's interpreter multiplies the bit patterns of bfloat16. A product of two is exact in float32, too.
        "WIDEN": not isinstance(_mm_kernel, triton.JITFunction),
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "GROUP_M": GROUP_M,
    }


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def aot_specs(vocab_size: int, hidden: int, dtype: str) -> list[AotSpec]:
    """The three products of a chunk: projection, gradient to the hidden states, gradient to the head."""
    V, D, padded_V = vocab_size, hidden, -(-vocab_size // 16) * 16
    C = 1024
    products = {
        # name: M, N, K, strides of a, b and out, accumulate
        "project": (C, V, D, (D, 1), (1, D), (padded_V, 1), False),
        "project, odd V": (C, V - 1, D, (D, 1), (1, D), (padded_V, 1), False),
        "grad_hidden": (C, D, V, (padded_V, 1), (D, 1), (D, 1), False),
        "grad_weight": (V, D, C, (1, padded_V), (D, 1), (D, 1), True),
    }
    specs = []
    for operand in (dtype, "fp32"):
        tile = FULL if operand == "fp32" else HALF
        for name, (M, N, K, a, b, out, accumulate) in products.items():
            strides = zip(("am", "ak", "bk", "bn", "om", "on"), (*a, *b, *out), strict=True)
            specs.append(
                AotSpec(
                    name=f"mm[{name}{', fp32' if operand == 'fp32' else ''}]",
                    fn=_mm_kernel,
                    signature={"a_ptr": f"*{operand}:16", "b_ptr": f"*{operand}:16", "out_ptr": "*fp32:16"}
                    | {"M": int_type(M, specialize=False), "N": int_type(N), "K": int_type(K, specialize=False)}
                    | {f"stride_{of}": int_type(stride) for of, stride in strides},
                    constexprs=_constexprs(tile, a[0] == 1, accumulate),
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    enable_fp_fusion=FP_FUSION,
                )
            )
    return specs
