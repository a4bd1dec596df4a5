"""Samples of a step's rollouts as text, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_oprd.rollout.engine import Rollout

_MOST = 4


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """A prompt and its response; special tokens are kept."""

    prompt_index: int
    prompt: str
    response: str
    num_tokens: int  # of the response
    finished: bool  # False: cut at the longest response
    weights_version: int


def samples_of(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[TextSample]:
    """The first response to each of the first prompts."""
    first = [rollout for rollout in rollouts if rollout.sample_index == 0][:_MOST]
    return [
        TextSample(
            prompt_index=one.prompt_index,
            prompt=tokenizer.decode(one.prompt_ids),
            response=tokenizer.decode(one.response_ids),
            num_tokens=len(one.response_ids),
            finished=one.finished,
            weights_version=one.weights_version,
        )
        for one in first
    ]
