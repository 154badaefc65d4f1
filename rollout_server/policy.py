"""Which weights a model can take: everything is checked before anything is exchanged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opd_mesh.errors import CorruptWeightsError, InvalidInputError


def check_policy_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that :func:`rollout_server.staged_weights.stage_weights` could not lay out, or should not.

    Args:
        model: names and shapes come from its ``state_dict``.
        tensors: by those names; any float dtype. Names left out keep their weights.

    Raises:
        InvalidInputError: an unknown name, a wrong shape, or two values for one tied weight.
        CorruptWeightsError: NaN or infinity.
    """
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
