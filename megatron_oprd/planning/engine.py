"""The rollout engine's memory, from numbers of the run, and what a weight sync needs."""

import functools
import math

from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.parameters import layer_of
from megatron_oprd.planning.workload import Workload
from megatron_oprd.rollout.costs import EngineBytes, EngineLoad
from megatron_oprd.rollout.kind import EngineKind, Place
from megatron_oprd.rollout.registry import engine_kind
from megatron_oprd.training.layout import ModelLayout, RunLayout
from megatron_oprd.weights.expert_parts import stored_shapes


def engine_of(layout: RunLayout) -> EngineKind:
    """The run's rollout engine."""
    return engine_kind(layout.config.rollout)


def engine_place(layout: RunLayout) -> Place:
    """Where the run's rollout engine generates."""
    return engine_of(layout).place(layout.config.rollout)


def engine_bytes(layout: RunLayout, workload: Workload, *, memory_gb: float) -> EngineBytes | None:
    """Estimates an engine's memory on a GPU with ``memory_gb`` (10^9 bytes).

    None if the engine has GPUs of its own.
    """
    load = engine_load(layout, workload, memory_gb=memory_gb)
    return engine_of(layout).memory(layout.config.rollout, load)


def num_engines(layout: RunLayout) -> int:
    """The run's rollout engines: over all its GPUs, or one per data-parallel replica."""
    if engine_place(layout) != "device":
        return layout.data_parallel_size
    return layout.world_size // engine_of(layout).num_gpus(layout.config.rollout)


def responses_of_engine(layout: RunLayout, workload: Workload) -> int:
    """Responses that the fullest engine generates in a step."""
    rollout = layout.config.rollout
    started = layout.data_parallel_size * workload.num_sequences * rollout.started_prompts
    return -(-started // (rollout.prompts_per_step * num_engines(layout)))


def _steps_at_once(layout: RunLayout) -> int:
    """Steps whose responses an engine generates together (`RolloutSource`)."""
    rollout = layout.config.rollout
    if engine_of(layout).overlaps or rollout.function is not None:
        return 1
    return rollout.steps_ahead + 1


def engine_load(layout: RunLayout, workload: Workload, *, memory_gb: float) -> EngineLoad:
    """The numbers of a run that an engine's memory depends on."""
    a = layout.student.architecture
    moe = a.moe
    ffn = a.ffn_hidden_size
    if moe is not None:
        of_token = moe.ffn_hidden_size * moe.num_experts_per_token
        of_token += moe.shared_ffn_hidden_size or 0
        ffn = max(of_token, ffn if moe.first_dense_layers else 0)
    return EngineLoad(
        itemsize=_itemsize(layout),
        num_weights=sum(_tensor_sizes(layout.student)),
        num_linear_weights=_num_linear_weights(layout.student),
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=ffn,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups,
        head_dim=a.head_dim,
        vocab_size=a.vocab_size,
        prompt_tokens=workload.prompt_tokens,
        response_tokens=workload.response_tokens,
        num_sequences=responses_of_engine(layout, workload) * _steps_at_once(layout),
        max_sequence_length=layout.max_sequence_length,
        memory_gb=memory_gb,
    )


def sync_workspace(layout: RunLayout, *, owns_engine: bool) -> int:
    """Bytes on a rank while the largest tensor is gathered for the engines."""
    # All ranks gather the shards; those that own an engine make the whole tensor of them.
    return (1 + owns_engine) * max(_tensor_sizes(layout.student)) * _itemsize(layout)


def sync_bytes(layout: RunLayout) -> int:
    """Bytes of all weights that a sync sends to an engine."""
    return sum(_tensor_sizes(layout.student)) * _itemsize(layout)


# A search asks again and again, with other settings of the same layout.
@functools.lru_cache(maxsize=256)
def _tensor_sizes(student: ModelLayout) -> tuple[int, ...]:
    """Elements of every tensor in which the student's weights are sent to an engine."""
    return tuple(math.prod(shape) for shape in stored_shapes(student.table).values())


@functools.lru_cache(maxsize=256)
def _num_linear_weights(student: ModelLayout) -> int:
    """Elements of the layers' matrices."""
    return sum(
        math.prod(shape)
        for mapping in student.table
        if layer_of(mapping.megatron) is not None and not mapping.is_replicated
        for shape in mapping.hf.values()
        if len(shape) == 2
    )


def _itemsize(layout: RunLayout) -> int:
    return DTYPES[layout.config.model.params_dtype].itemsize
