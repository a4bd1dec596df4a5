"""Projectors that train: what they start as, and what they compute."""

import math

import pytest
import torch
from torch import Tensor

from megatron_oprd.config.schema import BridgeConfig
from megatron_oprd.distill.trainable_projectors import Projector, num_parameters
from tests.helpers.closeness import assert_close_relative

LINEAR = BridgeConfig(trainable="linear")
MLP = BridgeConfig(trainable="mlp", hidden_size=96)


def projector(
    settings: BridgeConfig, student: int = 64, teacher: int = 80, *, seed: int = 7, layer: int = 3
) -> Projector:
    return Projector(settings, student_width=student, teacher_width=teacher, seed=seed, layer=layer)


def weights(one: Projector) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in one.parameters()])


@pytest.mark.parametrize("settings", [LINEAR, MLP])
def test_is_drawn_from_seed_and_layer_alone(settings: BridgeConfig) -> None:
    torch.manual_seed(1)
    first = weights(projector(settings))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(weights(projector(settings)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(weights(projector(settings, layer=4)), first)
    assert not torch.equal(weights(projector(settings, seed=8)), first)


def test_a_linear_one_of_equal_widths_starts_as_the_identity() -> None:
    rows = torch.randn(5, 64)
    assert torch.equal(projector(LINEAR, teacher=64)(rows), rows)
    assert not torch.equal(projector(MLP, teacher=64)(rows), rows)


def test_other_matrices_keep_the_mean_square() -> None:
    rows = 3 * torch.randn(500, 64)
    found = projector(LINEAR)(rows)
    assert found.shape == (500, 80)
    assert float(found.detach().square().mean() / rows.square().mean()) == pytest.approx(1, abs=0.1)
    for name, parameter in projector(MLP).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            deviation = 1 / math.sqrt(parameter.shape[1])
            assert float(parameter.std()) == pytest.approx(deviation, rel=0.05)


def test_bf16_parameters_compute_in_fp32() -> None:
    of_bf16 = projector(MLP).to(torch.bfloat16)
    plain = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 80))
    plain.load_state_dict({name: one.double() for name, one in of_bf16.state_dict().items()})
    rows = torch.randn(5, 64, dtype=torch.bfloat16)
    found = of_bf16(rows)
    assert found.dtype == torch.float32
    assert_close_relative(found, plain.double()(rows.double()).float(), 1e-5)


@pytest.mark.parametrize("settings", [LINEAR, MLP, BridgeConfig(trainable="mlp")])
def test_number_of_parameters(settings: BridgeConfig) -> None:
    found = num_parameters(settings, student_width=64, teacher_width=80)
    assert found == len(weights(projector(settings)))
