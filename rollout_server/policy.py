"""New weights into a live model: everything is checked before anything is copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from opd.v1 import common_pb2
from torch import Tensor, nn

from opd_mesh.errors import CorruptWeightsError, InvalidInputError
from opd_mesh.models.checkpoint import state_digest
from opd_mesh.policy import PolicyId
from opd_mesh.torch_tensors import from_numpy


def check_manifest(headers: Sequence[common_pb2.TensorHeader], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every parameter of the model, once, in its own shape: told before a byte is taken or memory is set aside.

    Raises:
        InvalidInputError: naming the tensor.
    """
    given = {header.name for header in headers}
    missing = sorted(shapes.keys() - given)
    if missing:
        raise InvalidInputError(
            f"{missing[0]} is missing ({len(missing)} of {len(shapes)} in all); a policy holds every parameter",
            field="manifest.tensors",
        )
    for header in headers:
        field = f"tensors[{header.name}]"
        if header.name not in shapes:
            raise InvalidInputError("the model has no weight of that name", field=field)
        if tuple(header.shape) != shapes[header.name]:
            raise InvalidInputError(
                f"shape {list(header.shape)}, the model has {list(shapes[header.name])}", field=field
            )


def verify_digest(arrays: Mapping[str, np.ndarray], offered: PolicyId) -> None:
    """Raises :class:`CorruptWeightsError` where the bytes are not those that were announced."""
    digest = state_digest((name, from_numpy(array)) for name, array in arrays.items())
    if digest != offered.digest:
        raise CorruptWeightsError(
            f"the weights received hash to {digest[:16]}…, policy {offered} was announced; the old policy stays"
        )


def check_policy_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that :func:`copy_policy_tensors` could not copy, or should not.

    Args:
        model: names and shapes come from its ``state_dict``.
        tensors: by those names; any float dtype. Names left out keep their weights.

    Raises:
        InvalidInputError: no tensors, an unknown name, a wrong shape, or two values for one tied weight.
        CorruptWeightsError: NaN or infinity.
    """
    if not tensors:
        raise InvalidInputError("must hold at least one tensor", field="tensors")
    own = model.state_dict()
    given_at: dict[int, str] = {}
    for name, tensor in tensors.items():
        field = f"tensors[{name}]"
        if name not in own:
            raise InvalidInputError("the model has no weight of that name", field=field)
        if tensor.shape != own[name].shape:
            raise InvalidInputError(f"shape {list(tensor.shape)}, the model has {list(own[name].shape)}", field=field)
        if not _is_finite(tensor):
            raise CorruptWeightsError("holds NaN or infinity", field=field)
        # A tied head has two names for one storage; the later copy would silently win.
        twin = given_at.setdefault(own[name].data_ptr(), name) if own[name].numel() else name
        if twin != name and not torch.equal(tensor, tensors[twin]):
            raise InvalidInputError(f"is tied to {twin}, but the values differ", field=field)


def _is_finite(tensor: Tensor) -> bool:
    """One pass that allocates nothing: extremes carry NaN on."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


@torch.no_grad()
def copy_policy_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy checked tensors into the model's own storage, in its own dtype and on its device."""
    own = model.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
