"""Collects the rollouts of a step: generated on replica leaders, then sent to every rank."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch.distributed as dist

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.data.teacher_sequences import TeacherReader
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.engine import Rollout, SamplingParams
from megatron_oprd.rollout.replicas import ReplicaEngines


def share_of_replica(prompts: Sequence[Prompt], context: ParallelContext) -> Sequence[Prompt]:
    """The prompts that this replica's leader generates for: every dp_size-th prompt."""
    return prompts[context.dp_rank :: context.dp_size]


def collect(
    engines: ReplicaEngines,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    weights_version: int = 0,
    context: ParallelContext,
    reader: TeacherReader | None = None,  # None: the teacher reads the student's sequences
) -> list[Rollout]:
    """Generates a step's responses and distributes them; arguments and result as in `gather`.

    Raises RolloutEngineError on every rank if an engine failed too often.
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
    generated: list[Rollout] | None,  # of `share_of_replica`; ignored if not a leader
    prompts: Sequence[Prompt],  # the step's, the same on every leader; ignored on other ranks
    sampling: SamplingParams,
    *,
    weights_versions: Collection[int],
    context: ParallelContext,
    reader: TeacherReader | None = None,  # None: the teacher reads the student's sequences
) -> list[Rollout]:
    """Collects the rollouts of all replicas on every rank, ordered by prompt, then by sample.

    The rollouts are broadcast in each replica, then gathered over replicas (the context's control
    groups). Raises RuntimeError on every rank if a rollout was sampled with a version of the
    weights outside ``weights_versions``.
    """
    # Leaders add what comes from prompts before the exchange: other ranks have no prompts.
    if generated is not None:
        repeated = [
            prompt
            for prompt in share_of_replica(prompts, context)
            for _ in range(sampling.samples_per_prompt)
        ]
        generated = [
            replace(
                rollout,
                teacher=None if reader is None else reader.read(prompt, rollout.response_ids),
                columns=prompt.columns,
            )
            for prompt, rollout in zip(repeated, generated, strict=True)
        ]
    own = [generated]
    dist.broadcast_object_list(own, src=context.leader, group=context.replica_control)
    shares: list[list[Rollout] | None] = [None] * context.dp_size
    dist.all_gather_object(shares, own[0], group=context.leaders_control)
    rollouts: list[Rollout] = []
    # Inverse of share_of_replica: prompt i is entry i // dp_size of replica i % dp_size.
    n = sampling.samples_per_prompt
    num_prompts = sum(len(share or ()) for share in shares) // n
    for prompt in range(num_prompts):
        share, first = shares[prompt % context.dp_size], prompt // context.dp_size * n
        assert share is not None
        rollouts += share[first : first + n]
    # Checked after the exchange, so that all ranks raise and none is left waiting in a collective.
    for rollout in rollouts:
        if rollout.weights_version not in weights_versions:
            raise RuntimeError(
                f"a rollout of prompt {rollout.prompt_index} comes from weights of version "
                f"{rollout.weights_version}, asked for were those of version "
                f"{' or '.join(map(str, weights_versions))}"
            )
    return rollouts
