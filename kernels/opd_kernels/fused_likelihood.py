"""Log-probabilities of given tokens: the loop over chunks once in forward, for values, and once more in backward.

How a loss depends on the log-probabilities is known in backward alone, so nothing can be multiplied out before; and
keeping the logits for it would be the [T, V] tensor. Backward projects again: then a token's upstream gradient g_t is
its weight in the sum Σ_t g_t log p_t, whose gradient :mod:`opd_kernels.fused` computes as it does a divergence's.

    forward     logits_CV = hidden_CD · W_VDᵀ                       one GEMM a chunk
    backward    logits_CV again, grad_CV · W_VD, grad_CVᵀ · hidden_CD    three
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_kernels.fused import Backend, go_through_chunks
from opd_kernels.inputs import DivergenceInputs, TokenLogprobs


def fused_token_logprobs(inputs: DivergenceInputs, backend_of: Callable[[DivergenceInputs], Backend]) -> TokenLogprobs:
    """See :func:`opd_kernels.token_logprobs`. A backend may hold copies of the head, so each pass has its own."""
    head = inputs.student_head
    logprobs_T, entropy_T = _TokenLogprobs.apply(
        inputs.student_hidden_TD, head.weight, head.bias, inputs.sampled_ids_T, inputs, backend_of
    )
    return TokenLogprobs(logprobs_T=logprobs_T, entropy_T=entropy_T)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_ids_T: Tensor,
        inputs: DivergenceInputs,
        backend_of: Callable[[DivergenceInputs], Backend],
    ) -> tuple[Tensor, Tensor]:
        _, (entropy_T, logprobs_T), _, _ = go_through_chunks(inputs, backend_of(inputs), False, False, False)
        # Saved so, autograd notices when they are changed before backward, and frees them after it.
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, token_ids_T)
        none = torch.empty(0)
        ctx.inputs, ctx.backend_of = _with_tensors(inputs, none, none, none, none, none), backend_of
        ctx.mark_non_differentiable(entropy_T)
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor | None, _entropy: None) -> tuple[Tensor | None, ...]:
        # What is differentiated again would be a constant to autograd, in silence.
        if torch.is_grad_enabled():
            raise RuntimeError("token_logprobs has no second derivatives: call backward without create_graph")
        if grad_T is None:
            return (None,) * 6
        hidden_TD, weight_VD, bias_V, token_ids_T = ctx.saved_tensors
        inputs = _with_tensors(ctx.inputs, hidden_TD, weight_VD, bias_V, token_ids_T, grad_T)
        *_, grads = go_through_chunks(inputs, ctx.backend_of(inputs), *ctx.needs_input_grad[:3])
        leaves = zip(grads, (hidden_TD, weight_VD, bias_V), strict=True)
        return (*(None if grad is None else grad.to(x.dtype) for grad, x in leaves), None, None, None)


def _with_tensors(
    inputs: DivergenceInputs,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    token_ids_T: Tensor,
    weights_T: Tensor,
) -> DivergenceInputs:
    return replace(
        inputs,
        student_hidden_TD=hidden_TD,
        student_head=replace(inputs.student_head, weight=weight_VD, bias=bias_V),
        sampled_ids_T=token_ids_T,
        token_weights_NT=weights_T[None],
    )
