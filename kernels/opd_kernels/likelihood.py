"""Log-probabilities of given tokens: what likelihoods (SFT) and ratios of policies (GRPO) are made of.

The letters in names are explained in :mod:`opd_kernels.inputs`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_kernels.checks import check_token_logprobs
from opd_kernels.divergence import implementation_of
from opd_kernels.head import LinearHead
from opd_kernels.inputs import DivergenceInputs, TokenLogprobs
from opd_kernels.objectives import LogLikelihood
from opd_kernels.signals import Signal


def token_logprobs(
    hidden_TD: Tensor,
    head: LinearHead,
    token_ids_T: Tensor,
    *,
    temperature: float = 1.0,
    implementation: str = "auto",
    deterministic: bool = False,
    chunk_tokens: int | None = None,
) -> TokenLogprobs:
    """log softmax(logits / τ) at given ids, differentiable, without a [T, V] tensor.

    A loss is a plain expression of ``logprobs_T``: ``-(weights_T * logprobs_T).sum()``, or a clipped ratio. Backward
    projects again and takes any upstream gradient g_T: ∂L/∂z_v = g_t (1[v=y_t] − p_v) at the logits z over τ. It
    computes gradients only of what requires them, and refuses to be differentiated itself.

    Args:
        hidden_TD: [T, D] floating; row t predicts token t.
        head: weight [≥V, D].
        token_ids_T: [T] integer, each below V.
        temperature: τ, divides the logits, after scale and soft-cap.
        implementation, chunk_tokens: as in :func:`opd_kernels.linear_divergence`.
        deterministic: as there, of a row's results and, for the same g_t, its hidden state's gradient.

    A g_t of 0 gives zeros, but does not mask its row: 0 · NaN is NaN, so its hidden state must be finite.

    Raises:
        ValueError: the arguments do not fit each other; the message names the one to mend.
    """
    inputs = DivergenceInputs(
        student_hidden_TD=hidden_TD,
        student_head=head,
        teachers=(Signal(),),
        reference=None,
        # A copy: backward reads them, whatever has become of the caller's, and whether or not those were made in
        # inference mode, as sampled ids are.
        sampled_ids_T=token_ids_T.clone(),
        token_weights_NT=torch.ones(1, *hidden_TD.shape[:1], device=hidden_TD.device),
        objective=LogLikelihood(),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        deterministic=deterministic,
    )
    module = implementation_of(inputs, implementation)
    check_token_logprobs(inputs)
    result: TokenLogprobs = module.token_logprobs(inputs)
    return result
