from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oprd.rollout.engine import SamplingParams
from megatron_oprd.rollout.sampling import GumbelNoise, logits_processors, sample_seed
from tests.helpers.closeness import assert_close_relative

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0, 1.0, -0.5])


def sampling(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 1, "seed": 0} | fields))


def draw(params: SamplingParams, rows: int, times: int, seed: int = 0) -> Tensor:
    """[rows, times] tokens, sampled from LOGITS in every row."""
    seeds = [sample_seed(seed, 0, row) for row in range(rows)]
    processors, _ = logits_processors(params, seeds, CPU)
    scores = LOGITS.expand(rows, -1)
    tokens = [processors(torch.zeros(rows, 1), scores).argmax(-1) for _ in range(times)]
    return torch.stack(tokens, dim=1)


def warped(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """The distribution to sample from, token by token: temperature, then top-k, then top-p."""
    p = (LOGITS.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        order = order[:top_k]
    total, reached, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        kept.append(i)
        reached += p[i] / total
        if reached >= top_p:
            break
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


def chi_square(counts: Tensor, probabilities: list[float]) -> float:
    """Pearson's statistic; infinite when an impossible token came up."""
    n, statistic = int(counts.sum()), 0.0
    for count, p in zip(counts.tolist(), probabilities, strict=True):
        if p == 0:
            statistic += float("inf") if count else 0.0
        else:
            statistic += (count - n * p) ** 2 / (n * p)
    return statistic


@pytest.mark.parametrize(
    "warp",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.8},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.9},
    ],
)
def test_frequencies_match_the_warped_distribution(warp: dict[str, Any]) -> None:
    tokens = draw(sampling(**warp), rows=4000, times=5)
    counts = torch.bincount(tokens.flatten(), minlength=len(LOGITS))
    # 24.3 is the 99.9% quantile for 7 degrees of freedom
    assert chi_square(counts, warped(**warp)) < 24.3


def test_successive_tokens_of_a_sample_are_independent() -> None:
    tokens = draw(sampling(), rows=20_000, times=2)
    counts = torch.bincount(tokens[:, 0] * len(LOGITS) + tokens[:, 1], minlength=len(LOGITS) ** 2)
    p = warped()
    # 103.4 is the 99.9% quantile for 63 degrees of freedom
    assert chi_square(counts, [a * b for a in p for b in p]) < 103.4


def test_a_row_does_not_depend_on_the_others() -> None:
    assert torch.equal(draw(sampling(), rows=7, times=20)[:2], draw(sampling(), rows=2, times=20))
    assert not torch.equal(draw(sampling(), rows=2, times=20), draw(sampling(), 2, 20, seed=1))


def test_noise_has_63_random_bits() -> None:
    """With the 24 of an fp32 number one of 16 million draws would be certain to win."""
    noise = GumbelNoise([0], torch.device("cpu"))
    found = noise(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1_000_000))[0]
    bits = torch.empty(1_000_000, dtype=torch.int64)
    bits.random_(generator=torch.Generator().manual_seed(0))
    expected = -torch.log(-torch.log1p(-bits.double() / 2**63))
    # Those above 0 can win among many tokens. The lower ones are coarse.
    assert_close_relative(found[expected > 0], expected[expected > 0], 1e-6)
    assert float(found.max()) > 10


@pytest.mark.parametrize("bits", [0, 2**63 - 1])
def test_noise_is_finite(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Else a token that is the only one left would not be chosen."""
    monkeypatch.setattr(torch.Tensor, "random_", lambda row, generator: row.fill_(bits))
    noise = GumbelNoise([0], torch.device("cpu"))
    found = noise(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 3))
    assert found.isfinite().all()


def test_temperature_zero_is_greedy() -> None:
    tokens = draw(sampling(temperature=0, top_k=2, top_p=0.5), rows=3, times=4)
    assert (tokens == LOGITS.argmax()).all()


def test_sample_seeds_are_distinct_and_stable() -> None:
    keys = [(s, p, i) for s in range(12) for p in range(12) for i in range(12)]
    assert len({sample_seed(*key) for key in keys}) == len(keys)
    # printf 1/2/3 | sha256sum
    assert sample_seed(1, 2, 3) == int("9de93caf7d8d2a94", 16) >> 1


def test_the_most_likely_token_alone() -> None:
    """top_k = 1 is greedy at any temperature."""
    found = draw(sampling(top_k=1), rows=3, times=40)
    assert len(found.unique(dim=1)[0]) == 1
    assert found.eq(found[:, :1]).all()
