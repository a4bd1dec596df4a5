"""Sampling that depends on the sample's seed, not on the batch."""

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
    """Adds standard Gumbel noise to the logits, with one random generator per row.

    argmax_v(logit_v + g_v) with independent Gumbel g_v is an exact sample of softmax(logits) (the
    Gumbel-max trick), so greedy decoding after this processor samples. Each call draws one value
    per vocabulary entry and row: token k of row i depends only on its logits, its seed and k.
    One uniform number and the cumulative distribution would do, but rounding of the logits moves
    all borders between tokens: with it, responses depended on the batch (tests/rollout/test_hf.py).
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._bits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores`` ([b, vocabulary], float32; b the number of seeds) with noise."""
        assert len(scores) == len(self._generators), (len(scores), len(self._generators))
        if self._bits is None:
            self._bits = torch.empty_like(scores, dtype=torch.int64)
        for row, generator in zip(self._bits, self._generators, strict=True):
            row.random_(generator=generator)
        # The smallest of 10^5 numbers decide, so they need 63 random bits: torch's float32 has 24,
        # and its float64 takes four times as long (12 against 3 ms for 8 rows of 49,152).
        uniform = self._bits.to(scores.dtype).mul_(2.0**-63).clamp_(2.0**-64, 1 - 2.0**-24)
        # -log(1 - u) is an exponential variable, and -log of that a Gumbel variable.
        return scores - uniform.neg_().log1p_().neg_().log_()


class RawLogits(LogitsProcessor):
    """Stores the current step's logits before later processors change them."""

    def __init__(self) -> None:
        self.scores: Tensor | None = None  # [b, vocabulary], float32

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores`` unchanged."""
        self.scores = scores
        return scores


class SampledLogprobs(LogitsProcessor):
    """Last processor: records the raw log-probability of the token that greedy decoding picks."""

    def __init__(self, raw: RawLogits) -> None:
        self._raw = raw
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores`` unchanged."""
        raw = self._raw.scores
        assert raw is not None
        # generate() does not report its choice to processors; greedy decoding picks this argmax.
        chosen = raw.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        self._steps.append(chosen - raw.logsumexp(dim=1))
        return scores

    def rows(self) -> list[list[float]]:
        """Returns one value per row and step, including steps after the row's end."""
        return torch.stack(self._steps, dim=1).tolist()


def sample_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """A 63-bit seed for one sample, equal on every machine and in every process."""
    text = f"{seed}/{prompt_index}/{sample_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def samples_of(prompt: Prompt, sampling: SamplingParams) -> Sequence[int]:
    """The samples of a prompt that an engine is asked for."""
    return range(sampling.samples_per_prompt) if prompt.samples is None else prompt.samples


def seed_of(prompt: Prompt, sample: int, sampling: SamplingParams) -> int:
    """The seed of sample ``sample`` (from 0).

    A repeated prompt gets new seeds per occurrence, and a response that is continued per turn.
    """
    number = prompt.occurrence * sampling.samples_per_prompt + sample
    of_step = sampling.seed if prompt.seed is None else prompt.seed
    seed = sample_seed(of_step, prompt.index, number)
    return sample_seed(seed, prompt.turn, 0) if prompt.turn else seed


def max_new_tokens_of(prompt: Prompt, sampling: SamplingParams) -> int:
    """The number of tokens that a response to a prompt is cut after."""
    if prompt.max_new_tokens is None:
        return sampling.max_new_tokens
    return min(prompt.max_new_tokens, sampling.max_new_tokens)


def logits_processors(
    sampling: SamplingParams,
    seeds: Sequence[int],  # one per row (`sample_seed`)
    device: torch.device,
    *,
    never: Sequence[int] = (),  # token ids, masked at any temperature
) -> tuple[LogitsProcessorList, SampledLogprobs | None]:
    """Builds the processors that turn greedy decoding into sampling.

    The order is temperature, top-k, top-p of the remaining tokens, noise; at temperature 0 none of
    them. The second result records log-probabilities, if requested: before all four, after ids in
    ``never`` are masked.
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
    """Stops a row at the token that completes one of the texts in its response.

    transformers' `StopStringCriteria` also searches the prompt, which may end with part of a stop
    text, and does not report the position.
    """

    def __init__(
        self,
        stop: Sequence[str],  # none empty
        decode: Callable[[Sequence[int]], str],  # keeps special tokens
        *,
        prompt_width: int,  # prompt tokens per row, padding included
        num_rows: int,
    ):
        # By row: response tokens up to the token that completed a text, included; None until then.
        self.lengths: list[int | None] = [None] * num_rows
        self._stop = tuple(stop)
        self._decode = decode
        self._prompt_width = prompt_width
        self._window = _window(stop)

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: object) -> Tensor:
        """Returns the stopped rows ([b], bool); ``input_ids`` is [b, s], newest token included."""
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
    """The length at which `StopTexts` would have stopped a complete response.

    Includes the token that completed the text; None if no text occurs.
    """
    # Most responses contain no stop text; this saves them the loop.
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
    """Last tokens of a response that can complete one of the texts."""
    # A token has at least one byte of text. The margin is for decoders that treat the first tokens
    # differently (a leading space, part of a character).
    return max(len(text.encode()) for text in stop) + 8
