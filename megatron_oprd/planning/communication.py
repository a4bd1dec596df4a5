"""Bytes that a rank sends in a step.

A collective over n ranks sends what a ring does: a gather or a scatter (n-1)/n of the whole, a sum
twice that. Small messages (shapes, metrics, the gradient norm) are left out.
"""

import math
from dataclasses import dataclass

from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.parameters import (
    count_parameters,
    expert_replicas,
    has_output_loss,
    num_checkpoints,
    num_recomputed,
    num_running,
    parameter_replicas,
    place_of,
    stage_of,
    stages_of_rank,
)
from megatron_oprd.planning.vllm import tensor_sizes
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import ModelLayout, RunLayout

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class SentBytes:
    """What each rank of a pipeline stage sends in a step.

    Attributes:
        teacher_tp: On the tensor-parallel group, in the teacher's pass.
        student_tp: Likewise in the student's.
        teacher_experts: Tokens to and from experts, on the expert-parallel and the
            expert-tensor-parallel group, in the teacher's pass.
        student_experts: Likewise in the student's, with their gradients.
        teacher_cp: Keys and values on the context-parallel group, in the teacher's pass.
        student_cp: Likewise in the student's, with their gradients.
        teacher_pp: To the neighbouring stages, in the teacher's pass.
        student_pp: Likewise in the student's.
        gradients: On the data-parallel group, to reduce gradients.
        parameters: On the data-parallel group, to gather updated parameters.
        weight_sync: Towards the rollout engine, the stage's ranks of a replica together (with
            those of other replicas that share its experts): shards within the stage, and whole
            tensors from the stage to the leader.
        into_engine: All weights, from a replica's leader into a vLLM engine's process or, of one
            replica only, to each worker of a server, which is counted as one. None from others.
    """

    teacher_tp: int
    student_tp: int
    teacher_experts: int
    student_experts: int
    teacher_cp: int
    student_cp: int
    teacher_pp: int
    student_pp: int
    gradients: int
    parameters: int
    weight_sync: int
    into_engine: int


def sent_bytes(layout: RunLayout, workload: Workload, *, pp_rank: int) -> SentBytes:
    """What the ranks of pipeline rank ``pp_rank`` send."""
    forward, backward = _hidden_states_sent(layout, layout.student, pp_rank)
    of_student = _sliced_bytes(layout, layout.student, workload)
    of_teacher = _sliced_bytes(layout, layout.teacher, workload)
    gradients, parameters = _data_parallel(layout, pp_rank)
    return SentBytes(
        teacher_tp=_teacher_tp(layout, workload, pp_rank),
        student_tp=_student_tp(layout, workload, pp_rank),
        teacher_experts=_teacher_layers(layout, pp_rank)
        * _tokens_to_experts(layout, layout.teacher, workload),
        student_experts=_student_experts(layout, workload, pp_rank),
        teacher_cp=_teacher_layers(layout, pp_rank)
        * _keys_and_values(layout, layout.teacher, workload),
        student_cp=_student_cp(layout, workload, pp_rank),
        teacher_pp=_hidden_states_sent(layout, layout.teacher, pp_rank)[0] * of_teacher,
        student_pp=(forward + backward) * of_student,
        gradients=gradients,
        parameters=parameters,
        weight_sync=_weight_sync(layout, pp_rank),
        into_engine=_into_engine(layout) if pp_rank == 0 else 0,
    )


def _teacher_layers(layout: RunLayout, pp_rank: int) -> int:
    counts = layout.teacher.extent.layers_per_stage
    return sum(counts[stage] for stage in stages_of_rank(layout, pp_rank))


def _teacher_tp(layout: RunLayout, workload: Workload, pp_rank: int) -> int:
    steps = 2 * _parallel_halves(layout.teacher) * _teacher_layers(layout, pp_rank)
    if pp_rank == 0:
        steps += 1 if layout.config.parallel.sequence_parallel else 2
    if has_output_loss(layout, pp_rank) and layout.config.parallel.sequence_parallel:
        steps += 1
    return _ring(layout, steps * _whole_bytes(layout, layout.teacher, workload))


def _student_tp(layout: RunLayout, workload: Workload, pp_rank: int) -> int:
    stages = stages_of_rank(layout, pp_rank)
    sequence_parallel = layout.config.parallel.sequence_parallel
    running = sum(num_running(layout, stage) for stage in stages)
    recomputed = sum(num_recomputed(layout, stage) for stage in stages)
    # A half of a layer: a gather and a scatter, which without sequence parallelism are one sum.
    # With it the backward pass gathers the input of the half's first linear layer once more.
    in_backward = 3 if sequence_parallel else 2
    steps = _parallel_halves(layout.student) * (2 * (running + recomputed) + in_backward * running)
    if pp_rank == 0:
        steps += 2
    if has_output_loss(layout, pp_rank):
        # Hidden states; sums of a few numbers a position are left out.
        steps += 2
    if layout.config.recompute.distribute_saved_activations:
        steps += sum(num_checkpoints(layout, stage) for stage in stages)
    sent = _ring(layout, steps * _whole_bytes(layout, layout.student, workload))
    if sequence_parallel:
        replicated = count_parameters(layout, layout.student, pp_rank).replicated
        sent += _ring(layout, 2 * replicated * _FP32)
    return sent


def _parallel_halves(model: ModelLayout) -> int:
    """Halves of a layer that are tensor-parallel: attention, and an MLP without experts."""
    return 2 if model.architecture.moe is None else 1


def _student_experts(layout: RunLayout, workload: Workload, pp_rank: int) -> int:
    stages = stages_of_rank(layout, pp_rank)
    passes = sum(2 * num_running(layout, stage) + num_recomputed(layout, stage) for stage in stages)
    return passes * _tokens_to_experts(layout, layout.student, workload)


def _tokens_to_experts(layout: RunLayout, model: ModelLayout, workload: Workload) -> int:
    """What a rank sends so that tokens get to one layer's experts and back, in equal shares."""
    moe, parallel = model.architecture.moe, model.parallel
    if moe is None:
        return 0
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    copies = moe.num_experts_per_token * _sliced_bytes(layout, model, workload)
    # Exchanged over one group, gathered and scattered over the other.
    return 2 * copies * (ep - 1) // ep + 2 * copies * (etp - 1)


def _student_cp(layout: RunLayout, workload: Workload, pp_rank: int) -> int:
    stages = stages_of_rank(layout, pp_rank)
    forward_again = layout.config.recompute.recompute_granularity == "selective"
    passes = sum(
        # Forward, and their gradients, which are scattered where they were gathered.
        (2 + forward_again) * num_running(layout, stage) + num_recomputed(layout, stage)
        for stage in stages
    )
    return passes * _keys_and_values(layout, layout.student, workload)


def _keys_and_values(layout: RunLayout, model: ModelLayout, workload: Workload) -> int:
    """What a rank sends so that one layer's keys and values are known on all ranks."""
    a, parallel = model.architecture, layout.config.parallel
    groups = max(a.num_query_groups // parallel.tensor_model_parallel_size, 1)
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    cp = parallel.context_parallel_size
    return 2 * workload.tokens * groups * a.head_dim * itemsize * (cp - 1) // cp


def _hidden_states_sent(layout: RunLayout, model: ModelLayout, pp_rank: int) -> tuple[int, int]:
    """How often a micro-batch's hidden state leaves the rank, forward and backward."""
    stages, last = stages_of_rank(layout, pp_rank), len(model.extent.layers_per_stage) - 1
    if last == 0:
        return 0, 0
    return sum(stage != last for stage in stages), sum(stage != 0 for stage in stages)


def _data_parallel(layout: RunLayout, pp_rank: int) -> tuple[int, int]:
    """Bytes for gradients and for parameters."""
    config = layout.config
    counts = count_parameters(layout, layout.student, pp_rank)
    itemsize = DTYPES[config.model.params_dtype].itemsize
    gradients = parameters = 0.0
    # Experts have an optimizer of their own, and each of the two gathers all parameters, unless
    # they are gathered in the forward pass.
    twice = counts.trainable_experts and not config.optimizer.overlap_param_gather
    times = 2 if twice else 1
    for number, replicas in (
        (counts.trainable, parameter_replicas(layout)),
        (counts.trainable_experts, expert_replicas(layout)),
    ):
        share = (replicas - 1) / replicas
        if config.optimizer.use_distributed_optimizer:
            gradients += share * number * _FP32
            parameters += share * number * itemsize * times
        else:
            gradients += 2 * share * number * _FP32
    return round(gradients), round(parameters)


def _weight_sync(layout: RunLayout, pp_rank: int) -> int:
    place, stages = place_of(layout.config.parallel), stages_of_rank(layout, pp_rank)
    sent = 0
    for mapping in layout.student.table:
        if stage_of(mapping.megatron, layout.student) not in stages:
            continue
        ranks = 1 if mapping.is_replicated else mapping.split_at(place)[1]
        shard = math.prod(mapping.local_shape(ranks))
        if mapping.expert is None:
            sent += (ranks - 1) * shard
        else:  # broadcast to all ranks that share the experts
            sent += (ranks * place.ep_size - 1) * ranks * shard
        if pp_rank > 0:
            sent += ranks * shard
    return sent * DTYPES[layout.config.model.params_dtype].itemsize


def _into_engine(layout: RunLayout) -> int:
    if layout.config.rollout.engine != "vllm":
        return 0
    return sum(tensor_sizes(layout)) * DTYPES[layout.config.model.params_dtype].itemsize


def _ring(layout: RunLayout, num_bytes: int) -> int:
    """What a rank sends of ``num_bytes`` that its tensor-parallel group gathers or scatters."""
    tp = layout.config.parallel.tensor_model_parallel_size
    return num_bytes * (tp - 1) // tp


def _whole_bytes(layout: RunLayout, model: ModelLayout, workload: Workload) -> int:
    """The hidden states of all tokens of a step on a context-parallel rank."""
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    tokens = workload.tokens // layout.config.parallel.context_parallel_size
    return tokens * model.architecture.hidden_size * itemsize


def _sliced_bytes(layout: RunLayout, model: ModelLayout, workload: Workload) -> int:
    """Of these what one rank holds between a layer's parallel regions."""
    parallel = layout.config.parallel
    slices = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return _whole_bytes(layout, model, workload) // slices
