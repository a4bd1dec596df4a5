"""Responses that are graded: metrics.jsonl gets the share of right ones, ``function/right``.

torchrun -m megatron_oprd.train --config examples/rollout_functions/graded.yaml

(`make demo` makes the models that the file names.) The engine alone generates, and the last number
of a response is compared with the column ``answer`` of its prompt. The grade changes no training.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from megatron_oprd.rollout.engine import SamplingParams
from megatron_oprd.rollout.function import Generate, Response, ResponseRequest

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def roll_out(
    generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[ResponseRequest],
    sampling: SamplingParams,
) -> list[Response]:
    """Graded responses; see `RolloutFunction`."""
    turns = generate(requests, [request.prompt_ids for request in requests])
    return [
        Response(
            token_ids=turn.token_ids,
            written=[True] * len(turn.token_ids),
            finished=turn.finished,
            logprobs=turn.logprobs,
            metrics={
                "right": is_right(
                    tokenizer.decode(turn.token_ids, skip_special_tokens=True),
                    request.columns["answer"],
                )
            },
        )
        for request, turn in zip(requests, turns, strict=True)
    ]


def is_right(response: str, answer: float) -> bool:
    """Whether the last number of a response is the answer."""
    numbers = _NUMBER.findall(response)
    return bool(numbers) and abs(float(numbers[-1].replace(",", "")) - answer) < 1e-6
