"""What the check of log-probabilities says of two sides whose difference is known."""

import math

import pytest
import torch

from megatron_oprd.training.logprob_check import LogprobDifference


def test_the_estimates() -> None:
    """Of a distribution over three tokens, with every token as often as the engine draws it."""
    engine, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.2, 0.4])
    tokens = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    found = LogprobDifference.of(engine.log()[tokens], trainer.log()[tokens])
    kl = sum(p * math.log(p / q) for p, q in zip(engine.tolist(), trainer.tolist(), strict=True))
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.k3_kl == pytest.approx(kl, rel=1e-5)
    assert found.diff_max == pytest.approx(math.log(2), rel=1e-5)
    mean = 0.5 * math.log(5 / 4) + 0.3 * math.log(3 / 2) + 0.2 * math.log(2)
    assert found.diff_mean == pytest.approx(mean, rel=1e-5)
