import math
from dataclasses import replace

import pytest

from megatron_oprd.config.schema import Interpolation, LossConfig, OutputLossConfig
from megatron_oprd.distill.coefficients import coefficient_at

# LastOPD's crossfade: hidden states alone for 50 steps, then over 10 steps to the other loss.
FADE_OUT = [[50.0, 1.0], [60.0, 0.0]]


@pytest.mark.parametrize(
    ("interpolation", "expected"),
    [
        ("linear", {0: 4.0, 50: 4.0, 55: 2.0, 59: 0.4, 60: 0.0, 99: 0.0}),
        ("cosine", {0: 4.0, 50: 4.0, 52: 2 + 2 * math.cos(math.pi / 5), 55: 2.0, 60: 0.0}),
        ("piecewise", {0: 4.0, 50: 4.0, 59: 4.0, 60: 0.0, 99: 0.0}),
    ],
)
def test_a_schedule_between_its_points(
    interpolation: Interpolation, expected: dict[int, float]
) -> None:
    for loss in (LossConfig(), OutputLossConfig()):
        scheduled = replace(
            loss, coefficient=4, coefficient_points=FADE_OUT, coefficient_schedule=interpolation
        )
        found = {step: coefficient_at(scheduled, step) for step in expected}
        assert found == pytest.approx(expected)


def test_without_points_the_coefficient_is_constant() -> None:
    assert {coefficient_at(LossConfig(coefficient=0.3), step) for step in range(100)} == {0.3}


def test_one_point_and_several_segments() -> None:
    assert coefficient_at(LossConfig(coefficient=2, coefficient_points=[[5, 0.5]]), 0) == 1
    loss = LossConfig(coefficient_points=[[0, 0], [10, 1], [20, 1], [40, 0]])
    assert [coefficient_at(loss, step) for step in (0, 5, 15, 30, 41)] == [0, 0.5, 1, 0.5, 0]
