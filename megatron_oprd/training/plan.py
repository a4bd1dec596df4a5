"""What a run will do, worked out and checked from configurations alone: no weight is read."""

import os
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.config import ParallelConfig, RunConfig
from megatron_oprd.config_file import dump_config
from megatron_oprd.data.prompts import check_prompt_files
from megatron_oprd.data.tokenizers import (
    check_same_tokenizer,
    eos_token_ids,
    load_tokenizer,
    pad_token_id,
)
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.build import Extent, padded_vocab_size
from megatron_oprd.models.families import read_architecture
from megatron_oprd.models.families.dense import mapping_table
from megatron_oprd.parallel import data_parallel_size
from megatron_oprd.taps.layer_map import LayerPair, layer_pairs
from megatron_oprd.taps.stages import student_stages, teacher_stages
from megatron_oprd.weights.hf_files import HFCheckpoint, check_output_folder
from megatron_oprd.weights.load import check_tensors
from megatron_oprd.weights.mapping import Mapping


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One model of the run.

    Attributes:
        checkpoint: The Hugging Face folder.
        architecture: What its configuration says.
        extent: How much of it is built, and on which stages.
        padded_vocab_size: Rows of its embedding.
        table: The mappings of the whole model.
    """

    checkpoint: HFCheckpoint
    architecture: Architecture
    extent: Extent
    padded_vocab_size: int
    table: list[Mapping]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A whole run.

    Attributes:
        config: The run's configuration.
        student: The student.
        teacher: The teacher, cut at its deepest mapped layer.
        tokenizer: The student's.
        pairs: Matched layers.
        data_parallel_size: Replicas.
    """

    config: RunConfig
    student: ModelPlan
    teacher: ModelPlan
    tokenizer: PreTrainedTokenizerBase
    pairs: list[LayerPair]
    data_parallel_size: int

    @property
    def num_running_layers(self) -> int:
        """Student layers that run in training: up to the deepest tap."""
        return max(pair.student for pair in self.pairs) + 1

    @property
    def trains_final_norm(self) -> bool:
        """Whether the student's final norm is in front of a tap, and so trained."""
        return (
            self.config.taps.last_layer == "post_norm"
            and self.num_running_layers == self.student.architecture.num_layers
        )


def export_folder(config: RunConfig) -> Path:
    """Where the distilled student is written at the end."""
    return Path(config.output_dir) / "student"


def make_plan(config: RunConfig, *, world_size: int) -> RunPlan:
    """Works out a run for ``world_size`` processes, reading configurations and file headers only.

    Raises:
        UserError: A model, a tokenizer or the prompts cannot be used, or the settings do not fit
            the models or the number of processes.
    """
    dp_size = data_parallel_size(config.parallel, world_size)
    _check_output_dir(config)
    _check_batch(config, dp_size)
    student = HFCheckpoint(config.model.student)
    teacher = HFCheckpoint(config.model.teacher)
    student_arch, teacher_arch = read_architecture(student), read_architecture(teacher)
    for setting, arch in (("model.student", student_arch), ("model.teacher", teacher_arch)):
        _check_heads(setting, arch, config.parallel)
        _check_sequence_length(setting, arch, config)
    if student_arch.hidden_size != teacher_arch.hidden_size:
        raise UserError(
            f"model.student is {student_arch.hidden_size} wide, model.teacher "
            f"{teacher_arch.hidden_size}: hidden states can only be compared directly at equal "
            "width. Models of other widths will be matched through a bridge (OPRD-Bridge, frozen "
            "projectors), which is not available yet"
        )
    check_same_tokenizer(Path(config.model.student), Path(config.model.teacher))
    tokenizer = load_tokenizer(Path(config.model.student))
    _check_tokenizer_and_prompts(config, tokenizer, student_arch, teacher_arch)
    pairs = layer_pairs(
        config.taps.layers,
        config.taps.layer_map,
        num_student_layers=student_arch.num_layers,
        num_teacher_layers=teacher_arch.num_layers,
    )
    student_layers = _student_layers(config.parallel, student_arch, pairs)
    teacher_layers = teacher_stages(pairs, student_layers)
    takes_norm = config.taps.last_layer == "post_norm"
    return RunPlan(
        config=config,
        student=_model_plan(
            config,
            student,
            student_arch,
            Extent(layers_per_stage=student_layers, final_norm=True, lm_head=True),
        ),
        teacher=_model_plan(
            config,
            teacher,
            teacher_arch,
            Extent(
                layers_per_stage=teacher_layers,
                final_norm=takes_norm and sum(teacher_layers) == teacher_arch.num_layers,
                lm_head=False,
            ),
        ),
        tokenizer=tokenizer,
        pairs=pairs,
        data_parallel_size=dp_size,
    )


def describe(plan: RunPlan) -> str:
    """The plan for a reader: configuration, layer map, and which layers sit on which stage."""
    config = plan.config
    pp = config.parallel.pipeline_model_parallel_size
    lines = [
        "# configuration",
        dump_config(config).rstrip(),
        "",
        f"# layer map, 0-based: student layer -> teacher layer ({len(plan.pairs)} of "
        f"{plan.student.architecture.num_layers} student layers)",
        ", ".join(f"{pair.student} -> {pair.teacher}" for pair in plan.pairs),
        "",
        f"# pipeline stages ({plan.data_parallel_size} data-parallel replicas)",
    ]
    student_end = teacher_end = 0
    counts = zip(
        plan.student.extent.layers_per_stage, plan.teacher.extent.layers_per_stage, strict=True
    )
    for stage, (of_student, of_teacher) in enumerate(counts):
        name = f"rank {stage % pp}"
        if config.parallel.virtual_pipeline_model_parallel_size is not None:
            name += f", chunk {stage // pp}"
        lines.append(
            f"{name}: student {_layers(student_end, of_student)}; "
            f"teacher {_layers(teacher_end, of_teacher)}"
        )
        student_end += of_student
        teacher_end += of_teacher
    not_run = plan.student.architecture.num_layers - plan.num_running_layers
    not_built = plan.teacher.architecture.num_layers - teacher_end
    lines.append(
        f"student: {not_run} layers past the deepest tap and the LM head are frozen and not run; "
        f"teacher: {not_built} layers and the LM head are not built"
    )
    return "\n".join(lines)


def _layers(start: int, count: int) -> str:
    if count == 0:
        return "no layers"
    return f"layer {start}" if count == 1 else f"layers {start}-{start + count - 1}"


def _model_plan(
    config: RunConfig, checkpoint: HFCheckpoint, architecture: Architecture, extent: Extent
) -> ModelPlan:
    padded = padded_vocab_size(
        architecture,
        divisible_by=config.model.make_vocab_size_divisible_by,
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
    )
    table = mapping_table(architecture, padded_vocab_size=padded)
    check_tensors(table, checkpoint, tied=architecture.tied)
    return ModelPlan(
        checkpoint=checkpoint,
        architecture=architecture,
        extent=extent,
        padded_vocab_size=padded,
        table=table,
    )


def _student_layers(
    parallel: ParallelConfig, student: Architecture, pairs: list[LayerPair]
) -> tuple[int, ...]:
    pp = parallel.pipeline_model_parallel_size
    num_stages = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    running = max(pair.student for pair in pairs) + 1
    if parallel.num_layers_per_stage is None:
        layers = student_stages(student.num_layers, pairs, num_stages)
    else:
        layers = tuple(parallel.num_layers_per_stage)
        if min(layers) < 1 or sum(layers) != student.num_layers:
            raise UserError(
                f"parallel.num_layers_per_stage = {list(layers)}: every stage needs at least one "
                f"layer, and all of them the student's {student.num_layers} (found {sum(layers)})"
            )
    starts = [sum(layers[:stage]) for stage in range(num_stages)]
    for rank in range(pp):
        if min(starts[rank::pp]) >= running:
            raise UserError(
                f"pipeline rank {rank} would have nothing to train: the deepest tap is at student "
                f"layer {running - 1}, its first layer is {min(starts[rank::pp])}. Megatron cannot "
                "checkpoint such a rank; tap deeper layers (taps.layers), divide the layers "
                "otherwise (parallel.num_layers_per_stage), or use fewer stages "
                "(parallel.pipeline_model_parallel_size)"
            )
    return layers


def _check_heads(setting: str, arch: Architecture, parallel: ParallelConfig) -> None:
    tp = parallel.tensor_model_parallel_size
    for what, count in (
        ("attention heads", arch.num_attention_heads),
        ("key/value heads", arch.num_query_groups),
        ("feed-forward width", arch.ffn_hidden_size),
    ):
        if count % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size = {tp} does not divide the {count} {what} "
                f"of {setting}"
            )


def _check_sequence_length(setting: str, arch: Architecture, config: RunConfig) -> None:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    if prompt + response > arch.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_tokens = {prompt} and rollout.max_new_tokens = {response} make "
            f"sequences of up to {prompt + response} tokens; {setting} was made for at most "
            f"{arch.max_position_embeddings} (max_position_embeddings)"
        )


def _check_output_dir(config: RunConfig) -> None:
    check_output_folder(export_folder(config), force=True)
    existing = Path(config.output_dir).absolute()
    while not existing.exists():
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(
            f"output_dir = {config.output_dir}: {existing} is no folder that can be written to"
        )


def _check_tokenizer_and_prompts(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    student: Architecture,
    teacher: Architecture,
) -> None:
    eos_token_ids(Path(config.model.student), tokenizer)
    pad_token_id(tokenizer)
    check_prompt_files(
        [Path(p) for p in config.data.prompts],
        tokenizer,
        prompt_key=config.data.prompt_key,
        chat_template=config.data.chat_template,
    )
    highest = max(tokenizer.get_vocab().values())
    for setting, arch in (("model.student", student), ("model.teacher", teacher)):
        if highest >= arch.vocab_size:
            raise UserError(
                f"{setting} has an embedding of {arch.vocab_size} rows; the tokenizer has ids up "
                f"to {highest}, so it needs at least {highest + 1}"
            )


def _check_batch(config: RunConfig, dp_size: int) -> None:
    rollout, parallel = config.rollout, config.parallel
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    multiple = dp_size
    needed = f"{dp_size} data-parallel replicas"
    if parallel.virtual_pipeline_model_parallel_size is not None:
        multiple *= parallel.pipeline_model_parallel_size
        needed += f" of {parallel.pipeline_model_parallel_size} interleaved stages"
    if sequences % multiple:
        raise UserError(
            f"rollout.prompts_per_step = {rollout.prompts_per_step} x rollout.samples_per_prompt = "
            f"{rollout.samples_per_prompt} gives {sequences} sequences a step; {needed} need a "
            f"multiple of {multiple}"
        )
