"""The batch-invariant matrix product, in Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from opd_kernels import triton_gemm
from opd_kernels.triton_gemm import mm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of the sum of the terms' magnitudes: a few float32 roundings.
RTOL = 2e-6


def operand(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random, inside a larger tensor of NaN."""
    generator = torch.Generator().manual_seed(seed)
    around = torch.full((rows + 2, columns + 19), torch.nan, dtype=dtype)
    around[1:-1, 3 : columns + 3] = torch.randn(rows, columns, generator=generator).to(dtype)
    return around.to(DEVICE)[1:-1, 3 : columns + 3]


def expected(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """→ the product in float64, and how far from it each element may be."""
    bound = a.double().abs() @ b.double().abs()
    return a.double() @ b.double(), RTOL * bound


def assert_near(out: Tensor, want: Tensor, bound: Tensor) -> None:
    assert torch.all((out.double() - want).abs() <= bound), (out.double() - want).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 1), (1, 300, 60), (5, 257, 64), (130, 60, 200), (129, 513, 7), (260, 17, 129)]
)
def test_product_of_awkward_shapes(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    a, b, out = operand(M, K, dtype, 0), operand(K, N, dtype, 1), operand(M, N, torch.float32, 2)
    out.fill_(torch.nan)
    mm(a, b, out)
    assert_near(out, *expected(a, b))
    assert torch.isnan(out._base).sum() == out._base.numel() - out.numel()  # nothing written around it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", ["a", "b", "out", "a b out"])
def test_transposed_views(transposed: str, dtype: torch.dtype) -> None:
    def view(name: str, rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
        return operand(columns, rows, dtype, seed).T if name in transposed else operand(rows, columns, dtype, seed)

    M, N, K = 149, 70, 90
    a, b, out = view("a", M, K, dtype, 0), view("b", K, N, dtype, 1), view("out", M, N, torch.float32, 2)
    mm(a, b, out)
    assert_near(out, *expected(a, b))


@pytest.mark.parametrize("padding", [0, 11])
def test_rows_that_are_dense_may_end_anywhere(padding: int) -> None:
    # gradᵀ of a vocabulary that is no multiple of 16; the memory ends with it, or goes on with NaN.
    C, V, D = 70, 149, 40
    grad_CV = torch.full((C, V + padding), torch.nan, dtype=torch.bfloat16, device=DEVICE)[:, :V]
    grad_CV.copy_(operand(C, V, torch.bfloat16, 0))
    assert triton_gemm._may_read_groups(grad_CV.T) == (padding == 11)
    hidden_CD, out_VD = operand(C, D, torch.bfloat16, 1), torch.empty(V, D, device=DEVICE)
    mm(grad_CV.T, hidden_CD, out_VD)
    assert_near(out_VD, *expected(grad_CV.T, hidden_CD))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate_adds_the_finished_product(dtype: torch.dtype) -> None:
    a, b = operand(40, 100, dtype, 0), operand(100, 60, dtype, 1)
    before, product = operand(40, 60, torch.float32, 2), torch.empty(40, 60, device=DEVICE)
    mm(a, b, product)
    out = before.clone()
    mm(a, b, out, accumulate=True)
    assert torch.equal(out, before + product)


def test_an_empty_sum_is_zero() -> None:
    out = torch.full((3, 4), torch.nan, device=DEVICE)
    mm(torch.empty(3, 0, device=DEVICE), torch.empty(0, 4, device=DEVICE), out)
    assert torch.equal(out, torch.zeros_like(out))
    out.fill_(2.0)
    mm(torch.empty(3, 0, device=DEVICE), torch.empty(0, 4, device=DEVICE), out, accumulate=True)
    assert torch.equal(out, torch.full_like(out, 2.0))
    mm(torch.empty(0, 5, device=DEVICE), torch.empty(5, 4, device=DEVICE), torch.empty(0, 4, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_in_the_operands_dtype_is_rounded_once(dtype: torch.dtype) -> None:
    # The interpreter, unlike a GPU, cuts float32 to bfloat16 instead of rounding.
    ulp = torch.finfo(dtype).eps if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0
    a, b, old = operand(20, 90, dtype, 0), operand(90, 30, dtype, 1), operand(20, 30, dtype, 2)
    wide, out = torch.empty(20, 30, device=DEVICE), old.clone()
    mm(a, b, wide)
    mm(a, b, out, accumulate=True)
    torch.testing.assert_close(out, (old.float() + wide).to(dtype), rtol=ulp, atol=0.0)
    mm(a, b, out)
    torch.testing.assert_close(out, wide.to(dtype), rtol=ulp, atol=0.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_infinities_and_nans_stay_in_their_rows() -> None:
    a, b = operand(140, 70, torch.float32, 0), operand(70, 20, torch.float32, 1)
    clean, out = torch.empty(140, 20, device=DEVICE), torch.empty(140, 20, device=DEVICE)
    mm(a, b, clean)
    a[3, 5], a[135, 69] = torch.nan, torch.inf
    mm(a, b, out)
    broken = torch.isin(torch.arange(140), torch.tensor([3, 135]))
    assert not torch.isfinite(out[broken]).any()
    assert torch.equal(out[~broken], clean[~broken])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    # On a GPU this is the proof. The interpreter multiplies tiles with NumPy, by a tile's shape.
    K, N = 130, 90
    row, b = operand(1, K, dtype, 0), operand(N, K, dtype, 1).T
    bits = []
    for M, position in [(1, 0), (2, 1), (40, 17), (129, 128), (300, 200)]:
        a, out = operand(M, K, dtype, M) * 3, torch.empty(M, N, device=DEVICE)
        a[position] = row[0]
        mm(a, b, out)
        bits.append(out[position])
    assert all(torch.equal(bits[0], other) for other in bits[1:])


def test_gradient_of_the_head_sums_tokens_in_order_whatever_the_vocabulary() -> None:
    # An id's gradient does not depend on which ids there are besides.
    C, D = 80, 30
    grad_CV, hidden_CD = operand(C, 300, torch.bfloat16, 0), operand(C, D, torch.bfloat16, 1)
    whole, part = torch.empty(300, D, device=DEVICE), torch.empty(100, D, device=DEVICE)
    mm(grad_CV.T, hidden_CD, whole)
    mm(grad_CV.T[150:250], hidden_CD, part)
    assert torch.equal(whole[150:250], part)


def test_the_configuration_depends_on_the_dtype_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: launches.append((grid, arguments, options))

    monkeypatch.setattr(triton_gemm, "_mm_kernel", Kernel())
    shapes = [(1, 1, 1), (7, 60, 60), (64, 300, 4096), (4096, 512, 64), (1000, 2000, 3)]
    for dtype in DTYPES:
        launches.clear()
        for M, N, K in shapes:
            mm(torch.empty(M, K, dtype=dtype), torch.empty(K, N, dtype=dtype), torch.empty(M, N))
        assert all(options == launches[0][2] for _, _, options in launches)
        tile = triton_gemm.TILES[dtype]
        for (grid, _, _), (M, N, _) in zip(launches, shapes, strict=True):
            assert grid == (-(-M // tile.m) * -(-N // tile.n),)  # K is not split: one program sums all of it


@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        (torch.empty(2, 3), torch.empty(4, 5), torch.empty(2, 5), "not \\[M, K\\]"),
        (torch.empty(2, 3), torch.empty(3, 5), torch.empty(5, 2), "not \\[M, K\\]"),
        (torch.empty(2, 3), torch.empty(3, 5).half(), torch.empty(2, 5), "not the same one"),
        (torch.empty(2, 3).double(), torch.empty(3, 5).double(), torch.empty(2, 5), "not the same one"),
        (torch.empty(2, 3), torch.empty(3, 5), torch.empty(2, 5).half(), "neither float32 nor"),
    ],
)
def test_arguments_that_do_not_fit(a: Tensor, b: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mm(a, b, out)
