"""More responses than a step uses: generated in rounds, until enough prompts are complete.

All engines generate a part of every open response, then look together at what is complete. So which
prompts a step takes depends on the number of tokens alone, not on the engines' speed or number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.collect import share_of_engine
from megatron_oprd.rollout.engine import Rollout, SamplingParams
from megatron_oprd.rollout.pool import EnginePool
from megatron_oprd.rollout.sampling import stopped_length

# Index, occurrence and sample: no response of a step has another's.
Key = tuple[int, int, int]


def key_of(prompt: Prompt, sample: int) -> Key:
    """The key of a response in its step."""
    return prompt.index, prompt.occurrence, sample


def is_complete(rollout: Rollout | None, sampling: SamplingParams) -> bool:
    """Whether a response has come to its end, or to ``max_new_tokens``."""
    return rollout is not None and (
        rollout.finished or len(rollout.response_ids) >= sampling.max_new_tokens
    )


def complete_prompts(
    prompts: Sequence[Prompt], responses: Mapping[Key, Rollout], sampling: SamplingParams
) -> list[Prompt]:
    """The prompts of which every sample is complete, in order."""
    return [
        prompt
        for prompt in prompts
        if all(
            is_complete(responses.get(key_of(prompt, sample)), sampling)
            for sample in range(sampling.samples_per_prompt)
        )
    ]


def generate_until(
    engines: EnginePool,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    wanted: int,
    interval: int,
    begun: Mapping[Key, Rollout],
    decode: Callable[[Sequence[int]], str],
) -> dict[Key, Rollout]:
    """Generates until ``wanted`` prompts are complete; every rank has to call.

    Args:
        engines: The run's engines, with weights.
        prompts: What the step starts, the same on every rank.
        sampling: The step's parameters.
        wanted: Number of prompts that have to be complete, at most ``len(prompts)``.
        interval: Tokens of a response in a round.
        begun: Responses that go on where they were stopped before.
        decode: Text of token ids, special tokens kept; for stop texts.

    Returns:
        All responses on every rank, those that were stopped before their end included.

    Raises:
        RolloutEngineError: An engine failed too often; on every rank.
    """
    share = share_of_engine(engines, prompts, sampling)
    own = [(prompt, sample) for prompt in share for sample in prompt.samples or ()]
    responses = dict(begun)
    while len(complete_prompts(prompts, responses, sampling)) < wanted:
        # An engine keeps its responses in every round, and so the caches of their beginnings.
        still = [
            (prompt, sample)
            for prompt, sample in own
            if not is_complete(responses.get(key_of(prompt, sample)), sampling)
        ]
        asked = [
            _continuation(prompt, sample, responses.get(key_of(prompt, sample)), sampling, interval)
            for prompt, sample in still
        ]
        found = engines.generate(asked, sampling) or []
        turns = {key_of(*one): turn for one, turn in zip(still, found, strict=True)}
        for of_engine in engines.told(turns):
            for key, turn in of_engine.items():
                responses[key] = _joined(responses.get(key), turn, sampling, decode)
    return responses


def _continuation(
    prompt: Prompt, sample: int, begun: Rollout | None, sampling: SamplingParams, interval: int
) -> Prompt:
    """The request for the next tokens of a response."""
    so_far = () if begun is None else begun.response_ids
    return replace(
        prompt,
        token_ids=prompt.token_ids + so_far,
        samples=(sample,),
        # Any number that grows will do: each round needs noise of its own.
        turn=len(so_far),
        max_new_tokens=min(interval, sampling.max_new_tokens - len(so_far)),
    )


def _joined(
    begun: Rollout | None,
    turn: Rollout,
    sampling: SamplingParams,
    decode: Callable[[Sequence[int]], str],
) -> Rollout:
    """A response with what a round added to it."""
    if begun is None:
        return turn
    response_ids = begun.response_ids + turn.response_ids
    logprobs = None
    if turn.logprobs is not None:
        assert begun.logprobs is not None, "the response was begun without log-probabilities"
        logprobs = begun.logprobs + turn.logprobs
    # The engine has looked for stop texts in its own round only; one can reach over the border.
    length = stopped_length(response_ids, sampling.stop, decode) if sampling.stop else None
    return replace(
        turn,
        prompt_ids=begun.prompt_ids,
        response_ids=response_ids[:length],
        logprobs=None if logprobs is None else logprobs[:length],
        finished=turn.finished or length is not None,
        weights_version=min(begun.weights_version, turn.weights_version),
    )
