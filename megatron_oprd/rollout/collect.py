"""Collects the rollouts of a step: divided over the engines, generated, then sent to every rank."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.data.teacher_sequences import TeacherReader
from megatron_oprd.rollout.division import divide
from megatron_oprd.rollout.engine import Rollout, SamplingParams
from megatron_oprd.rollout.function import UserFunction
from megatron_oprd.rollout.pool import EnginePool


def share_of_engine(
    engines: EnginePool, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Prompt]:
    """What this rank's engine generates for; empty on a rank without one."""
    if engines.own is None:
        return []
    return divide(prompts, sampling, num_engines=engines.size)[engines.own]


def collect(
    engines: EnginePool,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    weights_version: int = 0,
    reader: TeacherReader | None = None,  # None: the teacher reads the student's sequences
    function: UserFunction | None = None,  # makes the responses with the engines; None: plain
) -> list[Rollout]:
    """Generates a step's responses and distributes them; arguments and result as in `gather`.

    Raises on every rank RolloutEngineError if an engine failed too often, and
    RolloutFunctionError if ``function`` makes a mistake.
    """
    share = share_of_engine(engines, prompts, sampling)
    return gather(
        engines,
        engines.generate(share, sampling, function=function),
        prompts,
        sampling,
        weights_versions=(weights_version,),
        reader=reader,
    )


def gather(
    engines: EnginePool,
    generated: list[Rollout] | None,  # for `share_of_engine`; None without an engine
    prompts: Sequence[Prompt],  # the step's, the same on every rank
    sampling: SamplingParams,
    *,
    weights_versions: Collection[int],
    reader: TeacherReader | None = None,  # None: the teacher reads the student's sequences
) -> list[Rollout]:
    """Collects the rollouts of all engines on every rank, ordered by prompt, then by sample.

    Collective over all ranks (`EnginePool.told`). Raises RuntimeError on every rank if a rollout
    was sampled with a version of the weights outside ``weights_versions``.
    """
    divided = divide(prompts, sampling, num_engines=engines.size)
    # Owners add what comes from prompts before the exchange, which divides the work of `reader`.
    if generated is not None:
        assert engines.own is not None
        repeated = [prompt for prompt in divided[engines.own] for _ in prompt.samples or ()]
        generated = [
            replace(
                rollout,
                teacher=None if reader is None else reader.read(prompt, rollout.response_ids),
                columns=prompt.columns,
            )
            for prompt, rollout in zip(repeated, generated, strict=True)
        ]
    # A prompt can come more than once, but no (seed, prompt, occurrence, sample).
    of_request: dict[tuple[int | None, int, int, int], Rollout] = {}
    for share, found in zip(divided, engines.told(generated), strict=True):
        assert found is not None
        requests = [
            (p.seed, p.index, p.occurrence, sample) for p in share for sample in p.samples or ()
        ]
        of_request.update(zip(requests, found, strict=True))
    rollouts = [
        of_request[prompt.seed, prompt.index, prompt.occurrence, sample]
        for prompt in prompts
        for sample in range(sampling.samples_per_prompt)
    ]
    # Checked after the exchange, so that all ranks raise and none is left waiting in a collective.
    for rollout in rollouts:
        if rollout.weights_version not in weights_versions:
            raise RuntimeError(
                f"a rollout of prompt {rollout.prompt_index} comes from weights of version "
                f"{rollout.weights_version}, asked for were those of version "
                f"{' or '.join(map(str, weights_versions))}"
            )
    return rollouts
