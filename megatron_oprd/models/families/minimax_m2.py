"""MiniMax-M2 and M2.x.

Differs from Mixtral in a router of sigmoids with a bias for the choice, in norms over all heads of
the queries and of the keys, and in the rotation of a part of each head. Layers that predict further
tokens are not read, and not exported.
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
    layers_behind_the_last,
    off,
    on,
    read_shared,
)
from megatron_oprd.weights.mapping import QKV, Copy, GatedMLP, Mapping, RowSplit, Vocabulary

NAME = "MiniMaxM2ForCausalLM"

CLASSES = {"AutoConfig": "MiniMaxM2Config", "AutoModelForCausalLM": NAME}


def _full_attention(layers: Any) -> bool:
    """Whether no layer has the linear attention of MiniMax-Text-01."""
    return all(kind == 1 for kind in layers)


def _transformers_own(auto_map: dict[str, Any]) -> bool:
    """Whether the code that the folder brings along is that of transformers' classes."""
    return all(str(path).rpartition(".")[2] == CLASSES.get(k) for k, path in auto_map.items())


FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    "auto_map": _transformers_own,
    # Only other tools write these two.
    "attention_bias": equals(False),
    "qkv_bias": equals(False),
    # Published configurations have these; transformers' class computes with the accepted values
    # only, and does not read them.
    "attn_type_list": _full_attention,
    "layernorm_full_attention_beta": equals(1.0),
    "layernorm_linear_attention_beta": equals(1.0),
    "layernorm_mlp_beta": equals(1.0),
    "qk_norm_type": equals("per_layer"),
    "scoring_func": equals("sigmoid"),
    "shared_intermediate_size": off,
    "use_qk_norm": on,
    "use_routing_bias": on,
    "sliding_window": off,
    # Of parts that the models do not have: an MLP without experts, a shared expert.
    "mlp_intermediate_size": anything,
    "shared_moe_mode": anything,
    # Layers that predict further tokens: `unread`.
    "mtp_transformer_layers": anything,
    "num_mtp_modules": anything,
    "use_mtp": anything,
    # Transformers puts these two among the rotary settings.
    "partial_rotary_factor": anything,
    "rotary_dim": anything,
    # For the load-balancing loss, which distillation does not have.
    "output_router_logits": anything,
    "router_aux_loss_coef": anything,
    # `architecture` reads these; the experts' width is intermediate_size.
    "num_experts_per_tok": anything,
    "num_local_experts": anything,
}


def unread(raw: dict[str, Any]) -> tuple[str, ...]:
    """The layers behind the model's last one, which predict further tokens."""
    return layers_behind_the_last(raw, raw.get("num_mtp_modules") or 0)


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    return Architecture(
        family=NAME,
        **shared,
        rope=read_rope(
            config, source, head_dim=shared["head_dim"], rope_types=ROPE_TYPES, partial=True
        ),
        qk_norm=True,
        qk_norm_over_all_heads=True,
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
        sigmoid_router=True,
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
        Copy(
            megatron="decoder.layers.{layer}.self_attention.q_layernorm.weight",
            hf={"model.layers.{layer}.self_attn.q_norm.weight": (heads * head_dim,)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.self_attention.k_layernorm.weight",
            hf={"model.layers.{layer}.self_attn.k_norm.weight": (groups * head_dim,)},
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.self_attention.linear_proj.weight",
            hf={"model.layers.{layer}.self_attn.o_proj.weight": (hidden, heads * head_dim)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.router.weight",
            hf={"model.layers.{layer}.block_sparse_moe.gate.weight": (experts, hidden)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.router.expert_bias",
            hf={"model.layers.{layer}.block_sparse_moe.e_score_correction_bias": (experts,)},
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
    model_type="minimax_m2",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
    unread=unread,
)
