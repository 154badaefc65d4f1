"""Fused divergences between language-model heads, and log-probabilities: hidden states in, losses and gradients out."""

from opd_kernels.divergence import linear_divergence
from opd_kernels.head import LinearHead
from opd_kernels.inputs import Divergence, TokenLogprobs
from opd_kernels.likelihood import token_logprobs
from opd_kernels.masked_likelihood import AllowedIds, masked_token_logprobs
from opd_kernels.objectives import JSD, ExOPD, ForwardKL, Objective, ReverseKL, SampledToken, TopK
from opd_kernels.signals import Signal

__all__ = [
    "JSD",
    "AllowedIds",
    "Divergence",
    "ExOPD",
    "ForwardKL",
    "LinearHead",
    "Objective",
    "ReverseKL",
    "SampledToken",
    "Signal",
    "TokenLogprobs",
    "TopK",
    "linear_divergence",
    "masked_token_logprobs",
    "token_logprobs",
]
