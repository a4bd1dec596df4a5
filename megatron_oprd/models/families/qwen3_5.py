"""Qwen3.5 and Qwen3.6, dense (27B and smaller).

Differs from Qwen3-Next in an MLP in the place of experts, and in linear attention's projections of
the input: queries, keys and values have one, gates, strengths and steps one each, and rows are
ordered by kind. Published folders have parts for images beside it (`qwen3_5_images`). Tokens of
text have one position, so that the rotation's sections have no effect.
"""

from typing import Any

from megatron_oprd.models.architecture import ROPE_TYPES, Architecture, read_rope
from megatron_oprd.models.families.decoder import (
    SHARED_FIELDS,
    Check,
    Family,
    anything,
    each_layer,
    equals,
    off,
    read_shared,
)
from megatron_oprd.models.families.qwen3_next import read_delta_layers, read_delta_net
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

NAME = "Qwen3_5ForCausalLM"

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    "attention_bias": off,
    # The class has this gate, and keeps decays in fp32, without asking.
    "attn_output_gate": equals(True),
    "mamba_ssm_dtype": equals("float32"),
    # Of the layers that predict further tokens, which are not read.
    "mtp_num_hidden_layers": anything,
    "mtp_use_dedicated_embeddings": anything,
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
}


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    return Architecture(family=NAME, **read_shared(config, source), **read_hybrid(config, source))


def read_hybrid(config: Any, source: str) -> dict[str, Any]:
    """Reads the arguments of `Architecture` that Qwen3.5's dense and sparse models share."""
    return {
        "rope": read_rope(
            config,
            source,
            head_dim=config.head_dim,
            rope_types=ROPE_TYPES,
            partial=True,
            beside=("mrope_section", "mrope_interleaved"),
        ),
        "qk_norm": True,
        "attention_gate": True,
        "zero_centered_norms": True,
        "delta": read_delta_net(config, source),
        "delta_layers": read_delta_layers(config, source),
    }


def mappings(a: Architecture, padded_vocab_size: int) -> list[Mapping]:
    """The table: Megatron's parameters, and the tensors on disk that each is made of."""
    hidden, vocab = a.hidden_size, a.vocab_size
    heads, groups, head_dim = a.num_attention_heads, a.num_query_groups, a.head_dim
    ffn, delta = a.ffn_hidden_size, a.delta
    assert delta is not None
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
    mlp: list[Mapping] = [
        GatedMLP(
            megatron="decoder.layers.{layer}.mlp.linear_fc1.weight",
            hf={
                "model.layers.{layer}.mlp.gate_proj.weight": (ffn, hidden),
                "model.layers.{layer}.mlp.up_proj.weight": (ffn, hidden),
            },
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.mlp.linear_fc2.weight",
            hf={"model.layers.{layer}.mlp.down_proj.weight": (hidden, ffn)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
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
    model_type="qwen3_5_text",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
    longer_prefix="model.language_model.",
    # Layers that predict further tokens.
    unread=lambda raw: ("mtp.",),
)
