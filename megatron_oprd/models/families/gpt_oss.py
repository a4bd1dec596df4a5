"""gpt-oss-20b and gpt-oss-120b.

Differs from Mixtral in attention sinks, in biases of every linear layer but the head, in windows by
layer, and in the experts' activation: clamped, quick GELU for gates, and ups plus one. Folders have
a layer's experts stacked (`weights.expert_parts`), the published ones in MXFP4 (`weights.mxfp4`).
"""

from typing import Any

from megatron_oprd.models.architecture import (
    ROPE_TYPES,
    Activation,
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
    on,
    read_shared,
    read_windows,
)
from megatron_oprd.weights.mapping import (
    QKV,
    ColumnSplit,
    Copy,
    GatedMLP,
    Mapping,
    RowSplit,
    Vocabulary,
)

NAME = "GptOssForCausalLM"

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    # The table has the biases of q, k, v and o.
    "attention_bias": on,
    # Megatron's quick GELU has this factor.
    "swiglu_alpha": equals(1.702),
    # `architecture` reads these; the experts' width is intermediate_size.
    "sliding_window": anything,
    "layer_types": anything,
    "swiglu_limit": anything,
    "num_experts_per_tok": anything,
    "num_local_experts": anything,
    # Published configurations say again what num_experts_per_tok and the rotary settings say, and
    # transformers' class reads neither.
    "experts_per_token": anything,
    "initial_context_length": anything,
    # For the load-balancing loss, which distillation does not have.
    "output_router_logits": anything,
    "router_aux_loss_coef": anything,
}


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    return Architecture(
        family=NAME,
        **shared,
        **read_windows(config, source, by_layer=True),
        rope=read_rope(config, source, head_dim=shared["head_dim"], rope_types=ROPE_TYPES),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        attention_sinks=True,
        activation=Activation(
            function="quick_gelu", up_offset=1.0, clamp=float(config.swiglu_limit)
        ),
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
    # One after the other over all experts, so that one stack at a time is in memory.
    of_experts: list[Mapping] = [
        GatedMLP(
            megatron="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1.weight",
            hf={"model.layers.{layer}.mlp.experts.gate_up_proj[{expert}]": (2 * ffn, hidden)},
        ),
        GatedMLP(
            megatron="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1.bias",
            hf={"model.layers.{layer}.mlp.experts.gate_up_proj_bias[{expert}]": (2 * ffn,)},
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2.weight",
            hf={"model.layers.{layer}.mlp.experts.down_proj[{expert}]": (hidden, ffn)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2.bias",
            hf={"model.layers.{layer}.mlp.experts.down_proj_bias[{expert}]": (hidden,)},
        ),
    ]
    layer: list[Mapping] = [
        ColumnSplit(
            megatron="decoder.layers.{layer}.self_attention.core_attention.softmax_offset",
            hf={"model.layers.{layer}.self_attn.sinks": (heads,)},
        ),
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
        RowSplit(
            megatron="decoder.layers.{layer}.self_attention.linear_proj.weight",
            hf={"model.layers.{layer}.self_attn.o_proj.weight": (hidden, heads * head_dim)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.self_attention.linear_proj.bias",
            hf={"model.layers.{layer}.self_attn.o_proj.bias": (hidden,)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.router.weight",
            hf={"model.layers.{layer}.mlp.router.weight": (experts, hidden)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.router.bias",
            hf={"model.layers.{layer}.mlp.router.bias": (experts,)},
        ),
        *(one for mapping in of_experts for one in each_expert(moe, [mapping])),
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
    model_type="gpt_oss",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
)
