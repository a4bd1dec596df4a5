"""What a trainer and its vLLM process tell each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_oprd.rollout.bucket import BucketHandle
from megatron_oprd.rollout.engine import SamplingParams

# What vLLM's workers get besides (--worker-extension-cls of a server).
EXTENSION = "megatron_oprd.rollout.vllm_extension.WeightReceiver"


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
