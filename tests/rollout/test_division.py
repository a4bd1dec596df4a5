"""How a step's responses are divided over engines."""

import pytest

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.division import divide
from megatron_oprd.rollout.engine import SamplingParams


def prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(index=i, token_ids=(1,) * length) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("num_engines", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("per_prompt", [1, 3, 4])
def test_every_response_once_and_equal_shares(num_engines: int, per_prompt: int) -> None:
    given = prompts(5, 1, 9, 3, 3)
    sampling = SamplingParams(max_new_tokens=1, seed=0, samples_per_prompt=per_prompt)
    shares = divide(given, sampling, num_engines=num_engines)
    found = [[(p.index, sample) for p in share for sample in p.samples or ()] for share in shares]
    assert sorted(one for share in found for one in share) == [
        (index, sample) for index in range(len(given)) for sample in range(per_prompt)
    ]
    counts = [len(share) for share in found]
    assert max(counts) - min(counts) <= 1


def test_long_prompts_are_spread() -> None:
    sampling = SamplingParams(max_new_tokens=1, seed=0)
    shares = divide(prompts(100, 1, 90, 2, 3, 80), sampling, num_engines=3)
    assert [sum(len(p.token_ids) for p in share) for share in shares] == [101, 92, 83]


def test_responses_of_a_prompt_stay_together() -> None:
    sampling = SamplingParams(max_new_tokens=1, seed=0, samples_per_prompt=8)
    shares = divide(prompts(4, 3, 2, 1), sampling, num_engines=2)
    assert [[p.index for p in share] for share in shares] == [[0, 3], [1, 2]]
    # One prompt on four engines, which would else be idle.
    shares = divide(prompts(4), sampling, num_engines=4)
    assert [share[0].samples for share in shares] == [(0, 1), (2, 3), (4, 5), (6, 7)]
