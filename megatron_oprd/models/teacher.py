"""The frozen teacher: cut at its deepest mapped layer, without LM head, outside autograd."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_oprd.config.schema import ModelConfig, ParallelConfig, RecomputeConfig, TeacherConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models import fp8_transformer_engine as te_fp8
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.build import Extent, FP8Layers, build_model, transformer_config
from megatron_oprd.models.fp8 import fp8_stores
from megatron_oprd.models.fp8_codes import FORMATS
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.weights.load import load_weights
from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.source import WeightSource


@torch.no_grad()
def build_teacher(
    architecture: Architecture,
    extent: Extent,  # the part to build
    table: Sequence[Mapping],  # of the whole model
    checkpoint: WeightSource,
    *,
    teacher: TeacherConfig,
    model: ModelConfig,  # format of activations and of weights not in FP8
    parallel: ParallelConfig,
    context: ParallelContext,
    padded_vocab_size: int,
    max_sequence_length: int,  # tokens; decides longrope's factors, see build_model
) -> list[GPTModel]:
    """Builds and loads this rank's chunks of a model that is never trained.

    Weights are rounded to FP8 one by one as they are read, so at most one of them is on the device
    in another format. Communicates on the (expert-)tensor-parallel group.

    Raises `UserError` if this machine lacks the FP8 recipe or the checkpoint cannot be loaded.
    """
    options: dict[str, Any] = {}
    fp8 = None
    fp8_layers = layers_in_fp8(teacher, sum(extent.layers_per_stage))
    with_engine = uses_engine(teacher)
    if with_engine:
        te_fp8.check_available(teacher.fp8_recipe, transformer_engine=context.transformer_engine)
        options = te_fp8.fp8_options(teacher)
    elif fp8_layers:
        fp8 = FP8Layers(layers=fp8_layers, weight_format=FORMATS[teacher.fp8_recipe])
        # The FP8 layers derive from Megatron's local ones.
        context = dataclasses.replace(context, transformer_engine=False)
    chunks = build_model(
        architecture,
        extent,
        transformer_config(
            architecture,
            extent,
            model=model,
            parallel=parallel,
            recompute=RecomputeConfig(),
            fused_kernels=context.transformer_engine,
            fp8_options=options,
        ),
        context=context,
        padded_vocab_size=padded_vocab_size,
        max_sequence_length=max_sequence_length,
        fp8=fp8,
    )
    if with_engine:
        te_fp8.check_built(chunks, fp8_layers=fp8_layers)
    load_weights(
        chunks,
        table,
        checkpoint,
        place=context.place,
        tied=architecture.tied,
        stores=te_fp8.fp8_stores(chunks) if with_engine else fp8_stores(chunks),
    )
    freeze(chunks)
    return chunks


def check_precision(
    teacher: TeacherConfig,
    architecture: Architecture,
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    num_layers: int,
) -> None:
    """Checks the teacher's precision against its layers and the other settings.

    Raises `UserError` if they do not fit. ``num_layers`` is the number of layers that are built.
    """
    # Not in training/layout_checks.py: examples/fp8_report checks a teacher that has no run.
    at_start, at_end = teacher.num_layers_at_start_in_bf16, teacher.num_layers_at_end_in_bf16
    if teacher.precision == "fp8" and at_start + at_end >= num_layers:
        raise UserError(
            f"teacher.num_layers_at_start_in_bf16 = {at_start} and "
            f"teacher.num_layers_at_end_in_bf16 = {at_end} leave no layer for teacher.precision = "
            f"fp8, because the teacher runs {num_layers} layers, up to its deepest mapped one; "
            "give smaller numbers"
        )
    if not uses_engine(teacher):
        return
    if model.params_dtype != "bf16" or teacher.offload != "none":
        raise UserError(
            f"teacher.fp8_recipe = {teacher.fp8_recipe} needs model.params_dtype = bf16 (found "
            f"{model.params_dtype}) and teacher.offload = none (found {teacher.offload}); "
            "per_channel_log, per_channel and block_128 take any"
        )
    te_fp8.check_shapes(architecture, parallel, teacher.fp8_recipe)
    most = num_layers // parallel.pipeline_model_parallel_size
    # megatron-core checks both against the layers of one stage.
    if max(at_start, at_end) > most:
        raise UserError(
            f"teacher.num_layers_at_start_in_bf16 = {at_start} and "
            f"teacher.num_layers_at_end_in_bf16 = {at_end} are too many for teacher.fp8_recipe = "
            f"{teacher.fp8_recipe}, with which megatron-core allows at most {most} each: the "
            f"teacher's {num_layers} layers divided by the pipeline stages"
        )


def uses_engine(teacher: TeacherConfig) -> bool:
    """Whether the teacher's FP8 recipe is one of Transformer Engine's."""
    return teacher.precision == "fp8" and teacher.fp8_recipe in te_fp8.RECIPES


def layers_in_fp8(teacher: TeacherConfig, num_layers: int) -> range:
    """The layers, from 0, whose linear layers are FP8, of ``num_layers`` that are built."""
    if teacher.precision != "fp8":
        return range(0)
    return range(
        teacher.num_layers_at_start_in_bf16, num_layers - teacher.num_layers_at_end_in_bf16
    )


def token_multiple(teacher: TeacherConfig, parallel: ParallelConfig) -> int:
    """The multiple that the number of tokens in a micro-batch must be, on each rank."""
    if not uses_engine(teacher):
        return 1
    return te_fp8.token_multiple(teacher.fp8_recipe, sequence_parallel=parallel.sequence_parallel)


def freeze(chunks: Sequence[GPTModel]) -> None:
    """Makes a model inference-only."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
        for layer in chunk.decoder.layers:
            # Megatron re-enables grad around the residual addition, which would build a graph from
            # each stage's input on.
            layer.bias_dropout_add_exec_handler = torch.no_grad
