"""Messages between a trainer and its vLLM process, and the rollouts made of vLLM's responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import Rollout, SamplingParams
from megatron_oprd.rollout.sampling import seed_of, stopped_length
from megatron_oprd.rollout.vllm.bucket import BucketHandle

# What vLLM's workers get besides (--worker-extension-cls of a server).
EXTENSION = "megatron_oprd.rollout.vllm.worker.WeightReceiver"


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How the engine is built.

    Attributes:
        folder: A Hugging Face model folder. Its weights and its generation_config.json have no
            influence.
        dtype: The weights' and activations' type.
        options: Further arguments of ``vllm.LLM``.
        bucket: The buffer that weights come through.
        tied: Whether the LM head is the embedding.
        stop_token_ids: A response ends with any of these.
        meaningless_ids: Never sampled.
        sleep_level: How deep `sleep` is: 0 not at all, 1 weights to the host, 2 weights thrown
            away; the KV cache goes in both.
    """

    folder: Path
    dtype: torch.dtype
    options: dict[str, Any]
    bucket: BucketHandle
    tied: bool
    stop_token_ids: tuple[int, ...]
    meaningless_ids: tuple[int, ...]
    sleep_level: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response that is asked for.

    Attributes:
        prompt_ids: The prompt.
        seed: The sample's own seed.
    """

    prompt_ids: tuple[int, ...]
    seed: int


def sampling_fields(
    request: Request, sampling: SamplingParams, *, stop_token_ids: Sequence[int]
) -> dict[str, Any]:
    """The fields of vLLM's own SamplingParams for one response.

    Args:
        request: The response that is asked for.
        sampling: How to sample.
        stop_token_ids: A response ends with any of these, besides ``sampling``'s.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "seed": request.seed,
        "stop_token_ids": [*stop_token_ids, *sampling.stop_token_ids],
        "logprobs": 0 if sampling.logprobs else None,  # 0: of the sampled token alone
        "detokenize": False,
    }


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response.

    Attributes:
        token_ids: Its tokens, the one that ended it included.
        logprobs: The model's log-probability of each, before temperature, top-k and top-p; None
            where they were not asked for.
        finished: Whether one of ``stop_token_ids`` ended it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finished: bool


def requests_of(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Request]:
    """One request a sample, ordered by prompt, then sample, each with a seed of its own."""
    return [
        Request(prompt_ids=prompt.token_ids, seed=seed_of(prompt, sample, sampling))
        for prompt in prompts
        for sample in range(sampling.samples_per_prompt)
    ]


def rollouts_of(
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    responses: Sequence[Response],
    *,
    version: int,
    decode: Callable[[Sequence[int]], str] | None,
) -> list[Rollout]:
    """The rollouts of the responses to `requests_of`; a response is cut behind a stop text.

    Args:
        prompts: As they were asked for.
        sampling: As it was asked for.
        responses: In the order of the requests.
        version: Of the weights that they come from.
        decode: The tokenizer's decoding, special tokens kept; needed for stop texts.
    """
    samples = [(p, sample) for p in prompts for sample in range(sampling.samples_per_prompt)]
    rollouts = []
    for (prompt, sample), response in zip(samples, responses, strict=True):
        length = None
        if sampling.stop:
            # Not vLLM's own stop texts, which look at what its own tokenizer makes of it.
            assert decode is not None, "stop texts need the tokenizer's decoding"
            length = stopped_length(response.token_ids, sampling.stop, decode)
        rollouts.append(
            Rollout(
                prompt_index=prompt.index,
                sample_index=sample,
                prompt_ids=prompt.token_ids,
                response_ids=response.token_ids[:length],
                finished=response.finished or length is not None,
                weights_version=version,
                logprobs=None if response.logprobs is None else response.logprobs[:length],
            )
        )
    return rollouts
