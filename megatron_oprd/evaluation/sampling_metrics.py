"""Metrics over several sampled responses per problem of a benchmark."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from megatron_oprd.evaluation.samples_file import Sample

_RESAMPLES = 2000  # bootstrap
_LEVEL = 0.95
_NGRAM = 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over problems with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SamplingMetrics:
    """Metrics of a model on one benchmark."""

    num_problems: int
    n: int  # responses per problem
    avg: Estimate  # Avg@n: share of correct responses
    best: Estimate  # Best@n: share of problems with a correct response among n
    pass_at: dict[int, Estimate]  # k -> pass@k (`pass_at_k`)
    dist_4: float  # Dist-4g (`distinct_ngrams`)
    mean_length: float  # tokens per response, the end token included
    cut_share: float  # share of responses cut at the length limit
    no_answer_share: float  # share of responses without an answer
    num_timed_out: int  # responses whose grading was stopped; they count as wrong


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n responses, drawn without replacement, include one of c correct ones.

    1 - C(n-c, k) / C(n, k), the unbiased estimator of Chen et al., arXiv:2107.03374, eq. 1.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def ks(n: int) -> list[int]:
    """Reported values of k for pass@k: powers of two up to n, and n."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def bootstrap(values: Sequence[float]) -> Estimate:
    """Mean of one value per problem, with its 95% percentile bootstrap interval over problems."""
    array = np.asarray(values, dtype=np.float64)
    # Fixed seed: the same values give the same interval.
    draw = np.random.default_rng(0)
    means = np.array(
        [array[draw.integers(len(array), size=len(array))].mean() for _ in range(_RESAMPLES)]
    )
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(value=float(array.mean()), low=float(low), high=float(high))


def distinct_ngrams(texts: Iterable[str]) -> float:
    """Distinct 4-grams divided by all 4-grams of words, over all responses together.

    Words are separated by whitespace, so that models with different tokenizers are comparable.
    N-grams do not span responses. 0 if no response has four words.
    """
    hashes = []
    for text in texts:
        words = text.split()
        hashes.append(
            # Hashes instead of texts: 8 bytes per n-gram, and numpy counts the distinct ones.
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
    """Computes the metrics from all responses, ordered by problem, with n responses per problem."""
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
