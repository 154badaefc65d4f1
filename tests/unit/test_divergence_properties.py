"""Divergences: what holds of them for any logits, and at the ends of what floats can hold."""

from __future__ import annotations

import math
from dataclasses import replace

import opd_kernels.divergence
import pytest
import torch
from divergence_cases import (
    DIAGNOSTICS,
    OBJECTIVES,
    assert_near,
    assert_rows_match_reference,
    cast,
    extreme_case,
    fitted,
    given_top_k,
    logits_case,
    make_case,
    run,
    teacher_of,
    underflow_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from opd_kernels import JSD, ExOPD, ForwardKL, Objective, ReverseKL, SampledToken, Signal, TopK, linear_divergence
from opd_kernels.divergence import fitting_implementation
from opd_kernels.inputs import LOGPROB_FLOOR, TAIL_FLOOR
from opd_kernels.torch_rows import top_k
from torch import Tensor

few = settings(max_examples=25)


@st.composite
def three_sides(draw: st.DrawFn, most_scale: float = 30.0) -> list[Tensor]:
    """Logits [3, V] in float64 of student, teacher and reference."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    vocab, scale = draw(st.integers(1, 60)), draw(st.floats(0.01, most_scale))
    return list(scale * torch.randn(3, 3, vocab, generator=generator, dtype=torch.float64))


def measure(
    objective: Objective, student_TV: Tensor, teacher_TV: Tensor, reference_TV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and the gradient of their sum to the student's logits."""
    reference = Signal(logits_TV=torch.zeros_like(student_TV) if reference_TV is None else reference_TV)
    case = fitted(logits_case(student_TV, teacher_TV, reference=reference), objective)
    result, grads = run(case, objective=objective)
    return result.divergence_T, grads["hidden"]


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-9) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# --- bounds ------------------------------------------------------------------------------------------------------
@few
@given(sides=three_sides(), beta=st.floats(0.01, 0.99), lam=st.floats(0.1, 3.0), k=st.integers(1, 60))
def test_divergences_are_bounded(sides: list[Tensor], beta: float, lam: float, k: int) -> None:
    entropy = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    bounds = {ReverseKL(): math.inf, ForwardKL(): math.inf, JSD(beta): entropy, ExOPD(lam): math.inf, TopK(k): math.inf}
    for dtype, slack in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        logits = [side.to(dtype) for side in sides]
        largest = max(1.0, float(torch.cat(sides).abs().max()))
        for objective, most in bounds.items():
            value_T, _ = measure(objective, *logits)
            assert (value_T >= -slack * largest).all()
            assert (value_T <= most + slack * largest).all()
        result, _ = run(logits_case(*logits[:2]))
        vocab = logits[0].shape[1]
        for value_T, most in (
            (result.student_entropy_T, math.log(vocab)),
            (result.teacher_entropy_T, math.log(vocab)),
            (result.overlap_ratio_T, 1.0),
            (result.overlap_mass_T, 1.0),
        ):
            assert (value_T >= -slack * largest).all()
            assert (value_T <= most + slack * largest).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_learn_from_an_equal(name: str) -> None:
    case = cast(make_case(20, 3001, scale=3.0), torch.float32)
    case |= {"teacher_hidden_TE": case["student_hidden_TD"], "teacher_head": case["student_head"]}
    case["reference"] = teacher_of(case)
    for implementation in ("torch", "reference"):
        result, grads = run(fitted(case, OBJECTIVES[name]), objective=OBJECTIVES[name], implementation=implementation)
        assert result.divergence_T.abs().max() <= 2e-6
        assert result.kl_T.abs().max() <= 2e-6
        assert grads["hidden"].abs().max() <= 2e-6
        assert (result.overlap_ratio_T == 1).all()


# --- invariances -------------------------------------------------------------------------------------------------
@few
@given(sides=three_sides(), constant=st.floats(-100, 100))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_constant_changes_nothing(name: str, sides: list[Tensor], constant: float) -> None:
    expected = measure(OBJECTIVES[name], *sides)
    for i in range(3):
        moved = [side + constant * (i == j) for j, side in enumerate(sides)]
        assert_same(measure(OBJECTIVES[name], *moved), expected)
    # Each row of the gradient sums to 0, for the same reason.
    torch.testing.assert_close(expected[1].sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


@few
@given(sides=three_sides())
def test_jsd_of_one_half_is_symmetric(sides: list[Tensor]) -> None:
    student, teacher, _ = sides
    torch.testing.assert_close(measure(JSD(0.5), student, teacher)[0], measure(JSD(0.5), teacher, student)[0])


@few
@given(sides=three_sides(), beta=st.floats(0.01, 0.99))
def test_jsd_swaps_with_its_weights(sides: list[Tensor], beta: float) -> None:
    student, teacher, _ = sides
    torch.testing.assert_close(measure(JSD(beta), student, teacher)[0], measure(JSD(1 - beta), teacher, student)[0])


@few
@given(sides=three_sides())
def test_forward_kl_is_the_reverse_kl_the_other_way_round(sides: list[Tensor]) -> None:
    student, teacher, _ = sides
    torch.testing.assert_close(measure(ForwardKL(), student, teacher)[0], measure(ReverseKL(), teacher, student)[0])


def test_student_and_teacher_are_not_interchangeable() -> None:
    sides = 2 * torch.randn(2, 8, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for objective in (ReverseKL(), ForwardKL(), JSD(0.1), TopK(5)):
        assert (measure(objective, *sides)[0] - measure(objective, *sides.flip(0))[0]).abs().max() > 0.01


# --- one objective from another ----------------------------------------------------------------------------------
@few
@given(sides=three_sides(most_scale=1.0))
def test_jsd_tends_to_both_kls(sides: list[Tensor]) -> None:
    student, teacher, _ = sides
    end = 1e-7
    for objective, limit in ((JSD(end), ForwardKL()), (JSD(1 - end), ReverseKL())):
        value_T, grad_TV = measure(objective, student, teacher)
        assert_same((value_T / end, grad_TV / end), measure(limit, student, teacher), 1e-3)


@few
@given(sides=three_sides())
def test_top_k_grows_with_k_up_to_the_reverse_kl(sides: list[Tensor]) -> None:
    student, teacher, _ = sides
    vocab = student.shape[1]
    whole = measure(ReverseKL(), student, teacher)
    largest = float(whole[0].abs().max())
    before_T = torch.zeros(3, dtype=torch.float64)
    for k in sorted({1, 2, 3, vocab // 2 or 1, max(1, vocab - 1)}):
        value_T, _ = measure(TopK(k), student, teacher)
        # Below LOGPROB_FLOOR a tail counts as the floor.
        assert (value_T >= before_T - 1e-9 * largest - math.exp(LOGPROB_FLOOR / 2)).all()
        assert (value_T <= whole[0] + 1e-9 * (1 + largest)).all()
        before_T = value_T
    for k in (vocab, vocab + 1):
        assert_same(measure(TopK(k), student, teacher), whole)


@few
@given(sides=three_sides())
def test_exopd_of_lambda_one_is_the_reverse_kl(sides: list[Tensor]) -> None:
    assert_same(measure(ExOPD(1.0), *sides), measure(ReverseKL(), *sides[:2]))


@few
@given(sides=three_sides(), lam=st.floats(0.1, 3.0))
def test_exopd_has_the_gradient_of_the_papers_loss(sides: list[Tensor], lam: float) -> None:
    _, grad_TV = measure(ExOPD(lam), *sides)
    student_TV = sides[0].clone().requires_grad_()
    log_p, log_q, log_r = (torch.log_softmax(side, -1) for side in (student_TV, *sides[1:]))
    (log_p.exp() * (log_p - lam * log_q - (1 - lam) * log_r)).sum().backward()
    torch.testing.assert_close(grad_TV, student_TV.grad, rtol=1e-9, atol=1e-9)


@few
@given(sides=three_sides())
def test_sampled_token_is_the_reverse_kl_in_expectation(sides: list[Tensor]) -> None:
    """Over every id y of the vocabulary, each weighted by the student's probability of it."""
    student, teacher, _ = (side[:1] for side in sides)
    vocab = student.shape[1]
    value_T, grad_TV = measure(ReverseKL(), student, teacher)
    every_id = logits_case(
        student.expand(vocab, vocab),
        teacher.expand(vocab, vocab),
        sampled_ids_T=torch.arange(vocab),
        token_weights_T=torch.softmax(student[0], 0),
    )
    result, grads = run(every_id, objective=SampledToken())
    assert_same((result.loss[None], grads["hidden"].sum(0, keepdim=True)), (value_T, grad_TV))


# --- extremes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_of_ten_thousand(name: str, soft_cap: float | None) -> None:
    for implementation in ("torch", "reference"):
        assert_rows_match_reference(extreme_case(soft_cap), OBJECTIVES[name], implementation=implementation)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_probabilities_that_underflow(name: str) -> None:
    for implementation in ("torch", "reference"):
        assert_rows_match_reference(underflow_case(), OBJECTIVES[name], implementation=implementation)


def test_logits_of_ten_thousand_by_hand() -> None:
    case = extreme_case()
    case["student_hidden_TD"], teacher = (
        side.round(decimals=-1) for side in (case["student_hidden_TD"], teacher_of(case).logits_TV)
    )
    case = cast(fitted({**case, "teachers": Signal(logits_TV=teacher)}, None), torch.float32)
    sure, undecided = 2e4, math.log(50)
    reverse = [sure, 0.0, sure * 49 / 50 - undecided, undecided, sure]
    forward = [sure, 0.0, undecided, sure * 49 / 50 - undecided, sure]
    half = math.log(2)
    for objective, wanted in ((ReverseKL(), reverse), (ForwardKL(), forward)):
        torch.testing.assert_close(run(case, objective=objective)[0].divergence_T, torch.tensor(wanted))
    value_T = run(case, objective=JSD(0.5))[0].divergence_T
    torch.testing.assert_close(value_T[[0, 1, 4]], torch.tensor([half, 0.0, half]))


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_a_lost_logprob_counts_as_the_floor(implementation: str) -> None:
    case = cast(make_case(3, 97), torch.float32)
    del case["teacher_hidden_TE"], case["teacher_head"]
    for lost in (-math.inf, -1000.0):
        tokens = Signal(token_logprobs_T=torch.tensor([-1.0, lost, lost]))
        result, grads = run({**case, "teachers": tokens}, objective=SampledToken(), implementation=implementation)
        floored_T = torch.tensor([-1.0, LOGPROB_FLOOR, LOGPROB_FLOOR])
        torch.testing.assert_close(result.teacher_logprob_T, floored_T)
        torch.testing.assert_close(result.divergence_T, result.student_logprob_T - floored_T)
        assert torch.isfinite(grads["weight"]).all()

        ids_TK = torch.tensor([[5, 3]] * 3)
        given_TK = torch.tensor([[-0.5, -1.5], [-0.5, lost], [lost, lost]])
        few_ids = {**case, "teachers": Signal(top_k_ids_TK=ids_TK, top_k_logprobs_TK=given_TK)}
        result, grads = run(few_ids, objective=TopK(), implementation=implementation)
        p_TV = torch.softmax(case["student_head"].logits(case["student_hidden_TD"]), -1)
        p_TE = torch.cat([p_TV[:, [5, 3]], 1 - p_TV[:, [5, 3]].sum(1, keepdim=True)], 1)
        log_q_TK = given_TK.clamp(min=LOGPROB_FLOOR)
        log_q_TE = torch.cat([log_q_TK, (1 - log_q_TK.exp().sum(1, keepdim=True)).log()], 1)
        assert_near(result.divergence_T, (p_TE * (p_TE.log() - log_q_TE)).sum(1), 1e-5)
        assert torch.isfinite(grads["weight"]).all()


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("excess", [0.0, 1e-6])
def test_a_given_top_k_that_sums_to_one_leaves_the_tail_its_floor(implementation: str, excess: float) -> None:
    case = given_top_k(make_case(3, 97), 4)
    teacher = case["teachers"]
    logprobs_TK = torch.log_softmax(teacher.top_k_logprobs_TK, -1) + excess
    case = cast({**case, "teachers": replace(teacher, top_k_logprobs_TK=logprobs_TK)}, torch.float32)
    result, grads = run(case, objective=TopK(), implementation=implementation)
    p_TV = torch.softmax(case["student_head"].logits(case["student_hidden_TD"]), -1)
    p_TK = p_TV.gather(1, teacher.top_k_ids_TK)
    tail_T = 1 - p_TK.sum(1)
    inside_T = (p_TK * (p_TK.log() - logprobs_TK.float())).sum(1)
    expected_T = inside_T + tail_T * (tail_T.log() - math.log(TAIL_FLOOR))
    # What 1 − Σ is, to a float32's last bits, decides the logarithm of the tail: here up to log 3.
    assert ((result.divergence_T - expected_T).abs() <= (1e-5 if excess else math.log(3)) * torch.ones(3)).all()
    assert torch.isfinite(grads["weight"]).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_arguments_same_bits(name: str) -> None:
    case = fitted(cast(make_case(40, 97), torch.float32), OBJECTIVES[name])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        (first, first_grads), (second, second_grads) = (
            run(case, objective=OBJECTIVES[name], chunk_tokens=16) for _ in range(2)
        )
        assert torch.equal(first.loss, second.loss)
        assert torch.equal(first_grads["hidden"], second_grads["hidden"])
        assert torch.equal(first_grads["weight"], second_grads["weight"])


# --- the largest entries of a row --------------------------------------------------------------------------------
@few
@given(seed=st.integers(0, 2**31), vocab=st.integers(1, 9000), k=st.integers(1, 64), levels=st.integers(1, 10**6))
def test_top_k_finds_the_largest(seed: int, vocab: int, k: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_BV, k = torch.randint(levels, (3, vocab), generator=generator).float(), min(k, vocab)  # equals among them
    values_Bk, ids_Bk = top_k(x_BV, k)
    assert torch.equal(values_Bk, x_BV.topk(k).values)
    assert torch.equal(x_BV.gather(1, ids_Bk), values_Bk)
    assert all(len(set(ids)) == k for ids in ids_Bk.tolist())


@pytest.mark.parametrize(
    ("device", "has_float64", "has_triton", "expected"),
    [
        ("cpu", False, True, "torch"),
        ("cuda", False, True, "triton"),
        ("cuda", True, True, "torch"),
        ("cuda", False, False, "torch"),
    ],
)
def test_auto_is_what_can_run(
    device: str, has_float64: bool, has_triton: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opd_kernels.divergence, "_has_triton", lambda: has_triton)
    assert fitting_implementation(torch.device(device), has_float64=has_float64) == expected


def test_auto_is_torch_on_a_cpu() -> None:
    case = cast(make_case(9, 97), torch.float32)
    for name in DIAGNOSTICS:
        auto, chosen = (linear_divergence(**case, implementation=choice) for choice in ("auto", "torch"))
        assert torch.equal(getattr(auto, name), getattr(chosen, name))
