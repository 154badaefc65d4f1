"""Linear layers whose weights lie in oneDNN's own layout, for decoding on a CPU.

A decode step multiplies a handful of rows by every weight of the model. A plain GEMM first copies the weight into
blocks that suit its kernel, which for eight rows takes longer than to multiply; here that is done once per policy.
Costs the memory of a second copy of these weights, and changes results by rounding alone.

The two operators are torch's own, but private. Where one is missing, or a product differs from the plain one by more
than rounding, every layer stays plain.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

logger = logging.getLogger(__name__)

ROWS_HINT = 16  # the layout suits any number of rows; oneDNN wants one to choose by
_PROBE_ROWS = 3
_TOLERANCE = 1e-4  # of the largest |product|; another order of summation gives 1e-6

# None: this layer stays plain.
PackedWeights = Mapping[nn.Linear, Tensor | None]


class PackedLinears:
    """All float32 ``nn.Linear`` layers of a model on the CPU; none elsewhere.

    From the constructor on a layer computes with its packed weight, if it has one. After a change of the weights give
    it another, by :meth:`exchange`.

    Attributes:
        layers: those that may be packed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._packed: dict[nn.Linear, Tensor | None] = {}
        self._works = True
        self._proved: set[tuple[int, ...]] = set()  # weight shapes
        self.layers = [
            module
            for module in model.modules()
            if type(module) is nn.Linear
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        ]
        for linear in self.layers:
            linear.forward = partial(self._forward, linear)  # type: ignore[method-assign]

    def complete(self) -> None:
        """Pack the weights of the layers that have no packed one yet."""
        if len(self._packed) < len(self.layers):
            self.exchange(self.pack({linear: linear.weight for linear in self.layers if linear not in self._packed}))

    @torch.no_grad()
    def pack(self, weights: Mapping[nn.Linear, Tensor]) -> PackedWeights:
        """Pack weights [out, in] of some of the layers, beside those in use. Any thread."""
        packed: dict[nn.Linear, Tensor | None] = dict.fromkeys(weights)
        if not self._works:
            return packed
        try:
            for linear, weight in weights.items():
                packed[linear] = laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
                if tuple(weight.shape) not in self._proved:
                    _prove(weight, laid_out)
                    self._proved.add(tuple(weight.shape))
        except (AttributeError, RuntimeError) as failure:
            logger.warning("linear layers compute with plain weights, for packing does not work here: %s", failure)
            self._works = False
            return dict.fromkeys(weights)
        return packed

    def exchange(self, packed: PackedWeights) -> None:
        """Compute with these from now on."""
        self._packed |= packed

    def _forward(self, linear: nn.Linear, x: Tensor) -> Tensor:
        packed = self._packed.get(linear)
        return functional.linear(x, linear.weight, linear.bias) if packed is None else _multiply(x, packed, linear.bias)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def _prove(weight: Tensor, packed: Tensor) -> None:
    """Raises :class:`RuntimeError` where the packed product is not the plain one, up to rounding."""
    x = torch.randn(_PROBE_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = functional.linear(x, weight)
    error = float((_multiply(x, packed, None) - wanted).abs().max())
    if not error <= _TOLERANCE * float(wanted.abs().max()):
        raise RuntimeError(f"a packed product of shape {list(weight.shape)} is off by {error}")
