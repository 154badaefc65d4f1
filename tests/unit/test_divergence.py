"""Divergences: the torch implementation against the float64 reference, and the reference against the formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import opd_kernels.torch_backend
import pytest
import torch
from divergence_cases import (
    DIAGNOSTICS,
    FORMS,
    FULL_SIGNALS,
    OBJECTIVES,
    assert_matches_reference,
    assert_near,
    cast,
    fitted,
    given_logits,
    given_token_logprobs,
    given_top_k,
    logits_case,
    logits_of,
    make_case,
    rows_of,
    run,
    several_teachers,
    teacher_of,
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
from torch import Tensor


# --- the reference against the formulas --------------------------------------------------------------------------
def by_hand(objective: Objective, p: list[float], q: list[float], r: list[float], y: int) -> tuple[float, list[float]]:
    """Value, and gradient to the logits over τ, of one row: :mod:`opd_kernels.objectives` written out."""

    def towards(target: list[float]) -> tuple[float, list[float]]:
        ratio = [math.log(a / b) for a, b in zip(p, target, strict=True)]
        value = sum(a * b for a, b in zip(p, ratio, strict=True))
        return value, [a * (b - value) for a, b in zip(p, ratio, strict=True)]

    match objective:
        case ReverseKL():
            return towards(q)
        case ForwardKL():
            value = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
            return value, [a - b for a, b in zip(p, q, strict=True)]
        case JSD(beta):
            m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
            of_student, gradient = towards(m)
            of_teacher = sum(b * math.log(b / c) for b, c in zip(q, m, strict=True))
            return beta * of_teacher + (1 - beta) * of_student, [(1 - beta) * g for g in gradient]
        case ExOPD(lam):
            mixed = [b**lam * c ** (1 - lam) for b, c in zip(q, r, strict=True)]
            return towards([c / sum(mixed) for c in mixed])
        case TopK(k):
            inside = sorted(range(len(q)), key=lambda v: -q[v])[:k]
            p_tail, q_tail = (1 - sum(x[v] for v in inside) for x in (p, q))
            tail = math.log(p_tail / q_tail) if k < len(q) else 0.0
            ratio = [math.log(p[v] / q[v]) if v in inside else tail for v in range(len(q))]
            value = sum(a * b for a, b in zip(p, ratio, strict=True))
            return value, [a * (b - value) for a, b in zip(p, ratio, strict=True)]
        case SampledToken():
            value = math.log(p[y] / q[y])
            return value, [value * ((v == y) - a) for v, a in enumerate(p)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("form", ["bias", "all"])
@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), TopK(3), TopK(11)], ids=repr)
def test_reference_is_the_formula(objective: Objective, form: str, temperature: float) -> None:
    case = {**fitted(make_case(5, 11, 7, **{"teacher_width": 9, **FORMS[form]}), ExOPD())}
    head, hidden = case["student_head"], case["student_hidden_TD"]
    raw_TV = hidden @ head.weight[:11].T + head.bias[:11]
    cap = math.inf if head.soft_cap is None else head.soft_cap
    student_TV = (
        head.logit_scale * raw_TV if head.soft_cap is None else cap * torch.tanh(head.logit_scale * raw_TV / cap)
    )
    slope_TV = head.logit_scale * (1 - (student_TV / cap) ** 2) / temperature
    sides = (student_TV, logits_of(teacher_of(case)), logits_of(case["reference"]))
    p, q, r = (torch.softmax(logits_TV / temperature, -1).tolist() for logits_TV in sides)
    rows = [by_hand(objective, *row) for row in zip(p, q, r, case["sampled_ids_T"].tolist(), strict=True)]
    value_T = torch.tensor([value for value, _ in rows], dtype=torch.float64)
    gradient_TV = torch.tensor([gradient for _, gradient in rows], dtype=torch.float64) * slope_TV
    gradient_TV *= case["token_weights_T"][:, None]

    result, grads = run(
        fitted(case, objective), objective=objective, temperature=temperature, implementation="reference"
    )
    torch.testing.assert_close(result.divergence_T, value_T)
    torch.testing.assert_close(result.loss, (case["token_weights_T"] * value_T).sum())
    torch.testing.assert_close(grads["hidden"], gradient_TV @ head.weight[:11])
    torch.testing.assert_close(grads["weight"][:11], gradient_TV.T @ hidden)
    torch.testing.assert_close(grads["bias"][:11], gradient_TV.sum(0))
    assert (grads["weight"][11:] == 0).all()


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_diagnostics_by_hand(implementation: str) -> None:
    """V = 20, k = 16: the student's top 16 are ids 0…15, the teacher's 4…19; 12 in common."""
    student = torch.linspace(3, 0, 20, dtype=torch.float64)
    teacher = student.flip(0)
    p, q = torch.softmax(student, 0), torch.softmax(teacher, 0)
    for objective in (ReverseKL(), ForwardKL(), TopK(3), SampledToken()):
        case = logits_case(student[None], teacher[None], sampled_ids_T=torch.tensor([2]))
        result = linear_divergence(**case, objective=objective, implementation=implementation)
        assert result.kl_T.item() == pytest.approx((p * (p / q).log()).sum().item())
        assert result.overlap_ratio_T.item() == 12 / 16
        assert result.overlap_mass_T.item() == pytest.approx(p[4:16].sum().item())
        assert result.student_logprob_T.item() == pytest.approx(p[2].log().item())
        assert result.teacher_logprob_T.item() == pytest.approx(q[2].log().item())
        assert result.student_entropy_T.item() == pytest.approx(-(p * p.log()).sum().item())
        assert result.teacher_entropy_T.item() == pytest.approx(-(q * q.log()).sum().item())


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_what_a_narrow_signal_does_not_tell_is_nan(implementation: str) -> None:
    case = make_case(4, 97)
    for narrow, objective, known in (
        (given_top_k(case), TopK(), {"divergence_T"}),
        (given_token_logprobs(case), SampledToken(), {"divergence_T", "teacher_logprob_T"}),
    ):
        result, _ = run(narrow, objective=objective, implementation=implementation)
        known = known | {"student_entropy_T", "student_logprob_T"}
        assert {name for name in DIAGNOSTICS if not getattr(result, name).isnan().any()} == known
        assert all(getattr(result, name).isnan().all() for name in DIAGNOSTICS if name not in known)


# --- torch against the reference ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "vocab", "options"),
    [
        (1, 1, {}),
        (63, 1, {}),
        (4097, 1, {}),
        (4097, 97, {"chunk_tokens": 100}),
        (4097, 97, {}),
        (1, 50257, {}),
        (63, 50257, {"chunk_tokens": 20}),
        (1, 151_936, {}),
        (63, 151_936, {"chunk_tokens": 40}),
    ],
)
def test_matches_reference_at_awkward_sizes(tokens: int, vocab: int, options: dict[str, Any]) -> None:
    width, padding = (60, 0) if vocab < 151_936 else (12, 128)
    assert_matches_reference(make_case(tokens, vocab, width, 12, student_padding=padding), **options)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_at_awkward_sizes(name: str) -> None:
    for tokens, vocab, chunk in ((1, 1, None), (63, 1, 20), (257, 2, 100), (1, 97, None), (3, 9001, 2)):
        case = make_case(tokens, vocab, 12, 12)
        assert_matches_reference(case, objective=OBJECTIVES[name], chunk_tokens=chunk)


@pytest.mark.parametrize(
    ("form", "signal"),
    [
        (form, signal)
        for form in FORMS
        for signal in FULL_SIGNALS
        if signal != "logits" or form in ("plain", "student cap", "all")  # several have given logits among them
    ],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_matches_reference_in_every_form(name: str, form: str, signal: str) -> None:
    objective = OBJECTIVES[name]
    case = make_case(23, 301, **FORMS[form])
    assert_matches_reference(FULL_SIGNALS[signal](case, objective), objective=objective, chunk_tokens=9)
    if signal != "several":  # there, signals of temperature 1 take part
        case = FULL_SIGNALS[signal](case, objective)
        assert_matches_reference(case, objective=objective, chunk_tokens=9, temperature=0.6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_teachers_at_a_temperature(name: str) -> None:
    case = several_teachers(make_case(23, 301, **FORMS["all"]))
    assert_matches_reference(case, objective=OBJECTIVES[name], chunk_tokens=9, temperature=1.7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 20, 97])
def test_given_top_k_is_top_k_of_the_whole(form: str, k: int) -> None:
    case = make_case(23, 97, **FORMS[form])
    # Float64, where the tail that is left of 1 − Σ has enough digits to be compared.
    for implementation in ("torch", "reference"):
        options = {"objective": TopK(k), "implementation": implementation}
        expected, expected_grads = run(case, **options, chunk_tokens=9)
        actual, actual_grads = run(given_top_k(case, k), **options, chunk_tokens=9)
        assert_near(actual.divergence_T, expected.divergence_T, 1e-9)
        for name, grad in actual_grads.items():
            assert_near(grad, expected_grads[name], 1e-9, name)
    assert_matches_reference(given_top_k(case, min(k, 20)), objective=TopK(3), chunk_tokens=9)


@pytest.mark.parametrize("form", FORMS)
def test_given_token_logprobs_are_those_of_the_whole(form: str) -> None:
    case = make_case(23, 301, **FORMS[form])
    for implementation in ("torch", "reference"):
        options = {"objective": SampledToken(), "implementation": implementation}
        expected, expected_grads = run(case, **options, chunk_tokens=9)
        actual, actual_grads = run(given_token_logprobs(case), **options, chunk_tokens=9)
        assert_near(actual.divergence_T, expected.divergence_T, 1e-12)
        assert_near(actual.teacher_logprob_T, expected.teacher_logprob_T, 1e-12)
        for name, grad in actual_grads.items():
            assert_near(grad, expected_grads[name], 1e-12, name)
    assert_matches_reference(given_token_logprobs(case), objective=SampledToken(), chunk_tokens=9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float64_operands_keep_float64(name: str) -> None:
    case = several_teachers(make_case(23, 301, **FORMS["all"]), OBJECTIVES[name])
    assert_matches_reference(case, torch.float64, 1e-12, objective=OBJECTIVES[name], chunk_tokens=9)


@pytest.mark.parametrize("widening", ["whole", "by tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_operands_keep_float32_statistics(
    name: str, dtype: torch.dtype, widening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if widening == "by tiles":  # 42 rows of the student's head, the last tile narrower
        monkeypatch.setattr(opd_kernels.torch_backend, "WIDEN_BYTES", 10_100)
    case = several_teachers(make_case(23, 301, **FORMS["all"]), OBJECTIVES[name])
    assert_matches_reference(case, dtype, objective=OBJECTIVES[name], chunk_tokens=9)


def test_mixed_dtypes_of_student_and_teacher() -> None:
    case = cast(make_case(9, 97), torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        other = cast(case, dtype)
        mixed = {**case, "teacher_hidden_TE": other["teacher_hidden_TE"], "teacher_head": other["teacher_head"]}
        for changed in (mixed, given_logits(mixed)):
            actual, actual_grads = run(changed)
            expected, expected_grads = run(changed, implementation="reference")
            assert actual.kl_T.dtype == torch.float32
            assert_near(actual.kl_T, expected.kl_T, 1e-5)
            assert_near(actual_grads["hidden"], expected_grads["hidden"], 1e-5)


# --- weights, and several teachers -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_weigh_tokens(name: str) -> None:
    case = fitted(cast(make_case(6, 97), torch.float32), OBJECTIVES[name])
    case["token_weights_T"] = torch.tensor([0.0, 1.0, 2.0, 0.0, 0.5, 0.0], requires_grad=True)
    result, grads = run(case, objective=OBJECTIVES[name])
    torch.testing.assert_close(result.loss, (case["token_weights_T"] * result.divergence_T).sum())
    assert (grads["hidden"][case["token_weights_T"] == 0] == 0).all()
    assert case["token_weights_T"].grad is None
    default, _ = run({**case, "token_weights_T": None}, objective=OBJECTIVES[name])
    torch.testing.assert_close(default.loss, default.divergence_T.sum())
    torch.testing.assert_close(default.divergence_T, result.divergence_T)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_teachers_are_the_sum_of_single_calls(name: str, implementation: str) -> None:
    objective = OBJECTIVES[name]
    case = fitted(several_teachers(make_case(23, 97, **FORMS["all"]), objective), objective)
    options: dict[str, Any] = {"objective": objective, "implementation": implementation, "chunk_tokens": 9}
    result, grads = run(case, **options)
    weights_NT = case["token_weights_T"]
    assert len(weights_NT) == (4 if name in ("top-k", "sampled") else 3)
    singles = [
        run({**case, "teachers": teacher, "token_weights_T": weights_T}, **options)
        for teacher, weights_T in zip(case["teachers"], weights_NT, strict=True)
    ]
    torch.testing.assert_close(result.loss, torch.stack([single.loss for single, _ in singles]).sum())
    for leaf, grad in grads.items():
        torch.testing.assert_close(grad, torch.stack([single_grads[leaf] for _, single_grads in singles]).sum(0))
    for i, (single, _) in enumerate(singles):
        for field in DIAGNOSTICS:
            value = getattr(result, field)
            row = value if field.startswith("student_") else value[i]
            torch.testing.assert_close(row, getattr(single, field), equal_nan=True)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_weights_of_several_teachers_may_be_the_same_for_all(implementation: str) -> None:
    case = several_teachers(make_case(6, 97))
    for weights_T in (torch.rand(6, dtype=torch.float64), None):
        same = {**case, "token_weights_T": weights_T}
        one_each = torch.ones(3, 6) if weights_T is None else weights_T.repeat(3, 1)
        result, grads = run(same, implementation=implementation)
        expected, expected_grads = run({**case, "token_weights_T": one_each}, implementation=implementation)
        torch.testing.assert_close(result.loss, expected.loss)
        torch.testing.assert_close(grads["weight"], expected_grads["weight"])


def test_a_sequence_of_one_keeps_its_dimension() -> None:
    case = given_logits(make_case(6, 97))
    expected, _ = run(case)
    result, _ = run({**case, "teachers": [case["teachers"]]})
    for name in DIAGNOSTICS:
        wanted = getattr(expected, name)
        torch.testing.assert_close(getattr(result, name), wanted if name.startswith("student_") else wanted[None])


# --- whatever the objective: chunks, autocast, nothing to do -----------------------------------------------------
@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunk_size_does_not_matter(name: str) -> None:
    case = fitted(cast(several_teachers(make_case(65, 307, bias=True)), torch.float32), OBJECTIVES[name])
    expected, expected_grads = run(case, objective=OBJECTIVES[name])
    for chunk in (1, 7, 64, 65, 1000):
        actual, actual_grads = run(case, objective=OBJECTIVES[name], chunk_tokens=chunk)
        assert_near(actual.divergence_T, expected.divergence_T, 5e-6)
        for leaf, grad in actual_grads.items():
            assert_near(grad, expected_grads[leaf], 5e-6, leaf)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_changes_nothing(name: str) -> None:
    case = fitted(cast(make_case(9, 97), torch.float32), OBJECTIVES[name])
    expected, expected_grads = run(case, objective=OBJECTIVES[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, actual_grads = run(case, objective=OBJECTIVES[name])
    assert torch.equal(actual.divergence_T, expected.divergence_T)
    assert torch.equal(actual_grads["weight"], expected_grads["weight"])


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_tokens_no_loss(name: str, implementation: str) -> None:
    full = cast(several_teachers(make_case(3, 97, bias=True), OBJECTIVES[name]), torch.float32)
    case = rows_of(fitted(full, OBJECTIVES[name]), torch.arange(0))
    for deterministic in (False, True):
        options = {"implementation": implementation, "deterministic": deterministic}
        result, grads = run(case, objective=OBJECTIVES[name], **options)
        assert result.loss.item() == 0
        assert result.kl_T.shape == (len(case["teachers"]), 0)
        assert result.student_entropy_T.shape == (0,)
        assert all((grad == 0).all() for grad in grads.values())
        assert grads["weight"].shape == (97, 60)


def test_ids_may_be_32_bits_wide() -> None:
    case = make_case(6, 97)
    for narrow, objective in ((case, SampledToken()), (given_top_k(case), TopK())):
        expected, expected_grads = run(narrow, objective=objective)
        given = narrow.get("teachers")
        if isinstance(given, Signal):
            assert given.top_k_ids_TK is not None
            narrow = {**narrow, "teachers": replace(given, top_k_ids_TK=given.top_k_ids_TK.int())}
        for implementation in ("torch", "reference"):
            ids = {"sampled_ids_T": case["sampled_ids_T"].int(), "implementation": implementation}
            result, grads = run({**narrow, **ids}, objective=objective)
            torch.testing.assert_close(result.divergence_T, expected.divergence_T)
            torch.testing.assert_close(grads["hidden"], expected_grads["hidden"])


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_operands_need_not_be_contiguous(implementation: str) -> None:
    device = "cpu"
    if implementation == "triton":
        pytest.importorskip("triton")
        device = "cuda" if torch.cuda.is_available() else "cpu"

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]

    case = cast(make_case(6, 97, 30, 30, bias=True), torch.float32, device)
    case["student_head"] = replace(case["student_head"], bias=torch.full((97,), 0.5, device=device))
    expected, expected_grads = run(case, implementation="torch")
    loose = {
        **case,
        "student_hidden_TD": strided(case["student_hidden_TD"]),
        "teacher_hidden_TE": case["teacher_hidden_TE"].T.contiguous().T,
        "student_head": LinearHead(
            weight=case["student_head"].weight.T.contiguous().T, bias=torch.full((1,), 0.5, device=device).expand(97)
        ),
        "teacher_head": LinearHead(
            weight=strided(case["teacher_head"].weight), bias=strided(case["teacher_head"].bias)
        ),
        "token_weights_T": strided(case["token_weights_T"]),
    }
    head = loose["student_head"]
    leaves = [x.requires_grad_() for x in (loose["student_hidden_TD"], head.weight, head.bias)]
    result = linear_divergence(**loose, implementation=implementation)
    result.loss.backward()
    assert_near(result.kl_T, expected.kl_T, 2e-6)
    for leaf, name in zip(leaves, ("hidden", "weight", "bias"), strict=True):
        assert leaf.grad is not None
        assert_near(leaf.grad, expected_grads[name], 2e-6, name)


def test_heads_of_one_storage_are_not_mixed_up() -> None:
    """Views that begin at one address, of one width or of one shape, widened each on its own."""
    both_VD = torch.randn(60, 60, generator=torch.Generator().manual_seed(0)).bfloat16()
    case = cast(make_case(5, 60, 30, 30), torch.bfloat16)
    case = {**case, "teacher_head": LinearHead(both_VD[:, ::2]), "student_head": LinearHead(both_VD[:, :30])}
    square = cast(make_case(5, 60, 60, 60), torch.bfloat16)
    square = {**square, "teacher_head": LinearHead(both_VD.T), "student_head": LinearHead(both_VD)}
    for shared in (case, square):
        apart = {name: replace(shared[name], weight=shared[name].weight.clone()) for name in shared if "head" in name}
        actual, actual_grads = linear_divergence(**shared), run(shared)[1]
        expected, expected_grads = run({**shared, **apart})
        assert torch.equal(actual.kl_T, expected.kl_T)
        assert torch.equal(actual_grads["hidden"], expected_grads["hidden"])
