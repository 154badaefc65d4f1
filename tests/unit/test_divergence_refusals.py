"""Divergences: arguments that do not fit each other are refused, and the message names the one to mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import opd_kernels.divergence
import pytest
import torch
from divergence_cases import (
    Case,
    cast,
    given_logits,
    given_token_logprobs,
    given_top_k,
    make_case,
    make_reference,
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

NO_TEACHER = {"teacher_hidden_TE": None, "teacher_head": None}


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


META_VD = torch.empty(97, 60, device="meta")


def refused(case: Case, message: str, **options: Any) -> None:
    for implementation in ("torch", "reference"):
        with pytest.raises(ValueError, match=message):
            linear_divergence(**{"implementation": implementation, **case, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, r"implementation: 'cuda'.*'auto', 'triton', 'torch', 'reference'"),
        ({"objective": "reverse_kl"}, r"objective: 'reverse_kl' is not a value of ReverseKL, ForwardKL, JSD"),
        ({"objective": ReverseKL}, "objective: .*ReverseKL"),
        ({"temperature": 0.0}, "temperature: 0.0 is not above 0"),
        ({"temperature": -1.0}, "temperature: -1.0 is not above 0"),
        ({"temperature": float("nan")}, "temperature: nan is not above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens: 0 is below 1"),
        ({"student_hidden_TD": ids(5, 60)}, r"student_hidden: torch.int64 \(5, 60\), expected floating"),
        ({"student_hidden_TD": zeros(5)}, r"student_hidden: .*expected floating \[tokens, width\]"),
        ({"student_hidden_TD": zeros()}, r"student_hidden: torch.float32 \(\), expected floating \[tokens, width\]"),
        ({"student_hidden_TD": zeros(), "token_weights_T": None}, r"student_hidden: torch.float32 \(\), expected"),
        ({"teacher_hidden_TE": zeros()}, r"teacher_hidden: torch.float32 \(\), expected floating \[tokens, width\]"),
        ({"token_weights_T": zeros()}, r"token_weights_T: \(\) weights, expected \(1, 5\)"),
        ({"student_head": LinearHead(zeros(97, 61))}, r"student_head: weight \(97, 61\) does not fit hidden \(5, 60\)"),
        ({"student_head": LinearHead(zeros(97, 60), valid_vocab_size=98)}, "student_head: 98 valid ids"),
        ({"student_head": LinearHead(zeros(97, 60), valid_vocab_size=0)}, "student_head: 0 valid ids"),
        ({"student_head": LinearHead(zeros(97, 60), bias=zeros(1))}, r"student_head: bias \(1,\), expected \(97,\)"),
        ({"student_head": LinearHead(zeros(97, 60), soft_cap=0.0)}, "student_head: soft_cap 0.0 is not above 0"),
        ({"teacher_head": None}, "teacher: hidden_TE and head go together, and one of them is missing"),
        ({"teacher_hidden_TE": None}, "teacher: hidden_TE and head go together, and one of them is missing"),
        ({"teacher_head": LinearHead(zeros(98, 60))}, "teacher_head: 98 valid ids, the student's head has 97"),
        ({"teacher_head": LinearHead(zeros(97, 61))}, "teacher_head: weight"),
        ({"teacher_hidden_TE": zeros(4, 60)}, "teacher_hidden: 4 rows, the student has 5"),
        ({"sampled_ids_T": torch.tensor([0, 1, 2, 3, 97])}, r"sampled_ids_T: ids span 0…97, the vocabulary is 0…96"),
        ({"sampled_ids_T": torch.tensor([0, 1, 2, 3, -100])}, r"sampled_ids_T: ids span -100…3"),
        ({"sampled_ids_T": zeros(5)}, r"sampled_ids_T: torch.float32 \(5,\), expected int64 or int32 \(5,\)"),
        ({"sampled_ids_T": ids(4)}, r"sampled_ids_T: torch.int64 \(4,\), expected int64 or int32 \(5,\)"),
        ({"token_weights_T": zeros(4)}, r"token_weights_T: \(1, 4\) weights, expected \(1, 5\)"),
        ({"token_weights_T": zeros(2, 5)}, r"token_weights_T: \(2, 5\) weights, expected \(1, 5\)"),
        ({"token_weights_T": zeros(1, 1, 5)}, r"token_weights_T: \(1, 1, 5\) weights, expected \(1, 5\)"),
    ],
)
def test_misfits_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    refused({**cast(make_case(5, 97), torch.float32), **change}, message)


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (None, "teachers: give either teacher_hidden_TE with teacher_head, or teachers"),
        ([], "teachers: the sequence is empty"),
        (Signal(), "teacher: give exactly one of hidden_TE and head; logits_TV; .*got none"),
        (Signal(logits_TV=zeros(5, 97), token_logprobs_T=zeros(5)), "exactly one of .*got logits_TV; token_logprobs_T"),
        (Signal(hidden_TE=zeros(5, 60)), "teacher: hidden_TE and head go together"),
        (Signal(head=LinearHead(zeros(97, 60))), "teacher: hidden_TE and head go together"),
        (Signal(top_k_ids_TK=ids(5, 3)), "teacher: top_k_ids_TK and top_k_logprobs_TK go together"),
        (Signal(logits_TV=zeros(5, 98)), r"teacher_logits_TV: shape \(5, 98\), expected \(5, 97\); slice padding off"),
        (Signal(logits_TV=ids(5, 97)), "teacher_logits_TV: torch.int64 is not a floating dtype"),
        ([Signal(logits_TV=zeros(5, 97)), Signal(logits_TV=zeros(4, 97))], r"teachers\[1\]_logits_TV: shape \(4, 97\)"),
        ([Signal(logits_TV=zeros(5, 97)), Signal(hidden_TE=zeros(5, 60))], r"teachers\[1\]: hidden_TE and head go"),
    ],
)
def test_signals_are_refused_by_name(teachers: Any, message: str) -> None:
    refused({**cast(make_case(5, 97), torch.float32), **NO_TEACHER, "teachers": teachers}, message)


@pytest.mark.parametrize(
    ("signal", "objective", "message"),
    [
        (Signal(token_logprobs_T=zeros(4)), SampledToken(), r"teacher_token_logprobs_T: shape \(4,\), expected \(5,\)"),
        (Signal(token_logprobs_T=ids(5)), SampledToken(), "teacher_token_logprobs_T: torch.int64 is not a floating"),
        (
            Signal(top_k_ids_TK=ids(5, 3), top_k_logprobs_TK=zeros(5, 4)),
            TopK(),
            r"teacher_top_k_logprobs_TK: shape \(5, 4\), expected \(5, 3\)",
        ),
        (
            Signal(top_k_ids_TK=ids(4, 3), top_k_logprobs_TK=zeros(4, 3)),
            TopK(),
            r"teacher_top_k_ids_TK: .*\(4, 3\), expected int64 or int32 \(5, 3\)",
        ),
        (
            Signal(top_k_ids_TK=zeros(5, 3), top_k_logprobs_TK=zeros(5, 3)),
            TopK(),
            "teacher_top_k_ids_TK: torch.float32",
        ),
        (
            Signal(top_k_ids_TK=ids(5, 3) + 97, top_k_logprobs_TK=zeros(5, 3)),
            TopK(),
            "teacher_top_k_ids_TK: ids span 97…97",
        ),
        (
            Signal(top_k_ids_TK=ids(5, 0), top_k_logprobs_TK=zeros(5, 0)),
            TopK(),
            "teacher_top_k_ids_TK: 0 ids per token, expected 1…97",
        ),
        (
            Signal(top_k_ids_TK=ids(5, 98), top_k_logprobs_TK=zeros(5, 98)),
            TopK(),
            "teacher_top_k_ids_TK: 98 ids per token, expected 1…97",
        ),
    ],
)
def test_log_probabilities_are_refused_by_name(signal: Signal, objective: Objective, message: str) -> None:
    refused({**cast(make_case(5, 97), torch.float32), **NO_TEACHER, "teachers": signal}, message, objective=objective)


def test_teachers_in_both_ways_are_refused() -> None:
    case = make_case(5, 97)
    refused({**case, "teachers": teacher_of(case)}, "teachers: give either")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"student_head": LinearHead(META_VD)}, "student_head: weight"),
        ({"student_head": LinearHead(zeros(97, 60), bias=META_VD[:, 0])}, "student_head: bias"),
        ({"teacher_hidden_TE": META_VD[:5]}, "teacher_hidden_TE:"),
        ({"teacher_head": LinearHead(META_VD)}, "teacher_head: weight"),
        ({"teacher_head": LinearHead(zeros(97, 60), bias=META_VD[:, 0])}, "teacher_head: bias"),
        ({"sampled_ids_T": META_VD[:5, 0].long()}, "sampled_ids_T:"),
        ({"token_weights_T": META_VD[:5, 0]}, "token_weights_T:"),
        ({**NO_TEACHER, "teachers": Signal(logits_TV=META_VD.new_zeros(5, 97))}, "teacher_logits_TV:"),
        (
            {
                **NO_TEACHER,
                "teachers": [Signal(logits_TV=zeros(5, 97)), Signal(logits_TV=META_VD.new_zeros(5, 97))],
                "token_weights_T": None,
            },
            r"teachers\[1\]_logits_TV:",
        ),
        (
            {**NO_TEACHER, "teachers": Signal(token_logprobs_T=META_VD[:5, 0]), "objective": SampledToken()},
            "teacher_token_logprobs_T:",
        ),
        (
            {
                **NO_TEACHER,
                "teachers": Signal(top_k_ids_TK=ids(5, 3), top_k_logprobs_TK=META_VD[:5, :3]),
                "objective": TopK(),
            },
            "teacher_top_k_logprobs_TK:",
        ),
        ({"objective": ExOPD(), "reference": Signal(logits_TV=META_VD.new_zeros(5, 97))}, "reference_logits_TV:"),
    ],
)
def test_tensors_of_another_device_are_refused_by_name(change: dict[str, Any], name: str) -> None:
    case = {**cast(make_case(5, 97), torch.float32), **change}
    refused(case, f"{name} on meta, the student's hidden states are on cpu")


@pytest.mark.parametrize("objective", [None, ReverseKL(), ForwardKL(), JSD(), ExOPD(), TopK(), SampledToken()])
@pytest.mark.parametrize(
    ("given", "served", "told"),
    [
        (given_top_k, TopK, "top-k log-probabilities"),
        (given_token_logprobs, SampledToken, "the sampled tokens' log-probabilities"),
    ],
)
def test_an_objective_may_need_more_than_the_signal_tells(
    given: Callable[[Case], Case], served: type, told: str, objective: Objective | None
) -> None:
    case = given(make_case(5, 97))
    if isinstance(objective, served):
        refused(case, r"temperature: 0.5, but teacher gives log-probabilities", objective=objective, temperature=0.5)
        return
    name = type(objective or ReverseKL()).__name__
    refused(case, f"objective: {name} needs more than teacher tells, which is {told}", objective=objective)
    several = {**case, "teachers": [teacher_of(make_case(5, 97)), case["teachers"]], "token_weights_T": None}
    refused(several, rf"objective: {name} needs more than teachers\[1\] tells", objective=objective)


def test_the_reference_goes_with_exopd() -> None:
    case = make_case(5, 97)
    refused(case, "reference: goes with ExOPD, which needs it", objective=ExOPD())
    reference = make_reference(case)
    for objective in (None, ForwardKL(), JSD(), TopK(), SampledToken()):
        refused(case, "reference: goes with ExOPD", objective=objective, reference=reference)
    for wrong, message in (
        (make_reference(make_case(4, 97)), "reference_hidden: 4 rows, the student has 5"),
        (make_reference(make_case(5, 98)), "reference_head: 98 valid ids, the student's head has 97"),
        (Signal(), "reference: give exactly one of"),
        (given_top_k(case)["teachers"], "reference: needs hidden states and a head, or logits"),
        (given_token_logprobs(case)["teachers"], "reference: needs hidden states and a head, or logits"),
    ):
        refused(case, message, objective=ExOPD(), reference=wrong)


def test_weights_of_several_teachers_are_refused_by_name() -> None:
    case = several_teachers(make_case(5, 97))
    for shape in ((4,), (2, 5), (5, 3), (1, 5)):
        refused({**case, "token_weights_T": zeros(*shape)}, r"token_weights_T: .* weights, expected \(3, 5\)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JSD(0.0), "beta: 0.0 is not strictly between 0 and 1; the limits are ForwardKL"),
        (lambda: JSD(1.0), "beta: 1.0"),
        (lambda: JSD(-0.5), "beta: -0.5"),
        (lambda: JSD(float("nan")), "beta: nan"),
        (lambda: ExOPD(0.0), "lam: 0.0 is not above 0 and finite"),
        (lambda: ExOPD(-1.0), "lam: -1.0"),
        (lambda: ExOPD(float("inf")), "lam: inf"),
        (lambda: ExOPD(float("nan")), "lam: nan"),
        (lambda: TopK(0), "k: 0 is below 1"),
    ],
)
def test_objectives_refuse_what_is_out_of_range(make: Callable[[], Objective], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = given_logits(cast(make_case(5, 97), torch.float32))
    monkeypatch.setattr(opd_kernels.divergence, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"implementation: 'triton' needs the package .*pip install triton"):
        linear_divergence(**case, implementation="triton")


def test_triton_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    backend = pytest.importorskip("opd_kernels.triton_backend")
    # What it is where Triton was not told to interpret, as it was for these tests.
    compiled = object.__new__(triton.JITFunction)
    monkeypatch.setattr(backend.triton_rows, "statistics_kernel", compiled)
    with pytest.raises(ValueError, match="implementation: 'triton' compiles for GPUs, the tensors are on cpu"):
        linear_divergence(**cast(make_case(5, 97), torch.float32), implementation="triton")
