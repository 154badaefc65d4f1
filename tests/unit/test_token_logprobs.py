"""Log-probabilities of given tokens: every implementation against autograd of log_softmax in float64.

Triton's kernels run in its interpreter where there is no GPU, at sizes that its milliseconds a row allow.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from typing import Any

import opd_kernels.torch_backend
import pytest
import torch
from divergence_cases import Case, assert_near, cast, make_signal, poisoned_memory
from opd_kernels import LinearHead, TokenLogprobs, token_logprobs
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
HALF = [torch.bfloat16, torch.float16]

# Options of `make_tokens`.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"form": {"logit_scale": 0.25}},
    "negative scale": {"form": {"logit_scale": -0.8}},
    "cap": {"form": {"soft_cap": 3.0}},
    "large cap": {"form": {"soft_cap": 1e4}},  # tanh of 1e-4 and less
    "padding": {"padding": 31},
    "all": {"bias": True, "padding": 5, "form": {"logit_scale": 0.7, "soft_cap": 4.0}},
}
GRADIENTS = ("hidden", "weight", "bias")


def make_tokens(tokens: int, vocab: int, width: int = 60, *, seed: int = 0, **options: Any) -> Case:
    """Float64 arguments of ``token_logprobs``, and an upstream gradient with signs and zeros."""
    generator = torch.Generator().manual_seed(seed)
    signal = make_signal(tokens, vocab, width, generator=generator, **options)
    upstream_T = torch.randn(tokens, generator=generator, dtype=torch.float64)
    upstream_T[2::5] = 0.0
    return {
        "hidden_TD": signal.hidden_TE,
        "head": signal.head,
        "token_ids_T": torch.randint(vocab, (tokens,), generator=generator),
        "upstream_T": upstream_T,
    }


def with_leaves(case: Case, frozen: tuple[str, ...] = ()) -> tuple[Case, dict[str, Tensor]]:
    """Arguments of ``token_logprobs`` with fresh leaves, and those by name."""
    head = case["head"]
    given = {"hidden": case["hidden_TD"], "weight": head.weight, "bias": head.bias}
    leaves = {
        name: tensor.detach().clone().requires_grad_(name not in frozen)
        for name, tensor in given.items()
        if tensor is not None
    }
    head = replace(head, weight=leaves["weight"], bias=leaves.get("bias"))
    return {"hidden_TD": leaves["hidden"], "head": head, "token_ids_T": case["token_ids_T"]}, leaves


def run(case: Case, *, frozen: tuple[str, ...] = (), **options: Any) -> tuple[TokenLogprobs, dict[str, Tensor]]:
    """Result, and gradients under the case's upstream gradient, by leaf."""
    arguments, leaves = with_leaves(case, frozen)
    result = token_logprobs(**arguments, **options)
    result.logprobs_T.backward(case["upstream_T"].to(result.logprobs_T.dtype))
    return result, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def truth(case: Case, *, temperature: float = 1.0) -> tuple[TokenLogprobs, dict[str, Tensor]]:
    """The same in float64, as it is written in a textbook: a whole [T, V] tensor, padding masked, autograd."""
    arguments, leaves = with_leaves(cast(case, torch.float64))
    head: LinearHead = arguments["head"]
    logits_TV = arguments["hidden_TD"] @ head.weight.T
    if head.bias is not None:
        logits_TV = logits_TV + head.bias
    logits_TV = logits_TV * head.logit_scale
    if head.soft_cap is not None:
        logits_TV = head.soft_cap * torch.tanh(logits_TV / head.soft_cap)
    is_padding_V = torch.arange(len(head.weight)) >= head.vocab_size
    log_p_TV = torch.log_softmax((logits_TV / temperature).masked_fill(is_padding_V, -math.inf), -1)
    logprobs_T = log_p_TV.gather(1, case["token_ids_T"].cpu()[:, None])[:, 0]
    entropy_T = torch.special.entr(log_p_TV.exp()).sum(-1)
    logprobs_T.backward(case["upstream_T"].cpu().double())
    result = TokenLogprobs(logprobs_T=logprobs_T.detach(), entropy_T=entropy_T.detach())
    return result, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_matches_truth(
    case: Case,
    implementation: str,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    *,
    frozen: tuple[str, ...] = (),
    temperature: float = 1.0,
    **options: Any,
) -> None:
    """``dtype`` arguments through the implementation, against the same values in float64."""
    narrow = cast(case, dtype)
    narrow["upstream_T"] = cast(case["upstream_T"], torch.promote_types(dtype, torch.float32))
    there = cast(narrow, dtype, DEVICE if implementation == "triton" else "cpu")
    there["upstream_T"] = narrow["upstream_T"].to(there["hidden_TD"].device)
    options |= {"implementation": implementation, "temperature": temperature}
    with poisoned_memory():
        actual, grads = run(there, frozen=frozen, **options)
    expected, expected_grads = truth(narrow, temperature=temperature)
    for name in ("logprobs_T", "entropy_T"):
        value = getattr(actual, name)
        assert value.dtype == torch.promote_types(dtype, torch.float32), name
        assert_near(value.cpu(), getattr(expected, name), tolerance, name)
    assert grads.keys() == expected_grads.keys() - set(frozen)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        # A gradient is handed back in the dtype of its tensor: half precision rounds it once.
        assert_near(grad.cpu(), expected_grads[name], max(tolerance, torch.finfo(dtype).eps), name)
    if "hidden" in grads:
        assert (grads["hidden"][there["upstream_T"] == 0] == 0).all()


# --- against log_softmax -----------------------------------------------------------------------------------------
# Triton's interpreter takes the exponential of what is read beyond V, too, before it is masked.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["reference", "torch", TRITON])
def test_matches_log_softmax_in_every_form(implementation: str, form: str, temperature: float) -> None:
    vocab, tokens = (131, 3) if implementation == "triton" else (301, 63)
    case = make_tokens(tokens, vocab, **FORMS[form])
    assert_matches_truth(case, implementation, temperature=temperature, chunk_tokens=max(1, tokens - 1))


@pytest.mark.parametrize(
    ("tokens", "vocab", "width", "chunk_tokens"),
    [
        (1, 1, 60, None),
        (63, 1, 60, None),
        (1, 97, 60, None),
        (63, 97, 60, 20),
        (4097, 97, 7, None),
        (4097, 97, 7, 100),
        (1, 50257, 12, None),
        (5, 50257, 12, 2),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_matches_log_softmax_at_awkward_sizes(
    implementation: str, tokens: int, vocab: int, width: int, chunk_tokens: int | None
) -> None:
    case = make_tokens(tokens, vocab, width, bias=True, padding=3)
    assert_matches_truth(case, implementation, chunk_tokens=chunk_tokens)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (2, 5), (63, 17), (11, 97), (1, 3001), (1, 50257)])
def test_triton_matches_log_softmax_at_awkward_sizes(tokens: int, vocab: int) -> None:
    assert_matches_truth(make_tokens(tokens, vocab, 12, bias=True, padding=3), "triton", chunk_tokens=32)


@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "weight")])
@pytest.mark.parametrize("implementation", ["reference", "torch", TRITON])
def test_gradients_only_of_what_requires_them(implementation: str, frozen: tuple[str, ...]) -> None:
    assert_matches_truth(make_tokens(3, 97, **FORMS["all"]), implementation, frozen=frozen, chunk_tokens=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_float64_operands_keep_float64(implementation: str, form: str) -> None:
    case = make_tokens(23, 301, **FORMS[form])
    assert_matches_truth(case, implementation, torch.float64, 1e-12, temperature=1.7, chunk_tokens=9)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize("implementation", ["reference", "torch", TRITON])
def test_half_precision_operands_keep_float32_results(
    implementation: str, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opd_kernels.torch_backend, "WIDEN_BYTES", 10_100)  # 42 rows of the head at a time
    tokens = 5 if implementation == "triton" else 23
    assert_matches_truth(make_tokens(tokens, 131, **FORMS[form]), implementation, dtype, chunk_tokens=4)


@pytest.mark.parametrize("implementation", ["torch", TRITON])
def test_operands_of_different_dtypes_are_promoted(implementation: str) -> None:
    narrow = cast(make_tokens(3, 97, bias=True), torch.bfloat16)
    wide, upstream_T = cast(narrow, torch.float32), torch.tensor([1.0, -2.0, 0.5])
    expected, expected_grads = truth({**narrow, "upstream_T": upstream_T})
    for change in ({"hidden_TD": wide["hidden_TD"]}, {"head": wide["head"]}):
        case = cast({**narrow, **change}, torch.float32) | {**narrow, **change, "upstream_T": upstream_T}
        case = {name: value if name == "head" else value.to(DEVICE) for name, value in case.items()}
        case["head"] = replace(case["head"], weight=case["head"].weight.to(DEVICE), bias=case["head"].bias.to(DEVICE))
        actual, grads = run(case, implementation=implementation)
        assert actual.logprobs_T.dtype == torch.float32
        assert_near(actual.logprobs_T.cpu(), expected.logprobs_T, 1e-5)
        for name, grad in grads.items():
            assert_near(grad.cpu(), expected_grads[name], max(1e-5, torch.finfo(grad.dtype).eps), name)


# --- extremes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("implementation", ["reference", "torch", TRITON])
def test_logits_of_1e4_stay_finite(implementation: str, soft_cap: float | None) -> None:
    """A token that is certain, one that has lost all its probability, and one of many that share it."""
    logits_TV = torch.full((4, 50), -1e4, dtype=torch.float64)
    logits_TV[0, 7] = logits_TV[1, 3] = 1e4
    logits_TV[2] = 1e4
    logits_TV[3, 5:] = 1e4
    case = {
        "hidden_TD": logits_TV,
        "head": LinearHead(torch.eye(50, dtype=torch.float64), soft_cap=soft_cap),
        "token_ids_T": torch.full((4,), 7),
        "upstream_T": torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64),
    }
    there = cast(case, torch.float32, DEVICE if implementation == "triton" else "cpu")
    actual, grads = run(there, implementation=implementation)
    expected, expected_grads = truth(case)
    # Row by row: the loss of a certain one must not hide behind another's 2e4.
    for row in range(4):
        for name in ("logprobs_T", "entropy_T"):
            assert_near(getattr(actual, name)[row].cpu(), getattr(expected, name)[row], 1e-6, name)
        assert_near(grads["hidden"][row].cpu(), expected_grads["hidden"][row], 1e-6)
    assert_near(grads["weight"].cpu(), expected_grads["weight"], 1e-6)
    if soft_cap is None:
        assert actual.logprobs_T[0] == 0
        assert actual.logprobs_T[1] == -2e4


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("implementation", ["torch", TRITON])
def test_upstream_gradients_of_any_size(implementation: str, dtype: torch.dtype) -> None:
    """From 1e-9 to 1e4, both signs and zero: a row's gradient is as precise as if it were alone."""
    case = cast(make_tokens(6, 97, scale=0.5, bias=True), dtype)
    case["upstream_T"] = torch.tensor([1e4, -1e-9, 0.0, 1.0, -1e-4, -0.0])
    expected = truth(case)[1]
    there = cast(case, dtype, DEVICE if implementation == "triton" else "cpu")
    there["upstream_T"] = case["upstream_T"].to(there["hidden_TD"].device)
    there["hidden_TD"] = there["hidden_TD"].float()  # so that a gradient of 1e-9 is a number there
    _, grads = run(there, implementation=implementation)
    tolerance = 2 * max(1e-5, torch.finfo(dtype).eps)
    for row in (0, 1, 3, 4):
        unit = float(case["upstream_T"][row])
        assert_near(grads["hidden"][row].cpu() / unit, expected["hidden"][row] / unit, tolerance)
    assert (grads["hidden"][[2, 5]] == 0).all()
    for name in ("weight", "bias"):
        assert_near(grads[name].cpu(), expected[name], tolerance, name)


@pytest.mark.parametrize("implementation", ["torch", TRITON])
def test_no_upstream_gradient_is_an_exact_zero(implementation: str) -> None:
    case = cast(make_tokens(3, 97, scale=20.0, bias=True), torch.float32, DEVICE)
    case["upstream_T"] = torch.zeros(3, device=DEVICE)
    _, grads = run(case, implementation=implementation)
    assert grads.keys() == set(GRADIENTS)
    assert all((grad == 0).all() for grad in grads.values())


# --- losses ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["reference", "torch", TRITON])
def test_cross_entropy(implementation: str) -> None:
    case = cast(make_tokens(5, 97, bias=True), torch.float32, DEVICE)
    arguments, leaves = with_leaves(case)
    loss = -token_logprobs(**arguments, implementation=implementation).logprobs_T.mean()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    arguments, leaves = with_leaves(case)
    logits_TV = arguments["head"].logits(arguments["hidden_TD"])
    expected = torch.nn.functional.cross_entropy(logits_TV, case["token_ids_T"])
    torch.testing.assert_close(loss, expected)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, list(leaves.values())), strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("implementation", ["torch", TRITON])
def test_a_clipped_ratio_with_a_divergence_from_a_reference(implementation: str) -> None:
    """GRPO's loss as it is written; the upstream gradient is of every sign, and 0 where the ratio was clipped."""
    case = make_tokens(8, 97)
    generator = torch.Generator().manual_seed(1)
    noise_2T = 0.3 * torch.randn(2, 8, generator=generator, dtype=torch.float64)
    old_T, reference_T = truth(case)[0].logprobs_T + noise_2T
    advantage_T = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)

    def loss_of(logprobs_T: Tensor) -> Tensor:
        logprobs_T = logprobs_T.double().cpu()
        ratio_T = (logprobs_T - old_T).exp()
        clipped_T = torch.minimum(ratio_T * advantage_T, ratio_T.clamp(0.8, 1.28) * advantage_T)
        difference_T = reference_T - logprobs_T
        kl_T = ratio_T * (difference_T.exp() - difference_T - 1)
        return (0.1 * kl_T - clipped_T).mean()

    narrow, leaves = with_leaves(cast(case, torch.float32, DEVICE))
    loss = loss_of(token_logprobs(**narrow, implementation=implementation).logprobs_T)
    loss.backward()
    wide, wide_leaves = with_leaves(cast(narrow, torch.float64))
    log_p_TV = torch.log_softmax(wide["head"].logits(wide["hidden_TD"]), -1)
    expected = loss_of(log_p_TV.gather(1, case["token_ids_T"][:, None])[:, 0])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert wide_leaves[name].grad is not None
        assert_near(leaf.grad.cpu(), wide_leaves[name].grad, 2e-5, name)


def test_a_tied_head_collects_both_gradients() -> None:
    case, tokens = make_tokens(9, 97), torch.arange(9)
    grads = []
    for implementation in ("torch", "reference"):
        embedding = case["head"].weight.clone().requires_grad_()
        result = token_logprobs(
            torch.tanh(embedding[tokens]), LinearHead(embedding), case["token_ids_T"], implementation=implementation
        )
        result.logprobs_T.backward(case["upstream_T"])
        assert embedding.grad is not None
        grads.append(embedding.grad)
    torch.testing.assert_close(grads[0], grads[1])


# --- bits --------------------------------------------------------------------------------------------------------
def bits(case: Case, **options: Any) -> dict[str, Tensor]:
    """Whatever there is of a row, by name, the rows first."""
    result, grads = run(case, deterministic=True, **options)
    found = {"logprobs": result.logprobs_T, "entropy": result.entropy_T, "hidden gradient": grads["hidden"]}
    assert all(torch.isfinite(value).all() for value in found.values())
    return found


def assert_rows_are_independent(case: Case, **options: Any) -> None:
    """Permuted, halved, and each end alone: the rows have the bits that they have among all."""
    tokens = len(case["token_ids_T"])
    every = bits(case, **options)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    for index in (order, torch.arange(tokens // 2, tokens), torch.tensor([0]), torch.tensor([tokens - 1])):
        there = index.to(case["hidden_TD"].device)
        part = {name: value if name == "head" else value[there] for name, value in case.items()}
        for name, value in bits(part, **options).items():
            assert torch.equal(value, every[name][there]), f"{name}, with {len(index)} of {tokens} rows"


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 97), (33, 97), (110, 307), (200, 97), (5, 3001)])
def test_deterministic_rows_do_not_see_their_neighbours(tokens: int, vocab: int, form: str) -> None:
    assert_rows_are_independent(cast(make_tokens(tokens, vocab, **FORMS[form]), torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_deterministic_rows_of_other_dtypes(dtype: torch.dtype) -> None:
    assert_rows_are_independent(cast(make_tokens(110, 307), dtype))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_deterministic_rows_of_triton(dtype: torch.dtype) -> None:
    case = make_tokens(3, 97, **FORMS["all"])
    assert_rows_are_independent(cast(case, dtype, DEVICE), chunk_tokens=2, implementation="triton")
    assert_matches_truth(case, "triton", dtype, deterministic=True, chunk_tokens=2)


@pytest.mark.parametrize("implementation", ["torch", TRITON])
def test_chunk_size_does_not_matter(implementation: str) -> None:
    case = cast(make_tokens(5, 97, bias=True), torch.float32, DEVICE)
    expected, expected_grads = run(case, implementation=implementation)
    for chunk_tokens in (1, 2, 9):
        actual, grads = run(case, implementation=implementation, chunk_tokens=chunk_tokens)
        assert_near(actual.logprobs_T, expected.logprobs_T, 2e-6)
        for name, grad in grads.items():
            assert_near(grad, expected_grads[name], 2e-6, name)
