"""Ministral 3 and Devstral Small 2: the decoder of a `Mistral3ForConditionalGeneration`.

Differs from Mistral in a scale of queries that grows with their position. It is 1 up to the length
before YaRN's extension, and longer sequences are refused.
"""

from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture, read_rope
from megatron_oprd.models.families.decoder import (
    SHARED_FIELDS,
    Check,
    Family,
    anything,
    each_layer,
    equals,
    read_shared,
    read_windows,
)
from megatron_oprd.weights.mapping import QKV, Copy, GatedMLP, Mapping, RowSplit, Vocabulary

NAME = "Ministral3ForCausalLM"

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    # Only other tools write these two.
    "qkv_bias": equals(False),
    "use_qk_norm": equals(False),
    # `architecture` reads it: every layer has the window.
    "sliding_window": anything,
}


# Among the rotary settings: growth of the queries' scale, and a copy of the field above them.
SCALING, COPY = "llama_4_scaling_beta", "max_position_embeddings"


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object.

    Raises:
        UserError: The growth of the queries' scale is missing.
    """
    shared = read_shared(config, source)
    rope = read_rope(
        config,
        source,
        head_dim=shared["head_dim"],
        # The class scales by the length that only this type has.
        rope_types=("yarn",),
        beside=(SCALING, COPY),
    )
    growth, original = config.rope_parameters.get(SCALING), rope.original_max_position_embeddings
    if growth is None:
        raise UserError(f"{source}: rope_parameters has no {SCALING}; give a number, or 0 for none")
    assert original is not None
    if growth and original < shared["max_position_embeddings"]:
        # Up to this position, from 0, the scale is 1 + growth * log(1 + 0).
        shared["max_position_embeddings"] = original
        shared["length_field"] = (
            f"rope_parameters.original_max_position_embeddings, past which {SCALING} scales "
            "queries, which is not supported"
        )
    return Architecture(
        family=NAME, **shared, **read_windows(config, source, by_layer=False), rope=rope
    )


def mappings(a: Architecture, padded_vocab_size: int) -> list[Mapping]:
    """The table: Megatron's parameters, and the tensors on disk that each is made of."""
    hidden, ffn, vocab = a.hidden_size, a.ffn_hidden_size, a.vocab_size
    heads, groups, head_dim = a.num_attention_heads, a.num_query_groups, a.head_dim
    embedding = Vocabulary(
        megatron="embedding.word_embeddings.weight",
        hf={"model.embed_tokens.weight": (vocab, hidden)},
        padded_vocab_size=padded_vocab_size,
    )
    layer: list[Mapping] = [
        Copy(
            megatron="decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
            hf={"model.layers.{layer}.input_layernorm.weight": (hidden,)},
        ),
        QKV(
            megatron="decoder.layers.{layer}.self_attention.linear_qkv.weight",
            hf={
                "model.layers.{layer}.self_attn.q_proj.weight": (heads * head_dim, hidden),
                "model.layers.{layer}.self_attn.k_proj.weight": (groups * head_dim, hidden),
                "model.layers.{layer}.self_attn.v_proj.weight": (groups * head_dim, hidden),
            },
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.self_attention.linear_proj.weight",
            hf={"model.layers.{layer}.self_attn.o_proj.weight": (hidden, heads * head_dim)},
        ),
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
    return [embedding, *each_layer(a, layer), final_norm, *([] if a.tied else [head])]


FAMILY = Family(
    name=NAME,
    model_type="ministral3",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
)
