"""Phi-3 and Phi-3.5 (mini, medium), Phi-4, Phi-4-mini.

Differs from Llama in fused projections, in the rotation of a part of each head, and in longrope.
"""

from typing import Any

from megatron_oprd.models.architecture import Architecture, read_rope
from megatron_oprd.models.families.decoder import (
    SHARED_FIELDS,
    Check,
    Family,
    anything,
    each_layer,
    equals,
    off,
    read_shared,
    read_windows,
)
from megatron_oprd.weights.mapping import QKV, Copy, GatedMLP, Mapping, RowSplit, Vocabulary

NAME = "Phi3ForCausalLM"


def _transformers_own(auto_map: dict[str, Any] | None) -> bool:
    """Whether the code that the folder brings along is that of transformers' Phi-3."""
    classes = {"AutoConfig": "Phi3Config", "AutoModelForCausalLM": "Phi3ForCausalLM"}
    return all(
        name == "AutoTokenizer" or str(path).rpartition(".")[2] == classes.get(name)
        for name, path in (auto_map or {}).items()
    )


FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    "auto_map": _transformers_own,
    # The table has no biases.
    "attention_bias": off,
    "lm_head_bias": off,
    "mlp_bias": off,
    # Only other tools write these two.
    "qkv_bias": equals(False),
    "use_qk_norm": equals(False),
    # Dropout.
    "embd_pdrop": off,
    "resid_pdrop": off,
    # Written by Phi-4-mini; transformers' class does not read them.
    "full_attn_mod": equals(1),
    "interpolate_factor": equals(1),
    # Transformers puts these two among the rotary settings.
    "original_max_position_embeddings": anything,
    "partial_rotary_factor": anything,
    # `architecture` reads it: every layer has the window.
    "sliding_window": anything,
}


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    return Architecture(
        family=NAME,
        **shared,
        **read_windows(config, source, by_layer=False),
        rope=read_rope(
            config,
            source,
            head_dim=shared["head_dim"],
            rope_types=("default", "longrope"),
            partial=True,
        ),
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
                # All query heads, then all key heads, then all value heads.
                "model.layers.{layer}.self_attn.qkv_proj.weight": (
                    (heads + 2 * groups) * head_dim,
                    hidden,
                ),
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
            hf={"model.layers.{layer}.mlp.gate_up_proj.weight": (2 * ffn, hidden)},
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
    model_type="phi3",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
)
