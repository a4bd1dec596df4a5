"""This rank's model chunks of a decoder."""

from dataclasses import dataclass
from math import lcm

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_oprd.config import ModelConfig, ParallelConfig, RecomputeConfig
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.layers import final_norm_class, layer_spec
from megatron_oprd.parallel import ParallelContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of a model is built.

    Attributes:
        layers_per_stage: Layers on each stage, virtual stages in the order a token passes them.
            Their sum may be smaller than the model's depth: the rest is not built.
        final_norm: Whether there is a final norm, behind the last layer.
        lm_head: Whether the last stage has an LM head of its own. A tied head is the embedding,
            and is no parameter of its own.
    """

    layers_per_stage: tuple[int, ...]
    final_norm: bool
    lm_head: bool


def padded_vocab_size(
    architecture: Architecture, *, divisible_by: int, tensor_model_parallel_size: int
) -> int:
    """Rows of the embedding.

    The same for every tensor-parallel size that divides ``divisible_by``, so that a checkpoint of
    one layout fits another.
    """
    return architecture.padded_vocab_size(lcm(divisible_by, tensor_model_parallel_size))


def transformer_config(
    architecture: Architecture,
    extent: Extent,
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    fused_kernels: bool,
) -> TransformerConfig:
    """Megatron's configuration of the model."""
    a, pp = architecture, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    dtype = DTYPES[model.params_dtype]
    layout = [["decoder"] * count for count in extent.layers_per_stage]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return TransformerConfig(
        num_layers=sum(extent.layers_per_stage),
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups,
        kv_channels=a.head_dim,
        layernorm_epsilon=a.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        qk_layernorm=a.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_model_parallel_layout=layout if pp > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Every value is loaded; but Megatron marks which parameters are split while it
        # initialises them, so initialisation stays on and does nothing.
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        # Micro-batches differ in length.
        variable_seq_lengths=pp > 1,
        # The default dispatcher of mixture-of-experts models refuses that, in dense models too.
        moe_token_dispatcher_type="alltoall",
        # Interleaved messages between the same two ranks are only told apart in this way.
        overlap_p2p_comm=vpp is not None,
        batch_p2p_comm=vpp is None,
        deallocate_pipeline_outputs=True,
        # The loss is normalised over the global batch where it is attached, so gradients are
        # summed over the data-parallel ranks, not averaged.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        bias_activation_fusion=fused_kernels,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        recompute_granularity=recompute.recompute_granularity,
        recompute_method=recompute.recompute_method,
        recompute_num_layers=recompute.recompute_num_layers,
    )


def build_model(
    architecture: Architecture,
    extent: Extent,
    config: TransformerConfig,
    *,
    context: ParallelContext,
    padded_vocab_size: int,
) -> list[GPTModel]:
    """Builds this rank's model chunks, weights uninitialised, on the context's device.

    One chunk without virtual stages. A chunk's forward pass returns hidden states [s, b, h]; the
    LM head, where there is one, is a frozen parameter that the forward pass does not use.
    """
    vpp = config.virtual_pipeline_model_parallel_size
    norm = final_norm_class(transformer_engine=context.transformer_engine)
    stages = len(extent.layers_per_stage)
    last_with_layers = max(s for s, count in enumerate(extent.layers_per_stage) if count)
    chunks = []
    for chunk in range(vpp or 1):
        stage = chunk * context.pp_size + context.pp_rank
        spec = layer_spec(
            qk_norm=architecture.qk_norm, transformer_engine=context.transformer_engine
        )
        model = GPTModel(
            config,
            TransformerBlockSubmodules(
                layer_specs=[spec] * extent.layers_per_stage[stage], layer_norm=norm
            ),
            vocab_size=padded_vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=stage == 0,
            post_process=False,
            position_embedding_type="rope",
            rotary_base=architecture.rope.theta,
            pg_collection=context.groups,
            vp_stage=chunk if vpp else None,
        )
        if architecture.rope.rope_type != "default":
            model.rotary_pos_emb.inv_freq = _inverse_frequencies(architecture).to(context.device)
        # GPTModel builds these with ``post_process``, but then it always has an LM head and
        # computes logits.
        if extent.final_norm and stage == last_with_layers:
            model.decoder.final_layernorm = build_module(
                norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        if extent.lm_head and not architecture.tied and stage == stages - 1:
            model.output_layer = _frozen_head(config, context, padded_vocab_size)
        chunks.append(model)
    return chunks


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _frozen_head(
    config: TransformerConfig, context: ParallelContext, padded_vocab_size: int
) -> ColumnParallelLinear:
    head = ColumnParallelLinear(
        config.hidden_size,
        padded_vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_bias_add=False,
        tp_group=context.groups.tp,
    )
    head.weight.requires_grad = False
    return head


def _inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """Rotary inverse frequencies [head_dim / 2], fp32, as transformers computes them.

    megatron-core fixes three of llama3's four numbers.
    """
    rope = architecture.rope
    hf_config = AutoConfig.for_model(
        "llama",
        head_dim=architecture.head_dim,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        max_position_embeddings=architecture.max_position_embeddings,
        rope_parameters={
            "rope_type": rope.rope_type,
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        },
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope.rope_type](hf_config, torch.device("cpu"))
    assert scale == 1.0, "llama3 scales no attention"
    return frequencies
