"""Linear layers through oneDNN give torch's own products, and only while they should."""

import pytest
import torch
from torch import nn

from megatron_oprd.rollout.packed import linears_packed


def _layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 17, bias=False))


@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (1, 1, 24)])
def test_products_are_those_of_torch(shape: tuple[int, ...]) -> None:
    layers = _layers()
    states = torch.randn(shape)
    with torch.no_grad():
        expected = layers(states)
        with linears_packed(layers):
            assert all("forward" in one.__dict__ for one in layers)
            found = layers(states)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


def test_later_products_have_later_weights() -> None:
    layers = _layers()
    with torch.no_grad():
        for _ in range(2):
            next(layers.parameters()).mul_(2)
            states = torch.randn(3, 24)
            expected = layers(states)
            with linears_packed(layers):
                found = layers(states)
            scale = expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


def test_an_error_leaves_the_layers_as_they_were() -> None:
    layers = _layers()
    with pytest.raises(RuntimeError), linears_packed(layers):
        layers(torch.randn(3, 5))
    assert not any("forward" in one.__dict__ for one in layers)


def test_other_dtypes_and_subclasses_stay() -> None:
    class Own(nn.Linear):
        pass

    for layers in (_layers().to(torch.bfloat16), nn.Sequential(Own(4, 4))):
        with linears_packed(layers):
            assert not any("forward" in one.__dict__ for one in layers)
