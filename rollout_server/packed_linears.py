"""Linear layers whose weights lie in oneDNN's own layout, for decoding on a CPU.

A decode step multiplies a handful of rows by every weight of the model. A plain GEMM first copies the weight into
blocks that suit its kernel, which for eight rows takes longer than to multiply; here that is done once per policy.
Costs the memory of a second copy of these weights, and changes results by rounding alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

ROWS_HINT = 16  # the layout suits any number of rows; oneDNN wants one to choose by


class PackedLinears:
    """All float32 ``nn.Linear`` layers of a model on the CPU; none elsewhere.

    From the constructor on they compute with the packed weights: after a change of the weights call :meth:`pack`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._packed: dict[nn.Linear, Tensor] = {}
        self._linears = [
            module
            for module in model.modules()
            if type(module) is nn.Linear
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        ]
        self.pack()
        for linear in self._linears:
            linear.forward = partial(self._forward, linear)  # type: ignore[method-assign]

    @torch.inference_mode()
    def pack(self) -> None:
        """Take the weights as they are now."""
        for linear in self._linears:
            self._packed[linear] = torch.ops.mkldnn._reorder_linear_weight(linear.weight, ROWS_HINT)

    def _forward(self, linear: nn.Linear, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed[linear], linear.bias, "none", [], "")
        return product
