"""New weights beside the old ones, so that the swap is an exchange of pointers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opd_mesh.errors import InvalidInputError
from rollout_server.engine import PreparedPolicy
from rollout_server.packed_linears import PackedLinears, PackedWeights
from rollout_server.policy import check_finite, check_names_and_shapes


@dataclass(frozen=True, slots=True)
class StagedWeights(PreparedPolicy):
    """Weights in the model's dtype and on its device.

    Attributes:
        tensors: which parameter or persistent buffer gets which storage. Tied names appear once per object.
        packed: the linear layers among them, in oneDNN's layout.
    """

    tensors: tuple[tuple[Tensor, Tensor], ...]
    packed: PackedWeights


class WeightHomes:
    """Which objects of a model hold each of its weights, and so which names are tied.

    Found once, while nothing moves: later an exchange may be under way in another thread, and two names of one weight
    be at two addresses for a moment.

    Attributes:
        by_name: for each name of the model's ``state_dict`` the parameters or buffers that share its storage (a tied
            weight may be several objects), the same tuple for each of the names.
        shapes: by the same names.
    """

    def __init__(self, model: nn.Module) -> None:
        names = model.state_dict().keys()
        objects = dict(_parameters_and_buffers(model))
        groups: dict[tuple[object, ...], dict[int, Tensor]] = {}
        for tensor in objects.values():
            groups.setdefault(_place(tensor), {})[id(tensor)] = tensor
        homes = {place: tuple(group.values()) for place, group in groups.items()}
        self.by_name = {name: homes[_place(tensor)] for name, tensor in objects.items() if name in names}
        self.shapes = {name: tuple(group[0].shape) for name, group in self.by_name.items()}


def _place(tensor: Tensor) -> tuple[object, ...]:
    if not tensor.numel():  # it has no address
        return (id(tensor),)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


@torch.no_grad()
def stage_weights(
    homes: WeightHomes, tensors: Mapping[str, Tensor], packed: PackedLinears | None = None
) -> StagedWeights:
    """Check weights and lay them out. Changes nothing of the model, and no exchange disturbs it: any thread.

    Args:
        tensors: by name, any float dtype; names left out keep their weights. Storage that fits as it is is kept, not
            copied: leave it alone.
        packed: of the model, where it has packed layers.

    Raises:
        InvalidInputError: an unknown name, a wrong shape, or two values for one tied weight.
        CorruptWeightsError: NaN or infinity, in the model's dtype.
    """
    check_names_and_shapes(homes.shapes, tensors)
    staged: dict[int, tuple[Tensor, Tensor]] = {}
    names: dict[int, str] = {}
    for name, given in tensors.items():
        own = homes.by_name[name][0]
        new = given.detach().to(device=own.device, dtype=own.dtype).contiguous()
        if id(own) in staged:
            if not torch.equal(new, staged[id(own)][1]):
                raise InvalidInputError(f"is tied to {names[id(own)]}, but the values differ", field=f"tensors[{name}]")
            continue
        check_finite(name, new)
        if new.is_inference():  # a parameter cannot point to such a tensor
            new = new.clone()
        names[id(own)] = name
        staged |= {id(home): (home, new) for home in homes.by_name[name]}
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
