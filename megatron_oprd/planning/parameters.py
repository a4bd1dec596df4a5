"""How many parameters a rank holds, counted from the table of mappings."""

import math
import re
from collections import Counter
from dataclasses import dataclass

from megatron_oprd.config import ParallelConfig
from megatron_oprd.place import Place
from megatron_oprd.planning.layers import (
    LAYER,
    has_output_loss,
    stage_of,
    stages_of_rank,
    trains,
)
from megatron_oprd.training.layout import ModelLayout, RunLayout
from megatron_oprd.weights.mapping import Mapping

_FP32 = 4
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of one model on one rank.

    Attributes:
        total: All of them.
        trainable: Those with a gradient, without experts'.
        trainable_experts: Experts' parameters with a gradient; other ranks share their optimizer
            states than those of the rest.
        replicated: Those with a gradient that every tensor-parallel rank holds whole: norms.
    """

    total: int
    trainable: int
    trainable_experts: int
    replicated: int


def place_of(parallel: ParallelConfig) -> Place:
    """The first place; every other holds as many parameters of its layers."""
    return Place(
        tp_size=parallel.tensor_model_parallel_size,
        etp_size=parallel.expert_tensor_size,
        ep_size=parallel.expert_model_parallel_size,
    )


def held_parameters(layout: RunLayout, model: ModelLayout, pp_rank: int) -> list[Mapping]:
    """The parameters of a model that the first place of a pipeline rank holds."""
    place, stages = place_of(model.parallel), stages_of_rank(layout, pp_rank)
    return [
        mapping
        for mapping in model.table
        if mapping.is_held_at(place) and stage_of(mapping.megatron, model) in stages
    ]


def count_parameters(layout: RunLayout, model: ModelLayout, pp_rank: int) -> ParameterCounts:
    """The parameters of one of the run's models on pipeline rank ``pp_rank``."""
    place = place_of(model.parallel)
    is_student = model is layout.student
    sizes: dict[str, int] = {}  # layers are alike, and so are experts
    counts: Counter[str] = Counter()
    for mapping in held_parameters(layout, model, pp_rank):
        name = mapping.megatron
        kind = _EXPERT.sub(".experts.", LAYER.sub("layer.", name))
        if kind not in sizes:
            sizes[kind] = math.prod(mapping.local_shape(mapping.split_at(place)[1]))
        counts["total"] += sizes[kind]
        if is_student and trains(name, layout):
            counts["trainable" if mapping.expert is None else "trainable_experts"] += sizes[kind]
            counts["replicated"] += sizes[kind] if mapping.is_replicated else 0
    if model.architecture.tied and pp_rank > 0 and has_output_loss(layout, pp_rank):
        # Megatron keeps a copy of the embedding on the last stage.
        copy = model.padded_vocab_size // place.tp_size * model.architecture.hidden_size
        counts["total"] += copy
        counts["trainable"] += copy if is_student else 0
    return ParameterCounts(
        total=counts["total"],
        trainable=counts["trainable"],
        trainable_experts=counts["trainable_experts"],
        replicated=counts["replicated"],
    )


def parameter_replicas(layout: RunLayout) -> int:
    """Copies of each parameter that is no expert's in the whole run."""
    return layout.data_parallel_size * layout.config.parallel.context_parallel_size


def expert_replicas(layout: RunLayout) -> int:
    """Copies of each expert in the whole run."""
    parallel = layout.config.parallel
    ranks_of_stage = parameter_replicas(layout) * parallel.tensor_model_parallel_size
    return ranks_of_stage // (parallel.expert_tensor_size * parallel.expert_model_parallel_size)


def gradient_bytes(counts: ParameterCounts) -> int:
    """Megatron's gradient buffers, in fp32."""
    return (counts.trainable + counts.trainable_experts) * _FP32


def optimizer_bytes(counts: ParameterCounts, layout: RunLayout, *, itemsize: int) -> int:
    """Adam's two moments, and fp32 main parameters where the parameters are in another format.

    Args:
        counts: The student's parameters on the rank.
        layout: The run.
        itemsize: Bytes of a parameter.
    """
    of_each = 2 * _FP32 + (_FP32 if itemsize != _FP32 else 0)
    if not layout.config.optimizer.use_distributed_optimizer:
        return (counts.trainable + counts.trainable_experts) * of_each
    shared = counts.trainable / parameter_replicas(layout)
    shared += counts.trainable_experts / expert_replicas(layout)
    return round(shared * of_each)
