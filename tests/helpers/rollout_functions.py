"""Functions for ``rollout.function``, which tests name."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_oprd.rollout.engine import SamplingParams
from megatron_oprd.rollout.function import Generate, Response, ResponseRequest

INSERTED = (50, 51, 52)


def plain(
    generate: Generate, tokenizer: Any, requests: Sequence[ResponseRequest], sampling: Any
) -> list[Response]:
    """What the engine alone would make."""
    turns = generate(requests, [one.prompt_ids for one in requests])
    return [
        Response(
            token_ids=turn.token_ids,
            written=[True] * len(turn.token_ids),
            finished=turn.finished,
            logprobs=turn.logprobs,
        )
        for turn in turns
    ]


def two_turns(
    generate: Generate,
    tokenizer: Any,
    requests: Sequence[ResponseRequest],
    sampling: SamplingParams,
) -> list[Response]:
    """Three tokens of the student, three inserted ones, and as many of the student as fit."""
    short = replace(sampling, max_new_tokens=3)
    first = generate(requests, [one.prompt_ids for one in requests], short)
    prefixes = [
        [*one.prompt_ids, *turn.token_ids, *INSERTED]
        for one, turn in zip(requests, first, strict=True)
    ]
    second = generate(requests, prefixes)
    return [
        Response(
            token_ids=[*before.token_ids, *INSERTED, *after.token_ids],
            written=[True] * len(before.token_ids)
            + [False] * len(INSERTED)
            + [True] * len(after.token_ids),
            finished=after.finished,
            logprobs=[*(before.logprobs or ()), *(after.logprobs or ())]
            if sampling.logprobs
            else None,
            metrics={"first_length": len(before.token_ids)},
        )
        for before, after in zip(first, second, strict=True)
    ]


def fails_on_one_prompt(
    generate: Generate,
    tokenizer: Any,
    requests: Sequence[ResponseRequest],
    sampling: SamplingParams,
) -> list[Response]:
    """`plain`, but on one engine it divides by zero in the first step."""
    if any(request.prompt_index == min(FAILING) for request in requests):
        raise ZeroDivisionError("division by zero")
    return plain(generate, tokenizer, requests, sampling)


def fails_in_the_second_step(
    generate: Generate,
    tokenizer: Any,
    requests: Sequence[ResponseRequest],
    sampling: SamplingParams,
) -> list[Response]:
    """`plain`, but it divides by zero for a prompt of the second step, if none is shuffled."""
    if any(request.prompt_index == OF_SECOND_STEP for request in requests):
        raise ZeroDivisionError("division by zero")
    return plain(generate, tokenizer, requests, sampling)


FAILING = (0,)
OF_SECOND_STEP = 5
not_a_function = 3
