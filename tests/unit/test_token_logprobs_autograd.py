"""Log-probabilities of given tokens: finite differences, what a call costs and holds, how autograd may use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import opd_kernels.divergence
import pytest
import torch
from divergence_cases import Case, cast
from opd_kernels import LinearHead, token_logprobs
from test_divergence_gradients import Ledger, peak_extra_bytes
from test_token_logprobs import DEVICE, FORMS, HALF, TRITON, make_tokens, run, with_leaves
from torch import Tensor

IMPLEMENTATIONS = ["reference", "torch", TRITON]


# --- finite differences ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_gradcheck(implementation: str, form: str) -> None:
    case = make_tokens(4, 6, 2, **FORMS[form])
    arguments, leaves = with_leaves(case)

    def logprobs(*tensors: Tensor) -> Tensor:
        given = dict(zip(leaves, tensors, strict=True))
        head = replace(arguments["head"], weight=given["weight"], bias=given.get("bias"))
        options: dict[str, Any] = {"temperature": 0.8, "chunk_tokens": 3, "implementation": implementation}
        return token_logprobs(given["hidden"], head, arguments["token_ids_T"], **options).logprobs_T

    assert torch.autograd.gradcheck(logprobs, tuple(leaves.values()))


# --- cost --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("frozen", "backward_gemms"),
    [((), 3), (("weight", "bias"), 2), (("weight",), 2), (("hidden",), 2), (("hidden", "weight"), 1)],
)
def test_gemms_of_a_chunk(frozen: tuple[str, ...], backward_gemms: int) -> None:
    arguments, _ = with_leaves(cast(make_tokens(12, 97, bias=True), torch.float32), frozen)
    with Ledger() as ledger:
        logprobs_T = token_logprobs(**arguments, chunk_tokens=4).logprobs_T
    assert ledger.gemms == 3
    with Ledger() as ledger:
        logprobs_T.sum().backward()
    assert ledger.gemms == 3 * backward_gemms


@pytest.mark.parametrize("form", ["plain", "all"])
def test_never_a_whole_logits_tensor(form: str) -> None:
    tokens, vocab, chunk = 128, 2003, 16
    arguments, _ = with_leaves(cast(make_tokens(tokens, vocab, 8, **FORMS[form]), torch.float32))
    saved: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with Ledger() as ledger, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        token_logprobs(**arguments, chunk_tokens=chunk).logprobs_T.sum().backward()
    assert ledger.largest_numel <= 2 * chunk * vocab < tokens * vocab
    assert max(saved) == arguments["head"].weight.numel()  # nothing of [C, V] waits for backward


def test_peak_memory_does_not_grow_with_tokens() -> None:
    peaks = {}
    for tokens, implementation in ((32, "torch"), (256, "torch"), (256, "reference")):
        arguments, _ = with_leaves(cast(make_tokens(tokens, 5003, 8), torch.float32))
        with peak_extra_bytes() as extra:
            result = token_logprobs(**arguments, chunk_tokens=16, implementation=implementation)
            result.logprobs_T.sum().backward()
            del result
        peaks[tokens, implementation] = extra[0]
    assert peaks[256, "torch"] <= 1.1 * peaks[32, "torch"]
    assert peaks[256, "torch"] < peaks[256, "reference"] / 10


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens_no_work(implementation: str, deterministic: bool) -> None:
    case = cast(make_tokens(0, 97, bias=True), torch.float32, DEVICE)
    with Ledger() as ledger:
        result, grads = run(case, implementation=implementation, deterministic=deterministic)
    if implementation != "reference":
        assert ledger.gemms == 0
    assert result.logprobs_T.shape == result.entropy_T.shape == (0,)
    assert grads["hidden"].shape == (0, 60)
    assert all((grad == 0).all() for grad in grads.values())


# --- autograd ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_entropy_is_detached(implementation: str) -> None:
    arguments, _ = with_leaves(cast(make_tokens(3, 97), torch.float32, DEVICE))
    result = token_logprobs(**arguments, implementation=implementation)
    assert result.logprobs_T.requires_grad
    assert not result.entropy_T.requires_grad
    assert result.entropy_T.grad_fn is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_gradients_the_same_values(implementation: str) -> None:
    arguments, _ = with_leaves(cast(make_tokens(3, 97, bias=True), torch.float32, DEVICE))
    expected = token_logprobs(**arguments, implementation=implementation)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = token_logprobs(**arguments, implementation=implementation)
        assert not result.logprobs_T.requires_grad
        assert torch.equal(result.logprobs_T, expected.logprobs_T.detach())
        assert torch.equal(result.entropy_T, expected.entropy_T)


def test_inference_mode_reaches_the_threads() -> None:
    torch.set_num_threads(2)
    arguments, _ = with_leaves(cast(make_tokens(40, 301), torch.float32))
    expected = token_logprobs(**arguments, chunk_tokens=8)
    with torch.inference_mode():
        result = token_logprobs(**arguments, chunk_tokens=8)
    assert torch.equal(result.logprobs_T, expected.logprobs_T.detach())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ids_may_come_from_inference_mode_and_change_afterwards(implementation: str) -> None:
    case = cast(make_tokens(3, 97), torch.float32, DEVICE)
    _, expected = run(case, implementation=implementation)
    with torch.inference_mode():
        ids_T = case["token_ids_T"].int()
    arguments, leaves = with_leaves({**case, "token_ids_T": ids_T})
    result = token_logprobs(**arguments, implementation=implementation)
    with torch.inference_mode():
        ids_T.zero_()
    result.logprobs_T.backward(case["upstream_T"])
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, expected[name])


def test_a_head_that_changed_before_backward_is_an_error() -> None:
    arguments, leaves = with_leaves(cast(make_tokens(3, 97), torch.float32))
    logprobs_T = token_logprobs(**arguments).logprobs_T
    with torch.no_grad():
        leaves["weight"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs_T.sum().backward()


@pytest.mark.parametrize("implementation", ["torch", TRITON])
def test_backward_again_and_by_parts(implementation: str) -> None:
    """Gradients of two losses on one graph, apart and together."""
    arguments, leaves = with_leaves(cast(make_tokens(4, 97, bias=True), torch.float32, DEVICE))
    logprobs_T = token_logprobs(**arguments, implementation=implementation, chunk_tokens=3).logprobs_T
    tensors = list(leaves.values())
    first = torch.autograd.grad(logprobs_T[:2].sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(logprobs_T[2:].square().sum(), tensors, retain_graph=True)
    (logprobs_T[:2].sum() + logprobs_T[2:].square().sum()).backward()
    for leaf, one, other in zip(tensors, first, second, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, one + other)


@pytest.mark.parametrize("implementation", ["torch", TRITON])
def test_second_derivatives_are_refused(implementation: str) -> None:
    arguments, leaves = with_leaves(cast(make_tokens(3, 97), torch.float32, DEVICE))
    logprobs_T = token_logprobs(**arguments, implementation=implementation).logprobs_T
    with pytest.raises(RuntimeError, match="token_logprobs has no second derivatives"):
        torch.autograd.grad(logprobs_T.sum(), leaves["hidden"], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    case = cast(make_tokens(9, 97, bias=True), dtype)
    case["upstream_T"] = case["upstream_T"].float()
    expected, expected_grads = run(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, grads = run(case)
    assert torch.equal(actual.logprobs_T, expected.logprobs_T)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_are_left_as_they_were(implementation: str) -> None:
    case = cast(make_tokens(4, 97, **FORMS["all"]), torch.float32, DEVICE)
    arguments, leaves = with_leaves(case)
    upstream_T = case["upstream_T"].clone()
    token_logprobs(**arguments, implementation=implementation, chunk_tokens=3).logprobs_T.backward(upstream_T)
    assert torch.equal(upstream_T, case["upstream_T"])
    assert torch.equal(leaves["hidden"], case["hidden_TD"])
    assert torch.equal(leaves["weight"], case["head"].weight)
    assert torch.equal(leaves["bias"], case["head"].bias)


# --- refusals ----------------------------------------------------------------------------------------------------
META_VD = torch.empty(97, 60, device="meta")


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, r"implementation: 'cuda'.*'auto', 'triton', 'torch', 'reference'"),
        ({"temperature": 0.0}, "temperature: 0.0 is not above 0"),
        ({"temperature": float("nan")}, "temperature: nan is not above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens: 0 is below 1"),
        ({"hidden_TD": zeros(5, 60).int()}, r"^hidden: torch.int32 \(5, 60\), expected floating \[tokens, width\]"),
        ({"hidden_TD": zeros(5)}, r"^hidden: .*expected floating \[tokens, width\]"),
        ({"hidden_TD": zeros()}, r"^hidden: torch.float32 \(\), expected floating \[tokens, width\]"),
        ({"head": LinearHead(zeros(97, 61))}, r"^head: weight \(97, 61\) does not fit hidden \(5, 60\)"),
        ({"head": LinearHead(zeros(97, 60), valid_vocab_size=98)}, "^head: 98 valid ids"),
        ({"head": LinearHead(zeros(97, 60), bias=zeros(1))}, r"^head: bias \(1,\), expected \(97,\)"),
        ({"head": LinearHead(zeros(97, 60), soft_cap=0.0)}, "^head: soft_cap 0.0 is not above 0"),
        ({"head": LinearHead(META_VD)}, "^head: weight on meta, the hidden states are on cpu"),
        ({"head": LinearHead(zeros(97, 60), bias=META_VD[:, 0])}, "^head: bias on meta, the hidden"),
        ({"token_ids_T": META_VD[:5, 0].long()}, "^token_ids_T: on meta, the hidden states are on cpu"),
        ({"token_ids_T": torch.tensor([0, 1, 2, 3, 97])}, r"^token_ids_T: ids span 0…97, the vocabulary is 0…96"),
        ({"token_ids_T": torch.tensor([0, 1, 2, 3, -100])}, r"^token_ids_T: ids span -100…3"),
        ({"token_ids_T": zeros(5)}, r"^token_ids_T: torch.float32 \(5,\), expected int64 or int32 \(5,\)"),
        ({"token_ids_T": zeros().long()}, r"^token_ids_T: torch.int64 \(\), expected int64 or int32 \(5,\)"),
        ({"token_ids_T": zeros(4).long()}, r"^token_ids_T: torch.int64 \(4,\), expected int64 or int32 \(5,\)"),
    ],
)
def test_misfits_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments, _ = with_leaves(cast(make_tokens(5, 97), torch.float32))
    for implementation in ("torch", "reference"):
        with pytest.raises(ValueError, match=message):
            token_logprobs(**{"implementation": implementation, **arguments, **change})


def test_ids_of_padding_are_refused() -> None:
    case = cast(make_tokens(2, 97, padding=31), torch.float32)
    arguments, _ = with_leaves({**case, "token_ids_T": torch.tensor([0, 97])})
    with pytest.raises(ValueError, match="ids span 0…97, the vocabulary is 0…96"):
        token_logprobs(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: cast(case, torch.float64, DEVICE), "'triton' computes in float32 and would round float64"),
        (lambda case: cast(case, torch.float32), "'triton' needs the package of that name"),
    ],
)
def test_triton_is_refused_where_it_cannot_run(
    change: Callable[[Case], Case], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "package" in message:
        monkeypatch.setattr(opd_kernels.divergence, "_has_triton", lambda: False)
    else:
        pytest.importorskip("triton")
    arguments, _ = with_leaves(change(make_tokens(2, 97)))
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments, implementation="triton")
