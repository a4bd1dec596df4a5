"""Rounds of generation until enough prompts are complete, with a stand-in for the engine."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import Rollout, RolloutEngine, SamplingParams
from megatron_oprd.rollout.oversampling import Key, complete_prompts, generate_until
from megatron_oprd.rollout.pool import EnginePool
from megatron_oprd.rollout.recovery import EngineStarter

END = 9
SAMPLING = SamplingParams(max_new_tokens=7, samples_per_prompt=2, seed=0)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(index=index, token_ids=(index + 10,)) for index in range(count)]


class Counting:
    """Writes 20, 21, ... after a prompt, and END where the response has its length."""

    def __init__(self, lengths: Mapping[tuple[int, int], int], version: int = 0) -> None:
        self.lengths = lengths
        self.version = version
        self.asked: list[list[Prompt]] = []

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        self.asked.append(prompts)
        return [self._rollout(prompt) for prompt in prompts]

    def _rollout(self, prompt: Prompt) -> Rollout:
        assert prompt.samples is not None
        assert prompt.max_new_tokens is not None
        begun = len(prompt.token_ids) - 1
        end = self.lengths[prompt.index, prompt.samples[0]]
        count = min(prompt.max_new_tokens, end - begun)
        tokens = [20 + begun + i for i in range(count)]
        if begun + count == end:
            tokens[-1] = END
        return Rollout(
            prompt_index=prompt.index,
            sample_index=prompt.samples[0],
            prompt_ids=prompt.token_ids,
            response_ids=tuple(tokens),
            finished=tokens[-1] == END,
            weights_version=self.version,
            logprobs=tuple(-float(token) for token in tokens),
        )

    def pool(self, context: Any) -> EnginePool:
        engine = cast(RolloutEngine, SimpleNamespace(generate=self.generate))
        starter = EngineStarter(owners=[0], create=lambda: engine)
        return EnginePool(starter, lambda **_: iter(()), context=context)


def decode(ids: Any) -> str:
    return "".join(chr(ord("a") + token % 20) for token in ids)


def generate(
    engine: Counting,
    context: Any,
    count: int,
    *,
    wanted: int,
    begun: Mapping[Key, Rollout] | None = None,
    sampling: SamplingParams = SAMPLING,
) -> dict[Key, Rollout]:
    return generate_until(
        engine.pool(context),
        prompts(count),
        sampling,
        wanted=wanted,
        interval=2,
        begun=begun or {},
        decode=decode,
    )


# Prompt 1 is complete after one round, prompt 0 after two, prompt 2 is cut after four.
LENGTHS = {(0, 0): 1, (0, 1): 4, (1, 0): 2, (1, 1): 1, (2, 0): 2, (2, 1): 99}


def test_rounds_end_when_enough_is_complete(context: Any) -> None:
    engine = Counting(LENGTHS)
    found = generate(engine, context, 3, wanted=2)
    assert [one.index for one in complete_prompts(prompts(3), found, SAMPLING)] == [0, 1]
    assert found[0, 0, 1].response_ids == (20, 21, 22, END)
    assert found[0, 0, 1].logprobs == (-20.0, -21.0, -22.0, -9.0)
    assert found[0, 0, 1].prompt_ids == (10,)
    # Stopped where the others were complete.
    assert found[2, 0, 1].response_ids == (20, 21, 22, 23)
    assert not found[2, 0, 1].finished
    # Only what is open is asked for again, and each time with other noise.
    assert [len(asked) for asked in engine.asked] == [6, 2]
    assert [one.turn for one in engine.asked[1]] == [2, 2]
    assert {one.max_new_tokens for one in engine.asked[1]} == {2}


def test_all_that_is_started_may_be_wanted(context: Any) -> None:
    """A response is cut at ``max_new_tokens``, and then complete."""
    engine = Counting(LENGTHS)
    found = generate(engine, context, 3, wanted=3)
    assert len(found[2, 0, 1].response_ids) == SAMPLING.max_new_tokens
    assert not found[2, 0, 1].finished
    assert [[one.max_new_tokens for one in asked] for asked in engine.asked[1:]] == [
        [2, 2],
        [2],
        [1],
    ]


def test_what_was_begun_goes_on(context: Any) -> None:
    before = generate(Counting(LENGTHS, version=3), context, 3, wanted=2)
    engine = Counting(LENGTHS, version=4)
    found = generate(engine, context, 3, wanted=3, begun=before)
    assert [[one.token_ids for one in asked] for asked in engine.asked] == [
        [(12, 20, 21, 22, 23)],
        [(12, 20, 21, 22, 23, 24, 25)],
    ]
    assert found[2, 0, 1].response_ids == (20, 21, 22, 23, 24, 25, 26)
    assert found[2, 0, 1].weights_version == 3
    assert found[0, 0, 0] is before[0, 0, 0]


def test_nothing_is_asked_for_if_enough_was_complete_before(context: Any) -> None:
    before = generate(Counting(LENGTHS), context, 3, wanted=2)
    engine = Counting(LENGTHS)
    assert generate(engine, context, 3, wanted=2, begun=before) == before
    assert engine.asked == []


def test_a_stop_text_over_the_border_of_two_rounds(context: Any) -> None:
    """20, 21, 22 and 23 are a, b, c and d."""
    sampling = SamplingParams(max_new_tokens=7, seed=0, stop=("bc",))
    found = generate(Counting({(0, 0): 99}), context, 1, wanted=1, sampling=sampling)
    assert found[0, 0, 0].response_ids == (20, 21, 22)
    assert found[0, 0, 0].logprobs == (-20.0, -21.0, -22.0)
    assert found[0, 0, 0].finished


def test_tokens_without_log_probabilities_are_no_beginning_of_some_with(context: Any) -> None:
    engine = Counting(LENGTHS)
    before = {key: _without(one) for key, one in generate(engine, context, 3, wanted=2).items()}
    with pytest.raises(AssertionError, match="begun without log-probabilities"):
        generate(engine, context, 3, wanted=3, begun=before)


def _without(rollout: Rollout) -> Rollout:
    fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    return Rollout(**fields | {"logprobs": None})
