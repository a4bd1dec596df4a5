"""Which layers and parameters sit on which pipeline rank, and which of them run and train."""

import re

from megatron_oprd.training.layout import ModelLayout, RunLayout

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def stages_of_rank(layout: RunLayout, pp_rank: int) -> range:
    """The stages of a pipeline rank: one, or one for each of its virtual stages.

    Stages are counted in the order in which a token passes them, over all ranks.
    """
    counts = layout.student.extent.layers_per_stage
    return range(pp_rank, len(counts), layout.config.parallel.pipeline_model_parallel_size)


def layers_of_stage(model: ModelLayout, stage: int) -> range:
    """A model's layers, counted from 0, on a stage."""
    counts = model.extent.layers_per_stage
    start = sum(counts[:stage])
    return range(start, start + counts[stage])


def is_last_stage(layout: RunLayout, stage: int) -> bool:
    """Whether a stage has the models' ends."""
    return stage == len(layout.student.extent.layers_per_stage) - 1


def has_output_loss(layout: RunLayout, pp_rank: int) -> bool:
    """Whether a pipeline rank compares next-token distributions."""
    stages = stages_of_rank(layout, pp_rank)
    return layout.compares_outputs and any(is_last_stage(layout, stage) for stage in stages)


def num_running(layout: RunLayout, stage: int) -> int:
    """The student's layers on a stage that run in training: those up to the deepest tap."""
    layers = layers_of_stage(layout.student, stage)
    return sum(layer < layout.num_running_layers for layer in layers)


def num_recomputed(layout: RunLayout, stage: int) -> int:
    """Of these the layers whose forward pass runs again in the backward pass."""
    recompute, running = layout.config.recompute, num_running(layout, stage)
    match recompute.recompute_method:
        case "uniform":
            return running
        case "block":
            assert recompute.recompute_num_layers is not None
            return min(recompute.recompute_num_layers, running)
        case _:
            return 0


def num_checkpoints(layout: RunLayout, stage: int) -> int:
    """Runs of a stage's layers of which only the input is saved.

    Layers past the deepest tap are among them, though they do not run.
    """
    recompute, layers = layout.config.recompute, len(layers_of_stage(layout.student, stage))
    number = recompute.recompute_num_layers
    if number is None:
        return 0
    return -(-layers // number) if recompute.recompute_method == "uniform" else min(number, layers)


def layer_of(parameter: str) -> int | None:
    """The layer that a parameter belongs to; None for embedding, final norm and LM head."""
    match = LAYER.match(parameter)
    return int(match[1]) if match else None


def stage_of(parameter: str, model: ModelLayout) -> int | None:
    """The stage that holds a parameter; None if it is not built."""
    extent = model.extent
    stages = range(len(extent.layers_per_stage))
    layer = layer_of(parameter)
    if layer is not None:
        return next((stage for stage in stages if layer in layers_of_stage(model, stage)), None)
    match parameter.split(".")[0]:
        case "embedding":
            return 0
        case "decoder":  # the final norm
            behind = max(stage for stage in stages if extent.layers_per_stage[stage])
            return behind if extent.final_norm else None
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
