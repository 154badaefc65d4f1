"""Divergences on two threads: rows are dealt out by :mod:`opd_kernels.row_workers`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from divergence_cases import DIAGNOSTICS, FORMS, OBJECTIVES, assert_matches_reference, cast, fitted, make_case, run
from opd_kernels import linear_divergence
from opd_kernels.row_workers import for_each_share

pytestmark = pytest.mark.usefixtures("_two_threads")


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_matches_reference_in_every_objective(name: str) -> None:
    assert_matches_reference(make_case(23, 301, **FORMS["all"]), objective=OBJECTIVES[name], chunk_tokens=9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_inference_mode_reaches_the_threads(name: str) -> None:
    case = fitted(cast(make_case(23, 301), torch.float32), OBJECTIVES[name])
    expected, _ = run(case, objective=OBJECTIVES[name])
    with torch.inference_mode():
        result = linear_divergence(**case, objective=OBJECTIVES[name])
    for field in DIAGNOSTICS:
        assert torch.equal(getattr(result, field), getattr(expected, field)), field


def test_shares_run_on_threads_of_their_own_without_gradients() -> None:
    seen: dict[int, tuple[int, int, bool, str]] = {}

    def work(share: int, shares: int) -> None:
        name = threading.current_thread().name
        seen[share] = shares, torch.get_num_threads(), torch.is_grad_enabled(), name

    for_each_share(work)
    assert sorted(seen) == [0, 1]
    assert all(entry[:3] == (2, 1, False) and entry[3].startswith("opd-rows") for entry in seen.values())
    assert torch.get_num_threads() == 2


def test_an_error_is_raised_when_every_share_has_ended() -> None:
    ended = []

    def work(share: int, shares: int) -> None:
        if share == 0:
            raise ArithmeticError("share 0")
        time.sleep(0.2)
        ended.append(share)

    with pytest.raises(ArithmeticError, match="share 0"):
        for_each_share(work)
    assert ended == [1]
    for_each_share(lambda share, shares: ended.append(share))  # the threads are still there
    assert sorted(ended) == [0, 1, 1]


def test_two_callers_at_once() -> None:
    cases = [cast(make_case(40, 301, seed=seed), torch.float32) for seed in range(2)]
    expected = [run(case, chunk_tokens=8) for case in cases]
    ready = threading.Barrier(2)

    def call(i: int) -> None:
        ready.wait()
        for _ in range(5):
            result, grads = run(cases[i], chunk_tokens=8)
            assert torch.equal(result.kl_T, expected[i][0].kl_T)
            assert torch.equal(grads["hidden"], expected[i][1]["hidden"])

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(call, i) for i in range(2)]:
            done.result()
