"""One step's rollouts: generated on each replica's leader, known on every rank afterwards."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch.distributed as dist

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.data.teacher_sequences import TeacherReader
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.engine import Rollout, SamplingParams
from megatron_oprd.rollout.replicas import ReplicaEngines


def share_of_replica(prompts: Sequence[Prompt], context: ParallelContext) -> Sequence[Prompt]:
    """The prompts that this replica's leader generates for: every n-th."""
    return prompts[context.dp_rank :: context.dp_size]


def collect(
    engines: ReplicaEngines,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    weights_version: int = 0,
    context: ParallelContext,
    reader: TeacherReader | None = None,
) -> list[Rollout]:
    """Generates the responses of the whole step.

    Args:
        engines: The replicas' engines, with the weights.
        prompts: The step's prompts, the same on every leader; not looked at on other ranks.
        sampling: How to sample.
        weights_version: The version of the weights that the rollouts have to come from.
        context: This rank's place.
        reader: How the teacher reads; None: the student's sequences.

    Returns:
        See `gather`.

    Raises:
        RuntimeError: See `gather`.
        RolloutEngineError: An engine failed too often; on every rank.
    """
    return gather(
        engines.generate(share_of_replica(prompts, context), sampling),
        prompts,
        sampling,
        weights_versions=(weights_version,),
        context=context,
        reader=reader,
    )


def gather(
    generated: list[Rollout] | None,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    weights_versions: Collection[int],
    context: ParallelContext,
    reader: TeacherReader | None = None,
) -> list[Rollout]:
    """Puts together what the replicas generated.

    The results go to each replica's ranks, then over the replicas, on the context's control groups.

    Args:
        generated: On leaders, the rollouts of `share_of_replica`; not looked at on other ranks.
        prompts: The step's prompts; likewise.
        sampling: How they were sampled.
        weights_versions: Versions of the weights that the rollouts may come from.
        context: This rank's place.
        reader: How the teacher reads; None: the student's sequences.

    Returns:
        All rollouts in the order of ``prompts``, then of the sample, the same on every rank.

    Raises:
        RuntimeError: A rollout comes from other weights; on every rank.
    """
    if reader is not None and generated is not None:
        repeated = [
            prompt
            for prompt in share_of_replica(prompts, context)
            for _ in range(sampling.samples_per_prompt)
        ]
        generated = [
            replace(rollout, teacher=reader.read(prompt, rollout.response_ids))
            for prompt, rollout in zip(repeated, generated, strict=True)
        ]
    own = [generated]
    dist.broadcast_object_list(own, src=context.leader, group=context.replica_control)
    shares: list[list[Rollout] | None] = [None] * context.dp_size
    dist.all_gather_object(shares, own[0], group=context.leaders_control)
    rollouts: list[Rollout] = []
    n = sampling.samples_per_prompt
    num_prompts = sum(len(share or ()) for share in shares) // n
    for prompt in range(num_prompts):
        share, first = shares[prompt % context.dp_size], prompt // context.dp_size * n
        assert share is not None
        rollouts += share[first : first + n]
    for rollout in rollouts:
        if rollout.weights_version not in weights_versions:
            raise RuntimeError(
                f"a rollout of prompt {rollout.prompt_index} comes from weights of version "
                f"{rollout.weights_version}, asked for were those of version "
                f"{' or '.join(map(str, weights_versions))}"
            )
    return rollouts
