"""Qwen3.5 and Qwen3.6 with experts (35B-A3B, 122B-A10B, 397B-A17B).

Differs from Qwen3.5 in Qwen3-Next's mixture of experts. Published folders have parts for images
beside it (`qwen3_5_moe_images`).
"""

from typing import Any

from megatron_oprd.models.architecture import Architecture, MixtureOfExperts
from megatron_oprd.models.families import qwen3_5
from megatron_oprd.models.families.decoder import (
    Check,
    Family,
    anything,
    check_experts,
    each_expert,
    each_layer,
    off,
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

NAME = "Qwen3_5MoeForCausalLM"

FIELDS: dict[str, Check] = {
    **qwen3_5.FIELDS,
    # Other values give some layers of Qwen's older models a dense MLP.
    "mlp_only_layers": off,
    # For the load-balancing loss, which distillation does not have.
    "output_router_logits": anything,
    "router_aux_loss_coef": anything,
    # `architecture` reads these.
    "moe_intermediate_size": anything,
    "num_experts": anything,
    "num_experts_per_tok": anything,
    "shared_expert_intermediate_size": anything,
}


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    chosen = config.num_experts_per_tok
    check_experts(config.num_experts, chosen, source, field="num_experts")
    return Architecture(
        family=NAME,
        # Every layer has experts, and the class no width of a dense MLP.
        **read_shared(config, source, ffn_hidden_size=config.moe_intermediate_size),
        **qwen3_5.read_hybrid(config, source),
        moe=MixtureOfExperts(
            num_experts=config.num_experts,
            num_experts_per_token=chosen,
            ffn_hidden_size=config.moe_intermediate_size,
            # The class has no field for it.
            norm_topk_prob=True,
            shared_ffn_hidden_size=config.shared_expert_intermediate_size,
            shared_expert_gate=True,
        ),
    )


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
    of_key = delta.values_per_key * delta.value_dim
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
        # Rows by kind on disk, by key head in Megatron.
        GroupedRows(
            megatron="decoder.layers.{layer}.self_attention.in_proj_qkvz.weight",
            hf={
                "model.layers.{layer}.linear_attn.in_proj_qkv.weight": (channels, hidden),
                "model.layers.{layer}.linear_attn.in_proj_z.weight": (values, hidden),
            },
            num_groups=keys,
            rows_of_group=(delta.key_dim, delta.key_dim, of_key, of_key),
        ),
        GroupedRows(
            megatron="decoder.layers.{layer}.self_attention.in_proj_ba.weight",
            hf={
                "model.layers.{layer}.linear_attn.in_proj_b.weight": (value_heads, hidden),
                "model.layers.{layer}.linear_attn.in_proj_a.weight": (value_heads, hidden),
            },
            num_groups=keys,
            rows_of_group=(delta.values_per_key, delta.values_per_key),
        ),
        GroupedRows(
            megatron="decoder.layers.{layer}.self_attention.conv_weight",
            hf={"model.layers.{layer}.linear_attn.conv1d.weight": (channels, 1, delta.kernel_size)},
            num_groups=keys,
            rows_of_group=(delta.key_dim, delta.key_dim, of_key),
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
    model_type="qwen3_5_moe_text",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
    longer_prefix="model.language_model.",
    # Layers that predict further tokens.
    unread=lambda raw: ("mtp.",),
)
