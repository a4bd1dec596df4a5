"""GLM-4.5 and GLM-4.5-Air, GLM-4.6, GLM-4.7.

Differs from Qwen2-MoE in first layers without experts, in a router of sigmoids with a bias for the
choice, in the rotation of half of each head, and in a shared expert without a gate. The layers that
predict further tokens are not read, and not exported.
"""

from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture, MixtureOfExperts, read_rope
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
    on,
    read_groups,
    read_shared,
)
from megatron_oprd.weights.mapping import QKV, Copy, GatedMLP, Mapping, RowSplit, Vocabulary

NAME = "Glm4MoeForCausalLM"

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    # Only other tools write this.
    "qkv_bias": equals(False),
    # Transformers puts it among the rotary settings.
    "partial_rotary_factor": anything,
    # Otherwise probabilities stay as they are: Megatron always normalises sigmoids.
    "norm_topk_prob": on,
    # For the load-balancing loss, which distillation does not have.
    "output_router_logits": anything,
    # Layers that predict further tokens: `unread`.
    "num_mtp_layers": anything,
    "num_nextn_predict_layers": anything,
    # `architecture` reads these.
    "attention_bias": anything,
    "use_qk_norm": anything,
    "first_k_dense_replace": anything,
    "moe_intermediate_size": anything,
    "n_group": anything,
    "n_routed_experts": anything,
    "n_shared_experts": anything,
    "num_experts_per_tok": anything,
    "num_local_experts": anything,
    "routed_scaling_factor": anything,
    "topk_group": anything,
}


def unread(raw: dict[str, Any]) -> tuple[str, ...]:
    """The layers behind the model's last one, which predict further tokens."""
    # The old name, then transformers' own; its class has one such layer where the file has neither.
    given = [raw.get(name) for name in ("num_nextn_predict_layers", "num_mtp_layers")]
    count = next((number for number in given if number is not None), 1)
    return layers_behind_the_last(raw, count)


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    return Architecture(
        family=NAME,
        **shared,
        rope=read_rope(
            config,
            source,
            head_dim=shared["head_dim"],
            rope_types=("default", "yarn"),
            partial=True,
        ),
        qkv_bias=config.attention_bias,
        qk_norm=config.use_qk_norm,
        moe=_mixture_of_experts(config, source),
    )


def _mixture_of_experts(config: Any, source: str) -> MixtureOfExperts:
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    check_experts(experts, chosen, source, field="n_routed_experts")
    if config.n_shared_experts < 1:
        raise UserError(
            f"{source}: n_shared_experts = {config.n_shared_experts} has to be at least 1"
        )
    if not 0 <= config.first_k_dense_replace < config.num_hidden_layers:
        raise UserError(
            f"{source}: first_k_dense_replace = {config.first_k_dense_replace} has to be from 0 to "
            f"{config.num_hidden_layers - 1}, so that the last layer has experts"
        )
    num_groups, num_groups_per_token = read_groups(config, source)
    return MixtureOfExperts(
        num_experts=experts,
        num_experts_per_token=chosen,
        ffn_hidden_size=config.moe_intermediate_size,
        norm_topk_prob=True,
        # One MLP of their widths together.
        shared_ffn_hidden_size=config.n_shared_experts * config.moe_intermediate_size,
        sigmoid_router=True,
        routed_scaling_factor=float(config.routed_scaling_factor),
        first_dense_layers=config.first_k_dense_replace,
        num_groups=num_groups,
        num_groups_per_token=num_groups_per_token,
    )


def mappings(a: Architecture, padded_vocab_size: int) -> list[Mapping]:
    """The table: Megatron's parameters, and the tensors on disk that each is made of."""
    hidden, vocab, dense_ffn = a.hidden_size, a.vocab_size, a.ffn_hidden_size
    heads, groups, head_dim = a.num_attention_heads, a.num_query_groups, a.head_dim
    moe = a.moe
    assert moe is not None
    experts, ffn, shared = moe.num_experts, moe.ffn_hidden_size, moe.shared_ffn_hidden_size
    assert shared is not None
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
    biases: list[Mapping] = [
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
    ]
    norms: list[Mapping] = [
        Copy(
            megatron="decoder.layers.{layer}.self_attention.q_layernorm.weight",
            hf={"model.layers.{layer}.self_attn.q_norm.weight": (head_dim,)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.self_attention.k_layernorm.weight",
            hf={"model.layers.{layer}.self_attn.k_norm.weight": (head_dim,)},
        ),
    ]
    attention: list[Mapping] = [
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
        *(biases if a.qkv_bias else []),
        *(norms if a.qk_norm else []),
        RowSplit(
            megatron="decoder.layers.{layer}.self_attention.linear_proj.weight",
            hf={"model.layers.{layer}.self_attn.o_proj.weight": (hidden, heads * head_dim)},
        ),
    ]
    dense: list[Mapping] = [
        *attention,
        GatedMLP(
            megatron="decoder.layers.{layer}.mlp.linear_fc1.weight",
            hf={
                "model.layers.{layer}.mlp.gate_proj.weight": (dense_ffn, hidden),
                "model.layers.{layer}.mlp.up_proj.weight": (dense_ffn, hidden),
            },
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.mlp.linear_fc2.weight",
            hf={"model.layers.{layer}.mlp.down_proj.weight": (hidden, dense_ffn)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
            hf={"model.layers.{layer}.post_attention_layernorm.weight": (hidden,)},
        ),
    ]
    sparse: list[Mapping] = [
        *attention,
        Copy(
            megatron="decoder.layers.{layer}.mlp.router.weight",
            hf={"model.layers.{layer}.mlp.gate.weight": (experts, hidden)},
        ),
        Copy(
            megatron="decoder.layers.{layer}.mlp.router.expert_bias",
            hf={"model.layers.{layer}.mlp.gate.e_score_correction_bias": (experts,)},
        ),
        *each_expert(moe, expert),
        GatedMLP(
            megatron="decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight",
            hf={
                "model.layers.{layer}.mlp.shared_experts.gate_proj.weight": (shared, hidden),
                "model.layers.{layer}.mlp.shared_experts.up_proj.weight": (shared, hidden),
            },
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.mlp.shared_experts.linear_fc2.weight",
            hf={"model.layers.{layer}.mlp.shared_experts.down_proj.weight": (hidden, shared)},
        ),
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
    first = moe.first_dense_layers
    return [
        embedding,
        *each_layer(a, dense, layers=range(first)),
        *each_layer(a, sparse, layers=range(first, a.num_layers)),
        final_norm,
        *([] if a.tied else [head]),
    ]


FAMILY = Family(
    name=NAME,
    model_type="glm4_moe",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
    unread=unread,
)
