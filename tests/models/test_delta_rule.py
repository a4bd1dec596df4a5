"""The chunked delta rule against the recurrence, a token at a time."""

import pytest
import torch
from torch import Tensor

from megatron_oprd.models.delta_rule import CHUNK, gated_delta_rule
from tests.helpers.closeness import assert_close_relative


def inputs(length: int) -> dict[str, Tensor]:
    """Unit keys, decays from almost none to a thousandth, and strengths between 0 and 1."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, 3, length, *shape, generator=generator, dtype=torch.float64)

    return {
        "query": normal(5),
        "key": torch.nn.functional.normalize(normal(5), dim=-1),
        "value": normal(4),
        "decay": -normal().exp(),
        "strength": normal().sigmoid(),
    }


def recurrence(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, strength: Tensor
) -> Tensor:
    state = torch.zeros(*query.shape[:2], key.shape[-1], value.shape[-1], dtype=query.dtype)
    outputs = []
    for t in range(query.shape[2]):
        state = state * decay[:, :, t, None, None].exp()
        read = torch.einsum("bhkv,bhk->bhv", state, key[:, :, t])
        correction = strength[:, :, t, None] * (value[:, :, t] - read)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, :, t], correction)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, :, t]))
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_equals_the_recurrence(length: int) -> None:
    """Outputs, and gradients of everything that goes in."""
    results = []
    for function in (gated_delta_rule, recurrence):
        given = {name: tensor.requires_grad_() for name, tensor in inputs(length).items()}
        out = function(**given)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients = torch.autograd.grad((out * weights).sum(), list(given.values()))
        results.append([out.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        assert_close_relative(found, expected, 1e-10)


def test_strong_decays_do_not_overflow() -> None:
    """The sum over a chunk is far below what exp can invert in fp32."""
    given = {name: tensor.float() for name, tensor in inputs(2 * CHUNK).items()}
    given["decay"] = torch.full_like(given["decay"], -20.0)
    assert_close_relative(gated_delta_rule(**given), recurrence(**given), 1e-5)
