"""Fused divergences between language-model heads: hidden states and heads in, loss and gradients out."""

from opd_kernels.divergence import linear_divergence
from opd_kernels.head import LinearHead
from opd_kernels.inputs import Divergence
from opd_kernels.objectives import JSD, ExOPD, ForwardKL, Objective, ReverseKL, SampledToken, TopK
from opd_kernels.signals import Signal

__all__ = [
    "JSD",
    "Divergence",
    "ExOPD",
    "ForwardKL",
    "LinearHead",
    "Objective",
    "ReverseKL",
    "SampledToken",
    "Signal",
    "TopK",
    "linear_divergence",
]
