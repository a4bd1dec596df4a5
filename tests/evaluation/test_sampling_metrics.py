"""Measures of samples against enumeration and hand-made values."""

import itertools
from typing import Any

import numpy as np
import pytest

from megatron_oprd.evaluation.samples_file import Sample
from megatron_oprd.evaluation.sampling_metrics import (
    bootstrap,
    distinct_ngrams,
    ks,
    pass_at_k,
    sampling_metrics,
)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_all_subsets(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_reported_ks() -> None:
    assert ks(1) == [1]
    assert ks(6) == [1, 2, 4, 6]
    assert ks(16) == [1, 2, 4, 8, 16]


def test_distinct_ngrams() -> None:
    # 2 + 2 4-grams, "a b c d" twice; no 4-gram reaches from one text into the next.
    assert distinct_ngrams(["a b c d e", "x a  b\nc d", "a b", ""]) == pytest.approx(3 / 4)
    assert distinct_ngrams(["a b", ""]) == 0


def test_bootstrap_interval_of_a_share() -> None:
    values = [1.0] * 30 + [0.0] * 70
    estimate = bootstrap(values)
    assert estimate.value == pytest.approx(0.3)
    # The normal approximation, which 100 problems allow.
    half = 1.96 * np.sqrt(0.3 * 0.7 / 100)
    assert estimate.low == pytest.approx(0.3 - half, abs=0.015)
    assert estimate.high == pytest.approx(0.3 + half, abs=0.015)
    assert bootstrap(values) == estimate
    assert (bootstrap([0.5]).low, bootstrap([0.5]).high) == (0.5, 0.5)


def test_measures_of_two_problems() -> None:
    def sample(prompt: int, index: int, correct: bool, **fields: Any) -> Sample:
        values: dict[str, Any] = {
            "response": f"w{prompt} w{index} c d", "num_tokens": 4, "finished": True,
            "answer": "1", "timed_out": False,
        }  # fmt: skip
        return Sample(prompt_index=prompt, sample_index=index, correct=correct, **(values | fields))

    right = {5: [True, False, False, True], 9: [False] * 4}
    samples = [sample(p, i, ok) for p, of in right.items() for i, ok in enumerate(of)]
    samples[1] = sample(5, 1, False, finished=False, num_tokens=20)
    samples[2] = sample(5, 2, False, answer=None, response="")
    samples[7] = sample(9, 3, False, timed_out=True)
    metrics = sampling_metrics(samples, 4)
    assert (metrics.num_problems, metrics.n) == (2, 4)
    assert metrics.avg.value == 0.25
    assert metrics.best.value == 0.5
    assert {k: e.value for k, e in metrics.pass_at.items()} == pytest.approx(
        {1: 0.25, 2: (1 - 1 / 6) / 2, 4: 0.5}
    )
    assert metrics.dist_4 == 1
    assert metrics.mean_length == (7 * 4 + 20) / 8
    assert metrics.cut_share == metrics.no_answer_share == 1 / 8
    assert metrics.num_timed_out == 1
