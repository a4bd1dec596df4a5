"""Messages between a trainer and its vLLM process, and rollouts from vLLM's responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import Rollout, SamplingParams
from megatron_oprd.rollout.sampling import max_new_tokens_of, samples_of, seed_of, stopped_length

# Worker extension class (a server's --worker-extension-cls).
EXTENSION = "megatron_oprd.rollout.vllm.worker.WeightReceiver"
# Checkpoint names of two tensors that may be one.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of a vLLM engine process."""

    folder: Path  # its weights and generation_config.json are not used
    dtype: torch.dtype  # of weights and activations
    options: dict[str, Any]  # further arguments of vllm.LLM
    tied: bool  # the LM head is the embedding
    stop_token_ids: tuple[int, ...]
    meaningless_ids: tuple[int, ...]  # never sampled: they pad the embedding
    sleep_level: int  # 0: none; 1: weights to the host; 2: weights discarded (KV cache: 1 and 2)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for one response."""

    prompt_ids: tuple[int, ...]
    seed: int  # the sample's own seed (`seed_of`)
    max_new_tokens: int | None = None  # fewer than the step's, if it has a limit of its own


def sampling_fields(
    request: Request, sampling: SamplingParams, *, stop_token_ids: Sequence[int]
) -> dict[str, Any]:
    """Builds the fields of vLLM's SamplingParams for one response."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": request.max_new_tokens or sampling.max_new_tokens,
        "seed": request.seed,
        "stop_token_ids": [*stop_token_ids, *sampling.stop_token_ids],
        "logprobs": 0 if sampling.logprobs else None,  # 0: only the sampled token's
        # Not needed: `rollouts_of` finds stop texts in the token ids.
        "detokenize": False,
    }


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response of vLLM."""

    token_ids: tuple[int, ...]  # the end token included
    # Raw: before temperature, top-k and top-p; None if not requested.
    logprobs: tuple[float, ...] | None
    finished: bool  # ended by one of stop_token_ids
    version: int  # of the weights; the oldest, if weights came in the middle


def requests_of(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Request]:
    """One request per sample, ordered by prompt, then sample, each with its own seed."""
    return [
        Request(
            prompt_ids=prompt.token_ids,
            seed=seed_of(prompt, sample, sampling),
            max_new_tokens=max_new_tokens_of(prompt, sampling),
        )
        for prompt in prompts
        for sample in samples_of(prompt, sampling)
    ]


def rollouts_of(
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    responses: Sequence[Response],
    *,
    decode: Callable[[Sequence[int]], str] | None,
) -> list[Rollout]:
    """Converts responses to rollouts, cutting each after its stop text.

    ``responses`` has the order of `requests_of`; ``decode`` (special tokens kept) is needed for
    stop texts.
    """
    samples = [(p, sample) for p in prompts for sample in samples_of(p, sampling)]
    rollouts = []
    for (prompt, sample), response in zip(samples, responses, strict=True):
        length = None
        if sampling.stop:
            # vLLM's stop texts would search the text of its own tokenizer, which can differ.
            # Responses are therefore generated to their end and cut here.
            assert decode is not None, "stop texts need the tokenizer's decoding"
            length = stopped_length(response.token_ids, sampling.stop, decode)
        rollouts.append(
            Rollout(
                prompt_index=prompt.index,
                sample_index=sample,
                prompt_ids=prompt.token_ids,
                response_ids=response.token_ids[:length],
                finished=response.finished or length is not None,
                weights_version=response.version,
                logprobs=None if response.logprobs is None else response.logprobs[:length],
            )
        )
    return rollouts
