"""What is asked of vLLM for a batch of prompts, and the rollouts that its responses make."""

from collections.abc import Callable, Sequence

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import Rollout, SamplingParams
from megatron_oprd.rollout.sampling import seed_of
from megatron_oprd.rollout.stopping import stopped_length
from megatron_oprd.rollout.vllm_messages import Request, Response


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
