"""Reverse KL: the chunked implementation against the float64 reference, and the reference against the formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opd_kernels import Divergence, LinearHead, linear_divergence
from opd_kernels.chunked import CHUNK_BYTES, default_chunk_tokens
from opd_kernels.divergence import IMPLEMENTATIONS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DIAGNOSTICS = [field.name for field in fields(Divergence)][1:]


def make_case(
    tokens: int,
    vocab: int,
    student_width: int = 60,
    teacher_width: int = 60,
    *,
    seed: int = 0,
    scale: float = 1.0,
    bias: bool = False,
    student_padding: int = 0,
    teacher_padding: int = 0,
    student_form: dict[str, float] | None = None,
    teacher_form: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Float64 arguments of ``linear_divergence``; logits have a standard deviation of about 2 × scale."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head(width: int, padding: int, form: dict[str, float] | None) -> LinearHead:
        weight = randn(vocab + padding, width) * (2.0 * scale / width**0.5)
        weight[vocab:] = 1e3  # padding that leaked into a softmax would own it
        return LinearHead(
            weight,
            bias=randn(vocab + padding) if bias else None,
            valid_vocab_size=vocab if padding else None,
            **(form or {}),  # type: ignore[arg-type]
        )

    return {
        "student_hidden_TD": randn(tokens, student_width),
        "student_head": head(student_width, student_padding, student_form),
        "teacher_hidden_TE": randn(tokens, teacher_width),
        "teacher_head": head(teacher_width, teacher_padding, teacher_form),
        "sampled_ids_T": torch.randint(vocab, (tokens,), generator=generator),
        "token_weights_T": torch.rand(tokens, generator=generator, dtype=torch.float64),
    }


def cast(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def to(value: Any) -> Any:
        if isinstance(value, LinearHead):
            return replace(value, weight=value.weight.to(dtype), bias=None if value.bias is None else to(value.bias))
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: to(value) for name, value in case.items()}


def with_leaves(case: dict[str, Any], frozen: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The case with fresh leaves for what may have a gradient, and those leaves by name."""
    head = case["student_head"]
    leaves = {"hidden": case["student_hidden_TD"].detach().clone(), "weight": head.weight.detach().clone()}
    if head.bias is not None:
        leaves["bias"] = head.bias.detach().clone()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    head = replace(head, weight=leaves["weight"], bias=leaves.get("bias"))
    return {**case, "student_hidden_TD": leaves["hidden"], "student_head": head}, leaves


def run(case: dict[str, Any], *, factor: float = 1.0, **options: Any) -> tuple[Divergence, dict[str, Tensor]]:
    """Result, and gradients of ``factor · loss`` by leaf."""
    case, leaves = with_leaves(case)
    result = linear_divergence(**case, **options)
    (result.loss * factor).backward()
    return result, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Error against the largest entry: gradients hold tiny entries beside large ones."""
    assert actual.shape == expected.shape, name
    assert torch.isfinite(actual).all(), name
    if expected.numel():
        actual, expected = actual.detach().double(), expected.detach().double()
        bound = tolerance * max(float(expected.abs().max()), 1e-3)
        error = float((actual - expected).abs().max())
        assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_matches_reference(
    case: dict[str, Any], dtype: torch.dtype = torch.float32, tolerance: float = 2e-5, **options: Any
) -> None:
    """``dtype`` arguments through "chunked" against the same values in float64 through "reference"."""
    narrow = cast(case, dtype)
    with poisoned_memory():
        actual, actual_grads = run(narrow, factor=0.5, **options)
    options.pop("chunk_tokens", None)
    expected, expected_grads = run(cast(narrow, torch.float64), factor=0.5, implementation="reference", **options)
    for name in ("loss", *DIAGNOSTICS):
        assert_near(getattr(actual, name), getattr(expected, name), tolerance, name)
    assert actual_grads.keys() == expected_grads.keys() >= {"hidden", "weight"}
    for name, grad in actual_grads.items():
        assert grad.dtype == dtype
        # A gradient is handed back in the dtype of its tensor: half precision rounds it once.
        assert_near(grad, expected_grads[name], max(tolerance, torch.finfo(dtype).eps), name)


# --- the reference against the formula ---------------------------------------------------------------------------
def test_reference_is_eq_29_and_its_derived_gradient() -> None:
    case = make_case(5, 11, 7, 9)
    p = torch.softmax(case["student_head"].logits(case["student_hidden_TD"]), -1)
    q = torch.softmax(case["teacher_head"].logits(case["teacher_hidden_TE"]), -1)
    kl = torch.tensor(
        [sum(pv * (pv / qv).log() for pv, qv in zip(*row, strict=True)) for row in zip(p, q, strict=True)]
    )
    dlogits = case["token_weights_T"][:, None] * p * (p.log() - q.log() - kl[:, None])
    result, grads = run(case, implementation="reference")
    torch.testing.assert_close(result.kl_T, kl)
    torch.testing.assert_close(result.loss, (case["token_weights_T"] * kl).sum())
    torch.testing.assert_close(grads["hidden"], dlogits @ case["student_head"].weight)
    torch.testing.assert_close(grads["weight"], dlogits.T @ case["student_hidden_TD"])


def test_diagnostics_by_hand() -> None:
    """V = 20, k = 16: the student's top 16 are ids 0…15, the teacher's 4…19; 12 in common."""
    student = torch.linspace(3, 0, 20, dtype=torch.float64)
    teacher = student.flip(0)
    result = linear_divergence(
        student[None],
        LinearHead(torch.eye(20, dtype=torch.float64)),
        teacher_logits_TV=teacher[None],
        sampled_ids_T=torch.tensor([2]),
    )
    p, q = torch.softmax(student, 0), torch.softmax(teacher, 0)
    assert result.overlap_ratio_T.item() == 12 / 16
    assert result.overlap_mass_T.item() == pytest.approx(p[4:16].sum().item())
    assert result.student_logprob_T.item() == pytest.approx(p[2].log().item())
    assert result.teacher_logprob_T.item() == pytest.approx(q[2].log().item())
    assert result.student_entropy_T.item() == pytest.approx(-(p * p.log()).sum().item())
    assert result.teacher_entropy_T.item() == pytest.approx(-(q * q.log()).sum().item())


# --- chunked against the reference -------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", [1, 97, 50257])
@pytest.mark.parametrize("tokens", [1, 63, 257])
def test_matches_reference_at_awkward_sizes(tokens: int, vocab: int) -> None:
    assert_matches_reference(make_case(tokens, vocab), chunk_tokens=100)


FORMS: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "scale": {"student_form": {"logit_scale": 0.25}, "teacher_form": {"logit_scale": 1.7}},
    "student cap": {"student_form": {"soft_cap": 3.0}},
    "teacher cap": {"teacher_form": {"soft_cap": 3.0}},
    "padding": {"student_padding": 31, "teacher_padding": 7},
    "student padding": {"student_padding": 31},
    "widths": {"teacher_width": 33},
    "all": {
        "bias": True,
        "student_padding": 5,
        "teacher_padding": 9,
        "teacher_width": 17,
        "student_form": {"logit_scale": 0.7, "soft_cap": 4.0},
        "teacher_form": {"logit_scale": 1.3, "soft_cap": 5.0},
    },
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("form", FORMS)
def test_matches_reference_in_every_head_form(form: str, temperature: float) -> None:
    assert_matches_reference(make_case(70, 3001, **FORMS[form]), chunk_tokens=32, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_keep_float32_statistics(dtype: torch.dtype) -> None:
    assert_matches_reference(make_case(70, 301, **FORMS["all"]), dtype, chunk_tokens=32)
    result, _ = run(cast(make_case(3, 97), dtype))
    assert {getattr(result, name).dtype for name in ("loss", *DIAGNOSTICS)} == {torch.float32}


def test_mixed_dtypes_of_student_and_teacher() -> None:
    case = cast(make_case(9, 97), torch.float32)
    narrow = cast(case, torch.bfloat16)
    mixed = {**case, "teacher_hidden_TE": narrow["teacher_hidden_TE"], "teacher_head": narrow["teacher_head"]}
    actual, actual_grads = run(mixed)
    expected, expected_grads = run(mixed, implementation="reference")
    assert_near(actual.kl_T, expected.kl_T, 1e-5)
    assert_near(actual_grads["hidden"], expected_grads["hidden"], 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    case = make_case(4, 7, 3, **{"teacher_width": 3, **FORMS[form]})
    case, leaves = with_leaves(case)

    def loss(*tensors: Tensor) -> Tensor:
        given = dict(zip(leaves, tensors, strict=True))
        head = replace(case["student_head"], weight=given["weight"], bias=given.get("bias"))
        arguments = {**case, "student_hidden_TD": given["hidden"], "student_head": head}
        return linear_divergence(**arguments, temperature=0.8, chunk_tokens=3).loss

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


def test_teacher_logits_equal_hidden_and_head() -> None:
    case = cast(make_case(20, 97, teacher_form={"soft_cap": 3.0}), torch.float32)
    expected, expected_grads = run(case, temperature=0.7, chunk_tokens=8)
    logits = case["teacher_head"].logits(case["teacher_hidden_TE"])
    given = {**case, "teacher_hidden_TE": None, "teacher_head": None, "teacher_logits_TV": logits}
    for implementation in ("chunked", "reference"):
        actual, actual_grads = run(given, temperature=0.7, chunk_tokens=8, implementation=implementation)
        assert_near(actual.kl_T, expected.kl_T, 1e-5)
        assert_near(actual_grads["weight"], expected_grads["weight"], 1e-5)


def test_weights_weigh_tokens() -> None:
    case = cast(make_case(6, 97), torch.float32)
    case["token_weights_T"] = torch.tensor([0.0, 1.0, 2.0, 0.0, 0.5, 0.0])
    result, grads = run(case)
    torch.testing.assert_close(result.loss, (case["token_weights_T"] * result.kl_T).sum())
    assert (grads["hidden"][case["token_weights_T"] == 0] == 0).all()
    default, _ = run({**case, "token_weights_T": None})
    torch.testing.assert_close(default.loss, default.kl_T.sum())
    torch.testing.assert_close(default.kl_T, result.kl_T)


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
    ("frozen", "gemms_per_chunk"),
    [((), 4), (("weight", "bias"), 3), (("weight",), 3), (("hidden",), 3), (("hidden", "weight", "bias"), 2)],
)
def test_gradients_only_of_what_requires_them(frozen: tuple[str, ...], gemms_per_chunk: int) -> None:
    case = cast(make_case(12, 97, bias=True), torch.float32)
    _, expected = run(case, chunk_tokens=4)
    case, leaves = with_leaves(case, frozen)
    with Ledger() as ledger:
        loss = linear_divergence(**case, chunk_tokens=4).loss
        if loss.requires_grad:
            loss.backward()
    assert ledger.gemms == 3 * gemms_per_chunk
    assert loss.requires_grad == (len(frozen) < 3)
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name in frozen)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected[name])


def test_no_grad_costs_only_the_projections() -> None:
    case, _ = with_leaves(cast(make_case(12, 97), torch.float32))
    with Ledger() as ledger, torch.no_grad():
        result = linear_divergence(**case, chunk_tokens=4)
    assert ledger.gemms == 3 * 2
    assert not result.loss.requires_grad


def test_diagnostics_are_detached_and_the_teacher_gets_no_gradient() -> None:
    case, _ = with_leaves(cast(make_case(5, 97), torch.float32))
    teacher_weight = case["teacher_head"].weight.requires_grad_()
    teacher_hidden = case["teacher_hidden_TE"].requires_grad_()
    for implementation in IMPLEMENTATIONS:
        result = linear_divergence(**case, implementation=implementation)
        result.loss.backward()
        assert not any(getattr(result, name).requires_grad for name in DIAGNOSTICS)
        assert teacher_weight.grad is None
        assert teacher_hidden.grad is None


def test_tied_head_collects_both_gradients() -> None:
    case = make_case(9, 97)
    tokens = torch.arange(9)
    grads = []
    for implementation in ("chunked", "reference"):
        embedding = case["student_head"].weight.clone().requires_grad_()
        tied = {**case, "student_hidden_TD": torch.tanh(embedding[tokens]), "student_head": LinearHead(embedding)}
        linear_divergence(**tied, implementation=implementation).loss.backward()
        assert embedding.grad is not None
        grads.append(embedding.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_backward_twice_with_any_factor() -> None:
    case, leaves = with_leaves(cast(make_case(9, 97, bias=True), torch.float32))
    loss = linear_divergence(**case, chunk_tokens=4).loss
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


def test_autocast_changes_nothing() -> None:
    case = cast(make_case(9, 97), torch.float32)
    expected, expected_grads = run(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, actual_grads = run(case)
    assert torch.equal(actual.kl_T, expected.kl_T)
    assert torch.equal(actual_grads["weight"], expected_grads["weight"])


# --- memory ------------------------------------------------------------------------------------------------------
def test_never_a_whole_logits_tensor() -> None:
    tokens, vocab, chunk = 64, 5003, 16
    case, _ = with_leaves(cast(make_case(tokens, vocab, 8, 8), torch.float32))
    with Ledger() as ledger:
        linear_divergence(**case, chunk_tokens=chunk).loss.backward()
    assert ledger.largest_numel <= 2 * chunk * vocab < tokens * vocab


def peak_extra_bytes(case: dict[str, Any], **options: Any) -> int:
    """Most bytes that forward and backward held at once, over what they leave behind (the gradients)."""
    case, _ = with_leaves(case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        linear_divergence(**case, **options).loss.backward()
    held = peak = 0
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    return peak - held


def test_peak_memory_does_not_grow_with_tokens() -> None:
    # Of the seven diagnostics and the row factors, 8 numbers a token must grow; at V = 5003 that is nothing.
    small, large = (
        peak_extra_bytes(cast(make_case(tokens, 5003, 8, 8), torch.float32), chunk_tokens=16) for tokens in (32, 256)
    )
    whole = peak_extra_bytes(cast(make_case(256, 5003, 8, 8), torch.float32), implementation="reference")
    assert large <= 1.1 * small
    assert large < whole / 10


def test_default_chunk_is_bounded_and_knows_only_the_vocabulary() -> None:
    for vocab in (1, 97, 49152, 151_936, 10**9):
        rows = default_chunk_tokens(vocab)
        assert rows == 1 or rows * vocab * 4 <= CHUNK_BYTES


# --- properties --------------------------------------------------------------------------------------------------
def logits_divergence(student_TV: Tensor, teacher_TV: Tensor, **options: Any) -> tuple[Divergence, Tensor]:
    """Through an identity head, so that the student's "hidden states" are its logits; and their gradient."""
    student_TV = student_TV.detach().clone().requires_grad_()
    vocab = student_TV.shape[1]
    result = linear_divergence(
        student_TV,
        LinearHead(torch.eye(vocab, dtype=student_TV.dtype)),
        teacher_logits_TV=teacher_TV,
        sampled_ids_T=torch.zeros(len(student_TV), dtype=torch.int64),
        **options,
    )
    result.loss.backward()
    assert student_TV.grad is not None
    return result, student_TV.grad


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), vocab=st.integers(1, 300), scale=st.floats(0.01, 30), constant=st.floats(-100, 100))
def test_kl_is_not_negative_and_ignores_a_constant(seed: int, vocab: int, scale: float, constant: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, 3, vocab, generator=generator, dtype=torch.float64)
    result, grad = logits_divergence(student.float(), teacher.float())
    assert (result.kl_T >= -1e-5).all()
    assert (result.student_entropy_T >= -1e-5).all()
    # Float32 sheds bits of a logit when 100 is added to it; that the formula does not care, float64 shows.
    result, grad = logits_divergence(student, teacher)
    for moved in (
        logits_divergence(student + constant, teacher),
        logits_divergence(student, teacher + constant),
    ):
        torch.testing.assert_close(moved[0].kl_T, result.kl_T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moved[1], grad, rtol=1e-9, atol=1e-9)
    # Each row of the gradient to the logits sums to 0, for the same reason.
    torch.testing.assert_close(grad.sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_teacher_equal_to_student_gives_zero() -> None:
    case = cast(make_case(20, 3001, scale=3.0), torch.float32)
    case |= {"teacher_hidden_TE": case["student_hidden_TD"], "teacher_head": case["student_head"]}
    for implementation in IMPLEMENTATIONS:
        result, grads = run(case, implementation=implementation)
        assert result.kl_T.abs().max() <= 1e-6
        assert grads["hidden"].abs().max() <= 1e-6
        assert (result.overlap_ratio_T == 1).all()


def test_student_and_teacher_are_not_interchangeable() -> None:
    case = cast(make_case(8, 97), torch.float32)
    swapped = {
        **case,
        "student_hidden_TD": case["teacher_hidden_TE"],
        "student_head": case["teacher_head"],
        "teacher_hidden_TE": case["student_hidden_TD"],
        "teacher_head": case["student_head"],
    }
    forward, backward = run(case)[0], run(swapped)[0]
    assert (forward.kl_T - backward.kl_T).abs().max() > 0.1
    assert_near(forward.student_entropy_T, backward.teacher_entropy_T, 1e-6)


@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_extreme_logits_stay_finite(soft_cap: float | None) -> None:
    """Logits of ±1e4: probabilities underflow to 0 on both sides, their logarithms must not."""
    student, teacher = (torch.full((4, 50), -1e4) for _ in range(2))
    student[0, 3] = teacher[0, 7] = 1e4  # sure of different tokens: KL = 2e4
    student[1, 3] = teacher[1, 3] = 1e4  # of the same: 0
    student[2] = 0.0  # undecided against sure
    teacher[2, 7] = 1e4
    student[3, 3] = 1e4  # sure against undecided
    teacher[3] = 0.0
    head = LinearHead(torch.eye(50), soft_cap=soft_cap)
    grads = []
    for implementation in ("chunked", "reference"):
        logits = student.clone().requires_grad_()
        result = linear_divergence(
            logits,
            head,
            teacher_logits_TV=teacher,
            sampled_ids_T=torch.full((4,), 11),
            implementation=implementation,
        )
        result.loss.backward()
        assert all(torch.isfinite(getattr(result, name)).all() for name in ("loss", *DIAGNOSTICS))
        assert logits.grad is not None
        grads.append(logits.grad)
        if soft_cap is None:
            expected = torch.tensor([2e4, 0.0, 2e4 * 49 / 50 - torch.tensor(50.0).log(), torch.tensor(50.0).log()])
            torch.testing.assert_close(result.kl_T, expected)
            assert result.teacher_logprob_T[0] == -2e4
    assert_near(grads[0], grads[1], 1e-5)


def test_chunk_size_does_not_matter() -> None:
    case = cast(make_case(65, 307, bias=True), torch.float32)
    expected, expected_grads = run(case)
    for chunk_tokens in (1, 7, 64, 65, 1000):
        actual, actual_grads = run(case, chunk_tokens=chunk_tokens)
        assert_near(actual.kl_T, expected.kl_T, 2e-6)
        for name, grad in actual_grads.items():
            assert_near(grad, expected_grads[name], 2e-6, name)


def test_rows_of_one_token_chunks_do_not_see_their_neighbours() -> None:
    case = cast(make_case(33, 307), torch.float32)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    moved = {name: value[order] if name.endswith(("TD", "TE", "_T")) else value for name, value in case.items()}
    expected, expected_grads = run(case, chunk_tokens=1)
    actual, actual_grads = run(moved, chunk_tokens=1)
    for name in DIAGNOSTICS:
        assert torch.equal(getattr(actual, name), getattr(expected, name)[order]), name
    assert torch.equal(actual_grads["hidden"], expected_grads["hidden"][order])


def test_same_arguments_same_bits() -> None:
    case = cast(make_case(65, 307), torch.float32)
    (first, first_grads), (second, second_grads) = (run(case, chunk_tokens=16) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first_grads["weight"], second_grads["weight"])


def test_no_tokens_no_loss() -> None:
    for implementation in IMPLEMENTATIONS:
        result, grads = run(cast(make_case(0, 97, bias=True), torch.float32), implementation=implementation)
        assert result.loss.item() == 0
        assert result.kl_T.shape == (0,)
        assert all((grad == 0).all() for grad in grads.values())
        assert grads["weight"].shape == (97, 60)


# --- what is refused ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, r"implementation: 'cuda'.*'auto', 'chunked', 'reference'"),
        ({"objective": "forward"}, r"objective: 'forward'.*'reverse_kl'"),
        ({"temperature": 0.0}, "temperature"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"teacher_head": None}, "teacher_hidden_TE and teacher_head"),
        ({"teacher_head": LinearHead(torch.zeros(98, 60))}, "teacher_head: 98 valid ids, the student's head has 97"),
        ({"teacher_head": LinearHead(torch.zeros(97, 61))}, "teacher_head: weight"),
        ({"student_head": LinearHead(torch.zeros(97, 60), valid_vocab_size=98)}, "student_head: 98 valid ids"),
        ({"student_head": LinearHead(torch.zeros(97, 60), bias=torch.zeros(1))}, "student_head: bias"),
        ({"teacher_hidden_TE": torch.zeros(4, 60)}, "teacher_hidden: 4 rows, the student has 5"),
        ({"teacher_logits_TV": torch.zeros(5, 97)}, "not both"),
        ({"teacher_hidden_TE": None, "teacher_head": None, "teacher_logits_TV": torch.zeros(5, 98)}, "slice padding"),
        ({"sampled_ids_T": torch.tensor([0, 1, 2, 3, 97])}, r"sampled_ids_T: ids span 0…97"),
        ({"sampled_ids_T": torch.tensor([0, 1, 2, 3, -100])}, r"sampled_ids_T: ids span -100…3"),
        ({"sampled_ids_T": torch.zeros(5)}, "sampled_ids_T"),
        ({"token_weights_T": torch.ones(4)}, "token_weights_T"),
    ],
)
def test_misfits_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**cast(make_case(5, 97), torch.float32), **change})
