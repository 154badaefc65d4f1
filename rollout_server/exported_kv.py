"""Keys and values of a sequence as named tensors, for another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rollout_server.cache import KeyValues, LayerShape


def to_tensors(key_values: KeyValues) -> dict[str, Tensor]:
    """``layer{i}.keys`` and ``layer{i}.values``, each [H, T, D]; nothing for a layer that borrows another's."""
    tensors = {}
    for index, pair in enumerate(key_values.layers):
        if pair is not None:
            tensors[f"layer{index}.keys"], tensors[f"layer{index}.values"] = pair
    return tensors


def from_tensors(
    tensors: Mapping[str, Tensor], layers: Sequence[LayerShape | None], length: int, device: torch.device
) -> KeyValues:
    """The inverse of :func:`to_tensors`.

    Raises:
        ValueError: these are not keys and values of ``length`` tokens in layers of these shapes.
    """
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for index, shape in enumerate(layers):
        if shape is None:
            pairs.append(None)
            continue
        keys, values = tensors.get(f"layer{index}.keys"), tensors.get(f"layer{index}.values")
        if keys is None or values is None:
            raise ValueError(f"layer {index} is missing")
        if not shape.fits(keys, values, length):
            raise ValueError(
                f"layer {index} has keys {list(keys.shape)} and values {list(values.shape)} of {keys.dtype}, "
                f"{shape} and {length} tokens are wanted"
            )
        pairs.append((keys.to(device), values.to(device)))
    if len(tensors) != 2 * sum(pair is not None for pair in pairs):
        raise ValueError(f"{len(tensors)} tensors for a model of {len(layers)} layers")
    return KeyValues(pairs, length)
