"""Linear layers in oneDNN's layout compute what plain ones compute, from the weights of the last ``pack``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rollout_server.packed_linears import PackedLinears


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_same_products(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 131, bias=bias)
    x = torch.randn(rows, 2, 48)
    with torch.inference_mode():
        wanted = linear(x)
        PackedLinears(nn.Sequential(linear))
        found = linear(x)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_new_weights_count_after_pack() -> None:
    linear = nn.Linear(8, 8, bias=False)
    packed = PackedLinears(nn.Sequential(linear))
    with torch.inference_mode():
        linear.weight.copy_(torch.eye(8))
        packed.pack()
        torch.testing.assert_close(linear(torch.arange(8.0)[None]), torch.arange(8.0)[None])


def test_other_dtypes_and_layers_are_left_alone() -> None:
    class Own(nn.Linear):
        """Has a forward of its own, perhaps."""

    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), Own(4, 4))
    PackedLinears(model)
    assert all("forward" not in vars(module) for module in model)
