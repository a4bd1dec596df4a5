"""Memory of the student's and the teacher's passes over micro-batches, on one rank."""

from dataclasses import replace

import torch

from megatron_oprd.distill.head import CHUNK_TOKENS
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.build import DTYPES
from megatron_oprd.models.teacher import uses_engine
from megatron_oprd.planning.activations import (
    Kernels,
    LayerShape,
    backward_workspace,
    embedding_workspace,
    forward_workspace,
    head_workspace,
    logprob_workspace,
    saved_by_head,
    saved_by_layer,
    saved_by_norm,
    saved_by_recomputed,
    saved_by_tap,
    tap_workspace,
)
from megatron_oprd.planning.parameters import (
    is_last_stage,
    num_checkpoints,
)
from megatron_oprd.planning.schedule import ChunkBytes, Peak, peak_of_student_pass
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import ModelLayout, RunLayout


def student_peak(layout: RunLayout, workload: Workload, kernels: Kernels, *, pp_rank: int) -> Peak:
    """Memory of a pipeline rank at the peak of the student's pass."""
    return peak_of_student_pass(
        student_chunks(layout, workload, kernels, pp_rank=pp_rank),
        targets=kept_target_bytes(layout, workload, pp_rank=pp_rank),
        pp_rank=pp_rank,
        pp_size=layout.config.parallel.pipeline_model_parallel_size,
        num_micro_batches=workload.group_size,  # a pass covers one group of micro-batches
    )


def student_chunks(
    layout: RunLayout, workload: Workload, kernels: Kernels, *, pp_rank: int
) -> list[ChunkBytes]:
    """The student's model chunks on a pipeline rank."""
    return [
        _student_chunk(layout, workload, kernels, stage) for stage in layout.stages_of_rank(pp_rank)
    ]


def teacher_workspace(
    layout: RunLayout, workload: Workload, kernels: Kernels, *, pp_rank: int
) -> int:
    """Temporary bytes of the teacher's pass on a pipeline rank."""
    teacher = layout.config.teacher
    if teacher.precision == "fp8" and not uses_engine(teacher):
        kernels = replace(kernels, fused_swiglu=False)  # these teachers use Megatron's local layers
    shapes = _shapes(layout, layout.teacher, workload.of_teacher, kernels, pp_rank)
    # The chunk's input, and the output on its way to the next stage, which the last one has not.
    sends = any(not is_last_stage(layout, stage) for stage in layout.stages_of_rank(pp_rank))
    others = (1 + sends) * shapes[0].hidden_bytes
    # An exchange has a micro-batch's targets of all ranks, beside the rows of this one.
    at_tap = shapes[0].hidden_bytes
    if exchanges_targets(layout):
        at_tap += (workload.target_rows + workload.supervised_rows) * layout.bytes_of_target
    return others + max(at_tap, *map(forward_workspace, shapes))


def exchanges_targets(layout: RunLayout) -> bool:
    """Whether a target's row can be on another rank than the student's position."""
    config = layout.config
    has_own_batches = config.teacher_prompt.is_own or config.teacher.max_tokens is not None
    shares = layout.parallel.sequence_size * config.parallel.context_parallel_size
    return has_own_batches and shares > 1


def logprob_check_workspace(
    layout: RunLayout, workload: Workload, kernels: Kernels, *, pp_rank: int
) -> int:
    """Temporary bytes for comparing log-probabilities with the rollout engine's."""
    vocab_size, student = layout.student.padded_vocab_size, layout.student.architecture
    shapes = _shapes(layout, layout.student, workload, kernels, pp_rank)
    shape = shapes[0]  # hidden states are the same in all
    # With the chunk's input.
    needed = max(map(forward_workspace, shapes)) + shape.hidden_bytes
    if any(is_last_stage(layout, stage) for stage in layout.stages_of_rank(pp_rank)):
        positions = workload.micro_batch_size * workload.response_tokens
        rows = min(CHUNK_TOKENS, positions // layout.config.parallel.context_parallel_size)
        needed = max(needed, logprob_workspace(shape, rows, vocab_size=vocab_size))
        if student.tied and pp_rank > 0 and not layout.compares_outputs:
            # The tied embedding: the first stage sends it for this check only.
            needed += vocab_size // shape.tp * student.hidden_size * shape.itemsize
    # Log-probabilities of the whole step, in fp32, over all replicas.
    tokens = workload.num_sequences * layout.data_parallel_size * workload.response_tokens
    return needed + tokens * torch.float32.itemsize


def kept_target_bytes(layout: RunLayout, workload: Workload, *, pp_rank: int) -> int:
    """Bytes of the targets that a pipeline rank keeps at the same time."""
    stages = layout.stages_of_rank(pp_rank)
    return sum(
        _target_bytes_of_stage(layout, workload.kept_rows, workload.kept_output_rows, stage)
        for stage in stages
    )


def tap_bytes(layout: RunLayout, workload: Workload, kernels: Kernels, *, pp_rank: int) -> int:
    """Bytes that a teacher's taps on a pipeline rank keep for one micro-batch's backward pass."""
    shape = _shapes(layout, layout.student, workload, kernels, pp_rank)[0]
    return len(layout.pairs_of_rank(pp_rank)) * saved_by_tap(shape, workload.target_rows)


def _student_chunk(
    layout: RunLayout, workload: Workload, kernels: Kernels, stage: int
) -> ChunkBytes:
    pp_rank = stage % layout.config.parallel.pipeline_model_parallel_size
    shapes = _shapes(layout, layout.student, workload, kernels, pp_rank)
    shape = shapes[0]  # hidden states are the same in all
    saved, recomputed = _saved_by_chunk(layout, shapes, workload.target_rows, stage)
    vocab_size = layout.student.padded_vocab_size
    embedding = embedding_workspace(shape, padded_vocab_size=vocab_size)
    head = 0
    if layout.compares_outputs and is_last_stage(layout, stage):
        saved += saved_by_head(shape, workload.output_rows, vocab_size=vocab_size)
        head = head_workspace(
            shape,
            workload.output_rows,
            chunk_rows=layout.config.output_loss.chunk_tokens,
            teacher_width=layout.teacher.architecture.hidden_size,
            vocab_size=vocab_size,
        )
    return ChunkBytes(
        saved=saved,
        recomputed=recomputed,
        workspace=max(
            *map(backward_workspace, shapes), tap_workspace(shape, workload.target_rows), head
        )
        + _messages(layout) * shape.hidden_bytes,
        end_workspace=embedding if stage == 0 else 0,
        targets=_target_bytes_of_stage(layout, workload.target_rows, workload.output_rows, stage),
        uses_targets_in_backward=layout.config.recompute.recompute_method == "uniform",
    )


def _saved_by_chunk(
    layout: RunLayout, shapes: list[LayerShape], rows: int, stage: int
) -> tuple[int, int]:
    """Bytes that a chunk saves, and bytes that its backward pass saves again at most."""
    recompute, shape = layout.config.recompute, shapes[0]
    layers = layout.running_layers_of_stage(stage)
    running = len(layers)
    tapped = len(layout.pairs_of_stage(stage))
    of_kind = {
        (one.has_experts, one.has_delta_net): saved_by_layer(
            one, recompute_attention=recompute.recompute_granularity == "selective"
        )
        for one in shapes
    }
    of_layers = [of_kind[_kind(shape.architecture, layer)] for layer in layers]
    of_taps = tapped * saved_by_tap(shape, rows)
    norm = (
        saved_by_norm(shape) if is_last_stage(layout, stage) else 0
    )  # it runs, whether it trains or not
    if recompute.recompute_method is None:
        return sum(of_layers) + of_taps + norm, 0
    of_tap = of_taps // max(running, 1)
    of_input = saved_by_recomputed(shape, distribute=recompute.distribute_saved_activations)
    number = recompute.recompute_num_layers
    assert number is not None
    if recompute.recompute_method == "uniform":
        # The first layer's input is already saved; when the last layers run again, the norm's
        # backward pass is done.
        runs = [of_layers[i : i + number] for i in range(0, running, number)]
        again = max((sum(run) + len(run) * of_tap for run in runs), default=0) - of_input - norm
        return num_checkpoints(layout, stage) * of_input + norm, max(again, 0)
    kept = sum(of_layers[number:]) + max(running - number, 0) * of_tap
    again = max(of_layers[:number], default=0) + of_tap - of_input - kept - norm
    return num_checkpoints(layout, stage) * of_input + kept + norm, max(again, 0)


def _messages(layout: RunLayout) -> int:
    """Hidden states and gradients in transit between stages at the same time."""
    parallel = layout.config.parallel
    if parallel.virtual_pipeline_model_parallel_size is not None:
        return 6
    return 1 if parallel.pipeline_model_parallel_size > 1 else 0


def _target_bytes_of_stage(layout: RunLayout, rows: int, output_rows: int, stage: int) -> int:
    tapped = {pair.teacher for pair in layout.pairs_of_stage(stage)}
    of_taps = rows * len(tapped) * layout.bytes_of_target
    if not is_last_stage(layout, stage):
        return of_taps
    return of_taps + output_rows * layout.output_target_bytes_per_row


def _shapes(
    layout: RunLayout, model: ModelLayout, workload: Workload, kernels: Kernels, pp_rank: int
) -> list[LayerShape]:
    """Sizes of each kind of layer on a pipeline rank, for the largest micro-batch."""
    config, of_stage = layout.config, model.extent.layers_of_stage
    layers = [layer for stage in layout.stages_of_rank(pp_rank) for layer in of_stage(stage)]
    # A rank without layers of the teacher passes on the hidden states of any.
    kinds = sorted({_kind(model.architecture, layer) for layer in layers or [0]})
    return [
        LayerShape(
            architecture=model.architecture,
            has_experts=has_experts,
            has_delta_net=has_delta_net,
            parallel=model.parallel,
            kernels=kernels,
            num_rows=workload.num_rows,
            row_tokens=workload.row_tokens // config.parallel.context_parallel_size,
            num_sequences=workload.micro_batch_size,
            is_packed=config.batch.sequence_packing,
            itemsize=DTYPES[config.model.params_dtype].itemsize,
        )
        for has_experts, has_delta_net in kinds
    ]


def _kind(architecture: Architecture, layer: int) -> tuple[bool, bool]:
    """In what a layer may differ from others: experts, and linear attention."""
    return architecture.has_experts(layer), architecture.has_delta_net(layer)
