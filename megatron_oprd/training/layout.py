"""The placement of both models' layers, computed from their configurations alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from megatron_oprd.config.schema import ParallelConfig, RunConfig
from megatron_oprd.distill.coefficients import coefficient_at
from megatron_oprd.distill.layer_map import LayerPair, layer_pairs, student_stages, teacher_stages
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.build import DTYPES, Extent, padded_vocab_size
from megatron_oprd.models.families import mapping_table
from megatron_oprd.models.teacher import check_precision, token_multiple
from megatron_oprd.parallel.context import data_parallel_size
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.training.layout_checks import (
    check_losses,
    check_models,
    check_recompute,
    check_same_model,
)
from megatron_oprd.weights.mapping import Mapping


# Compared by identity: plans keep what they have counted of a model.
@dataclass(frozen=True, kw_only=True, eq=False)
class ModelLayout:
    """One model of the run."""

    architecture: Architecture
    # The layers that are built, and the pipeline stage of each.
    extent: Extent
    padded_vocab_size: int  # rows of the embedding
    table: list[Mapping]  # of the whole model
    # Student and teacher differ only in how experts are sharded.
    parallel: ParallelConfig


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """Both models of a run, placed."""

    config: RunConfig
    student: ModelLayout
    teacher: ModelLayout  # cut after its deepest mapped layer
    pairs: list[LayerPair]
    data_parallel_size: int
    # Student layers that run in any case, because another teacher needs them.
    min_running_layers: int = 0
    # Numbers kept of a target's state; None keeps all of it.
    bridge_rank: int | None = None

    @property
    def compares_outputs(self) -> bool:
        """Whether there is an output-space loss, so that both models run to their LM heads."""
        return self.config.compares_outputs

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.data_parallel_size * self.config.parallel.replica_size

    @property
    def trains_projectors(self) -> bool:
        """Whether the student's states are projected by what trains with the student."""
        return self.config.bridge.trainable != "none"

    @cached_property
    def num_running_layers(self) -> int:
        """Student layers that run in training: up to the deepest tap, or to the LM head."""
        student = self.student.architecture
        return _num_running_layers(self.config, student, self.pairs, self.min_running_layers)

    def pair_coefficients(self, step: int) -> list[float]:
        """The factor on each pair's loss in a step's loss; the mean over pairs is included."""
        loss = self.config.loss
        coefficient = coefficient_at(loss, step)
        weights = loss.layer_weights or [1.0] * len(self.pairs)
        return [coefficient * weight / len(self.pairs) for weight in weights]

    @property
    def vocab_size(self) -> int:
        """Columns of the vocabulary that both models have."""
        # Models with the same tokenizer can have different numbers of unused rows.
        return min(self.student.architecture.vocab_size, self.teacher.architecture.vocab_size)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the longest sequence that the run allows."""
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens

    @property
    def teacher_max_prompt_tokens(self) -> int:
        """Tokens of the teacher's longest prompt."""
        return self.config.teacher_max_prompt_tokens

    @property
    def teacher_max_sequence_length(self) -> int:
        """Tokens of the longest sequence that the teacher reads.

        A response may be up to twice as long in the teacher's tokens as in the student's, capped at
        the teacher's context length; longer ones are truncated.
        """
        prompt, response = self.teacher_max_prompt_tokens, self.config.rollout.max_new_tokens
        if self.config.teacher_prompt.tokenizer == "same":
            return prompt + response
        return min(prompt + 2 * response, self.teacher.architecture.max_position_embeddings)

    @property
    def parallel(self) -> ParallelLayout:
        """The student's layout, which shares sequences for all models."""
        parallel = self.config.parallel
        # All teachers read the same micro-batches.
        multiple = max(token_multiple(one, parallel) for one in self.config.teachers)
        return ParallelLayout.of(parallel, token_multiple=multiple)

    @property
    def bytes_of_target(self) -> int:
        """Bytes of the target of one supervised position of one layer."""
        if self.bridge_rank is not None:
            # Projected states are fp32, see `Projectors`.
            return self.bridge_rank * torch.float32.itemsize
        itemsize = DTYPES[self.config.model.params_dtype].itemsize
        return self.teacher.architecture.hidden_size * itemsize

    def stages_of_rank(self, pp_rank: int) -> range:
        """Stages of a pipeline rank, numbered over all ranks in the order a token passes them."""
        counts = self.student.extent.layers_per_stage
        # Virtual stages are assigned round-robin.
        return range(pp_rank, len(counts), self.config.parallel.pipeline_model_parallel_size)

    def pairs_of_stage(self, stage: int) -> list[LayerPair]:
        """The matched pairs on a stage."""
        layers = self.student.extent.layers_of_stage(stage)
        return [pair for pair in self.pairs if pair.student in layers]

    def pairs_of_rank(self, pp_rank: int) -> list[LayerPair]:
        """The matched pairs on pipeline rank ``pp_rank``, in all of its chunks."""
        stages = self.stages_of_rank(pp_rank)
        return [pair for stage in stages for pair in self.pairs_of_stage(stage)]

    @property
    def running_per_stage(self) -> tuple[int, ...]:
        """The student's layers on each stage that run in training, i.e. up to the deepest tap."""
        return _first_layers(self.student.extent.layers_per_stage, self.num_running_layers)

    def running_layers_of_stage(self, stage: int) -> range:
        """The layers of ``running_per_stage`` on a stage, counted from 0 over the whole model."""
        return self.student.extent.layers_of_stage(stage)[: self.running_per_stage[stage]]

    @property
    def target_bytes_per_row(self) -> int:
        """Bytes of the targets of one supervised position, on the rank that keeps most of them."""
        pp = self.config.parallel.pipeline_model_parallel_size
        # A set: pairs with the same teacher layer share its target.
        mapped = [{pair.teacher for pair in self.pairs_of_rank(rank)} for rank in range(pp)]
        return max(map(len, mapped)) * self.bytes_of_target

    @property
    def output_target_bytes_per_row(self) -> int:
        """Bytes kept of the teacher for a position of the output-space loss, on the last stage.

        This is its last hidden state, whole on every tensor-parallel rank.
        """
        if not self.compares_outputs:
            return 0
        itemsize = DTYPES[self.config.model.params_dtype].itemsize
        return self.teacher.architecture.hidden_size * itemsize

    @property
    def trains_final_norm(self) -> bool:
        """Whether a tap or loss is after the student's final norm, so that it is trained."""
        return self.compares_outputs or (
            self.config.taps.last_layer == "post_norm"
            and self.num_running_layers == self.student.architecture.num_layers
        )


def matched_layers(
    config: RunConfig, student: Architecture, teacher: Architecture
) -> list[LayerPair]:
    """The pairs of layers that the settings match; raises the errors of `layer_pairs`."""
    return layer_pairs(
        config.taps.layers,
        config.taps.layer_map,
        num_student_layers=student.num_layers,
        num_teacher_layers=teacher.num_layers,
        n=config.taps.n,
    )


def make_layout(
    config: RunConfig,
    *,
    student: Architecture,
    teacher: Architecture,
    world_size: int,
    min_running_layers: int = 0,
    bridge_rank: int | None = None,
) -> RunLayout:
    """Places both models on ``world_size`` ranks. Reads no file.

    ``min_running_layers`` and ``bridge_rank`` are those of `RunLayout`.

    Raises:
        UserError: The settings do not fit the models or the number of processes.
    """
    dp_size = data_parallel_size(config.parallel, world_size)
    check_models(config, student=student, teacher=teacher, world_size=world_size)
    pairs = matched_layers(config, student, teacher)
    check_losses(config, pairs, student, teacher)
    student_layers = _student_layers(config, student, pairs, min_running_layers)
    check_recompute(config, student_layers)
    to_the_end = config.compares_outputs
    depth = teacher.num_layers if to_the_end else max(pair.teacher for pair in pairs) + 1
    if config.teacher.refresh_interval is None:
        teacher_layers = teacher_stages(pairs, student_layers, depth=depth)
    else:
        check_same_model(config, pairs, student, teacher)
        # Refreshing copies weights between the models rank by rank, so each stage needs the same
        # layers of both.
        teacher_layers = _first_layers(student_layers, depth)
    takes_norm = config.taps.last_layer == "post_norm"
    if to_the_end and takes_norm and teacher_layers[-1] == 0:
        raise UserError(
            f"taps.layer_map puts all {depth} teacher layers in front of the last pipeline stage, "
            f"where output_loss.kind = {config.output_loss.kind} needs the teacher's final norm, "
            "and taps.last_layer = post_norm needs it behind the last of them; use pre_norm, fewer "
            "stages, or another map"
        )
    check_precision(
        config.teacher,
        teacher,
        model=config.model,
        parallel=config.parallel,
        num_layers=sum(teacher_layers),
    )
    rows = [
        padded_vocab_size(
            model,
            divisible_by=config.model.make_vocab_size_divisible_by,
            tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        )
        for model in (student, teacher)
    ]
    if to_the_end:
        rows = [max(rows)] * 2  # so that a rank has the same columns of both vocabularies
    return RunLayout(
        config=config,
        student=_model_layout(
            student,
            Extent(
                layers_per_stage=student_layers,
                final_norm=True,
                lm_head=True,
                uses_lm_head=to_the_end,
            ),
            rows[0],
            config.parallel,
        ),
        teacher=_model_layout(
            teacher,
            Extent(
                layers_per_stage=teacher_layers,
                final_norm=to_the_end or (takes_norm and depth == teacher.num_layers),
                lm_head=to_the_end,
                uses_lm_head=to_the_end,
            ),
            rows[1],
            config.teacher_parallel,
        ),
        pairs=pairs,
        data_parallel_size=dp_size,
        min_running_layers=min_running_layers,
        bridge_rank=bridge_rank,
    )


def check_coefficients(layouts: Sequence[RunLayout]) -> None:
    """Checks that negative coefficients leave each student layer a loss with a minimum.

    ``layouts`` are those of all teachers.

    Raises:
        UserError: The coefficients of a layer are negative, or 0, together.
    """
    total: dict[int, float] = {}
    has_negative: set[int] = set()
    for layout in layouts:
        for pair, coefficient in zip(layout.pairs, layout.pair_coefficients(0), strict=True):
            total[pair.student] = total.get(pair.student, 0.0) + coefficient
            if coefficient < 0:
                has_negative.add(pair.student)
    for layer in sorted(has_negative):
        if total[layer] <= 0:
            raise UserError(
                f"extra_teachers: the coefficients of student layer {layer} are "
                f"{total[layer]:.3g} together (each divided by its teacher's number of layers); a "
                "negative one needs a larger positive one at the same layer, or the loss has no "
                "minimum"
            )


def _model_layout(
    architecture: Architecture, extent: Extent, padded: int, parallel: ParallelConfig
) -> ModelLayout:
    return ModelLayout(
        architecture=architecture,
        extent=extent,
        padded_vocab_size=padded,
        table=mapping_table(architecture, padded_vocab_size=padded),
        parallel=parallel,
    )


def _num_running_layers(
    config: RunConfig, student: Architecture, pairs: list[LayerPair], at_least: int
) -> int:
    if config.compares_outputs:
        return student.num_layers
    return min(max([at_least, *(pair.student + 1 for pair in pairs)]), student.num_layers)


def _student_layers(
    config: RunConfig, student: Architecture, pairs: list[LayerPair], min_running_layers: int
) -> tuple[int, ...]:
    parallel = config.parallel
    pp = parallel.pipeline_model_parallel_size
    num_stages = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    running = _num_running_layers(config, student, pairs, min_running_layers)
    if parallel.num_layers_per_stage is None:
        layers = student_stages(student.num_layers, pairs, num_stages, num_running=running)
    else:
        layers = tuple(parallel.num_layers_per_stage)
        if sum(layers) != student.num_layers:
            raise UserError(
                f"parallel.num_layers_per_stage = {list(layers)} has {sum(layers)} layers "
                f"together; the sum has to be {student.num_layers}, the student's layers"
            )
    starts = [sum(layers[:stage]) for stage in range(num_stages)]
    for rank in range(pp):
        # All chunks of the rank start after the last layer that runs.
        if min(starts[rank::pp]) >= running:
            raise UserError(
                f"pipeline rank {rank} would have nothing to train: the deepest tap is at student "
                f"layer {running - 1}, its first layer is {min(starts[rank::pp])}. Megatron cannot "
                "checkpoint such a rank; tap deeper layers (taps.layers), divide the layers "
                "otherwise (parallel.num_layers_per_stage), or use fewer stages "
                "(parallel.pipeline_model_parallel_size)"
            )
    return layers


def _first_layers(layers_per_stage: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The first ``depth`` layers, by stage."""
    ends = [min(end, depth) for end in accumulate(layers_per_stage)]
    return tuple(end - start for start, end in pairwise([0, *ends]))
