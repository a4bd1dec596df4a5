"""Plain Megatron GPT models, saved and loaded with Megatron's own dist_checkpointing."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_oprd.config.schema import ParallelConfig
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.families import mapping_table
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.parallel.context import ParallelContext, parallel_run
from megatron_oprd.weights.megatron_keys import named_parameters
from megatron_oprd.weights.source import WeightSource

# Rows of the embedding become a multiple of this times the tensor-parallel size.
VOCAB_MULTIPLE = 8


@torch.no_grad()
def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, action, hf, checkpoint, dtype, parallel, layers_per_stage, metadata}.

    ``save`` writes the model of the Hugging Face folder to ``checkpoint``; ``load`` reads it and
    writes the names of the parameters that then differ from the folder's.
    """
    parallel = ParallelConfig(**case["parallel"])
    opened = open_checkpoint(Path(case["hf"]))
    hf, architecture = opened.source, opened.architecture
    checkpoint = directory / case["checkpoint"]
    with parallel_run(parallel, seed=0) as context:
        layers = case["layers_per_stage"] or _even(architecture, parallel)
        dtype = getattr(torch, case["dtype"])
        chunks = _build(architecture, parallel, layers, context, dtype)
        expected = _expected(chunks, architecture, hf, parallel, context)
        names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
        if case["action"] == "save":
            for name, parameter in named_parameters(chunks).items():
                parameter.copy_(expected[name])
            if context.rank == 0:
                checkpoint.mkdir(parents=True)
            dist.barrier()
            dist_checkpointing.save(_state(names, chunks, case["metadata"]), str(checkpoint))
            return
        for parameter in named_parameters(chunks).values():
            parameter.fill_(torch.nan)
        loaded = dist_checkpointing.load(_state(names, chunks, case["metadata"]), str(checkpoint))
        for name, chunk in zip(names, chunks, strict=True):
            chunk.load_state_dict(loaded[name])
        differing = [
            name
            for name, parameter in named_parameters(chunks).items()
            if not torch.equal(parameter, expected[name].to(dtype))
        ]
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, (len(expected), differing))
        if context.rank == 0:
            (directory / f"{case['name']}.json").write_text(json.dumps(results))


def _state(names: list[str], chunks: list[GPTModel], metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        name: chunk.sharded_state_dict(metadata=dict(metadata))
        for name, chunk in zip(names, chunks, strict=True)
    }


def _even(architecture: Architecture, parallel: ParallelConfig) -> list[int]:
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    stages = parallel.pipeline_model_parallel_size * vpp
    return [architecture.num_layers // stages] * stages


def _padded_vocab_size(architecture: Architecture, parallel: ParallelConfig) -> int:
    return architecture.padded_vocab_size(VOCAB_MULTIPLE * parallel.tensor_model_parallel_size)


def _build(
    a: Architecture,
    parallel: ParallelConfig,
    layers_per_stage: list[int],
    context: ParallelContext,
    dtype: torch.dtype,
) -> list[GPTModel]:
    """The model as Megatron's own training script would build it with the local layer spec."""
    layout = [["decoder"] * count for count in layers_per_stage]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    vpp = parallel.virtual_pipeline_model_parallel_size
    moe: dict[str, Any] = {}
    if a.moe is not None:
        moe = {
            "num_moe_experts": a.moe.num_experts,
            "moe_ffn_hidden_size": a.moe.ffn_hidden_size,
            "moe_router_topk": a.moe.num_experts_per_token,
            "expert_model_parallel_size": parallel.expert_model_parallel_size,
            "expert_tensor_parallel_size": parallel.expert_tensor_size,
            "moe_token_dispatcher_type": "alltoall",
        }
    config = TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups,
        kv_channels=a.head_dim,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=a.mlp_bias,
        softmax_type="learnable" if a.attention_sinks else "vanilla",
        add_qkv_bias=a.qkv_bias,
        qk_layernorm=a.qk_norm,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_model_parallel_layout=layout if len(layout) > 1 else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **moe,
    )
    stages = len(layers_per_stage)
    chunks = []
    for chunk in range(vpp or 1):
        stage = chunk * context.pp_size + context.pp_rank
        chunks.append(
            GPTModel(
                config,
                TransformerBlockSubmodules(
                    layer_specs=[_layer_spec(a)] * layers_per_stage[stage],
                    layer_norm=_layer_spec(a).submodules.pre_mlp_layernorm,
                ),
                vocab_size=_padded_vocab_size(a, parallel),
                max_sequence_length=64,
                pre_process=stage == 0,
                post_process=stage == stages - 1,
                share_embeddings_and_output_weights=a.tied,
                position_embedding_type="rope",
                pg_collection=context.groups,
                vp_stage=chunk if vpp else None,
            ).to(dtype)
        )
    return chunks


def _layer_spec(a: Architecture) -> ModuleSpec:
    experts = None if a.moe is None else a.moe.num_experts
    spec = get_gpt_layer_local_spec(
        num_experts=experts, qk_layernorm=a.qk_norm, normalization="RMSNorm"
    )
    if experts is None:
        return spec
    # Named as with Transformer Engine's spec.
    names = dict(spec.submodules.sharded_state_dict_keys_map)
    del names["pre_mlp_layernorm."]
    submodules = dataclasses.replace(spec.submodules, sharded_state_dict_keys_map=names)
    return dataclasses.replace(spec, submodules=submodules)


def _expected(
    chunks: list[GPTModel],
    architecture: Architecture,
    hf: WeightSource,
    parallel: ParallelConfig,
    context: ParallelContext,
) -> dict[str, Tensor]:
    """This rank's parameters, straight from the Hugging Face folder."""
    table = mapping_table(
        architecture, padded_vocab_size=_padded_vocab_size(architecture, parallel)
    )
    mappings = {mapping.megatron: mapping for mapping in table}
    # With several stages the last has a copy of a tied embedding.
    mappings.setdefault("output_layer.weight", mappings["embedding.word_embeddings.weight"])
    expected = {}
    for name, parameter in named_parameters(chunks).items():
        mapping = mappings[name]
        values = torch.zeros(parameter.shape, dtype=parameter.dtype)
        for piece in mapping.pieces(*mapping.split_at(context.place)):
            if piece.hf is not None:
                values[piece.local_index] = hf.read(piece.hf)[piece.hf_index].to(values.dtype)
        expected[name] = values
    return expected
