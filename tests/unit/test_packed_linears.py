"""Linear layers in oneDNN's layout compute what plain ones compute, from the weights last given to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rollout_server import packed_linears
from rollout_server.packed_linears import PackedLinears


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_same_products(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 131, bias=bias)
    x = torch.randn(rows, 2, 48)
    with torch.inference_mode():
        wanted = linear(x)
        packed = PackedLinears(nn.Sequential(linear))
        assert torch.equal(linear(x), wanted)  # nothing is packed yet
        packed.complete()
        found = linear(x)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_new_weights_count_once_they_are_exchanged() -> None:
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    packed = PackedLinears(nn.Sequential(first, second))
    x, eye = torch.arange(8.0)[None], torch.eye(8)
    with torch.inference_mode():
        before = first(x), second(x)
        new = packed.pack({first: eye})
        packed.complete()
        torch.testing.assert_close(first(x), before[0])
        packed.exchange(new)
        torch.testing.assert_close(first(x), x)
        torch.testing.assert_close(second(x), before[1])


def test_other_dtypes_and_layers_are_left_alone() -> None:
    class Own(nn.Linear):
        """Has a forward of its own, perhaps."""

    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), Own(4, 4))
    PackedLinears(model)
    assert all("forward" not in vars(module) for module in model)


def _missing(*_: Any) -> Tensor:
    raise AttributeError("no such operator")


@pytest.mark.parametrize("multiply", [_missing, lambda x, packed, bias: torch.zeros(x.shape[0], packed.shape[0])])
def test_where_packing_does_not_work_layers_stay_plain(
    multiply: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    linear = nn.Linear(8, 8)
    packed = PackedLinears(nn.Sequential(linear))
    packed.complete()
    other = nn.Linear(8, 9)
    packed.layers.append(other)  # of a shape that was not proved
    monkeypatch.setattr(packed_linears, "_multiply", multiply)
    new = packed.pack({linear: torch.eye(8), other: other.weight.detach()})
    assert "packing does not work here" in caplog.text
    packed.exchange(new)
    linear.weight.data = torch.eye(8)  # as the swap does
    with torch.inference_mode():
        torch.testing.assert_close(linear(torch.ones(1, 8)), 1 + linear.bias[None])
