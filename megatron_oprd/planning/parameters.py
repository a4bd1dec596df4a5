"""Layers and parameters of each pipeline rank, counted from the table of weight mappings."""

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass

from megatron_oprd.distill.trainable_projectors import num_parameters
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.training.layout import ModelLayout, RunLayout
from megatron_oprd.weights.mapping import Mapping

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def is_last_stage(layout: RunLayout, stage: int) -> bool:
    """Whether a stage has final norm and LM head."""
    return stage == len(layout.student.extent.layers_per_stage) - 1


def has_output_loss(layout: RunLayout, pp_rank: int) -> bool:
    """Whether a pipeline rank compares next-token distributions."""
    stages = layout.stages_of_rank(pp_rank)
    return layout.compares_outputs and any(is_last_stage(layout, stage) for stage in stages)


def num_recomputed(layout: RunLayout, stage: int) -> int:
    """Running layers whose forward pass is repeated in the backward pass."""
    recompute, running = layout.config.recompute, layout.running_per_stage[stage]
    match recompute.recompute_method:
        case "uniform":
            return running
        case "block":
            assert recompute.recompute_num_layers is not None
            return min(recompute.recompute_num_layers, running)
        case _:
            return 0


def num_checkpoints(layout: RunLayout, stage: int) -> int:
    """Recomputed runs of a stage's layers, which save only their input."""
    recompute, layers = layout.config.recompute, layout.student.extent.layers_per_stage[stage]
    number = recompute.recompute_num_layers
    if number is None:
        return 0
    # Layers past the deepest tap count, although they do not run.
    return -(-layers // number) if recompute.recompute_method == "uniform" else min(number, layers)


@functools.cache
def layer_of(parameter: str) -> int | None:
    """Layer of a parameter; None for embedding, final norm and LM head."""
    match = LAYER.match(parameter)
    return int(match[1]) if match else None


def stage_of(parameter: str, model: ModelLayout) -> int | None:
    """Stage that holds a parameter; None if it is not built."""
    extent = model.extent
    stages = range(len(extent.layers_per_stage))
    layer = layer_of(parameter)
    if layer is not None:
        return next((stage for stage in stages if layer in extent.layers_of_stage(stage)), None)
    match parameter.split(".")[0]:
        case "embedding":
            return 0
        case "decoder":  # the final norm
            return extent.last_stage_with_layers if extent.final_norm else None
        case "output_layer":
            return stages[-1] if extent.lm_head else None
    raise AssertionError(f"where is {parameter}?")


def trains(parameter: str, layout: RunLayout) -> bool:
    """Whether a parameter of the student gets a gradient."""
    layer = layer_of(parameter)
    if layer is not None:
        return layer < layout.num_running_layers
    match parameter.split(".")[0]:
        case "embedding":
            return True
        case "decoder":  # the final norm
            return layout.trains_final_norm
        case "output_layer":
            return layout.compares_outputs
    raise AssertionError(f"what is {parameter}?")


_FP32 = 4
_EXPERT = re.compile(r"\.experts\.\d+\.")


@functools.cache
def kind_of(parameter: str) -> str:
    """A parameter's name without the numbers of layer and expert; one kind has one shape."""
    return _EXPERT.sub(".experts.", LAYER.sub("layer.", parameter))


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters of one model on one rank; the student's projectors count."""

    total: int
    trainable: int  # with a gradient, without experts'
    trainable_experts: int  # separate, because different ranks share their optimizer states
    # Trainable and whole on every tensor-parallel rank: norms and projectors.
    replicated: int


def held_parameters(
    layout: RunLayout, model: ModelLayout, pp_rank: int
) -> list[tuple[Mapping, int]]:
    """A model's parameters at the first place of a pipeline rank.

    Those that differ only in the number of their expert are one, with how many they are.
    """
    by_stage = _held_by_stage(model)
    return [one for stage in layout.stages_of_rank(pp_rank) for one in by_stage.get(stage, [])]


# A search plans a layout with many other settings, and a large mixture of experts has 10^4 tensors.
@functools.lru_cache(maxsize=512)
def _held_by_stage(model: ModelLayout) -> dict[int | None, list[tuple[Mapping, int]]]:
    place = ParallelLayout.of(model.parallel)
    found: dict[tuple[int | None, str], tuple[Mapping, int]] = {}
    for mapping in model.table:
        if mapping.is_held_at(place):
            key = layer_of(mapping.megatron), kind_of(mapping.megatron)
            first, number = found.get(key, (mapping, 0))
            found[key] = first, number + 1
    by_stage: dict[int | None, list[tuple[Mapping, int]]] = {}
    for mapping, number in found.values():
        by_stage.setdefault(stage_of(mapping.megatron, model), []).append((mapping, number))
    return by_stage


def count_parameters(layout: RunLayout, model: ModelLayout, pp_rank: int) -> ParameterCounts:
    """Counts the parameters of one of the run's models on a pipeline rank."""
    place = ParallelLayout.of(model.parallel)
    is_student = model is layout.student
    sizes: dict[str, int] = {}  # one per kind: layers and experts are alike
    counts: Counter[str] = Counter()
    for mapping, number in held_parameters(layout, model, pp_rank):
        name = mapping.megatron
        kind = kind_of(name)
        if kind not in sizes:
            sizes[kind] = math.prod(mapping.local_shape(mapping.split_at(place)[1]))
        counts["total"] += number * sizes[kind]
        if is_student and trains(name, layout):
            of_kind = "trainable" if mapping.expert is None else "trainable_experts"
            counts[of_kind] += number * sizes[kind]
            counts["replicated"] += sizes[kind] if mapping.is_replicated else 0
    if model.architecture.tied and pp_rank > 0 and has_output_loss(layout, pp_rank):
        # Megatron keeps a copy of a tied embedding on the last stage.
        copy = (
            model.padded_vocab_size
            // place.tensor_model_parallel_size
            * model.architecture.hidden_size
        )
        counts["total"] += copy
        counts["trainable"] += copy if is_student else 0
    if is_student and layout.trains_projectors:
        of_one = num_parameters(
            layout.config.bridge,
            student_width=model.architecture.hidden_size,
            teacher_width=layout.teacher.architecture.hidden_size,
        )
        for kind in ("total", "trainable", "replicated"):
            counts[kind] += of_one * len(layout.pairs_of_rank(pp_rank))
    return ParameterCounts(
        total=counts["total"],
        trainable=counts["trainable"],
        trainable_experts=counts["trainable_experts"],
        replicated=counts["replicated"],
    )


def parameter_replicas(layout: RunLayout) -> int:
    """Copies of each non-expert parameter in the run."""
    return layout.data_parallel_size * layout.config.parallel.context_parallel_size


def expert_replicas(layout: RunLayout) -> int:
    """Copies of each expert in the run."""
    parallel = layout.config.parallel
    ranks_of_stage = parameter_replicas(layout) * parallel.tensor_model_parallel_size
    return ranks_of_stage // (parallel.expert_tensor_size * parallel.expert_model_parallel_size)


def gradient_bytes(counts: ParameterCounts) -> int:
    """Bytes of Megatron's gradient buffers, in fp32."""
    return (counts.trainable + counts.trainable_experts) * _FP32


def optimizer_bytes(counts: ParameterCounts, layout: RunLayout, *, itemsize: int) -> int:
    """Bytes of Adam's moments, and of fp32 main parameters for other parameter types."""
    of_each = 2 * _FP32 + (_FP32 if itemsize != _FP32 else 0)
    if not layout.config.optimizer.use_distributed_optimizer:
        return (counts.trainable + counts.trainable_experts) * of_each
    # A distributed optimizer divides the states over the replicas of each parameter.
    shared = counts.trainable / parameter_replicas(layout)
    shared += counts.trainable_experts / expert_replicas(layout)
    return round(shared * of_each)
