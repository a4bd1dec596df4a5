"""A layer's modules that some families have in another form than Megatron's specs."""

import dataclasses
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.gated_delta_net import (
    DeltaSubmodules,
    GatedDeltaNet,
    GatedSelfAttention,
)
from megatron_oprd.models.latent_attention import LatentAttention, LatentSubmodules
from megatron_oprd.models.layers import final_norm_class
from megatron_oprd.models.residual import ResidualAdd
from megatron_oprd.models.wide_norm import WideNorm

# Our modules' names -> those in checkpoints: a norm is named after the linear layer before it, as
# those at its input are named after the one behind.
POST_NORMS = {
    "self_attn_bda.norm.": "self_attention.linear_proj.post_layernorm.",
    "mlp_bda.norm.": "mlp.linear_fc2.post_layernorm.",
}
# Of latent attention: Megatron fuses these norms into the linear layers behind them where it can.
LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def with_variants(
    spec: ModuleSpec,
    architecture: Architecture,
    config: TransformerConfig,
    *,
    layer: int,  # from 0, over the whole model
    tp_group: dist.ProcessGroup,
    transformer_engine: bool,
) -> ModuleSpec:
    """A copy of the spec of `layers.layer_spec` with the modules of an architecture."""
    a, submodules = architecture, spec.submodules
    if a.has_delta_net(layer):
        submodules = _with_delta_net(submodules, a, transformer_engine=transformer_engine)
    elif a.attention_gate:
        attention = dataclasses.replace(submodules.self_attention, module=GatedSelfAttention)
        submodules = dataclasses.replace(submodules, self_attention=attention)
    if a.latent is not None:
        submodules = _with_latent_attention(submodules, a, transformer_engine=transformer_engine)
    if a.qk_norm_over_all_heads:
        of_queries, of_keys = (
            ModuleSpec(module=WideNorm, params={"width": heads * a.head_dim, "tp_group": tp_group})
            for heads in (a.num_attention_heads, a.num_query_groups)
        )
        submodules = _with_attention(submodules, q_layernorm=of_queries, k_layernorm=of_keys)
    if not a.pre_norms:
        submodules = _without_pre_norms(submodules, transformer_engine=transformer_engine)
    if a.post_norms or a.residual_multiplier != 1.0:
        norm = final_norm_class(transformer_engine=transformer_engine)
        residual = ModuleSpec(
            module=ResidualAdd,
            params={
                "config": config,
                "norm": norm if a.post_norms else None,
                "multiplier": a.residual_multiplier,
            },
        )
        submodules = dataclasses.replace(
            submodules,
            self_attn_bda=residual,
            mlp_bda=residual,
            sharded_state_dict_keys_map=submodules.sharded_state_dict_keys_map | POST_NORMS,
        )
    return dataclasses.replace(spec, submodules=submodules)


def _with_attention(submodules: Any, **changes: Any) -> Any:
    """Changes submodules of the attention."""
    attention = submodules.self_attention
    changed = dataclasses.replace(attention.submodules, **changes)
    return dataclasses.replace(
        submodules, self_attention=dataclasses.replace(attention, submodules=changed)
    )


def _column_parallel(*, transformer_engine: bool) -> type:
    if not transformer_engine:
        return ColumnParallelLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear


def _with_norm_apart(submodules: Any, *, transformer_engine: bool) -> Any:
    """With a norm at the layer's input that is no part of a linear layer: two read its output."""
    names = dict(submodules.sharded_state_dict_keys_map)
    names.pop("input_layernorm.", None)
    return dataclasses.replace(
        submodules,
        input_layernorm=final_norm_class(transformer_engine=transformer_engine),
        sharded_state_dict_keys_map=names,
    )


def _with_delta_net(submodules: Any, a: Architecture, *, transformer_engine: bool) -> Any:
    linear_proj = submodules.self_attention.submodules.linear_proj
    return dataclasses.replace(
        _with_norm_apart(submodules, transformer_engine=transformer_engine),
        self_attention=ModuleSpec(
            module=GatedDeltaNet,
            params={"delta": a.delta},
            submodules=DeltaSubmodules(
                in_proj=_column_parallel(transformer_engine=transformer_engine),
                out_proj=linear_proj,
            ),
        ),
    )


def _with_latent_attention(submodules: Any, a: Architecture, *, transformer_engine: bool) -> Any:
    latent, attention = a.latent, submodules.self_attention.submodules
    assert latent is not None
    norm = final_norm_class(transformer_engine=transformer_engine)
    submodules = _with_norm_apart(submodules, transformer_engine=transformer_engine)
    return dataclasses.replace(
        submodules,
        sharded_state_dict_keys_map=submodules.sharded_state_dict_keys_map | LATENT_NORMS,
        self_attention=ModuleSpec(
            module=LatentAttention,
            params={"attn_mask_type": AttnMaskType.causal, "latent": latent},
            submodules=LatentSubmodules(
                linear_up_proj=_column_parallel(transformer_engine=transformer_engine),
                norm=norm,
                # Transformer Engine's has to know the widths.
                core_attention=partial(
                    attention.core_attention, k_channels=a.head_dim, v_channels=latent.value_dim
                ),
                linear_proj=attention.linear_proj,
            ),
        ),
    )


def _without_pre_norms(submodules: Any, *, transformer_engine: bool) -> Any:
    if not transformer_engine:
        return dataclasses.replace(
            submodules, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp
        )
    # There the norms are part of the linear layers behind them.
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    submodules = _with_attention(submodules, linear_qkv=TEColumnParallelLinear)
    mlp = submodules.mlp
    plain = dataclasses.replace(mlp.submodules, linear_fc1=TEColumnParallelLinear)
    return dataclasses.replace(submodules, mlp=dataclasses.replace(mlp, submodules=plain))
