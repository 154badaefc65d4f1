"""Divergences with ``deterministic=True``: a row's bits do not depend on the other rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divergence_cases import (
    DIAGNOSTICS,
    FORMS,
    OBJECTIVES,
    Case,
    cast,
    fitted,
    given_logits,
    given_token_logprobs,
    given_top_k,
    make_case,
    rows_of,
    run,
    several_teachers,
)
from opd_kernels import JSD, SampledToken, TopK
from opd_kernels.inputs import STUDENT_STATS, TEACHER_STATS
from torch import Tensor


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def bits(case: Case, **options: Any) -> dict[str, Tensor]:
    """Whatever there is of a row, by name, the rows last. NaN only where a teacher's signal does not tell."""
    result, grads = run(case, deterministic=True, **options)
    given = case.get("teachers")
    signals = given if isinstance(given, list) else [given]
    known_N = torch.tensor([signal is None or signal.is_full for signal in signals])
    for name in ("divergence_T", *STUDENT_STATS):
        assert torch.isfinite(getattr(result, name)).all(), name
    for name in TEACHER_STATS:
        assert torch.isfinite(getattr(result, name).reshape(len(signals), -1)[known_N]).all(), name
    assert torch.isfinite(grads["hidden"]).all()
    return {name: getattr(result, name) for name in DIAGNOSTICS} | {"hidden gradient": grads["hidden"].T}


def assert_rows_are_independent(case: Case, **options: Any) -> None:
    """Permuted, halved, and each end alone: the rows have the bits that they have among all."""
    tokens = len(case["sampled_ids_T"])
    every = bits(case, **options)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    for index in (order, torch.arange(tokens // 2, tokens), torch.tensor([0]), torch.tensor([tokens - 1])):
        for name, value in bits(rows_of(case, index), **options).items():
            wanted = every[name][..., index]
            differs = (value != wanted) & ~(value.isnan() & wanted.isnan())
            assert not differs.any(), f"{name}: {int(differs.sum())} entries, with {len(index)} of {tokens} rows"


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    ("tokens", "vocab"),
    [*((tokens, vocab) for tokens in (1, 5, 33, 64, 100, 200) for vocab in (97, 307)), (5, 3001), (100, 3001)],
)
def test_rows_are_independent(tokens: int, vocab: int) -> None:
    assert_rows_are_independent(cast(make_case(tokens, vocab, 60, 33, bias=True), torch.float32))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_are_independent_for_every_objective(name: str) -> None:
    case = cast(several_teachers(make_case(110, 307, **FORMS["all"]), OBJECTIVES[name]), torch.float32)
    assert_rows_are_independent(fitted(case, OBJECTIVES[name]), objective=OBJECTIVES[name])
    case = cast(make_case(110, 97, 7, 64), torch.float32)
    assert_rows_are_independent(fitted(case, OBJECTIVES[name]), objective=OBJECTIVES[name])


@pytest.mark.usefixtures("_threads")
def test_rows_are_independent_at_a_large_vocabulary() -> None:
    assert_rows_are_independent(cast(make_case(7, 50257, 60, 12), torch.float32), objective=JSD(0.5))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_are_independent_in_other_dtypes(dtype: torch.dtype) -> None:
    assert_rows_are_independent(cast(make_case(110, 307, 60, 33), dtype))


@pytest.mark.usefixtures("_threads")
def test_rows_are_independent_with_other_signals() -> None:
    case = make_case(110, 307)
    for given, objective in ((given_logits(case), TopK()), (given_top_k(case), TopK())):
        assert_rows_are_independent(cast(given, torch.float32), objective=objective)
    assert_rows_are_independent(cast(given_token_logprobs(case), torch.float32), objective=SampledToken())


def test_rows_of_one_token_chunks_do_not_see_their_neighbours() -> None:
    assert_rows_are_independent(cast(make_case(33, 307), torch.float32), chunk_tokens=1)


def test_deterministic_changes_no_value() -> None:
    case = cast(make_case(110, 307, **FORMS["all"]), torch.float32)
    (loose, loose_grads), (strict, strict_grads) = (run(case, deterministic=choice) for choice in (False, True))
    torch.testing.assert_close(strict.kl_T, loose.kl_T)
    for name, grad in strict_grads.items():
        torch.testing.assert_close(grad, loose_grads[name])
