"""Divergences: gradients by finite differences, what they cost in GEMMs and memory, and how autograd may use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
    run,
    several_teachers,
    with_leaves,
)
from opd_kernels import ExOPD, LinearHead, Objective, ReverseKL, SampledToken, TopK, linear_divergence
from opd_kernels.torch_backend import CHUNK_BYTES, MIN_CHUNK_TOKENS, TorchBackend, default_chunk_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


# --- finite differences ------------------------------------------------------------------------------------------
def assert_gradients_are_slopes(case: Case, **options: Any) -> None:
    case, leaves = with_leaves(case)

    def loss(*tensors: Tensor) -> Tensor:
        given = dict(zip(leaves, tensors, strict=True))
        head = replace(case["student_head"], weight=given["weight"], bias=given.get("bias"))
        arguments = {**case, "student_hidden_TD": given["hidden"], "student_head": head}
        return linear_divergence(**arguments, chunk_tokens=3, **options).loss

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


@pytest.mark.parametrize("form", ["plain", "scale", "student cap", "all"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "sampled"])
def test_gradcheck(name: str, form: str) -> None:
    objective = TopK(3) if name == "top-k" else OBJECTIVES[name]
    case = fitted(make_case(4, 6, 2, **{"teacher_width": 3, **FORMS[form]}), objective)
    assert_gradients_are_slopes(case, objective=objective, temperature=0.8)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "sampled"])
def test_gradcheck_of_several_teachers(name: str) -> None:
    objective = TopK(3) if name == "top-k" else OBJECTIVES[name]
    case = fitted(several_teachers(make_case(4, 6, 2, bias=True), objective), objective)
    assert_gradients_are_slopes(case, objective=objective)


def test_gradcheck_of_a_given_top_k() -> None:
    assert_gradients_are_slopes(given_top_k(make_case(4, 6, 2, **FORMS["all"]), 3), objective=TopK())


@pytest.mark.parametrize("given", [lambda case: case, given_logits, given_token_logprobs])
@pytest.mark.parametrize("form", FORMS)
def test_sampled_token_has_the_gradient_of_its_surrogate(form: str, given: Any) -> None:
    """Of Σ w · A · log p_y with A a constant, and not of Σ w · A."""
    case = given(make_case(6, 11, 5, **{"teacher_width": 3, **FORMS[form]}))
    result, grads = run(case, objective=SampledToken())
    case, leaves = with_leaves(case)
    student_TV = torch.log_softmax(case["student_head"].logits(leaves["hidden"]), -1)
    logprob_T = student_TV.gather(1, case["sampled_ids_T"][:, None])[:, 0]
    torch.testing.assert_close(result.divergence_T, result.student_logprob_T - result.teacher_logprob_T)
    (case["token_weights_T"] * result.divergence_T * logprob_T).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(grads[name], leaf.grad)


# --- what needs a gradient, and what it costs --------------------------------------------------------------------
class Ledger(TorchDispatchMode):
    """Counts GEMMs and remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.gemms = 0
        self.largest_numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.gemms += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.largest_numel = max(self.largest_numel, value.numel())
        return result


@pytest.mark.parametrize(
    ("frozen", "gradient_gemms"),
    [((), 2), (("weight", "bias"), 1), (("weight",), 1), (("hidden",), 1), (("hidden", "weight", "bias"), 0)],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_only_of_what_requires_them(name: str, frozen: tuple[str, ...], gradient_gemms: int) -> None:
    objective = OBJECTIVES[name]
    case = fitted(cast(make_case(12, 97, bias=True), torch.float32), objective)
    _, expected = run(case, objective=objective, chunk_tokens=4)
    case, leaves = with_leaves(case, frozen)
    with Ledger() as ledger:
        loss = linear_divergence(**case, objective=objective, chunk_tokens=4).loss
        if loss.requires_grad:
            loss.backward()
    projections = 3 if isinstance(objective, ExOPD) else 2
    assert ledger.gemms == 3 * (projections + gradient_gemms)
    assert loss.requires_grad == (len(frozen) < 3)
    for leaf_name, leaf in leaves.items():
        assert (leaf.grad is None) == (leaf_name in frozen)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected[leaf_name])


@pytest.mark.parametrize(
    ("case", "objective", "projections"),
    [
        (make_case(12, 97), ReverseKL(), 2),
        (given_logits(make_case(12, 97)), ReverseKL(), 1),
        (given_top_k(make_case(12, 97)), TopK(), 1),
        (given_token_logprobs(make_case(12, 97)), SampledToken(), 1),
        (make_case(12, 97), ExOPD(), 3),
        (several_teachers(make_case(12, 97)), ReverseKL(), 3),  # of the student's head and two: one gives logits
        (several_teachers(make_case(12, 97)), ExOPD(), 4),  # and the reference, once for all teachers
        (several_teachers(make_case(12, 97), TopK()), TopK(), 3),
    ],
)
def test_gemms_of_a_chunk(case: Case, objective: Objective, projections: int) -> None:
    case, _ = with_leaves(cast(fitted(case, objective), torch.float32))
    with Ledger() as ledger:
        linear_divergence(**case, objective=objective, chunk_tokens=4).loss.backward()
    assert ledger.gemms == 3 * (projections + 2)
    with Ledger() as ledger, torch.no_grad():
        result = linear_divergence(**case, objective=objective, chunk_tokens=4)
    assert ledger.gemms == 3 * projections
    assert not result.loss.requires_grad


# --- autograd ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_diagnostics_are_detached_and_no_other_model_gets_a_gradient(name: str, implementation: str) -> None:
    case, _ = with_leaves(cast(fitted(make_case(5, 97), OBJECTIVES[name]), torch.float32))
    others = [case["teacher_head"].weight, case["teacher_hidden_TE"]]
    if "reference" in case:
        others += [case["reference"].head.weight, case["reference"].hidden_TE]
    for tensor in others:
        tensor.requires_grad_()
    result = linear_divergence(**case, objective=OBJECTIVES[name], implementation=implementation)
    result.loss.backward()
    assert not any(getattr(result, field).requires_grad for field in DIAGNOSTICS)
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_inputs_are_left_as_they_were(name: str) -> None:
    case = fitted(several_teachers(make_case(9, 97), OBJECTIVES[name]), OBJECTIVES[name])
    tensors = {
        "logits": case["teachers"][2].logits_TV,
        "ids": case["sampled_ids_T"],
        "weights": case["token_weights_T"],
    }
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    run(case, objective=OBJECTIVES[name], chunk_tokens=4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tied_head_collects_both_gradients(name: str) -> None:
    case = fitted(make_case(9, 97), OBJECTIVES[name])
    tokens = torch.arange(9)
    grads = []
    for implementation in ("torch", "reference"):
        embedding = case["student_head"].weight.clone().requires_grad_()
        tied = {**case, "student_hidden_TD": torch.tanh(embedding[tokens]), "student_head": LinearHead(embedding)}
        linear_divergence(**tied, objective=OBJECTIVES[name], implementation=implementation).loss.backward()
        assert embedding.grad is not None
        grads.append(embedding.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_backward_twice_with_any_factor(name: str) -> None:
    case, leaves = with_leaves(cast(fitted(make_case(9, 97, bias=True), OBJECTIVES[name]), torch.float32))
    loss = linear_divergence(**case, objective=OBJECTIVES[name], chunk_tokens=4).loss
    tensors = list(leaves.values())
    once = torch.autograd.grad(loss, tensors, retain_graph=True)
    kept = [grad.clone() for grad in once]
    scaled = torch.autograd.grad(loss * -3.0, tensors, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, keep, first, triple in zip(tensors, kept, once, scaled, strict=True):
        torch.testing.assert_close(first, keep)
        torch.testing.assert_close(triple, -3.0 * keep)
        torch.testing.assert_close(leaf.grad, 2.0 * keep)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_no_signal_gets_a_gradient(implementation: str) -> None:
    case, _ = with_leaves(cast(make_case(5, 97), torch.float32))
    for given, objective in (
        (given_logits, ReverseKL()),
        (given_top_k, TopK()),
        (given_token_logprobs, SampledToken()),
    ):
        signal = given(case)["teachers"]
        parts = [x for x in (signal.logits_TV, signal.top_k_logprobs_TK, signal.token_logprobs_T) if x is not None]
        for part in parts:
            part.requires_grad_()
        narrow = {**case, "teacher_hidden_TE": None, "teacher_head": None, "teachers": signal}
        linear_divergence(**narrow, objective=objective, implementation=implementation).loss.backward()
        assert [part.grad for part in parts] == [None]


def test_second_derivatives_are_refused() -> None:
    """Also where the factor of the loss requires no gradient, which autograd takes for a constant gradient."""
    case, leaves = with_leaves(cast(make_case(5, 97), torch.float32))
    loss = linear_divergence(**case).loss
    with pytest.raises(RuntimeError, match="linear_divergence has no second derivatives"):
        torch.autograd.grad(loss, leaves["hidden"], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_factor_of_the_loss_is_rounded_with_the_gradient_once(dtype: torch.dtype) -> None:
    case = cast(make_case(9, 97, bias=True), dtype)
    expected = run(cast(case, torch.float64), factor=3.0, implementation="reference")[1]
    for name, grad in run(case, factor=3.0)[1].items():
        assert grad.dtype == dtype
        largest = expected[name].abs().max()
        error = (grad.double() - expected[name]).abs() - torch.finfo(dtype).eps / 2 * expected[name].abs()
        assert (error <= 2e-5 * largest).all(), name


# --- memory ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OBJECTIVES)
def test_never_a_whole_logits_tensor(name: str) -> None:
    tokens, vocab, chunk = 128, 2003, 16
    case = fitted(several_teachers(make_case(tokens, vocab, 8, 8)), OBJECTIVES[name])
    case["teachers"].pop()  # whose logits were given, all of them
    case, _ = with_leaves(cast({**case, "token_weights_T": None}, torch.float32))
    with Ledger() as ledger:
        linear_divergence(**case, objective=OBJECTIVES[name], chunk_tokens=chunk).loss.backward()
    assert ledger.largest_numel <= 3 * chunk * vocab < tokens * vocab


@contextmanager
def peak_extra_bytes() -> Iterator[list[int]]:
    """Appends the most bytes that were held at once, over what is left behind (the gradients)."""
    peaks: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peaks
    held = peak = 0
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    peaks.append(peak - held)


@pytest.mark.parametrize("name", ["reverse", "jsd .5", "exopd 1.25", "top-k"])
def test_peak_memory_does_not_grow_with_tokens(name: str) -> None:
    peaks = {}
    # Of the statistics and the row factors, a dozen numbers a token must grow; at V = 5003 that is nothing.
    for tokens, implementation in ((32, "torch"), (256, "torch"), (256, "reference")):
        case, _ = with_leaves(cast(fitted(make_case(tokens, 5003, 8, 8), OBJECTIVES[name]), torch.float32))
        options: dict[str, Any] = {"objective": OBJECTIVES[name], "chunk_tokens": 16, "implementation": implementation}
        with peak_extra_bytes() as extra:
            result = linear_divergence(**case, **options)
            result.loss.backward()
            del result
        peaks[tokens, implementation] = extra[0]
    assert peaks[256, "torch"] <= 1.1 * peaks[32, "torch"]
    assert peaks[256, "torch"] < peaks[256, "reference"] / 10


def test_default_chunk_is_bounded_and_knows_only_the_vocabulary() -> None:
    for vocab in (1, 97, 49152, 151_936, 10**9):
        rows = default_chunk_tokens(vocab)
        assert MIN_CHUNK_TOKENS <= rows <= 4096
        assert rows == MIN_CHUNK_TOKENS or CHUNK_BYTES - 8 * vocab * 4 < rows * vocab * 4 <= CHUNK_BYTES or rows == 4096


@pytest.mark.parametrize(("tokens", "expected"), [(1, [1]), (95, [95]), (97, [56, 41]), (200, [72, 72, 56])])
def test_default_chunks_are_even(tokens: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """At a vocabulary whose chunks have 96 rows."""
    sizes: list[int] = []
    project = TorchBackend.project

    def counted(self: TorchBackend, head: LinearHead, hidden_CD: Tensor, out_CV: Tensor) -> None:
        sizes.append(len(hidden_CD))
        project(self, head, hidden_CD, out_CV)

    monkeypatch.setattr(TorchBackend, "project", counted)
    monkeypatch.setattr("opd_kernels.torch_backend.CHUNK_BYTES", 96 * 97 * 4)
    case = given_logits(cast(make_case(tokens, 97), torch.float32))
    linear_divergence(**case)
    assert sizes == expected
