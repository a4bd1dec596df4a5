"""Llama 2 and 3.x, SmolLM2, and other models of the same class."""

from typing import Any

from megatron_oprd.models.architecture import ROPE_TYPES, Architecture, read_rope
from megatron_oprd.models.families.decoder import (
    SHARED_FIELDS,
    Check,
    Family,
    anything,
    each_layer,
    equals,
    read_shared,
)
from megatron_oprd.weights.mapping import QKV, Copy, GatedMLP, Mapping, RowSplit, Vocabulary

NAME = "LlamaForCausalLM"

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    # `architecture` reads these: biases of q, k, v and o, and of the MLP.
    "attention_bias": anything,
    "mlp_bias": anything,
    # Only other tools write these two.
    "qkv_bias": equals(False),
    "use_qk_norm": equals(False),
}


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    return Architecture(
        family=NAME,
        **shared,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        rope=read_rope(config, source, head_dim=shared["head_dim"], rope_types=ROPE_TYPES),
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
    attention_biases: list[Mapping] = [
        QKV(
            megatron="decoder.layers.{layer}.self_attention.linear_qkv.bias",
            hf={
                "model.layers.{layer}.self_attn.q_proj.bias": (heads * head_dim,),
                "model.layers.{layer}.self_attn.k_proj.bias": (groups * head_dim,),
                "model.layers.{layer}.self_attn.v_proj.bias": (groups * head_dim,),
            },
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
        ),
        Copy(
            megatron="decoder.layers.{layer}.self_attention.linear_proj.bias",
            hf={"model.layers.{layer}.self_attn.o_proj.bias": (hidden,)},
        ),
    ]
    mlp_biases: list[Mapping] = [
        GatedMLP(
            megatron="decoder.layers.{layer}.mlp.linear_fc1.bias",
            hf={
                "model.layers.{layer}.mlp.gate_proj.bias": (ffn,),
                "model.layers.{layer}.mlp.up_proj.bias": (ffn,),
            },
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.linear_fc2.bias",
            hf={"model.layers.{layer}.mlp.down_proj.bias": (hidden,)},
        ),
    ]
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
        *(attention_biases if a.output_bias else []),
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
        *(mlp_biases if a.mlp_bias else []),
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
    model_type="llama",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
)
