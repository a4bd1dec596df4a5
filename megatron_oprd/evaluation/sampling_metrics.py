"""Measures of several sampled responses to each of a benchmark's problems."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from megatron_oprd.evaluation.samples_file import Sample

_RESAMPLES = 2000
_LEVEL = 0.95
_NGRAM = 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over problems and its bootstrap interval.

    Attributes:
        value: The mean.
        low: Lower end of the 95% interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SamplingMetrics:
    """A model's measures on one benchmark.

    Attributes:
        num_problems: Problems.
        n: Responses for each.
        avg: Avg@n: the share of right responses.
        best: Best@n: the share of problems with a right response among all n.
        pass_at: k -> pass@k: the expected share of problems with a right response among k.
        dist_4: Dist-4g (`distinct_ngrams`).
        mean_length: Tokens of a response, what ended it included.
        cut_share: Share of responses that were cut at the length limit.
        no_answer_share: Share of responses without an answer.
        num_timed_out: Responses whose grading was given up (they count as wrong).
    """

    num_problems: int
    n: int
    avg: Estimate
    best: Estimate
    pass_at: dict[int, Estimate]
    dist_4: float
    mean_length: float
    cut_share: float
    no_answer_share: float
    num_timed_out: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n responses, drawn without replacement, contain one of c right ones.

    1 - C(n-c, k) / C(n, k), the unbiased estimator of Chen et al., arXiv:2107.03374, eq. 1.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def ks(n: int) -> list[int]:
    """The k of pass@k that are reported: powers of two up to n, and n."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def bootstrap(values: Sequence[float]) -> Estimate:
    """Mean of one value a problem, with its 95% percentile bootstrap interval over problems.

    The resampling has a fixed seed: the same values give the same interval.
    """
    array = np.asarray(values, dtype=np.float64)
    draw = np.random.default_rng(0)
    means = np.array(
        [array[draw.integers(len(array), size=len(array))].mean() for _ in range(_RESAMPLES)]
    )
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(value=float(array.mean()), low=float(low), high=float(high))


def distinct_ngrams(texts: Iterable[str]) -> float:
    """Unique 4-grams over all 4-grams of words, over all responses to a benchmark together.

    Words are what whitespace separates, so that models with different tokenizers compare. N-grams
    do not reach from one response into the next. 0 where no response has four words.
    """
    hashes = []
    for text in texts:
        words = text.split()
        hashes.append(
            np.array(
                [
                    xxhash.xxh3_64_intdigest(" ".join(words[i : i + _NGRAM]).encode())
                    for i in range(len(words) - _NGRAM + 1)
                ],
                dtype=np.uint64,
            )
        )
    together = np.concatenate(hashes)
    return len(np.unique(together)) / len(together) if len(together) else 0.0


def sampling_metrics(samples: Sequence[Sample], n: int) -> SamplingMetrics:
    """The measures of a benchmark.

    Args:
        samples: All responses, ordered by problem, n for each; at least one.
        n: How many.
    """
    assert samples
    assert len(samples) % n == 0
    problems = [samples[i : i + n] for i in range(0, len(samples), n)]
    right = [sum(sample.correct for sample in of_problem) for of_problem in problems]

    def share(is_so: Callable[[Sample], bool]) -> float:
        return sum(map(is_so, samples)) / len(samples)

    return SamplingMetrics(
        num_problems=len(problems),
        n=n,
        avg=bootstrap([c / n for c in right]),
        best=bootstrap([float(c > 0) for c in right]),
        pass_at={k: bootstrap([pass_at_k(n, c, k) for c in right]) for k in ks(n)},
        dist_4=distinct_ngrams(sample.response for sample in samples),
        mean_length=sum(sample.num_tokens for sample in samples) / len(samples),
        cut_share=share(lambda sample: not sample.finished),
        no_answer_share=share(lambda sample: sample.answer is None),
        num_timed_out=sum(sample.timed_out for sample in samples),
    )
