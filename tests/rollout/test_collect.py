"""Rollouts of other weights than asked for, on a world of one."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.collect import collect, gather
from megatron_oprd.rollout.engine import Rollout, RolloutEngine, SamplingParams
from megatron_oprd.rollout.pool import EnginePool
from megatron_oprd.rollout.recovery import EngineStarter

PROMPTS = [Prompt(index=index, token_ids=(1,)) for index in (4, 2)]


def engines(versions: list[int], context: Any) -> EnginePool:
    def generate(prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        return [
            Rollout(
                prompt_index=prompt.index,
                sample_index=0,
                prompt_ids=prompt.token_ids,
                response_ids=(5,),
                finished=True,
                weights_version=version,
            )
            for prompt, version in zip(prompts, versions, strict=True)
        ]

    def create() -> RolloutEngine:
        return cast(RolloutEngine, SimpleNamespace(generate=generate))

    return EnginePool(
        EngineStarter(owners=[0], create=create), lambda **_: iter(()), context=context
    )


def test_versions(context: Any) -> None:
    sampling = SamplingParams(max_new_tokens=1, seed=0)
    found = collect(engines([7, 7], context), PROMPTS, sampling, weights_version=7)
    assert [rollout.prompt_index for rollout in found] == [4, 2]
    with pytest.raises(RuntimeError, match=r"prompt 2 comes from weights of version 6, .* 7"):
        collect(engines([7, 6], context), PROMPTS, sampling, weights_version=7)


def test_versions_of_rollouts_that_were_begun_before(context: Any) -> None:
    """Those of the weights then, or, from an engine that was started again, of those now."""
    sampling = SamplingParams(max_new_tokens=1, seed=0)

    def gathered(versions: list[int]) -> list[Rollout]:
        them = engines(versions, context)
        generated = them.generate(PROMPTS, sampling)
        return gather(them, generated, PROMPTS, sampling, weights_versions=(6, 7))

    assert [rollout.weights_version for rollout in gathered([6, 7])] == [6, 7]
    with pytest.raises(RuntimeError, match=r"prompt 4 comes from weights of version 5, .* 6 or 7"):
        gathered([5, 6])
