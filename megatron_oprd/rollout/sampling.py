"""Sampling that depends on the sample alone, not on the batch it is in."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import SamplingParams


class GumbelNoise(LogitsProcessor):
    """Adds standard Gumbel noise to the logits, from one random generator a row.

    argmax_v(logit_v + g_v) with independent Gumbel g_v is an exact sample of softmax(logits)
    (the Gumbel-max trick), so greedy decoding after this processor samples. Every call draws one
    value a token of the vocabulary from each row's generator: row i's k-th token depends on its
    logits, its seed and k only.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._exponential: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores`` ([b, vocabulary], float32; b the number of seeds) with noise."""
        assert len(scores) == len(self._generators), (len(scores), len(self._generators))
        if self._exponential is None:
            # float64: with 24 random bits the smallest values, which decide between a hundred
            # thousand tokens, would be coarse, and 0 would come up.
            self._exponential = torch.empty_like(scores, dtype=torch.float64)
        for row, generator in zip(self._exponential, self._generators, strict=True):
            row.exponential_(generator=generator)
        # -log of an exponential variable is a Gumbel variable.
        return scores - self._exponential.log().to(scores.dtype)


class RawLogits(LogitsProcessor):
    """Keeps the logits of the step under way, as they are before what follows it.

    Attributes:
        scores: [b, vocabulary], float32; None before the first step.
    """

    def __init__(self) -> None:
        self.scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores`` as they are."""
        self.scores = scores
        return scores


class SampledLogprobs(LogitsProcessor):
    """The last processor: log-probability, by the raw logits, of what greedy decoding then takes.

    Args:
        raw: The processor that sees the raw logits.
    """

    def __init__(self, raw: RawLogits) -> None:
        self._raw = raw
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores`` as they are."""
        raw = self._raw.scores
        assert raw is not None
        chosen = raw.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        self._steps.append(chosen - raw.logsumexp(dim=1))
        return scores

    def rows(self) -> list[list[float]]:
        """For each row of the batch one value a step, those behind its end included."""
        return torch.stack(self._steps, dim=1).tolist()


def sample_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """A 63-bit seed for one sample, the same on every machine and in every process."""
    text = f"{seed}/{prompt_index}/{sample_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_of(prompt: Prompt, sample: int, sampling: SamplingParams) -> int:
    """The seed of a prompt's sample, counted from 0; of a prompt that comes again other ones."""
    number = prompt.occurrence * sampling.samples_per_prompt + sample
    return sample_seed(sampling.seed, prompt.index, number)


def logits_processors(
    sampling: SamplingParams,
    seeds: Sequence[int],
    device: torch.device,
    *,
    never: Sequence[int] = (),
) -> tuple[LogitsProcessorList, SampledLogprobs | None]:
    """What turns greedy decoding into sampling as ``sampling`` says: nothing at temperature 0.

    Temperature first, then top-k, then top-p of what is left, then the noise. Log-probabilities
    are those before all of them, without the ids that are never sampled.

    Args:
        sampling: How to sample.
        seeds: One seed (`sample_seed`) for each row of the batch.
        device: Where the logits are.
        never: Token ids that are not sampled, at no temperature.

    Returns:
        The processors, and the one of them that has the samples' log-probabilities, where they
        are asked for.
    """
    processors = LogitsProcessorList()
    if never:
        processors.append(SuppressTokensLogitsProcessor(list(never), device=device.type))
    raw = RawLogits() if sampling.logprobs else None
    if raw is not None:
        processors.append(raw)
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(GumbelNoise(seeds, device))
    if raw is None:
        return processors, None
    logprobs = SampledLogprobs(raw)
    processors.append(logprobs)
    return processors, logprobs


class StopTexts(StoppingCriteria):
    """Ends a row with the token that completes one of some texts, and notes where that was.

    transformers' own `StopStringCriteria` also looks at the prompt, which may end with a part of a
    stop text, and does not say where the text was.

    Attributes:
        lengths: For each row, the tokens of its response up to and with the one that completed a
            text; None as long as none did.
    """

    def __init__(
        self,
        stop: Sequence[str],
        decode: Callable[[Sequence[int]], str],
        *,
        prompt_width: int,
        num_rows: int,
    ):
        """Knows of no token yet.

        Args:
            stop: The texts, none empty.
            decode: Token ids -> text, special tokens kept.
            prompt_width: Tokens of each row that are its prompt.
            num_rows: Rows of the batch.
        """
        self.lengths: list[int | None] = [None] * num_rows
        self._stop = tuple(stop)
        self._decode = decode
        self._prompt_width = prompt_width
        self._window = _window(stop)

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: object) -> Tensor:
        """Which rows ([b], bool) have ended; ``input_ids`` is [b, s] with the newest token."""
        length = input_ids.shape[1] - self._prompt_width
        start = self._prompt_width + max(0, length - self._window)
        for row, tokens in enumerate(input_ids[:, start:].tolist()):
            if self.lengths[row] is None and any(
                text in self._decode(tokens) for text in self._stop
            ):
                self.lengths[row] = length
        return torch.tensor([n is not None for n in self.lengths], device=input_ids.device)


def stopped_length(
    tokens: Sequence[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> int | None:
    """Where `StopTexts` would have ended a response that was generated to its end.

    Args:
        tokens: The response.
        stop: The texts, none empty.
        decode: Token ids -> text, special tokens kept.

    Returns:
        The tokens up to and with the one that completed a text; None if none did.
    """
    whole = decode(tokens)
    if not any(text in whole for text in stop):
        return None
    window = _window(stop)
    for end in range(1, len(tokens) + 1):
        part = decode(tokens[max(0, end - window) : end])
        if any(text in part for text in stop):
            return end
    return None


def _window(stop: Sequence[str]) -> int:
    """The last tokens of a response that can complete one of the texts."""
    # A token is at least one byte of text. The rest is for decoders that treat the first tokens
    # otherwise (a space, a part of a character).
    return max(len(text.encode()) for text in stop) + 8
