"""Mixtral 8x7B and 8x22B.

Differs from Mistral in the router and the experts, whose probabilities sum to one.
"""

from typing import Any

from megatron_oprd.models.architecture import (
    ROPE_TYPES,
    Architecture,
    MixtureOfExperts,
    read_rope,
)
from megatron_oprd.models.families.decoder import (
    SHARED_FIELDS,
    Check,
    Family,
    anything,
    check_experts,
    each_expert,
    each_layer,
    equals,
    read_shared,
    read_windows,
)
from megatron_oprd.weights.mapping import QKV, Copy, GatedMLP, Mapping, RowSplit, Vocabulary

NAME = "MixtralForCausalLM"

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    # Only other tools write these two.
    "qkv_bias": equals(False),
    "use_qk_norm": equals(False),
    # `architecture` reads it: every layer has the window.
    "sliding_window": anything,
    # For the load-balancing loss, which distillation does not have.
    "output_router_logits": anything,
    "router_aux_loss_coef": anything,
    # `architecture` reads these; the experts' width is intermediate_size.
    "num_experts_per_tok": anything,
    "num_local_experts": anything,
}


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    return Architecture(
        family=NAME,
        **shared,
        **read_windows(config, source, by_layer=False),
        rope=read_rope(config, source, head_dim=shared["head_dim"], rope_types=ROPE_TYPES),
        moe=_mixture_of_experts(config, source),
    )


def _mixture_of_experts(config: Any, source: str) -> MixtureOfExperts:
    experts, chosen = config.num_local_experts, config.num_experts_per_tok
    check_experts(experts, chosen, source, field="num_local_experts")
    return MixtureOfExperts(
        num_experts=experts,
        num_experts_per_token=chosen,
        ffn_hidden_size=config.intermediate_size,
        norm_topk_prob=True,
    )


def mappings(a: Architecture, padded_vocab_size: int) -> list[Mapping]:
    """The table: Megatron's parameters, and the tensors on disk that each is made of."""
    hidden, vocab = a.hidden_size, a.vocab_size
    heads, groups, head_dim = a.num_attention_heads, a.num_query_groups, a.head_dim
    moe = a.moe
    assert moe is not None
    experts, ffn = moe.num_experts, moe.ffn_hidden_size
    embedding = Vocabulary(
        megatron="embedding.word_embeddings.weight",
        hf={"model.embed_tokens.weight": (vocab, hidden)},
        padded_vocab_size=padded_vocab_size,
    )
    expert: list[Mapping] = [
        GatedMLP(
            megatron="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1.weight",
            hf={
                "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight": (ffn, hidden),
                "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight": (ffn, hidden),
            },
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2.weight",
            hf={"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight": (hidden, ffn)},
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
        Copy(
            megatron="decoder.layers.{layer}.mlp.router.weight",
            hf={"model.layers.{layer}.block_sparse_moe.gate.weight": (experts, hidden)},
        ),
        *each_expert(moe, expert),
        # Transformer Engine fuses this norm into a dense MLP's first layer, not into the
        # experts': it has a name of its own here.
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
    return [embedding, *each_layer(a, layer), final_norm, *([] if a.tied else [head])]


FAMILY = Family(
    name=NAME,
    model_type="mixtral",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
)
