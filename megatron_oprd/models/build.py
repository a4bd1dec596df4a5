"""Builds this rank's model chunks of a decoder."""

from collections.abc import Collection
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_oprd.config.schema import ModelConfig, ParallelConfig, RecomputeConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture, MixtureOfExperts
from megatron_oprd.models.fp8 import with_fp8_linears
from megatron_oprd.models.fp8_codes import WeightFormat
from megatron_oprd.models.layer_variants import with_variants
from megatron_oprd.models.layers import final_norm_class, layer_spec
from megatron_oprd.models.logits import LogitForm
from megatron_oprd.models.rotary import (
    RotaryTransformerConfig,
    has_fused_rotation,
    set_frequencies,
)
from megatron_oprd.parallel.context import ParallelContext


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU with tanh, as transformers' ``gelu_pytorch_tanh``."""
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS = {"silu": F.silu, "quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}
# Megatron's fused kernels have these, with gates.
_FUSED_ACTIVATIONS = ("silu", "quick_gelu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class HiddenStatesModel(GPTModel):
    """A GPT model whose forward pass returns the last hidden states, with or without LM head.

    Attributes:
        embedding_multiplier: Factor on the embedding's output.
        logit_form: What makes logits of the LM head's output, wherever it is computed.
    """

    embedding_multiplier = 1.0
    logit_form = LogitForm()

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, *others = super()._preprocess(*args, **kwargs)
        # Later stages have no embedding: their input comes from the stage before.
        if decoder_input is not None and self.embedding_multiplier != 1.0:
            decoder_input = decoder_input * self.embedding_multiplier
        return decoder_input, *others

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The part of a model that is built."""

    # Per stage, virtual stages in the order in which a token passes them. The sum may be below the
    # model's depth; the remaining layers are not built.
    layers_per_stage: tuple[int, ...]
    final_norm: bool  # after the last built layer
    lm_head: bool  # on the last stage
    # True: the head is used, and trained unless the model is frozen. False: it is a frozen
    # parameter for export only, and a tied head is not built.
    uses_lm_head: bool = False

    def layers_of_stage(self, stage: int) -> range:
        """A stage's layers, counted from 0 over the whole model."""
        start = sum(self.layers_per_stage[:stage])
        return range(start, start + self.layers_per_stage[stage])

    @property
    def last_stage_with_layers(self) -> int:
        """The stage of the last built layer; later stages are empty."""
        return max(stage for stage, count in enumerate(self.layers_per_stage) if count)


@dataclass(frozen=True, kw_only=True)
class FP8Layers:
    """The layers of a frozen model with FP8 weights, without Transformer Engine."""

    layers: Collection[int]  # from 0, over the whole model
    weight_format: WeightFormat


def padded_vocab_size(
    architecture: Architecture, *, divisible_by: int, tensor_model_parallel_size: int
) -> int:
    """The number of rows of the embedding, padding included."""
    # The same for all tensor-parallel sizes that divide `divisible_by`, so that a checkpoint of one
    # layout fits another.
    return architecture.padded_vocab_size(lcm(divisible_by, tensor_model_parallel_size))


def transformer_config(
    architecture: Architecture,
    extent: Extent,
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    fused_kernels: bool,
    fp8_options: dict[str, Any] | None = None,
) -> TransformerConfig:
    """Megatron's configuration of the model.

    ``fused_kernels`` says that Transformer Engine's and CUDA's fused kernels exist; ``fp8_options``
    are Megatron's settings of FP8 with Transformer Engine.
    """
    a, pp = architecture, parallel.pipeline_model_parallel_size
    num_layers = sum(extent.layers_per_stage)
    vpp = parallel.virtual_pipeline_model_parallel_size
    dtype = DTYPES[model.params_dtype]
    # megatron-core's pipeline layout: the modules of each stage, in order.
    layout = [["decoder"] * count for count in extent.layers_per_stage]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return RotaryTransformerConfig(
        num_layers=num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups,
        # Of the values, and of linear_proj's input.
        kv_channels=a.value_dim,
        layernorm_epsilon=a.layernorm_epsilon,
        # `RotaryTransformerConfig` turns this into a plain factor on cosine and sine.
        yarn_mscale=a.rope.attention_factor - 1.0,
        sliding_yarn_mscale=(
            None if a.sliding_rope is None else a.sliding_rope.attention_factor - 1.0
        ),
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=a.zero_centered_norms,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[a.activation.function],
        glu_linear_offset=a.activation.up_offset,
        activation_func_clamp_value=a.activation.clamp,
        add_bias_linear=a.mlp_bias,
        attention_output_bias=a.output_bias,
        add_qkv_bias=a.qkv_bias,
        softmax_type="learnable" if a.attention_sinks else "vanilla",
        qk_layernorm=a.qk_norm,
        attention_output_gate=a.attention_gate,
        softmax_scale=a.softmax_scale,
        score_softcap=a.score_softcap,
        rotary_interleaved=a.rope.interleaved,
        # Positions to the left of a token and to its right; then, by layer, whether it counts.
        window_size=None if a.sliding_window is None else (a.sliding_window - 1, 0),
        window_attn_skip_freq=[int(slides) for slides in a.sliding_layers[:num_layers]] or None,
        # By layer, whether it goes without rotation.
        no_rope_freq=[int(not rotated) for rotated in a.rotated_layers[:num_layers]] or None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_model_parallel_layout=layout if pp > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Loading overwrites every value. Initialisation stays on, as a no-op, because Megatron
        # marks the split parameters during it.
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        # Micro-batches differ in length.
        variable_seq_lengths=pp > 1,
        # The default dispatcher rejects variable lengths, even in dense models.
        moe_token_dispatcher_type="alltoall",
        **(_moe_options(a.moe, parallel, fused_kernels) if a.moe is not None else {}),
        # Without this, interleaved messages between the same two ranks cannot be told apart.
        overlap_p2p_comm=vpp is not None,
        batch_p2p_comm=vpp is None,
        deallocate_pipeline_outputs=True,
        # The loss is normalised over the global batch where it is attached, so data-parallel ranks
        # sum gradients instead of averaging.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        bias_activation_fusion=fused_kernels and a.activation.function in _FUSED_ACTIVATIONS,
        masked_softmax_fusion=False,
        apply_rope_fusion=fused_kernels and model.apply_rope_fusion and has_fused_rotation(a),
        # Megatron would ask for Apex as well, for the LM head, whose gradient is computed elsewhere
        # here; `models.student.fuse_gradient_accumulation` turns it on for the layers alone.
        gradient_accumulation_fusion=False,
        # With the cache Transformer Engine overwrites the buffers with a pass's first micro-batch,
        # but a step may have several passes (`Distiller.compute_gradients`). Only FP8 models have
        # something to cache, and they do not train.
        disable_parameter_transpose_cache=fp8_options is None,
        recompute_granularity=recompute.recompute_granularity,
        recompute_method=recompute.recompute_method,
        recompute_num_layers=recompute.recompute_num_layers,
        distribute_saved_activations=recompute.distribute_saved_activations,
        **(fp8_options or {}),
    )


def build_model(
    architecture: Architecture,
    extent: Extent,
    config: TransformerConfig,
    *,
    context: ParallelContext,
    padded_vocab_size: int,
    max_sequence_length: int,
    fp8: FP8Layers | None = None,
) -> list[GPTModel]:
    """Builds this rank's model chunks on the context's device, weights uninitialised.

    There is one chunk unless there are virtual stages. The forward pass returns hidden states [s,
    b, h] and does not use the LM head, if there is one.

    Args:
        architecture: The whole model's.
        extent: The part to build.
        config: The result of `transformer_config`.
        context: This rank's process groups.
        padded_vocab_size: Rows of the embedding.
        max_sequence_length: Longest sequence of the run in tokens, without padding. Beyond
            longrope's original length the whole run uses its long factors
            (`megatron_oprd.models.rotary`).
        fp8: Layers with FP8 weights, which only loading fills. Requires a context without
            Transformer Engine.

    Raises:
        UserError: With Transformer Engine, a softcap of attention's scores, or a sliding window or
            attention sinks under context parallelism.
    """
    if context.transformer_engine:
        _check_attention(config, architecture)
    vpp, moe = config.virtual_pipeline_model_parallel_size, architecture.moe
    norm = final_norm_class(transformer_engine=context.transformer_engine)
    stages = len(extent.layers_per_stage)
    chunks = []
    for chunk in range(vpp or 1):
        stage = chunk * context.pp_size + context.pp_rank
        layers = extent.layers_of_stage(stage)
        specs = []
        for layer in layers:
            spec = with_variants(
                layer_spec(
                    qk_norm=architecture.qk_norm,
                    num_experts=moe.num_experts
                    if moe and architecture.has_experts(layer)
                    else None,
                    transformer_engine=context.transformer_engine,
                ),
                architecture,
                config,
                layer=layer,
                tp_group=context.groups.tp,
                transformer_engine=context.transformer_engine,
            )
            if fp8 is not None and layer in fp8.layers:
                spec = with_fp8_linears(spec, fp8.weight_format)
            specs.append(spec)
        is_last = stage == stages - 1
        model = HiddenStatesModel(
            config,
            TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm),
            vocab_size=padded_vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=stage == 0,
            # With post_process, Megatron builds final norm and LM head, and keeps a tied head equal
            # to the first stage's embedding.
            post_process=extent.uses_lm_head and is_last,
            share_embeddings_and_output_weights=extent.uses_lm_head and architecture.tied,
            position_embedding_type="rope",
            rotary_percent=architecture.rope.partial_rotary_factor,
            rotary_base=architecture.rope.theta,
            pg_collection=context.groups,
            vp_stage=chunk if vpp else None,
        )
        model.embedding_multiplier = _embedding_multiplier(architecture, config.params_dtype)
        model.logit_form = LogitForm.of(architecture)
        set_frequencies(
            model, architecture, max_sequence_length=max_sequence_length, device=context.device
        )
        _prepare_experts(model, context)
        # Without post_process Megatron builds neither, so they are attached by hand.
        if not extent.uses_lm_head:
            if extent.final_norm and stage == extent.last_stage_with_layers:
                model.decoder.final_layernorm = build_module(
                    norm,
                    config=config,
                    hidden_size=config.hidden_size,
                    eps=config.layernorm_epsilon,
                )
            if extent.lm_head and not architecture.tied and is_last:
                model.output_layer = _frozen_head(config, context, padded_vocab_size)
        chunks.append(model)
    return chunks


def _embedding_multiplier(architecture: Architecture, dtype: torch.dtype) -> float:
    multiplier = architecture.embedding_multiplier
    if not architecture.rounds_embedding_multiplier:
        return multiplier
    # In bf16 transformers' Gemma 3 multiplies with 73.5, not with the root of 5376, 73.32.
    return torch.tensor(multiplier, dtype=dtype).item()


def _check_attention(config: TransformerConfig, architecture: Architecture) -> None:
    if architecture.score_softcap is not None:
        raise UserError(
            f"a {architecture.family} has attn_logit_softcapping = {architecture.score_softcap}, "
            "which Transformer Engine's attention, as Megatron builds it, does not have; use an "
            "environment without the package transformer_engine, where attention is torch's"
        )
    if config.context_parallel_size == 1:
        return
    found = []
    if architecture.sliding_window is not None:
        found.append(f"a sliding window of {architecture.sliding_window} positions")
    if architecture.attention_sinks:
        found.append("attention sinks")
    if found:
        raise UserError(
            f"parallel.context_parallel_size = {config.context_parallel_size}, but a "
            f"{architecture.family} has {' and '.join(found)}, which Transformer Engine's "
            "attention does not keep where keys pass from rank to rank; give 1, and tensor or "
            "pipeline parallelism instead"
        )


def _moe_options(
    moe: MixtureOfExperts, parallel: ParallelConfig, fused_kernels: bool
) -> dict[str, Any]:
    """The fields of Megatron's configuration for a mixture of experts."""
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.num_experts_per_token,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_shared_expert_gate": moe.shared_expert_gate,
        # A softmax over the chosen experts equals one over all experts, rescaled to sum to one.
        "moe_router_pre_softmax": not moe.norm_topk_prob,
        "moe_router_score_function": "sigmoid" if moe.sigmoid_router else "softmax",
        "moe_router_topk_scaling_factor": moe.routed_scaling_factor,
        "moe_router_enable_expert_bias": moe.sigmoid_router,
        "moe_router_num_groups": moe.num_groups if moe.num_groups > 1 else None,
        "moe_router_group_topk": moe.num_groups_per_token if moe.num_groups > 1 else None,
        "moe_router_bias_update_rate": 0.0,  # it balances a pre-training's load
        # As in transformers and inference engines: the weights' format (None), or fp32. Another one
        # would now and then choose other experts than the rollouts did.
        "moe_router_dtype": "fp32" if moe.sigmoid_router else None,
        # Distillation adds no balancing loss and drops no token.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_expert_capacity_factor": None,
        "moe_grouped_gemm": fused_kernels,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }


def _prepare_experts(model: GPTModel, context: ParallelContext) -> None:
    for layer in model.decoder.layers:
        if not layer.is_moe_layer:
            continue
        # Megatron builds the router on the CPU and moves it in its first forward pass.
        router = layer.mlp.router
        router.to(context.device)
        if router.expert_bias is not None:
            # Megatron's buffer, as a parameter that does not train: those are loaded and exported.
            bias = router.expert_bias
            del router.expert_bias
            router.expert_bias = torch.nn.Parameter(bias, requires_grad=False)
        if layer.mlp.shared_experts is not None:
            layer.mlp.shared_experts.to(context.device)  # its gate, likewise
        for expert in getattr(layer.mlp.experts, "local_experts", ()):
            if expert.linear_fc2.bias is not None:
                expert.linear_fc2.register_forward_hook(_copied)
        for name, parameter in layer.mlp.experts.named_parameters():
            if name.rpartition(".")[2].startswith("bias"):
                # Megatron would sum its gradient over the tensor-parallel ranks, which is right
                # where each sees a slice of the sequence, not where each has tokens of its own.
                parameter.sequence_parallel = False
                # As a weight: else the norm of gradients misses those of ranks but the first.
                parameter.tensor_model_parallel = True
            # Sums its gradients over the expert-data-parallel group. Megatron sets this only under
            # expert parallelism, but the two groups also differ where experts are split over fewer
            # ranks than the other matrices.
            parameter.allreduce = False


def _copied(
    module: torch.nn.Module, inputs: Any, result: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A forward hook: Megatron adds an expert's bias in place, which autograd refuses on a view."""
    output, bias = result
    return output.clone() if output.requires_grad else output, bias


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
