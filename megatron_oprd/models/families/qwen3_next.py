"""Qwen3-Next-80B-A3B.

Differs from Qwen2-MoE in linear attention in most layers (`models.gated_delta_net`), in a gate on
the output of attention in the others, in norms of heads, in norms whose weights are differences
from one, and in the rotation of a part of each head. The layers that predict further tokens are not
read, and not exported.
"""

from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import (
    ROPE_TYPES,
    Architecture,
    DeltaNet,
    MixtureOfExperts,
    read_rope,
)
from megatron_oprd.models.families.decoder import (
    SHARED_FIELDS,
    Check,
    Family,
    anything,
    each_expert,
    each_layer,
    equals,
    off,
    read_experts,
    read_shared,
)
from megatron_oprd.weights.mapping import (
    QKV,
    ColumnSplit,
    Copy,
    GatedMLP,
    GroupedRows,
    Mapping,
    RowSplit,
    Vocabulary,
)

NAME = "Qwen3NextForCausalLM"
KINDS = ("linear_attention", "full_attention")

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    "attention_bias": off,
    # Other values give some layers a dense MLP.
    "decoder_sparse_step": equals(1),
    "mlp_only_layers": off,
    # The class has no windows.
    "use_sliding_window": off,
    # For the load-balancing loss, which distillation does not have.
    "output_router_logits": anything,
    "router_aux_loss_coef": anything,
    # Transformers puts the first among the rotary settings, and makes layer_types of the second
    # where there is none.
    "partial_rotary_factor": anything,
    "full_attention_interval": anything,
    # `architecture` reads these.
    "layer_types": anything,
    "linear_conv_kernel_dim": anything,
    "linear_key_head_dim": anything,
    "linear_num_key_heads": anything,
    "linear_num_value_heads": anything,
    "linear_value_head_dim": anything,
    "moe_intermediate_size": anything,
    "norm_topk_prob": anything,
    "num_experts": anything,
    "num_experts_per_tok": anything,
    "num_local_experts": anything,
    "shared_expert_intermediate_size": anything,
}


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    return Architecture(
        family=NAME,
        **shared,
        rope=read_rope(
            config, source, head_dim=shared["head_dim"], rope_types=ROPE_TYPES, partial=True
        ),
        qk_norm=True,
        attention_gate=True,
        zero_centered_norms=True,
        delta=read_delta_net(config, source),
        delta_layers=read_delta_layers(config, source),
        moe=MixtureOfExperts(
            **read_experts(config, source),
            shared_ffn_hidden_size=config.shared_expert_intermediate_size,
            shared_expert_gate=True,
        ),
    )


def read_delta_net(config: Any, source: str) -> DeltaNet:
    """Reads the fields of linear attention; `UserError` if heads do not divide."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if values % keys:
        raise UserError(
            f"{source}: linear_num_value_heads = {values} is not a multiple of "
            f"linear_num_key_heads = {keys}"
        )
    return DeltaNet(
        num_key_heads=keys,
        values_per_key=values // keys,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        kernel_size=config.linear_conv_kernel_dim,
    )


def read_delta_layers(config: Any, source: str) -> tuple[bool, ...]:
    """For each layer whether it has linear attention; `UserError` for other kinds."""
    kinds = config.layer_types
    if len(kinds) != config.num_hidden_layers or not set(kinds) <= set(KINDS):
        raise UserError(
            f"{source}: layer_types = {kinds} has to have {config.num_hidden_layers} entries "
            f"(num_hidden_layers) of {' and '.join(KINDS)}"
        )
    return tuple(kind == "linear_attention" for kind in kinds)


def mappings(a: Architecture, padded_vocab_size: int) -> list[Mapping]:
    """The table: Megatron's parameters, and the tensors on disk that each is made of."""
    hidden, vocab = a.hidden_size, a.vocab_size
    heads, groups, head_dim = a.num_attention_heads, a.num_query_groups, a.head_dim
    moe, delta = a.moe, a.delta
    assert moe is not None
    assert delta is not None
    experts, ffn, shared = moe.num_experts, moe.ffn_hidden_size, moe.shared_ffn_hidden_size
    assert shared is not None
    keys, value_heads = delta.num_key_heads, delta.num_key_heads * delta.values_per_key
    channels, values = keys * delta.channels_per_key, value_heads * delta.value_dim
    embedding = Vocabulary(
        megatron="embedding.word_embeddings.weight",
        hf={"model.embed_tokens.weight": (vocab, hidden)},
        padded_vocab_size=padded_vocab_size,
    )
    # The norms' weights are differences from one on both sides, but for `norm_weight`.
    linear_attention: list[Mapping] = [
        Copy(
            megatron="decoder.layers.{layer}.input_layernorm.weight",
            hf={"model.layers.{layer}.input_layernorm.weight": (hidden,)},
        ),
        ColumnSplit(
            megatron="decoder.layers.{layer}.self_attention.in_proj_qkvz.weight",
            hf={
                "model.layers.{layer}.linear_attn.in_proj_qkvz.weight": (channels + values, hidden)
            },
        ),
        ColumnSplit(
            megatron="decoder.layers.{layer}.self_attention.in_proj_ba.weight",
            hf={"model.layers.{layer}.linear_attn.in_proj_ba.weight": (2 * value_heads, hidden)},
        ),
        GroupedRows(
            megatron="decoder.layers.{layer}.self_attention.conv_weight",
            hf={"model.layers.{layer}.linear_attn.conv1d.weight": (channels, 1, delta.kernel_size)},
            num_groups=keys,
            rows_of_group=(delta.key_dim, delta.key_dim, delta.values_per_key * delta.value_dim),
        ),
        ColumnSplit(
            megatron="decoder.layers.{layer}.self_attention.dt_bias",
            hf={"model.layers.{layer}.linear_attn.dt_bias": (value_heads,)},
        ),
        ColumnSplit(
            megatron="decoder.layers.{layer}.self_attention.log_decay",
            hf={"model.layers.{layer}.linear_attn.A_log": (value_heads,)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.self_attention.norm_weight",
            hf={"model.layers.{layer}.linear_attn.norm.weight": (delta.value_dim,)},
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.self_attention.out_proj.weight",
            hf={"model.layers.{layer}.linear_attn.out_proj.weight": (hidden, values)},
        ),
    ]
    full_attention: list[Mapping] = [
        Copy(
            megatron="decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
            hf={"model.layers.{layer}.input_layernorm.weight": (hidden,)},
        ),
        QKV(
            megatron="decoder.layers.{layer}.self_attention.linear_qkv.weight",
            hf={
                # Of each head the query, then the gate.
                "model.layers.{layer}.self_attn.q_proj.weight": (2 * heads * head_dim, hidden),
                "model.layers.{layer}.self_attn.k_proj.weight": (groups * head_dim, hidden),
                "model.layers.{layer}.self_attn.v_proj.weight": (groups * head_dim, hidden),
            },
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            has_gate=True,
        ),
        Copy(
            megatron="decoder.layers.{layer}.self_attention.q_layernorm.weight",
            hf={"model.layers.{layer}.self_attn.q_norm.weight": (head_dim,)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.self_attention.k_layernorm.weight",
            hf={"model.layers.{layer}.self_attn.k_norm.weight": (head_dim,)},
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.self_attention.linear_proj.weight",
            hf={"model.layers.{layer}.self_attn.o_proj.weight": (hidden, heads * head_dim)},
        ),
    ]
    expert: list[Mapping] = [
        GatedMLP(
            megatron="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1.weight",
            hf={
                "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": (ffn, hidden),
                "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": (ffn, hidden),
            },
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2.weight",
            hf={"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": (hidden, ffn)},
        ),
    ]
    mlp: list[Mapping] = [
        Copy(
            megatron="decoder.layers.{layer}.mlp.router.weight",
            hf={"model.layers.{layer}.mlp.gate.weight": (experts, hidden)},
        ),
        *each_expert(moe, expert),
        GatedMLP(
            megatron="decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight",
            hf={
                "model.layers.{layer}.mlp.shared_expert.gate_proj.weight": (shared, hidden),
                "model.layers.{layer}.mlp.shared_expert.up_proj.weight": (shared, hidden),
            },
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.mlp.shared_experts.linear_fc2.weight",
            hf={"model.layers.{layer}.mlp.shared_expert.down_proj.weight": (hidden, shared)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.shared_experts.gate_weight",
            hf={"model.layers.{layer}.mlp.shared_expert_gate.weight": (1, hidden)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.pre_mlp_layernorm.weight",
            hf={"model.layers.{layer}.post_attention_layernorm.weight": (hidden,)},
        ),
    ]
    final_norm = Copy(
        megatron="decoder.final_layernorm.weight",
        hf={"model.norm.weight": (hidden,)},
    )
    head = Vocabulary(
        megatron="output_layer.weight",
        hf={"lm_head.weight": (vocab, hidden)},
        padded_vocab_size=padded_vocab_size,
    )
    layers: list[Mapping] = []
    for layer, is_linear in enumerate(a.delta_layers):
        attention = linear_attention if is_linear else full_attention
        layers += each_layer(a, [*attention, *mlp], layers=range(layer, layer + 1))
    return [embedding, *layers, final_norm, *([] if a.tied else [head])]


FAMILY = Family(
    name=NAME,
    model_type="qwen3_next",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
    # Layers that predict further tokens.
    unread=lambda raw: ("mtp.",),
)
