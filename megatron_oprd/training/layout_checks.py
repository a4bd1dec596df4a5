"""Checks a run's settings against its models and the number of processes; builds nothing."""

from collections.abc import Sequence

from megatron_oprd.config.schema import ParallelConfig, RunConfig
from megatron_oprd.distill.layer_map import LayerPair
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.layout_checks import (
    as_setting,
    check_divides,
    check_expert_biases,
    refuse_expert_sizes,
)
from megatron_oprd.parallel.context import data_parallel_size
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.rollout.registry import engine_kind


def check_models(
    config: RunConfig, *, student: Architecture, teacher: Architecture, world_size: int
) -> None:
    """Checks that both models can be sharded as configured, and sequence lengths.

    Raises:
        UserError: A setting does not fit.
    """
    _check_batch(config, data_parallel_size(config.parallel, world_size))
    layout = ParallelLayout.of(config.parallel)
    check_divides(student, layout, model="model.student", spelling=as_setting)
    check_expert_biases(student, layout, model="model.student", spelling=as_setting)
    _check_engine(config, student, world_size)
    _check_teacher_experts(config, teacher, world_size)
    for setting, arch in (("model.student", student), ("model.teacher", teacher)):
        _check_sequence_length(setting, arch, config)
        _check_context_parallelism(setting, arch, config.parallel)
    _check_experts(student, teacher, config.parallel)


def check_recompute(config: RunConfig, layers_per_stage: Sequence[int]) -> None:
    """Checks that ``recompute_num_layers`` divides the student's layers on each stage.

    Megatron assumes it without a check. Raises a UserError if it does not.
    """
    recompute = config.recompute
    number = recompute.recompute_num_layers
    if recompute.recompute_method != "uniform" or number is None:
        return
    if any(layers % number for layers in layers_per_stage):
        raise UserError(
            f"recompute.recompute_num_layers = {number} does not divide the layers of every "
            f"stage, which are {list(layers_per_stage)}, as recompute.recompute_method = uniform "
            "needs; give 1, another divisor of them, or recompute_method = block"
        )


def check_same_model(
    config: RunConfig, pairs: list[LayerPair], student: Architecture, teacher: Architecture
) -> None:
    """Checks that the teacher can take over the student's weights.

    Raises:
        UserError: The architectures differ, or a layer is not matched with itself.
    """
    setting = f"teacher.refresh_interval = {config.teacher.refresh_interval}"
    if student != teacher:
        raise UserError(
            f"{setting} needs model.teacher to be of model.student's architecture, whose weights "
            "it takes over; give the student itself"
        )
    if other := [pair for pair in pairs if pair.student != pair.teacher]:
        raise UserError(
            f"{setting} needs each layer to be matched with itself; taps.layer_map matches student "
            f"layer {other[0].student} with teacher layer {other[0].teacher}"
        )


def check_losses(
    config: RunConfig, pairs: list[LayerPair], student: Architecture, teacher: Architecture
) -> None:
    """Checks the losses against the matched layers and the vocabularies.

    Raises:
        UserError: They do not fit.
    """
    weights = config.loss.layer_weights
    if weights is not None and len(weights) != len(pairs):
        raise UserError(
            f"loss.layer_weights has {len(weights)} entries, but taps.layers selects {len(pairs)} "
            "layers; give one for each"
        )
    smallest = min(student.vocab_size, teacher.vocab_size)
    if config.output_loss.kind == "top_k" and config.output_loss.k > smallest:
        raise UserError(
            f"output_loss.k = {config.output_loss.k} is more than the {smallest} tokens of the "
            "vocabulary; give at most that"
        )


def _check_experts(student: Architecture, teacher: Architecture, parallel: ParallelConfig) -> None:
    if student.moe is None and teacher.moe is None:
        refuse_expert_sizes(
            ParallelLayout.of(parallel),
            models="neither model.student nor model.teacher has a",
            spelling=as_setting,
        )
    tp = parallel.tensor_model_parallel_size
    if student.moe is not None and tp > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.tensor_model_parallel_size = {tp} needs parallel.sequence_parallel = true, "
            "because model.student has a mixture of experts, which Megatron trains with sequence "
            "parallelism only"
        )


def _check_context_parallelism(setting: str, arch: Architecture, parallel: ParallelConfig) -> None:
    size = parallel.context_parallel_size
    if arch.delta is not None and size > 1:
        raise UserError(
            f"parallel.context_parallel_size = {size}, but {setting} has linear attention, whose "
            "state goes through a sequence from its first token on; give 1, and tensor or pipeline "
            "parallelism instead"
        )


def _check_sequence_length(setting: str, arch: Architecture, config: RunConfig) -> None:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    prompt_setting = "data.max_prompt_tokens"
    if setting == "model.teacher" and config.teacher_prompt.max_tokens is not None:
        prompt, prompt_setting = config.teacher_prompt.max_tokens, "teacher_prompt.max_tokens"
    if prompt + response > arch.max_position_embeddings:
        raise UserError(
            f"{prompt_setting} = {prompt} and rollout.max_new_tokens = {response} make sequences "
            f"of up to {prompt + response} tokens, but {setting} was made for at most "
            f"{arch.max_position_embeddings} ({arch.length_field}); lower one of the two"
        )
    # Training uses the long factors for all sequences of such a run.
    original = arch.rope.original_max_position_embeddings
    switches = arch.rope.rope_type == "longrope" and setting == "model.student"
    kind = engine_kind(config.rollout)
    if switches and kind.switches_rotary_factors and prompt + response > (original or 0):
        raise UserError(
            f"data.max_prompt_tokens = {prompt} and rollout.max_new_tokens = {response} make "
            f"sequences of up to {prompt + response} tokens; {setting} changes its rotary factors "
            f"past {original}, which rollout.engine = {kind.name} does in the middle of a "
            "sequence, so that rollouts would not be the trained model's. Allow at most "
            f"{original} tokens"
        )


def _check_batch(config: RunConfig, dp_size: int) -> None:
    rollout, parallel = config.rollout, config.parallel
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    multiple = dp_size
    needed = f"{dp_size} data-parallel replicas"
    if parallel.virtual_pipeline_model_parallel_size is not None:
        # The number of micro-batches has to be a multiple of the pipeline size for Megatron's
        # interleaved schedule.
        multiple *= parallel.pipeline_model_parallel_size
        needed += f" of {parallel.pipeline_model_parallel_size} interleaved stages"
    if sequences % multiple:
        raise UserError(
            f"rollout.prompts_per_step = {rollout.prompts_per_step} x rollout.samples_per_prompt "
            f"= {rollout.samples_per_prompt} gives {sequences} sequences a step, but {needed} "
            f"need a multiple of {multiple}"
        )


def _check_engine(config: RunConfig, student: Architecture, world_size: int) -> None:
    """Checks that engines divide the ranks, and that an engine's GPUs can share the student."""
    kind = engine_kind(config.rollout)
    size = kind.num_gpus(config.rollout)
    if kind.place(config.rollout) == "device" and world_size % size:
        raise UserError(
            f"{kind.setting('tensor_model_parallel_size')} = {size}: engines run on all GPUs of "
            f"the run, so it has to divide the {world_size} processes"
        )
    check_divides(
        student,
        ParallelLayout(tensor_model_parallel_size=size),
        model="model.student",
        spelling=lambda name, size: f"{kind.setting(name)} = {size}",
    )


def _check_teacher_experts(config: RunConfig, teacher: Architecture, world_size: int) -> None:
    parallel, own = config.teacher_parallel, vars(config.teacher)

    def spelling(name: str, size: int) -> str:
        return f"teacher.{name} = {size}" if own.get(name) is not None else as_setting(name, size)

    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if own[name] is not None and teacher.moe is None:
            raise UserError(
                f"teacher.{name} = {own[name]}, but model.teacher has no mixture of experts; leave "
                "it out"
            )
    layout = ParallelLayout.of(parallel)
    check_divides(teacher, layout, model="model.teacher", spelling=spelling)
    check_expert_biases(teacher, layout, model="model.teacher", spelling=spelling)
    etp, ep = parallel.expert_tensor_size, parallel.expert_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    if world_size % (etp * ep * pp):
        raise UserError(
            f"{world_size} processes do not divide into groups that share the teacher's experts, "
            f"of {spelling('expert_tensor_parallel_size', etp)} x "
            f"{spelling('expert_model_parallel_size', ep)} x "
            f"parallel.pipeline_model_parallel_size = {pp}; start a multiple of {etp * ep * pp}"
        )
