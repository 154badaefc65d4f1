"""What only a device can show of the Triton implementation: sizes that are trained, the vendor's GEMMs, timing hazards.

tests/unit/test_triton.py runs on the GPU, too, where there is one: every objective, form and signal, at small sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from divergence_cases import (
    DIAGNOSTICS,
    FORMS,
    OBJECTIVES,
    Case,
    assert_matches_reference,
    assert_near,
    cast,
    fitted,
    given_top_k,
    make_case,
    run,
    several_teachers,
    with_leaves,
)
from opd_kernels import Objective, ReverseKL, TopK, linear_divergence

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_matches(case: Case, dtype: torch.dtype, **options: Any) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 2e-4  # sums over thousands of rows and ids, in another order
    assert_matches_reference(case, dtype, tolerance, implementation="triton", device="cuda", **options)


@pytest.fixture
def _sync_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_matches_reference_with_many_rows(name: str, dtype: torch.dtype) -> None:
    assert_matches(make_case(257, 3001, **FORMS["all"]), dtype, objective=OBJECTIVES[name], chunk_tokens=100)


# One row of 16-bit operands is rounded three times, with no sum to even it out.
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float32), *((63, dtype) for dtype in DTYPES)])
@pytest.mark.parametrize("vocab", [1, 97, 50257, 151_936])
def test_matches_reference_at_awkward_sizes(tokens: int, vocab: int, dtype: torch.dtype) -> None:
    assert_matches(make_case(tokens, vocab), dtype, chunk_tokens=40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", [ReverseKL(), TopK(64)])
def test_matches_reference_with_several_teachers(objective: Objective, dtype: torch.dtype) -> None:
    assert_matches(several_teachers(make_case(100, 3001), objective), dtype, objective=objective)


def test_matches_reference_with_given_top_k() -> None:
    assert_matches(given_top_k(make_case(100, 50257), 64), torch.float32, objective=TopK())


@pytest.mark.usefixtures("_sync_mode")
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    case, _ = with_leaves(cast(fitted(make_case(33, 307, bias=True), OBJECTIVES[name]), dtype, "cuda"))
    for mode in ("default", "error"):  # kernels are compiled, and cuBLAS is set up, the first time
        torch.cuda.set_sync_debug_mode(mode)
        linear_divergence(**case, objective=OBJECTIVES[name], implementation="triton").loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_rows_do_not_see_their_neighbours(dtype: torch.dtype) -> None:
    case = cast(make_case(300, 5003), dtype, "cuda")
    options: dict[str, Any] = {"deterministic": True, "implementation": "triton"}
    expected, expected_grads = run(case, **options)
    for rows in (torch.randperm(300, device="cuda"), torch.arange(17, 50, device="cuda")):
        part = {name: value[rows] if name.endswith(("TD", "TE", "_T")) else value for name, value in case.items()}
        actual, actual_grads = run(part, **options)
        for name in DIAGNOSTICS:
            assert torch.equal(getattr(actual, name), getattr(expected, name)[rows]), name
        assert torch.equal(actual_grads["hidden"], expected_grads["hidden"][rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_arguments_same_bits(dtype: torch.dtype) -> None:
    case = cast(make_case(300, 5003, bias=True), dtype, "cuda")
    (first, first_grads), *others = (run(case, implementation="triton", chunk_tokens=128) for _ in range(5))
    for other, other_grads in others:
        assert torch.equal(first.kl_T, other.kl_T)
        assert all(torch.equal(first_grads[name], other_grads[name]) for name in first_grads)


def test_float32_is_not_tensor_float_32() -> None:
    case = cast(make_case(64, 3001, 512, 512), torch.float32, "cuda")
    expected, expected_grads = run(case, implementation="triton")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        actual, actual_grads = run(case, implementation="triton")
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert torch.equal(actual.kl_T, expected.kl_T)
    assert torch.equal(actual_grads["weight"], expected_grads["weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    case = cast(make_case(64, 3001), torch.float32, "cuda")
    expected, expected_grads = run(case, implementation="triton")
    with torch.autocast("cuda", dtype=dtype):
        actual, actual_grads = run(case, implementation="triton")
    assert torch.equal(actual.kl_T, expected.kl_T)
    assert torch.equal(actual_grads["weight"], expected_grads["weight"])


def test_peak_memory_does_not_grow_with_tokens() -> None:
    def peak_bytes(tokens: int) -> int:
        case, _ = with_leaves(cast(make_case(tokens, 50257, 64, 64), torch.bfloat16, "cuda"))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_divergence(**case, implementation="triton", chunk_tokens=128).loss.backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak_bytes(2048) <= 1.2 * peak_bytes(256)


def test_default_is_triton() -> None:
    case = cast(make_case(5, 97), torch.bfloat16, "cuda")
    actual, actual_grads = run(case)
    expected, expected_grads = run(case, implementation="triton")
    assert torch.equal(actual.loss, expected.loss)
    assert_near(actual_grads["hidden"], expected_grads["hidden"], 0.0)
