"""Which weights a model can take: everything is checked before anything is exchanged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opd_mesh.errors import CorruptWeightsError, InvalidInputError


def check_names_and_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that the model has no place for. Names left out keep their weights.

    Raises:
        InvalidInputError: an unknown name, or a wrong shape.
    """
    for name, tensor in tensors.items():
        field = f"tensors[{name}]"
        if name not in shapes:
            raise InvalidInputError("the model has no weight of that name", field=field)
        if tuple(tensor.shape) != shapes[name]:
            raise InvalidInputError(f"shape {list(tensor.shape)}, the model has {list(shapes[name])}", field=field)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight in the dtype in which it is to be served: what was finite before may be beyond its range.

    One pass that allocates nothing: extremes carry NaN on.

    Raises:
        CorruptWeightsError: NaN or infinity.
    """
    if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        raise CorruptWeightsError(f"holds NaN or infinity in {tensor.dtype}, as it is served", field=f"tensors[{name}]")
