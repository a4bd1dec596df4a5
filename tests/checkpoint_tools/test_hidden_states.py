"""Where models differ. test_transformers_parity compares transformers' and Megatron's states."""

import math

import pytest
import torch
from torch import Tensor

from checkpoint_tools.hidden_states import HiddenStates, compare_states
from megatron_oprd.errors import UserError


def states(*, layers: int = 2, width: int = 4) -> HiddenStates:
    def of_sequences(size: int) -> list[Tensor]:
        return [torch.full((length, size), 0.5) for length in (3, 5)]

    return HiddenStates(
        layers=[of_sequences(width) for _ in range(layers)],
        normed=of_sequences(width),
        logits=of_sequences(7),
    )


def test_where_the_difference_is() -> None:
    a, b = states(), states()
    b.layers[1][1][4, 2] = 0.75
    b.layers[1][0][0, 0] = 0.6
    first, second, norm, logits = compare_states(a, b)
    assert [one.place for one in (first, second, norm, logits)] == [
        "layer 0", "layer 1", "final norm", "logits",
    ]  # fmt: skip
    assert first.relative == norm.relative == logits.relative == 0.0
    assert (second.sequence, second.position, second.channel) == (1, 4, 2)
    assert (second.a, second.b) == (0.5, 0.75)
    assert second.relative == second.absolute == 0.25


def test_large_states_are_compared_relatively() -> None:
    a, b = states(), states()
    a.layers[0][0][1, 3] = b.layers[0][0][1, 3] = 1000.0
    b.layers[0][0][1, 2] = 1.5  # 1.0 off, beside a state of 1,000
    b.layers[0][1][0, 0] = 0.51
    (found, *_) = compare_states(a, b)
    assert (found.sequence, found.position) == (1, 0)
    assert found.relative == pytest.approx(0.01, rel=1e-5)
    assert found.absolute == 1.0


@pytest.mark.parametrize(("value", "expected"), [(math.nan, math.inf), (math.inf, math.inf)])
def test_nan_and_infinity_differ(value: float, expected: float) -> None:
    a, b = states(), states()
    b.logits[0][2, 6] = value
    found = compare_states(a, b)[-1]
    assert found.relative == expected
    assert (found.position, found.channel) == (2, 6)
    assert compare_states(b, b)[-1].relative == 0.0


def test_other_shapes() -> None:
    with pytest.raises(UserError, match="the models have 2 and 3 layers"):
        compare_states(states(), states(layers=3))
    with pytest.raises(UserError, match="the models' layer 0 is 4 and 5 wide"):
        compare_states(states(), states(width=5))
