"""The Triton kernels against the float64 reference: in Triton's interpreter where there is no GPU, else on it.

Few rows and small vocabularies: the interpreter takes 70 ms a row. tests/gpu has the sizes that are trained.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from divergence_cases import (
    DIAGNOSTICS,
    FORMS,
    FULL_SIGNALS,
    OBJECTIVES,
    Case,
    assert_matches_reference,
    assert_near,
    assert_rows_match_reference,
    cast,
    extreme_case,
    fitted,
    given_token_logprobs,
    given_top_k,
    logits_case,
    make_case,
    rows_of,
    run,
    underflow_case,
    with_leaves,
)
from opd_kernels import (
    JSD,
    ExOPD,
    ForwardKL,
    LinearHead,
    Objective,
    ReverseKL,
    SampledToken,
    Signal,
    TopK,
    linear_divergence,
)

pytest.importorskip("triton")

import triton
from opd_kernels import triton_backend, triton_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16]
# One of each type.
KINDS = ["reverse", "forward", "jsd .1", "exopd 1.25", "top-k", "sampled"]


def assert_matches(case: Case, dtype: torch.dtype = torch.float32, tolerance: float = 2e-5, **options: Any) -> None:
    assert_matches_reference(case, dtype, tolerance, implementation="triton", device=DEVICE, **options)


def on_device(case: Any, dtype: torch.dtype = torch.float32) -> Any:
    return cast(case, dtype, DEVICE)


# --- against the reference ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (2, 5), (11, 97), (1, 3001), (1, 50257)])
def test_matches_reference_at_awkward_sizes(tokens: int, vocab: int) -> None:
    assert_matches(make_case(tokens, vocab), chunk_tokens=8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_matches_reference_in_every_objective(name: str) -> None:
    assert_matches(make_case(1, 3001, seed=1), objective=OBJECTIVES[name])


@pytest.mark.parametrize("objective", [ReverseKL(), ExOPD(1.25), TopK(20)])
@pytest.mark.parametrize("form", FORMS)
def test_matches_reference_in_every_head_form(form: str, objective: Objective) -> None:
    assert_matches(make_case(1, 131, seed=1, **FORMS[form]), objective=objective, temperature=0.6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_operands_keep_float32_statistics(name: str, dtype: torch.dtype) -> None:
    assert_matches(make_case(3, 131, **FORMS["all"]), dtype, objective=OBJECTIVES[name], chunk_tokens=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("objective", [ForwardKL(), ExOPD(0.5), TopK(20), SampledToken()])
@pytest.mark.parametrize("signal", [name for name in FULL_SIGNALS if name != "hidden"])
def test_matches_reference_with_every_full_signal(signal: str, objective: Objective, dtype: torch.dtype) -> None:
    assert_matches(FULL_SIGNALS[signal](make_case(1, 67, bias=True), objective), dtype, objective=objective)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_matches_reference_with_given_log_probabilities(dtype: torch.dtype) -> None:
    case = make_case(2, 131, **FORMS["all"])
    assert_matches(given_top_k(case), dtype, objective=TopK())
    assert_matches(given_top_k(make_case(2, 7), 7), dtype, objective=TopK())
    assert_matches(given_token_logprobs(case), dtype, objective=SampledToken())


def test_top_k_of_many_ids() -> None:
    """K of more than one tile of ids, and all of V: no tail."""
    assert_matches(make_case(1, 3001), objective=TopK(1500))
    assert_matches(make_case(2, 50, bias=True), objective=TopK(64))


@pytest.mark.parametrize(
    ("name", "soft_cap"), [*((name, None) for name in KINDS), ("reverse", 30.0), ("exopd 1.25", 30.0)]
)
def test_extreme_logits_stay_finite(name: str, soft_cap: float | None) -> None:
    assert_rows_match_reference(extreme_case(soft_cap), OBJECTIVES[name], implementation="triton", device=DEVICE)


@pytest.mark.parametrize("name", KINDS)
def test_probabilities_that_underflow_are_not_logged(name: str) -> None:
    case = rows_of(underflow_case(), torch.tensor([0, 2, 4]))  # one of each kind
    assert_rows_match_reference(case, OBJECTIVES[name], implementation="triton", device=DEVICE)


def test_uniform_logits_of_1e4_have_exact_entropies() -> None:
    result = linear_divergence(
        torch.full((1, 1), 1e4, device=DEVICE),
        LinearHead(torch.ones(3001, 1, device=DEVICE)),
        teachers=Signal(logits_TV=torch.full((1, 3001), 1e4, device=DEVICE)),
        sampled_ids_T=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        implementation="triton",
    )
    assert result.student_entropy_T.item() == pytest.approx(math.log(3001), rel=1e-6)
    assert result.teacher_entropy_T.item() == pytest.approx(math.log(3001), rel=1e-6)
    assert result.kl_T.item() == 0
    assert result.student_logprob_T.item() == pytest.approx(-math.log(3001), rel=1e-6)


def test_teacher_equal_to_student_gives_zero() -> None:
    case = on_device(make_case(2, 3001, scale=3.0))
    case |= {"teacher_hidden_TE": case["student_hidden_TD"], "teacher_head": case["student_head"]}
    for objective in (ReverseKL(), ForwardKL(), JSD(0.3)):
        result, grads = run(case, objective=objective, implementation="triton")
        assert result.divergence_T.abs().max() <= 1e-6
        assert grads["hidden"].abs().max() <= 1e-6
        assert (result.overlap_ratio_T == 1).all()


# --- overlap -----------------------------------------------------------------------------------------------------
def test_overlap_of_equal_logits_is_a_choice_of_16() -> None:
    """Which of equal logits are among the largest is open, but they are 16, and the mass is that of as many."""
    student, teacher = torch.zeros(2, 1, 300, dtype=torch.float64)
    teacher[0, :4] = 1.0
    result = linear_divergence(**on_device(logits_case(student, teacher)), implementation="triton")
    common = result.overlap_ratio_T.item() * 16
    assert common == round(common)
    assert 0 <= common <= 16
    assert result.overlap_mass_T.item() == pytest.approx(common / 300, rel=1e-5)


def test_overlap_finds_ids_that_share_a_group() -> None:
    """The largest logits a tile's width apart: all in one group, whose maximum is one of them alone."""
    width = triton_rows.statistics_block(5000)
    student = 0.01 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = student.clone()
    student[0, 7::width] = torch.arange(10, 10 + len(student[0, 7::width]), dtype=torch.float64)
    teacher[0, 7::width] = torch.arange(10, 10 + len(teacher[0, 7::width]), dtype=torch.float64).flip(0)
    result = linear_divergence(**on_device(logits_case(student, teacher)), implementation="triton")
    expected = linear_divergence(**logits_case(student, teacher), implementation="reference")
    assert result.overlap_ratio_T.item() == expected.overlap_ratio_T.item() == 1.0
    assert_near(result.overlap_mass_T.cpu(), expected.overlap_mass_T, 1e-5)


# --- dtypes ------------------------------------------------------------------------------------------------------
def test_operands_of_different_dtypes_are_promoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states wider than their head, a head wider than its hidden states, a teacher of another dtype; the head
    that is widened in more than one tile."""
    monkeypatch.setattr(triton_backend, "TILE_BYTES", 4 * 60 * 32)
    case = make_case(3, 97, bias=True)
    narrow = on_device(case, torch.bfloat16)
    wide = on_device(narrow)
    expected, expected_grads = run(cast(narrow, torch.float64, "cpu"), implementation="reference")
    for student in ({"student_hidden_TD": wide["student_hidden_TD"]}, {"student_head": wide["student_head"]}):
        actual, grads = run({**narrow, **student}, implementation="triton")
        assert_near(actual.kl_T.cpu(), expected.kl_T, 1e-5)
        for name in ("hidden", "weight", "bias"):
            tolerance = max(1e-5, torch.finfo(grads[name].dtype).eps)
            assert_near(grads[name].cpu(), expected_grads[name], tolerance, name)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("several", [False, True])
def test_tiny_weights_keep_their_precision(several: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 1e-9 and less: in float16 every factor of a row would underflow."""
    monkeypatch.setattr(triton_backend, "TILE_BYTES", 4 * 60 * 32)
    case = cast(make_case(4, 97, bias=True, scale=3.0), dtype)
    case["token_weights_T"] = 1e-9 * torch.tensor([1.0, 1e-3, 2.0, 0.0])
    if several:
        teacher = Signal(hidden_TE=case.pop("teacher_hidden_TE"), head=case.pop("teacher_head"))
        case |= {"teachers": [teacher, teacher], "token_weights_T": case["token_weights_T"].expand(2, -1)}
    expected = run(cast(case, torch.float64), factor=1e9, implementation="reference")[1]
    weights = case["token_weights_T"].to(DEVICE)  # 1e-9 is no float16
    case = {**on_device(case, dtype), "token_weights_T": weights}
    grads = run(case, factor=1e9, implementation="triton")[1]
    for name, grad in grads.items():
        assert_near(grad.cpu(), expected[name], 2 * torch.finfo(dtype).eps, name)
    assert_near(grads["hidden"][1].cpu(), expected["hidden"][1], 4 * torch.finfo(dtype).eps, "a thousandth")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_default_dtype_of_the_process_is_none_of_its_business(dtype: torch.dtype) -> None:
    case = on_device(make_case(2, 97, bias=True), dtype)
    expected, expected_grads = run(case, objective=TopK(5), implementation="triton")
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual, actual_grads = run(case, objective=TopK(5), implementation="triton")
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("loss", *DIAGNOSTICS):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert all(torch.equal(actual_grads[name], expected_grads[name]) for name in expected_grads)


def test_float64_is_refused() -> None:
    case = make_case(2, 97)
    with pytest.raises(ValueError, match=r"implementation: 'triton'.*float64.*'torch' or 'reference'"):
        linear_divergence(**cast(case, torch.float64, DEVICE), implementation="triton")
    mixed = on_device(case) | {"teacher_head": cast(case["teacher_head"], torch.float64, DEVICE)}
    with pytest.raises(ValueError, match="float64"):
        linear_divergence(**mixed, implementation="triton")


def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = triton.JITFunction(triton_rows.statistics_kernel.fn)
    monkeypatch.setattr(triton_rows, "statistics_kernel", compiled)
    with pytest.raises(ValueError, match=r"implementation: 'triton' compiles for GPUs.*cpu; choose 'torch'"):
        linear_divergence(**cast(make_case(2, 97), torch.float32), implementation="triton")


# --- what is wanted, and what not --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", KINDS)
def test_without_gradients_the_same_statistics(name: str) -> None:
    case = on_device(fitted(make_case(1, 97), OBJECTIVES[name]))
    expected, _ = run(case, objective=OBJECTIVES[name], implementation="triton")
    result = linear_divergence(**case, objective=OBJECTIVES[name], implementation="triton")
    assert not result.loss.requires_grad
    for field in ("loss", *DIAGNOSTICS):
        assert torch.equal(getattr(result, field), getattr(expected, field)), field


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("hidden", "weight")])
def test_gradients_only_of_what_requires_them(frozen: tuple[str, ...]) -> None:
    case = on_device(make_case(1, 97, bias=True))
    _, expected = run(case, implementation="triton")
    case, leaves = with_leaves(case, frozen)
    linear_divergence(**case, implementation="triton").loss.backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name in frozen)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[name])


def test_inputs_are_not_written() -> None:
    case = on_device(make_case(3, 97, bias=True))
    logits = case["teacher_head"].logits(case["teacher_hidden_TE"])
    given = {**case, "teacher_hidden_TE": None, "teacher_head": None, "teachers": Signal(logits_TV=logits)}
    before = cast(given, torch.float32)
    run(given, objective=TopK(5), implementation="triton")
    assert torch.equal(given["teachers"].logits_TV, before["teachers"].logits_TV)
    assert torch.equal(given["student_hidden_TD"], before["student_hidden_TD"])


# --- chunks and bits ---------------------------------------------------------------------------------------------
def test_chunk_size_does_not_matter() -> None:
    case = on_device(make_case(3, 97, bias=True))
    expected, expected_grads = run(case, implementation="triton")
    for chunk_tokens in (1, 2):
        actual, actual_grads = run(case, chunk_tokens=chunk_tokens, implementation="triton")
        assert_near(actual.kl_T, expected.kl_T, 2e-6)
        for name, grad in actual_grads.items():
            assert_near(grad, expected_grads[name], 2e-6, name)


@pytest.mark.parametrize(
    ("dtype", "objective"), [(torch.float32, ReverseKL()), (torch.bfloat16, TopK(20)), (torch.float16, ExOPD(1.25))]
)
def test_deterministic_rows_do_not_see_their_neighbours(dtype: torch.dtype, objective: Objective) -> None:
    """Their order, how many they are, and their place in a chunk: the same bits."""
    case = on_device(fitted(make_case(3, 97, bias=True), objective), dtype)
    options: dict[str, Any] = {"objective": objective, "deterministic": True, "chunk_tokens": 2}

    expected, expected_grads = run(case, implementation="triton", **options)
    rows = torch.tensor([2, 0], device=DEVICE)
    actual, actual_grads = run(rows_of(case, rows), implementation="triton", **options)
    for name in DIAGNOSTICS:
        assert torch.equal(getattr(actual, name), getattr(expected, name)[rows]), name
    assert torch.equal(actual_grads["hidden"], expected_grads["hidden"][rows])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_deterministic_matches_reference(dtype: torch.dtype) -> None:
    assert_matches(make_case(2, 131, **FORMS["all"]), dtype, deterministic=True, chunk_tokens=2)


def test_gradient_of_the_bias_sums_more_rows_than_a_tile() -> None:
    rows, vocab = 2 * triton_rows.BIAS_TILE["BLOCK_C"] + 5, triton_rows.BIAS_TILE["BLOCK_V"] + 9
    generator = torch.Generator().manual_seed(0)
    around_CV = torch.full((rows, triton_rows.stride_of(vocab)), torch.nan)
    grad_CV, factor_C = around_CV[:, :vocab], torch.randn(rows, generator=generator)
    grad_CV.copy_(torch.randn(rows, vocab, generator=generator))
    before_V = torch.randn(vocab, generator=generator)
    expected = before_V.double() + grad_CV.double().T @ factor_C.double()
    sums_V = before_V.to(DEVICE)
    triton_rows.bias(vocab)(2, around_CV.to(DEVICE)[:, :vocab], factor_C.to(DEVICE), sums_V, rows)
    assert_near(sums_V.cpu(), expected, 1e-6)


def test_same_arguments_same_bits() -> None:
    case = on_device(make_case(3, 97, bias=True))
    (first, first_grads), (second, second_grads) = (
        run(case, chunk_tokens=2, implementation="triton") for _ in range(2)
    )
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


def test_no_tokens_no_loss() -> None:
    result, grads = run(on_device(make_case(0, 97, bias=True)), implementation="triton")
    assert result.loss.item() == 0
    assert result.kl_T.shape == (0,)
    assert all((grad == 0).all() for grad in grads.values())


def test_default_chunk_is_bounded_and_knows_only_the_vocabulary() -> None:
    whole = triton_backend.CHUNK_MULTIPLE
    for vocab in (1, 97, 49152, 129_280, 151_936, 262_144, 10**9):
        rows = triton_backend.default_chunk_tokens(vocab)
        assert rows % whole == 0
        assert 0 < rows <= triton_backend.MAX_CHUNK_TOKENS
        assert rows == whole or 4 * (rows - whole // 2) * vocab <= triton_backend.CHUNK_BYTES


def test_full_float32_is_for_the_product_alone() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        run(on_device(make_case(2, 97)), implementation="triton")
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
