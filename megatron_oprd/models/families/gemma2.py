"""Gemma 2 (2B, 9B and 27B).

Differs from Gemma 3 in softcaps of attention's scores and of the logits; in no norms of query and
key heads; and in one rotation for all layers, of which every other one has a sliding window.
"""

from typing import Any

from megatron_oprd.models.architecture import (
    ROPE_TYPES,
    Activation,
    Architecture,
    read_rope,
)
from megatron_oprd.models.families.decoder import (
    SHARED_FIELDS,
    Check,
    Family,
    anything,
    each_layer,
    equals,
    off,
    read_shared,
    read_softcap,
    read_windows,
)
from megatron_oprd.weights.mapping import QKV, Copy, GatedMLP, Mapping, RowSplit, Vocabulary

NAME = "Gemma2ForCausalLM"

GELU = "gelu_pytorch_tanh"

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    "hidden_act": equals(GELU),
    "hidden_activation": equals(GELU),
    "use_bidirectional_attention": off,
    # `architecture` reads these: the first for biases of q, k, v and o.
    "attention_bias": anything,
    "attn_logit_softcapping": anything,
    "final_logit_softcapping": anything,
    "query_pre_attn_scalar": anything,
    "sliding_window": anything,
    "layer_types": anything,
    # Published beside sliding_window; transformers reads only the latter.
    "sliding_window_size": anything,
    # A kind of cache, for generation.
    "cache_implementation": anything,
}


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    return Architecture(
        family=NAME,
        **shared,
        **read_windows(config, source, by_layer=True),
        rope=read_rope(config, source, head_dim=shared["head_dim"], rope_types=ROPE_TYPES),
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        zero_centered_norms=True,
        post_norms=True,
        softmax_scale=config.query_pre_attn_scalar**-0.5,
        score_softcap=read_softcap(config, source, "attn_logit_softcapping"),
        activation=Activation(function="gelu_tanh"),
        embedding_multiplier=config.hidden_size**0.5,
        rounds_embedding_multiplier=True,
        logits_softcap=read_softcap(config, source, "final_logit_softcapping"),
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
        Copy(
            megatron="decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
            hf={"model.layers.{layer}.pre_feedforward_layernorm.weight": (hidden,)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.self_attention.linear_proj.post_layernorm.weight",
            hf={"model.layers.{layer}.post_attention_layernorm.weight": (hidden,)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.linear_fc2.post_layernorm.weight",
            hf={"model.layers.{layer}.post_feedforward_layernorm.weight": (hidden,)},
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
    model_type="gemma2",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
)
