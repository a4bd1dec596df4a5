"""Hidden states and logits of a model that runs in Megatron, in any layout."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from checkpoint_tools.hidden_states import HiddenStates
from megatron_oprd.config.schema import ModelConfig, ParallelConfig, RecomputeConfig
from megatron_oprd.data.batching import MicroBatch, collate
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.build import Extent, build_model, padded_vocab_size, transformer_config
from megatron_oprd.models.families import mapping_table
from megatron_oprd.models.logits import LogitForm
from megatron_oprd.models.schedule import run_schedule
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.weights.load import load_weights
from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.megatron_keys import named_parameters
from megatron_oprd.weights.source import WeightSource
from megatron_oprd.weights.torch_dist_plan import stage_of_layers

Outputs = dict[str, list[Tensor]]


def load_whole_model(
    architecture: Architecture,
    source: WeightSource,
    *,
    parallel: ParallelConfig,
    context: ParallelContext,
    max_sequence_length: int,  # tokens; decides longrope's factors, see build_model
    make_vocab_size_divisible_by: int = 128,
) -> tuple[list[GPTModel], list[Mapping]]:
    """Builds this rank's part of a whole model in fp32, in evaluation mode, and loads it.

    Layers are divided over the stages as evenly as possible. Returns the chunks and the whole
    model's mappings. Raises `UserError` if the checkpoint cannot be loaded or there are more stages
    than layers.
    """
    stages = context.pp_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    stage_of = stage_of_layers(architecture.num_layers, stages)
    extent = Extent(
        layers_per_stage=tuple(stage_of.count(stage) for stage in range(stages)),
        final_norm=True,
        lm_head=not architecture.tied,
    )
    config = transformer_config(
        architecture,
        extent,
        model=ModelConfig(params_dtype="fp32"),
        parallel=parallel,
        recompute=RecomputeConfig(),
        fused_kernels=context.transformer_engine,
    )
    padded = padded_vocab_size(
        architecture,
        divisible_by=make_vocab_size_divisible_by,
        tensor_model_parallel_size=context.tp_size,
    )
    chunks = build_model(
        architecture,
        extent,
        config,
        context=context,
        padded_vocab_size=padded,
        max_sequence_length=max_sequence_length,
    )
    table = mapping_table(architecture, padded_vocab_size=padded)
    load_weights(chunks, table, source, place=context.place, tied=architecture.tied)
    for chunk in chunks:
        # Megatron refuses to train experts with tensor parallelism but without sequence
        # parallelism; it can run them.
        chunk.eval()
    return chunks, table


@torch.no_grad()
def megatron_states(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    sequences: Sequence[Sequence[int]],
    *,
    parallel: ParallelConfig,
    context: ParallelContext,
    batches: Sequence[Sequence[int]] | None = None,
) -> HiddenStates | None:
    """Runs a whole model on token ids under Megatron's schedule; states on the leader, else None.

    Every rank has to call this. Communicates on the model's groups and the replica's control group;
    all data-parallel replicas do the same work.

    ``chunks`` have the final norm and, unless tied, the LM head. ``batches`` are the sequences'
    indices in each micro-batch, which is padded on the right; by default a micro-batch per
    sequence.
    """
    batches = batches or [[number] for number in range(len(sequences))]
    micro_batches = collate(
        batches,
        sequences,
        pad_to_multiple_of=context.tp_size if parallel.sequence_parallel else 1,
        device=context.device,
    )
    outputs = _forward(chunks, micro_batches)
    if parallel.sequence_parallel:
        outputs = {name: [_whole(t, context) for t in ts] for name, ts in outputs.items()}
    states = {name: _by_sequence(tensors, batches, sequences) for name, tensors in outputs.items()}
    states |= _logits(chunks, states.get("norm"), architecture, context)
    if context.tp_rank != 0:
        # Tensor ranks have the same states; rank 0 alone sends them.
        states = {}
    stages = _gather(states, context)
    if stages is None:
        return None
    of_all = {name: tensors for stage in stages for name, tensors in stage.items()}
    return HiddenStates(
        layers=[of_all[f"layer {layer}"] for layer in range(architecture.num_layers)],
        normed=of_all["norm"],
        logits=of_all["logits"],
    )


def _forward(chunks: Sequence[GPTModel], batches: Sequence[MicroBatch]) -> Outputs:
    """Runs the model; returns the outputs of this rank's modules by micro-batch."""
    outputs: Outputs = {}

    def record(name: str, output: Tensor) -> Tensor:
        outputs.setdefault(name, []).append(output.clone())
        return output

    hooks = []
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.tap = partial(record, f"layer {layer.layer_number - 1}")
        if chunk.decoder.final_layernorm is not None:
            hooks.append(
                chunk.decoder.final_layernorm.register_forward_hook(
                    lambda _module, _inputs, output: record("norm", output)
                )
            )

    run_schedule(chunks, batches, forward_only=True, begin=lambda batch: batch.input)
    for hook in hooks:
        hook.remove()
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.tap = None
    return outputs


def _whole(tensor: Tensor, context: ParallelContext) -> Tensor:
    """[s/tp, b, h] --> [s, b, h] under sequence parallelism."""
    slices = [torch.empty_like(tensor) for _ in range(context.tp_size)]
    dist.all_gather(slices, tensor, group=context.groups.tp)
    return torch.cat(slices)


def _by_sequence(
    tensors: Sequence[Tensor], batches: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]]
) -> list[Tensor]:
    """[s, b, h] of each micro-batch --> [length, h] of each sequence, on the CPU."""
    rows: dict[int, Tensor] = {}
    for batch, tensor in zip(batches, tensors, strict=True):
        for row, number in enumerate(batch):
            rows[number] = tensor[: len(sequences[number]), row].cpu().clone()
    return [rows[number] for number in range(len(sequences))]


def _logits(
    chunks: Sequence[GPTModel],
    normed: list[Tensor] | None,
    architecture: Architecture,
    context: ParallelContext,
) -> Outputs:
    """The logits on the ranks with the head: the last stage, or the first if tied."""
    # The models end with hidden states, so the head that they hold is applied here.
    name = "embedding.word_embeddings.weight" if architecture.tied else "output_layer.weight"
    # The head is the first stage's embedding, but the normed states are on the last stage.
    if architecture.tied and context.pp_size > 1:
        stages: list[list[Tensor] | None] = [None] * context.control.size()
        dist.all_gather_object(stages, normed, group=context.control)
        normed = next(one for one in stages if one is not None)
    head = named_parameters(chunks).get(name)
    if head is None:
        return {}
    assert normed is not None
    logits = []
    for hidden in normed:
        local = hidden.to(context.device) @ head.data.t()  # [length, padded vocabulary / tp]
        parts = [torch.empty_like(local) for _ in range(context.tp_size)]
        dist.all_gather(parts, local, group=context.groups.tp)
        whole = torch.cat(parts, dim=1)[:, : architecture.vocab_size]
        logits.append(LogitForm.of(architecture).logits(whole).cpu())
    return {"logits": logits}


def _gather(states: Outputs, context: ParallelContext) -> list[Outputs] | None:
    """The states of all ranks, on rank 0."""
    gathered: list[Outputs] | None = None
    if context.rank == 0:
        gathered = [{} for _ in range(context.control.size())]
    dist.gather_object(states, gathered, dst=0, group=context.control)
    return gathered
