"""Bytes that a rank sends in a step.

Collectives over n ranks count as ring algorithms: a gather or scatter sends (n-1)/n of the whole,
an all-reduce twice that. Small messages (shapes, metrics, the gradient norm) are omitted.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

from megatron_oprd.models.build import DTYPES
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.planning.engine import engine_place, sync_bytes
from megatron_oprd.planning.parameters import (
    ParameterCounts,
    count_parameters,
    expert_replicas,
    has_output_loss,
    num_checkpoints,
    num_recomputed,
    parameter_replicas,
    stage_of,
)
from megatron_oprd.planning.passes import exchanges_targets
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import ModelLayout, RunLayout

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class SentBytes:
    """Bytes that each rank of a pipeline rank sends in a step.

    Fields named student_* include the backward pass.
    """

    # On the tensor-parallel group, and targets on their way to the student's positions if ranks
    # share sequences and the teacher's micro-batches are others.
    teacher_tp: int
    student_tp: int
    # Tokens to and from experts (expert-parallel and expert-tensor-parallel groups).
    teacher_experts: int
    student_experts: int  # with gradients
    # Keys and values on the context-parallel group. Targets, too, of sequences that both groups
    # share: that group has the slower links.
    teacher_cp: int
    student_cp: int  # with gradients
    teacher_pp: int  # to neighbouring stages
    student_pp: int
    gradients: int  # reduction on the data-parallel group, without those of experts
    parameters: int  # gather of updated parameters on that group, without experts
    expert_gradients: int  # the same on the group of ranks with the same experts
    expert_parameters: int
    # For the rollout engines, by all ranks of the stage in a replica (and in replicas that share
    # its experts): its shards to the other stages, then all shards within the stage.
    weight_sync: int
    # All weights: from an engine's owner into the engine's processes or, from one rank only, to a
    # server, whose workers count as one. 0 elsewhere.
    into_engine: int


def sent_bytes(layout: RunLayout, workload: Workload, *, pp_rank: int) -> SentBytes:
    """Bytes sent by each rank of pipeline rank ``pp_rank``."""
    forward, backward = _hidden_states_sent(layout, layout.student, pp_rank)
    read = workload.of_teacher
    of_student = _sliced_bytes(layout, layout.student, workload)
    of_teacher = _sliced_bytes(layout, layout.teacher, read)
    counts = count_parameters(layout, layout.student, pp_rank)
    gradients, parameters = _data_parallel(
        layout, counts.trainable, parameter_replicas(layout), counts
    )
    expert_gradients, expert_parameters = _data_parallel(
        layout, counts.trainable_experts, expert_replicas(layout), counts
    )
    over_tp, over_cp = _exchanged_targets(layout, workload, pp_rank)
    return SentBytes(
        teacher_tp=_teacher_tp(layout, read, pp_rank) + over_tp,
        student_tp=_student_tp(layout, workload, pp_rank),
        teacher_experts=layout.teacher.architecture.num_with_experts(
            _teacher_layers(layout, pp_rank)
        )
        * _tokens_to_experts(layout, layout.teacher, read),
        student_experts=_student_experts(layout, workload, pp_rank),
        teacher_cp=len(_teacher_layers(layout, pp_rank))
        * _keys_and_values(layout, layout.teacher, read)
        + over_cp,
        student_cp=_student_cp(layout, workload, pp_rank),
        teacher_pp=_hidden_states_sent(layout, layout.teacher, pp_rank)[0] * of_teacher,
        student_pp=(forward + backward) * of_student,
        gradients=gradients,
        parameters=parameters,
        expert_gradients=expert_gradients,
        expert_parameters=expert_parameters,
        weight_sync=_weight_sync(layout, pp_rank),
        into_engine=_into_engine(layout, pp_rank),
    )


def _teacher_layers(layout: RunLayout, pp_rank: int) -> list[int]:
    of_stage = layout.teacher.extent.layers_of_stage
    return [layer for stage in layout.stages_of_rank(pp_rank) for layer in of_stage(stage)]


def _teacher_tp(layout: RunLayout, workload: Workload, pp_rank: int) -> int:
    layers = _teacher_layers(layout, pp_rank)
    steps = 2 * _parallel_halves(layout.teacher, layers)
    if layout.config.parallel.sequence_parallel:
        steps += _second_projections(layout.teacher, layers)
    # The embedding's output: a scatter with sequence parallelism, else an all-reduce.
    if pp_rank == 0:
        steps += 1 if layout.config.parallel.sequence_parallel else 2
    if has_output_loss(layout, pp_rank) and layout.config.parallel.sequence_parallel:
        # The hidden states, gathered for the LM head.
        steps += 1
    return _ring(layout, steps * _whole_bytes(layout, layout.teacher, workload)) + _squares(
        layout, layout.teacher, workload, len(layers)
    )


def _exchanged_targets(layout: RunLayout, workload: Workload, pp_rank: int) -> tuple[int, int]:
    """Bytes that a rank sends in the sums that bring targets to their ranks: TP group, CP group."""
    if not exchanges_targets(layout):
        return 0, 0
    cp, sp = layout.config.parallel.context_parallel_size, layout.parallel.sequence_size
    # Equal sequences: those of the largest micro-batch times the rest of the step.
    share = workload.num_sequences / workload.micro_batch_size
    layers = {pair.teacher for pair in layout.pairs_of_rank(pp_rank)}
    of_states = share * workload.supervised_rows * len(layers) * layout.bytes_of_target
    of_outputs = 0.0
    if has_output_loss(layout, pp_rank):
        of_outputs = share * workload.supervised_output_rows * layout.output_target_bytes_per_row

    def all_reduce(num_bytes: float, ranks: int) -> int:
        return round(2 * num_bytes * (ranks - 1) / ranks)

    if cp == 1:  # the head's hidden states are gathered whole
        return all_reduce(of_states, sp), 0
    return 0, all_reduce(of_states, sp * cp) + all_reduce(of_outputs, cp)


def _student_tp(layout: RunLayout, workload: Workload, pp_rank: int) -> int:
    stages = layout.stages_of_rank(pp_rank)
    sequence_parallel = layout.config.parallel.sequence_parallel
    running, recomputed = _student_layers(layout, pp_rank)
    a = layout.student.architecture
    linear = _second_projections(layout.student, running)
    # Per half layer a gather and a scatter (one all-reduce without sequence parallelism). With
    # sequence parallelism, the backward pass gathers the input of the half's first linear layer
    # again.
    in_backward = 3 if sequence_parallel else 2
    steps = 2 * _parallel_halves(layout.student, running + recomputed)
    steps += in_backward * _parallel_halves(layout.student, running)
    if sequence_parallel:
        steps += _second_projections(layout.student, running + recomputed)
    # With sequence parallelism a gather and a scatter, without it an all-reduce.
    steps += 2 * linear
    if pp_rank == 0:
        steps += 2
    if has_output_loss(layout, pp_rank):
        # The hidden states and their gradients; sums of a few numbers per position are omitted.
        steps += 2
    if layout.config.recompute.distribute_saved_activations:
        steps += sum(num_checkpoints(layout, stage) for stage in stages)
    sent = _ring(layout, steps * _whole_bytes(layout, layout.student, workload))
    if sequence_parallel:
        # Gradients of norms are all-reduced, as each rank has seen only its slice of the sequence.
        replicated = count_parameters(layout, layout.student, pp_rank).replicated
        if a.delta is not None:
            replicated -= linear * a.delta.value_dim  # as below
        sent += _ring(layout, 2 * replicated * _FP32)
    elif a.qk_norm:
        # Without it only those of query and key heads.
        heads = a.num_attention_heads + a.num_query_groups if a.qk_norm_over_all_heads else 2
        sent += _ring(layout, 2 * (len(running) - linear) * heads * a.head_dim * _FP32)
    if a.delta is not None:
        # The gradient of the heads' norm, in every backward pass; packed sequences have their own.
        is_packed = layout.config.batch.sequence_packing
        passes = workload.num_sequences if is_packed else workload.num_micro_batches
        itemsize = DTYPES[layout.config.model.params_dtype].itemsize
        sent += _ring(layout, 2 * linear * passes * a.delta.value_dim * itemsize)
    passes = 2 * len(running) + len(recomputed)
    return sent + _squares(layout, layout.student, workload, passes)


def _student_layers(layout: RunLayout, pp_rank: int) -> tuple[list[int], list[int]]:
    """The rank's layers that run, and those of them that run again in the backward pass."""
    running: list[int] = []
    recomputed: list[int] = []
    for stage in layout.stages_of_rank(pp_rank):
        layers = layout.running_layers_of_stage(stage)
        running += layers
        recomputed += layers[: num_recomputed(layout, stage)]
    return running, recomputed


def _parallel_halves(model: ModelLayout, layers: list[int]) -> int:
    """Tensor-parallel halves of some layers: attention, and an MLP or an expert for all tokens."""
    moe = model.architecture.moe
    halves = 2 * len(layers)
    if moe is not None and moe.shared_ffn_hidden_size is None:
        halves -= model.architecture.num_with_experts(layers)
    return halves


def _second_projections(model: ModelLayout, layers: list[int]) -> int:
    """Layers in which two projections read the input, each with messages of its own."""
    return sum(map(model.architecture.has_delta_net, layers))


def _squares(layout: RunLayout, model: ModelLayout, workload: Workload, passes: int) -> int:
    """Bytes that a rank sends for norms over all heads, in so many passes through a layer."""
    if not model.architecture.qk_norm_over_all_heads:
        return 0
    tokens = workload.tokens // layout.config.parallel.context_parallel_size
    # Of queries and of keys a number for each token, summed over the ranks.
    return _ring(layout, passes * 2 * 2 * tokens * _FP32)


def _student_experts(layout: RunLayout, workload: Workload, pp_rank: int) -> int:
    running, recomputed = _student_layers(layout, pp_rank)
    passes = layout.student.architecture.num_with_experts([*running, *running, *recomputed])
    return passes * _tokens_to_experts(layout, layout.student, workload)


def _tokens_to_experts(layout: RunLayout, model: ModelLayout, workload: Workload) -> int:
    """Bytes sent by a rank for one layer's tokens to experts and back, in equal shares."""
    moe, parallel = model.architecture.moe, model.parallel
    if moe is None:
        return 0
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    copies = moe.num_experts_per_token * _sliced_bytes(layout, model, workload)
    # All-to-all over the expert-parallel group, gather and scatter over the expert-tensor-parallel
    # group.
    return 2 * copies * (ep - 1) // ep + 2 * copies * (etp - 1)


def _student_cp(layout: RunLayout, workload: Workload, pp_rank: int) -> int:
    running, recomputed = _student_layers(layout, pp_rank)
    forward_again = layout.config.recompute.recompute_granularity == "selective"
    # Forward, and the gradients, which are scattered where keys and values were gathered.
    passes = (2 + forward_again) * len(running) + len(recomputed)
    return passes * _keys_and_values(layout, layout.student, workload)


def _keys_and_values(layout: RunLayout, model: ModelLayout, workload: Workload) -> int:
    """Bytes that a rank sends to exchange one layer's keys and values."""
    a, parallel = model.architecture, layout.config.parallel
    groups = max(a.num_query_groups // parallel.tensor_model_parallel_size, 1)
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    cp = parallel.context_parallel_size
    width = a.head_dim + a.value_dim
    return workload.tokens * groups * width * itemsize * (cp - 1) // cp


def _hidden_states_sent(layout: RunLayout, model: ModelLayout, pp_rank: int) -> tuple[int, int]:
    """Sends of a micro-batch's hidden state by the rank, forward and backward."""
    stages, last = layout.stages_of_rank(pp_rank), len(model.extent.layers_per_stage) - 1
    if last == 0:
        return 0, 0
    return sum(stage != last for stage in stages), sum(stage != 0 for stage in stages)


def _data_parallel(
    layout: RunLayout, number: int, replicas: int, counts: ParameterCounts
) -> tuple[int, int]:
    """Bytes for the gradients of ``number`` parameters, and for the parameters themselves."""
    config, share = layout.config, (replicas - 1) / replicas
    if not config.optimizer.use_distributed_optimizer:
        return round(2 * share * number * _FP32), 0
    itemsize = DTYPES[config.model.params_dtype].itemsize
    # Experts have their own optimizer, and each of the two optimizers gathers all parameters,
    # unless the forward pass gathers them.
    twice = counts.trainable_experts and not config.optimizer.overlap_param_gather
    times = 2 if twice else 1
    return round(share * number * _FP32), round(share * number * itemsize * times)


def _weight_sync(layout: RunLayout, pp_rank: int) -> int:
    place, stages = ParallelLayout.of(layout.config.parallel), layout.stages_of_rank(pp_rank)
    sent = 0
    parallel = layout.config.parallel
    of_stage = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    to_others = parallel.pipeline_model_parallel_size - 1
    for (stage, is_expert, ranks), shards in _shards(layout.student).items():
        is_own = stage in stages
        if not is_expert:
            # Every rank has its counterparts on the other stages.
            sent += of_stage * (ranks - 1) * shards + is_own * of_stage * to_others * shards
        else:  # broadcast to all ranks that share the experts
            sent += (ranks * place.expert_model_parallel_size - 1) * ranks * shards
            sent += is_own * ranks * to_others * shards
    return sent * DTYPES[layout.config.model.params_dtype].itemsize


# A search asks again and again, with other settings of the same layout.
@functools.lru_cache(maxsize=256)
def _shards(model: ModelLayout) -> dict[tuple[int | None, bool, int], int]:
    """Elements of a shard of each parameter, summed over those of the same kind.

    Keys are the stage (None for what is not built), whether an expert has it, and the number of
    ranks that it is split over.
    """
    place = ParallelLayout.of(model.parallel)
    found: Counter[tuple[int | None, bool, int]] = Counter()
    for mapping in model.table:
        ranks = 1 if mapping.is_replicated else mapping.split_at(place)[1]
        key = stage_of(mapping.megatron, model), mapping.expert is not None, ranks
        found[key] += math.prod(mapping.local_shape(ranks))
    return found


def _into_engine(layout: RunLayout, pp_rank: int) -> int:
    place = engine_place(layout)
    # Engines on the trainer's GPUs are owned by ranks of all stages.
    has_owner = place == "device" or (place == "server" and pp_rank == 0)
    return sync_bytes(layout) if has_owner else 0


def _ring(layout: RunLayout, num_bytes: int) -> int:
    """Bytes that a rank sends when its tensor-parallel group gathers or scatters ``num_bytes``."""
    tp = layout.config.parallel.tensor_model_parallel_size
    return num_bytes * (tp - 1) // tp


def _whole_bytes(layout: RunLayout, model: ModelLayout, workload: Workload) -> int:
    """Hidden states of all tokens of a step on a context-parallel rank."""
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    tokens = workload.tokens // layout.config.parallel.context_parallel_size
    return tokens * model.architecture.hidden_size * itemsize


def _sliced_bytes(layout: RunLayout, model: ModelLayout, workload: Workload) -> int:
    """The part of `_whole_bytes` that a rank holds between a layer's parallel regions."""
    return _whole_bytes(layout, model, workload) // layout.parallel.sequence_size
