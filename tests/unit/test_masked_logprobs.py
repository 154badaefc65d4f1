"""Log-probabilities over allowed ids: against autograd of a masked log_softmax in float64, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from divergence_cases import Case, assert_near, cast
from opd_kernels import AllowedIds, LinearHead, TokenLogprobs, masked_token_logprobs, token_logprobs
from test_divergence_gradients import Ledger
from test_token_logprobs import DEVICE, FORMS, HALF, make_tokens, with_leaves
from torch import Tensor

MASKS = 5


def make_masked(tokens: int, vocab: int, width: int = 60, *, seed: int = 0, **options: Any) -> tuple[Case, Tensor]:
    """Arguments but for ``allowed``, and [T, V] the masks: of a handful of kinds, each with its token."""
    case = make_tokens(tokens, vocab, width, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    allowed_MV = torch.rand(MASKS, vocab, generator=generator) < torch.tensor([0.02, 0.2, 0.5, 0.9, 1.0])[:, None]
    allowed_MV[0, 3] = True
    index_T = torch.randint(MASKS, (tokens,), generator=generator)
    rows = [torch.multinomial(allowed_MV[i].double(), 1, generator=generator) for i in index_T]
    case["token_ids_T"] = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    case["allowed"] = AllowedIds.of(allowed_MV, index_T)
    return case, allowed_MV[index_T]


def on(case: Case, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Floating tensors in a dtype, all on a device."""
    allowed = case["allowed"]
    moved = cast({key: value for key, value in case.items() if key != "allowed"}, dtype, device)
    return {**moved, "allowed": AllowedIds(allowed.packed_MB.to(device), allowed.index_T.to(device))}


def run(case: Case, frozen: tuple[str, ...] = (), **options: Any) -> tuple[TokenLogprobs, dict[str, Tensor]]:
    arguments, leaves = with_leaves(case, frozen)
    result = masked_token_logprobs(**arguments, allowed=case["allowed"], **options)
    result.logprobs_T.backward(case["upstream_T"].to(result.logprobs_T.dtype))
    return result, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def expected(case: Case, allowed_TV: Tensor, temperature: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(log-probabilities, entropies, gradients): whole tensors in float64."""
    arguments, leaves = with_leaves(cast({k: v for k, v in case.items() if k != "allowed"}, torch.float64))
    logits_TV = arguments["head"].logits(arguments["hidden_TD"]) / temperature
    log_p_TV = logits_TV.masked_fill(~allowed_TV, -torch.inf).log_softmax(-1)
    logprobs_T = log_p_TV.gather(1, arguments["token_ids_T"][:, None])[:, 0]
    p_TV = log_p_TV.exp()
    entropy_T = -torch.where(allowed_TV, p_TV * log_p_TV, 0.0).sum(-1)
    logprobs_T.backward(case["upstream_T"].double())
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return logprobs_T.detach(), entropy_T.detach(), grads


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4])
def test_equals_autograd_in_float64(form: str, chunk_tokens: int | None) -> None:
    case, allowed_TV = make_masked(13, 97, **FORMS[form])
    case = on(case, torch.float32)
    logprobs_T, entropy_T, grads = expected(case, allowed_TV, 0.7)
    result, found = run(on(case, torch.float32, DEVICE), temperature=0.7, chunk_tokens=chunk_tokens)
    assert result.logprobs_T.dtype == result.entropy_T.dtype == torch.float32
    assert_near(result.logprobs_T.detach().cpu(), logprobs_T, 1e-6, "logprobs")
    assert_near(result.entropy_T.cpu(), entropy_T, 1e-6, "entropy")
    assert found.keys() == grads.keys()
    for name, grad in found.items():
        assert_near(grad.cpu(), grads[name], 1e-6, name)


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Logits of half-precision operands are not rounded; a gradient is, once."""
    case, allowed_TV = make_masked(9, 97, bias=True)
    case = on(case, dtype)
    logprobs_T, entropy_T, grads = expected(case, allowed_TV, 1.0)
    result, found = run(case)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert_near(result.logprobs_T.detach(), logprobs_T, tolerance, "logprobs")
    assert_near(result.entropy_T, entropy_T, tolerance, "entropy")
    for name, grad in found.items():
        assert grad.dtype == dtype
        assert_near(grad, grads[name], max(tolerance, torch.finfo(dtype).eps), name)


def test_all_ids_allowed_is_token_logprobs_and_one_is_certain() -> None:
    case, _ = make_masked(11, 97)
    case = on(case, torch.float32)
    everything = AllowedIds.of(torch.ones(1, 97, dtype=torch.bool), torch.zeros(11, dtype=torch.int64))
    arguments, _ = with_leaves(case)
    free = token_logprobs(**arguments)
    masked = masked_token_logprobs(**arguments, allowed=everything)
    assert_near(masked.logprobs_T.detach(), free.logprobs_T.detach(), 1e-6, "logprobs")
    assert_near(masked.entropy_T, free.entropy_T, 1e-6, "entropy")
    only = AllowedIds.of(torch.nn.functional.one_hot(arguments["token_ids_T"], 97).bool(), torch.arange(11))
    certain, grads = run({**case, "allowed": only})
    assert (certain.logprobs_T == 0).all()
    assert (certain.entropy_T == 0).all()
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("frozen", [("hidden",), ("weight", "bias"), ("weight",), ("bias",)])
def test_gradients_of_what_requires_them_alone(frozen: tuple[str, ...]) -> None:
    case, _ = make_masked(7, 97, bias=True)
    case = on(case, torch.float32)
    _, whole = run(case)
    _, found = run(case, frozen)
    assert found.keys() == whole.keys() - set(frozen)
    assert all(torch.equal(grad, whole[name]) for name, grad in found.items())


def test_never_a_whole_logits_tensor() -> None:
    tokens, vocab, chunk = 128, 2003, 16
    case, _ = make_masked(tokens, vocab, 8)
    arguments, _ = with_leaves(on(case, torch.float32))
    saved: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with Ledger() as ledger, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        masked_token_logprobs(**arguments, allowed=case["allowed"], chunk_tokens=chunk).logprobs_T.sum().backward()
    assert ledger.largest_numel <= (chunk + 1) * vocab < tokens * vocab
    # Within backward a chunk's own [C, V] is saved and freed; nothing larger ever is.
    assert max(saved) <= chunk * vocab


def test_no_tokens_no_work() -> None:
    case, _ = make_masked(0, 97, bias=True)
    case["allowed"] = AllowedIds(torch.empty(0, 13, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    result, grads = run(on(case, torch.float32))
    assert result.logprobs_T.shape == result.entropy_T.shape == (0,)
    assert all((grad == 0).all() for grad in grads.values())


def test_autograd_is_told_what_it_may_do() -> None:
    case, _ = make_masked(3, 97)
    case = on(case, torch.float32)
    arguments, leaves = with_leaves(case)
    result = masked_token_logprobs(**arguments, allowed=case["allowed"])
    assert not result.entropy_T.requires_grad
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(result.logprobs_T.sum(), leaves["hidden"], create_graph=True)
    with torch.no_grad():
        assert torch.equal(masked_token_logprobs(**arguments, allowed=case["allowed"]).logprobs_T, result.logprobs_T)


def test_masks_of_whatever_width_survive_packing() -> None:
    for vocab in (1, 7, 8, 9, 64, 131):
        allowed_MV = torch.rand(4, vocab, generator=torch.Generator().manual_seed(vocab)) < 0.5
        allowed = AllowedIds.of(allowed_MV, torch.tensor([3, 0, 0, 2, 1]))
        assert allowed.packed_MB.shape == (4, -(-vocab // 8))
        assert torch.equal(allowed.rows(slice(0, 5), vocab), allowed_MV[[3, 0, 0, 2, 1]])


def test_what_does_not_fit_is_refused() -> None:
    case, allowed_TV = make_masked(6, 97)
    case = on(case, torch.float32)
    arguments, _ = with_leaves(case)
    good: AllowedIds = case["allowed"]
    forbidden = int((~allowed_TV[2]).nonzero()[0, 0])
    ids_T = case["token_ids_T"].clone()
    ids_T[2] = forbidden
    cases: list[tuple[dict[str, Any], str]] = [
        ({"token_ids_T": ids_T}, f"token_ids_T: id {forbidden} of row 2"),
        ({"allowed": replace(good, packed_MB=good.packed_MB[:, :-1])}, r"expected uint8 \[masks, 13\]"),
        ({"allowed": replace(good, packed_MB=good.packed_MB.bool())}, "allowed: torch.bool"),
        ({"allowed": replace(good, index_T=good.index_T[1:])}, "allowed: index"),
        ({"allowed": replace(good, index_T=good.index_T.int())}, "allowed: index"),
        ({"allowed": replace(good, index_T=torch.full((6,), MASKS))}, f"of {MASKS} masks"),
        ({"head": LinearHead(torch.ones(97, 3))}, "head: weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            masked_token_logprobs(**{**arguments, "allowed": good, **changes})
