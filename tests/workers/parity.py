"""A loaded model's forward pass; rank 0 writes every layer's output, the logits and the export."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file
from torch import Tensor

from megatron_oprd.config import ModelConfig, ParallelConfig, RecomputeConfig
from megatron_oprd.data.batching import MicroBatch, collate
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.build import Extent, build_model, padded_vocab_size, transformer_config
from megatron_oprd.models.families import read_architecture
from megatron_oprd.models.families.dense import mapping_table
from megatron_oprd.parallel import ParallelContext, parallel_run
from megatron_oprd.weights.export import Exporter
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.load import load_weights
from megatron_oprd.weights.parameters import named_parameters
from tests.models.mutations import mutate

# Rows of the embedding become a multiple of this: for 97 tokens, 7 rows of padding.
VOCAB_MULTIPLE = 8
Outputs = dict[str, list[Tensor]]


@torch.no_grad()
def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, folder, sequences, batches, parallel, mutation}."""
    parallel = ParallelConfig(**case["parallel"])
    checkpoint = HFCheckpoint(case["folder"])
    architecture = read_architecture(checkpoint)
    with parallel_run(parallel, seed=0) as context:
        chunks, table = _load(architecture, checkpoint, parallel, context)
        if case["mutation"] is not None:
            mutate(case["mutation"], architecture, named_parameters(chunks), chunks)
        batches = collate(
            case["batches"],
            case["sequences"],
            [torch.zeros(len(sequence)) for sequence in case["sequences"]],
            pad_to_multiple_of=context.tp_size if parallel.sequence_parallel else 1,
            device=context.device,
        )
        outputs = _gather(_forward(chunks, batches), parallel, context)
        exported = dict(Exporter(chunks, table, context=context).stream())
        if context.rank == 0:
            source = load_file(Path(case["folder"]) / "model.safetensors")
            states = _by_sequence(outputs, case["batches"], case["sequences"])
            head = exported.get("lm_head.weight", exported["model.embed_tokens.weight"])
            assert head is not None
            result = {
                "layers": [states[f"layer {layer}"] for layer in range(architecture.num_layers)],
                "normed": states["norm"],
                "logits": [hidden @ head.t() for hidden in states["norm"]],
                "exported": list(exported),
                "source": list(source),
                "changed": [
                    name
                    for name, tensor in exported.items()
                    if tensor is None or name not in source or not torch.equal(tensor, source[name])
                ],
            }
            torch.save(result, directory / f"{case['name']}.pt")


def _load(
    architecture: Architecture,
    checkpoint: HFCheckpoint,
    parallel: ParallelConfig,
    context: ParallelContext,
) -> tuple[list[GPTModel], list]:
    """The whole model, its layers divided evenly over the stages."""
    stages = context.pp_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    extent = Extent(
        layers_per_stage=(architecture.num_layers // stages,) * stages,
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
        architecture, divisible_by=VOCAB_MULTIPLE, tensor_model_parallel_size=context.tp_size
    )
    chunks = build_model(architecture, extent, config, context=context, padded_vocab_size=padded)
    table = mapping_table(architecture, padded_vocab_size=padded)
    load_weights(
        chunks,
        table,
        checkpoint,
        tp_rank=context.tp_rank,
        tp_size=context.tp_size,
        tied=architecture.tied,
    )
    return chunks, table


def _forward(chunks: Sequence[GPTModel], batches: Sequence[MicroBatch]) -> Outputs:
    """Runs the model under Megatron's schedule; what this rank's modules put out, by batch."""
    outputs: Outputs = {}

    def record(name: str, output: Tensor) -> Tensor:
        outputs.setdefault(name, []).append(output.clone())
        return output

    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.tap = partial(record, f"layer {layer.layer_number - 1}")
        if chunk.decoder.final_layernorm is not None:
            chunk.decoder.final_layernorm.register_forward_hook(
                lambda _module, _inputs, output: record("norm", output)
            )

    def forward_step(data: Any, model: Any) -> tuple[Tensor, Callable]:
        batch = next(data)
        return model(batch.tokens, batch.position_ids, None), lambda hidden: (hidden.sum(), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=True,
    )
    return outputs


def _gather(outputs: Outputs, parallel: ParallelConfig, context: ParallelContext) -> Outputs:
    """The outputs of all stages, in full: [s/tp, b, h] --> [s, b, h] under sequence parallelism."""
    if parallel.sequence_parallel:
        for tensors in outputs.values():
            for number, tensor in enumerate(tensors):
                slices = [torch.empty_like(tensor) for _ in range(context.tp_size)]
                dist.all_gather(slices, tensor, group=context.groups.tp)
                tensors[number] = torch.cat(slices)
    stages: list[Outputs] = [{} for _ in range(context.pp_size)]
    dist.all_gather_object(stages, outputs, group=context.groups.pp)
    return {name: tensors for stage in stages for name, tensors in stage.items()}


def _by_sequence(
    outputs: Outputs, batches: list[list[int]], sequences: list[list[int]]
) -> dict[str, list[Tensor]]:
    """Each output for each sequence, [length, h], without the padding."""
    by_sequence: dict[str, list[Tensor]] = {}
    for name, tensors in outputs.items():
        rows: dict[int, Tensor] = {}
        for batch, tensor in zip(batches, tensors, strict=True):
            for row, number in enumerate(batch):
                rows[number] = tensor[: len(sequences[number]), row].clone()
        by_sequence[name] = [rows[number] for number in range(len(sequences))]
    return by_sequence
