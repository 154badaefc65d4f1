"""Fused divergences between two language-model heads: hidden states and heads in, loss and gradients out."""

from opd_kernels.divergence import Divergence, linear_divergence
from opd_kernels.head import LinearHead

__all__ = ["Divergence", "LinearHead", "linear_divergence"]
