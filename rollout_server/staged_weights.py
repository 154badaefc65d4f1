"""New weights beside the old ones, so that the swap is an exchange of pointers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rollout_server.engine import PreparedPolicy
from rollout_server.packed_linears import PackedLinears, PackedWeights
from rollout_server.policy import check_policy_tensors


@dataclass(frozen=True, slots=True)
class StagedWeights(PreparedPolicy):
    """Weights in the model's dtype and on its device.

    Attributes:
        tensors: which parameter or persistent buffer gets which storage. Tied names appear once per object.
        packed: the linear layers among them, in oneDNN's layout.
    """

    tensors: tuple[tuple[Tensor, Tensor], ...]
    packed: PackedWeights


@torch.no_grad()
def stage_weights(model: nn.Module, tensors: Mapping[str, Tensor], packed: PackedLinears | None) -> StagedWeights:
    """Check weights and lay them out. Reads the model and changes nothing of it, so any thread may call it.

    Args:
        tensors: by name in the model's ``state_dict``. Storage that fits as it is is kept, not copied: leave it alone.
        packed: of this model, where it has packed layers.

    Raises:
        InvalidInputError, CorruptWeightsError: as :func:`check_policy_tensors`.
    """
    check_policy_tensors(model, tensors)
    homes: dict[int, list[Tensor]] = {}  # a tied weight may be two objects over one storage
    by_name: dict[str, Tensor] = {}
    for name, tensor in _parameters_and_buffers(model):
        by_name[name] = tensor
        if not any(tensor is home for home in homes.setdefault(tensor.data_ptr(), [])):
            homes[tensor.data_ptr()].append(tensor)
    staged: dict[int, tuple[Tensor, Tensor]] = {}
    for name, given in tensors.items():
        own = by_name[name]
        if id(own) in staged:
            continue  # tied, and equal, which was checked
        new = given.detach().to(device=own.device, dtype=own.dtype).contiguous()
        if new.is_inference():  # a parameter cannot point to such a tensor
            new = new.clone()
        for home in homes[own.data_ptr()] if own.numel() else [own]:
            if home.shape == own.shape:
                staged[id(home)] = (home, new)
    layers = packed.layers if packed is not None else []
    weights = {linear: staged[id(linear.weight)][1] for linear in layers if id(linear.weight) in staged}
    return StagedWeights(tuple(staged.values()), packed.pack(weights) if packed is not None else {})


def exchange_weights(staged: StagedWeights, packed: PackedLinears | None) -> None:
    """Serve staged weights. The storage of the old ones is freed, unless somebody else holds it."""
    for own, new in staged.tensors:
        own.data = new
    if packed is not None:
        packed.exchange(staged.packed)


def _parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
