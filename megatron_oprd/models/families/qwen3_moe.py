"""Qwen3 with a mixture of experts in every layer, as in Qwen3-30B-A3B.

Differs from Qwen3 in the router and the experts. transformers 4 writes ``num_experts``,
transformers 5 ``num_local_experts``; in both the checkpoint's tensors are one for each expert.
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
    each_expert,
    each_layer,
    equals,
    off,
    read_experts,
    read_shared,
    read_windows,
)
from megatron_oprd.weights.mapping import QKV, Copy, GatedMLP, Mapping, RowSplit, Vocabulary

NAME = "Qwen3MoeForCausalLM"

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    # `architecture` reads it: biases of q, k, v and o.
    "attention_bias": anything,
    # Only other tools write these two.
    "qkv_bias": equals(False),
    "use_qk_norm": equals(True),
    # `architecture` reads these: with use_sliding_window every layer has the window.
    "sliding_window": anything,
    "use_sliding_window": anything,
    # Other values give some layers a dense MLP.
    "decoder_sparse_step": equals(1),
    "mlp_only_layers": off,
    # For the load-balancing loss, which distillation does not have.
    "output_router_logits": anything,
    "router_aux_loss_coef": anything,
    # `architecture` reads these.
    "moe_intermediate_size": anything,
    "norm_topk_prob": anything,
    "num_experts": anything,
    "num_experts_per_tok": anything,
    "num_local_experts": anything,
}


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    return Architecture(
        family=NAME,
        **shared,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        **read_windows(config, source, by_layer=False),
        rope=read_rope(config, source, head_dim=shared["head_dim"], rope_types=ROPE_TYPES),
        qk_norm=True,
        moe=MixtureOfExperts(**read_experts(config, source)),
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
                "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": (ffn, hidden),
                "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": (ffn, hidden),
            },
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2.weight",
            hf={"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": (hidden, ffn)},
        ),
    ]
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
        *(attention_biases if a.output_bias else []),
        Copy(
            megatron="decoder.layers.{layer}.mlp.router.weight",
            hf={"model.layers.{layer}.mlp.gate.weight": (experts, hidden)},
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
    model_type="qwen3_moe",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
)
