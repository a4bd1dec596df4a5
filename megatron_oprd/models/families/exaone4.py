"""EXAONE 4.0.

Differs from Llama in norms behind attention and MLP instead of before them, in norms of query and
key heads, and, in the 32B model, in sliding windows: layers without a window are not rotated.
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
    read_shared,
    read_windows,
)
from megatron_oprd.weights.mapping import QKV, Copy, GatedMLP, Mapping, RowSplit, Vocabulary

NAME = "Exaone4ForCausalLM"

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    # Only other tools write these two.
    "qkv_bias": equals(False),
    "use_qk_norm": equals(True),
    # `architecture` reads these; transformers makes the second of the third where there is none.
    "sliding_window": anything,
    "layer_types": anything,
    "sliding_window_pattern": anything,
}


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    return Architecture(
        family=NAME,
        **shared,
        **read_windows(config, source, by_layer=True),
        rope=read_rope(config, source, head_dim=shared["head_dim"], rope_types=ROPE_TYPES),
        rotated_layers=_rotated_layers(config),
        qk_norm=True,
        pre_norms=False,
        post_norms=True,
    )


def _rotated_layers(config: Any) -> tuple[bool, ...]:
    # Without windows all layers look at everything, and all are rotated.
    if config.sliding_window is None or "full_attention" not in config.layer_types:
        return ()
    return tuple(kind == "sliding_attention" for kind in config.layer_types)


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
    model_type="exaone4",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
)
