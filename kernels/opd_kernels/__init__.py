"""Fused divergences between two language-model heads: hidden states and heads in, loss and gradients out."""

from opd_kernels.head import LinearHead

__all__ = ["LinearHead"]
