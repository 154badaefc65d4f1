"""Log-probabilities of given tokens where only some ids were allowed: what a grammar leaves of a distribution.

At a token whose mask allows the ids A, p_v = exp(z_v/τ) / Σ_{u∈A} exp(z_u/τ) for v ∈ A, and 0 for all others.

Rows go through in chunks of C, in forward for values and in backward once more, where autograd differentiates the same
few operations chunk by chunk: [C, V] is all that ever exists of [T, V], and a mask is a bit per id until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_kernels.checks import check_token_logprobs
from opd_kernels.head import LinearHead
from opd_kernels.inputs import DivergenceInputs, TokenLogprobs
from opd_kernels.objectives import LogLikelihood
from opd_kernels.signals import Signal
from opd_kernels.torch_backend import default_chunk_tokens


@dataclass(frozen=True, slots=True)
class AllowedIds:
    """Which ids each of T tokens was one of.

    Attributes:
        packed_MB: [M, ⌈V / 8⌉] uint8, distinct masks; bit i % 8 of byte i // 8 is id i.
        index_T: [T] int64, the mask of each token.
    """

    packed_MB: Tensor
    index_T: Tensor

    @classmethod
    def of(cls, allowed_MV: Tensor, index_T: Tensor) -> AllowedIds:
        """From masks [M, V] bool."""
        padded = torch.nn.functional.pad(allowed_MV, (0, -allowed_MV.shape[1] % 8)).unflatten(1, (-1, 8))
        powers_8 = 2 ** torch.arange(8, device=allowed_MV.device)
        return cls((padded * powers_8).sum(-1, dtype=torch.uint8), index_T)

    def rows(self, part: slice, vocab_size: int) -> Tensor:
        """[C, V] bool, of some tokens."""
        packed_CB1 = self.packed_MB[self.index_T[part]][:, :, None]
        shifts_8 = torch.arange(8, dtype=torch.uint8, device=packed_CB1.device)
        return ((packed_CB1 >> shifts_8) & 1).flatten(1)[:, :vocab_size].bool()


def masked_token_logprobs(
    hidden_TD: Tensor,
    head: LinearHead,
    token_ids_T: Tensor,
    allowed: AllowedIds,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> TokenLogprobs:
    """log softmax over the allowed ids' logits / τ, at given ids, differentiable once, without a [T, V] tensor.

    As :func:`opd_kernels.token_logprobs`, but for the ids that count; the entropy is of the same distribution.

    Args:
        allowed: of each row; every token must be one of its row's.
        chunk_tokens: rows of a chunk; None takes what is good for V.

    Raises:
        ValueError: the arguments do not fit each other, or a token is not allowed; the message names the one to mend.
    """
    inputs = DivergenceInputs(
        student_hidden_TD=hidden_TD,
        student_head=head,
        teachers=(Signal(),),
        reference=None,
        sampled_ids_T=token_ids_T.clone(),  # for backward, whatever becomes of the caller's
        token_weights_NT=torch.ones(1, *hidden_TD.shape[:1], device=hidden_TD.device),
        objective=LogLikelihood(),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        deterministic=False,
    )
    check_token_logprobs(inputs)
    _check_allowed(inputs, allowed)
    vocab_size = head.vocab_size
    settings = _Settings(
        form=replace(head, weight=torch.empty(0), bias=None, valid_vocab_size=None),
        temperature=temperature,
        vocab_size=vocab_size,
        chunk=chunk_tokens or default_chunk_tokens(vocab_size),
        dtype=inputs.result_dtype,
    )
    masks = allowed.packed_MB.clone(), allowed.index_T.clone()
    logprobs_T, entropy_T = _MaskedLogprobs.apply(
        hidden_TD, head.weight, head.bias, inputs.sampled_ids_T.long(), *masks, settings
    )
    return TokenLogprobs(logprobs_T=logprobs_T, entropy_T=entropy_T)


def _check_allowed(inputs: DivergenceInputs, allowed: AllowedIds) -> None:
    packed_MB, index_T, ids_T = allowed.packed_MB, allowed.index_T, inputs.sampled_ids_T.long()
    width = -(-inputs.vocab_size // 8)
    if packed_MB.dim() != 2 or packed_MB.shape[1] != width or packed_MB.dtype != torch.uint8:
        raise ValueError(
            f"allowed: {packed_MB.dtype} {tuple(packed_MB.shape)}, expected uint8 [masks, {width}] for a vocabulary of "
            f"{inputs.vocab_size}"
        )
    if index_T.shape != ids_T.shape or index_T.dtype != torch.int64:
        raise ValueError(f"allowed: index {index_T.dtype} {tuple(index_T.shape)}, expected int64 {tuple(ids_T.shape)}")
    for tensor in (packed_MB, index_T):
        if tensor.device != ids_T.device:
            raise ValueError(f"allowed: on {tensor.device}, the hidden states are on {ids_T.device}")
    if not len(index_T):
        return
    if not (int(index_T.min()) >= 0 and int(index_T.max()) < len(packed_MB)):
        raise ValueError(f"allowed: index spans {int(index_T.min())}…{int(index_T.max())} of {len(packed_MB)} masks")
    fits_T = (packed_MB[index_T, ids_T // 8] >> (ids_T % 8).to(torch.uint8)) & 1
    if not bool(fits_T.all()):
        row = int((fits_T == 0).nonzero()[0, 0])
        raise ValueError(f"token_ids_T: id {int(ids_T[row])} of row {row} is not one that its mask allows")


@dataclass(frozen=True, slots=True)
class _Settings:
    """All but the tensors.

    Attributes:
        form: a head without its weight.
        dtype: of logits and results.
    """

    form: LinearHead
    temperature: float
    vocab_size: int
    chunk: int
    dtype: torch.dtype

    def chunks(self, tokens: int) -> Iterator[slice]:
        for start in range(0, tokens, self.chunk):
            yield slice(start, min(start + self.chunk, tokens))

    def widened(self, tensor: Tensor) -> Tensor:
        """The tokens' rows of a weight or bias. Of bfloat16 operands a GEMM would round logits to 8 bits."""
        return tensor.detach()[: self.vocab_size].to(self.dtype)

    def log_p(self, hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, allowed_CV: Tensor) -> Tensor:
        """[C, V] log-probabilities, −inf where not allowed."""
        with torch.autocast(hidden_CD.device.type, enabled=False):
            logits_CV = replace(self.form, weight=weight_VD, bias=bias_V).logits(hidden_CD) / self.temperature
            return logits_CV.masked_fill(~allowed_CV, -torch.inf).log_softmax(-1)


class _MaskedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_ids_T: Tensor,
        packed_MB: Tensor,
        index_T: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        allowed = AllowedIds(packed_MB, index_T)
        wide_VD, wide_V = settings.widened(weight_VD), None if bias_V is None else settings.widened(bias_V)
        logprobs_T = torch.empty(len(hidden_TD), dtype=settings.dtype, device=hidden_TD.device)
        entropy_T = torch.empty_like(logprobs_T)
        for part in settings.chunks(len(hidden_TD)):
            allowed_CV = allowed.rows(part, settings.vocab_size)
            log_p_CV = settings.log_p(hidden_TD[part].to(settings.dtype), wide_VD, wide_V, allowed_CV)
            logprobs_T[part] = log_p_CV.gather(1, token_ids_T[part, None])[:, 0]
            entropy_T[part] = torch.special.entr(log_p_CV.exp_()).sum(-1)
        # Saved so, autograd notices when they are changed before backward, and frees them after it.
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, token_ids_T, packed_MB, index_T)
        ctx.settings = settings
        ctx.mark_non_differentiable(entropy_T)
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor | None, _entropy: None) -> tuple[Tensor | None, ...]:
        # What is differentiated again would be a constant to autograd, in silence.
        if torch.is_grad_enabled():
            raise RuntimeError("masked_token_logprobs has no second derivatives: call backward without create_graph")
        if grad_T is None:
            return (None,) * 7
        hidden_TD, weight_VD, bias_V, token_ids_T, packed_MB, index_T = ctx.saved_tensors
        settings: _Settings = ctx.settings
        allowed = AllowedIds(packed_MB, index_T)
        given = (hidden_TD, weight_VD, bias_V)
        wanted = [x is not None and needed for x, needed in zip(given, ctx.needs_input_grad, strict=False)]
        wide_VD = settings.widened(weight_VD).requires_grad_(wanted[1])
        wide_V = None if bias_V is None else settings.widened(bias_V).requires_grad_(wanted[2])
        # Added up over the chunks in the dtype of the results, and rounded once.
        grads = [
            torch.zeros(x.shape, dtype=settings.dtype, device=x.device) if needed else None
            for x, needed in zip(given, wanted, strict=True)
        ]
        for part in settings.chunks(len(hidden_TD)):
            hidden_CD = hidden_TD[part].detach().to(settings.dtype).requires_grad_(wanted[0])
            with torch.enable_grad():
                log_p_CV = settings.log_p(hidden_CD, wide_VD, wide_V, allowed.rows(part, settings.vocab_size))
                logprobs_C = log_p_CV.gather(1, token_ids_T[part, None])[:, 0]
            leaves = [x for x, needed in zip((hidden_CD, wide_VD, wide_V), wanted, strict=True) if needed]
            found = iter(torch.autograd.grad(logprobs_C, leaves, grad_T[part]))
            rows = (part, slice(settings.vocab_size), slice(settings.vocab_size))
            for grad, own in zip(grads, rows, strict=True):
                if grad is not None:
                    grad[own] += next(found)
        results = (None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, given, strict=True))
        return (*results, None, None, None, None)
