"""DeepSeek-V3, R1 and V3.1; Kimi K2 and Moonlight, whose classes are copies of DeepSeek-V3's.

Differs from GLM-4.5 in latent attention, whose scores have a factor of YaRN's, in groups of
experts, and in that there are no biases and no norms of heads. The layers that predict further
tokens are not read, and not exported.
"""

import math
from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import (
    Architecture,
    Latent,
    MixtureOfExperts,
    read_rope,
    yarn_stretch,
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
    own_code_of,
    read_groups,
    read_shared,
)
from megatron_oprd.weights.mapping import (
    ColumnSplit,
    Copy,
    GatedMLP,
    Mapping,
    RowSplit,
    Vocabulary,
)

NAME = "DeepseekV3ForCausalLM"

FIELDS: dict[str, Check] = {
    **SHARED_FIELDS,
    "auto_map": own_code_of(
        AutoConfig="DeepseekV3Config", AutoModel="DeepseekV3Model", AutoModelForCausalLM=NAME
    ),
    "attention_bias": off,
    "norm_topk_prob": on,
    # Published configurations have these; transformers' class computes with the accepted values
    # only, and does not read them.
    "moe_layer_freq": equals(1),
    "scoring_func": equals("sigmoid"),
    "topk_method": equals("noaux_tc"),
    # For the load-balancing loss, which distillation does not have; and a layout.
    "aux_loss_alpha": anything,
    "output_router_logits": anything,
    "seq_aux": anything,
    "ep_size": anything,
    # Layers that predict further tokens: `unread`.
    "num_mtp_layers": anything,
    "num_nextn_predict_layers": anything,
    # `architecture` reads these.
    "first_k_dense_replace": anything,
    "kv_lora_rank": anything,
    "moe_intermediate_size": anything,
    "n_group": anything,
    "n_routed_experts": anything,
    "n_shared_experts": anything,
    "num_experts_per_tok": anything,
    "num_local_experts": anything,
    "q_lora_rank": anything,
    "qk_head_dim": anything,
    "qk_nope_head_dim": anything,
    "qk_rope_head_dim": anything,
    "rope_interleave": anything,
    "routed_scaling_factor": anything,
    "topk_group": anything,
    "v_head_dim": anything,
}


def unread(raw: dict[str, Any]) -> tuple[str, ...]:
    """The layers behind the model's last one, which predict further tokens."""
    # Two names; transformers' class has one such layer where the file has neither.
    given = [raw.get(name) for name in ("num_nextn_predict_layers", "num_mtp_layers")]
    count = next((number for number in given if number is not None), 1)
    return layers_behind_the_last(raw, count)


def architecture(config: Any, source: str) -> Architecture:
    """Translates a transformers configuration object."""
    shared = read_shared(config, source)
    latent = _latent(config, source)
    shared["head_dim"] = head_dim = latent.unrotated_dim + latent.rotated_dim
    return Architecture(
        family=NAME,
        **shared,
        latent=latent,
        rope=read_rope(
            config,
            source,
            head_dim=latent.rotated_dim,
            rope_types=("default", "yarn"),
            interleaved=bool(config.rope_interleave),
        ),
        softmax_scale=_yarn_scale(config) / math.sqrt(head_dim),
        moe=_mixture_of_experts(config, source),
    )


def _latent(config: Any, source: str) -> Latent:
    unrotated, rotated = config.qk_nope_head_dim, config.qk_rope_head_dim
    # The class computes these two, but takes them from the file where they are there.
    for name, computed, of in (
        ("head_dim", rotated, "qk_rope_head_dim"),
        ("qk_head_dim", unrotated + rotated, "qk_nope_head_dim + qk_rope_head_dim"),
        ("num_key_value_heads", config.num_attention_heads, "num_attention_heads"),
    ):
        if (found := getattr(config, name)) != computed:
            raise UserError(f"{source}: {name} = {found} has to be {of} = {computed}")
    return Latent(
        query_rank=config.q_lora_rank,
        key_value_rank=config.kv_lora_rank,
        unrotated_dim=unrotated,
        rotated_dim=rotated,
        value_dim=config.v_head_dim,
        # Transformers' class gives these norms no rms_norm_eps, so that they have its norm's own.
        norm_epsilon=1e-6,
    )


def _yarn_scale(config: Any) -> float:
    """The factor on attention's scores: YaRN's on cosine and sine may be 1 for its sake."""
    rope = config.rope_parameters
    # Without the field, and with 0, there is none.
    if rope.get("rope_type") != "yarn" or not rope.get("mscale_all_dim"):
        return 1.0
    return yarn_stretch(rope["factor"], rope["mscale_all_dim"]) ** 2


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
    heads, moe, latent = a.num_attention_heads, a.moe, a.latent
    assert moe is not None
    assert latent is not None
    experts, ffn, shared = moe.num_experts, moe.ffn_hidden_size, moe.shared_ffn_hidden_size
    assert shared is not None
    query, rank = heads * a.head_dim, latent.key_value_rank
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
    if latent.query_rank is None:
        queries: list[Mapping] = [
            ColumnSplit(
                megatron="decoder.layers.{layer}.self_attention.linear_q_proj.weight",
                hf={"model.layers.{layer}.self_attn.q_proj.weight": (query, hidden)},
            ),
        ]
    else:
        width = latent.query_rank
        queries = [
            Copy(
                megatron="decoder.layers.{layer}.self_attention.linear_q_down_proj.weight",
                hf={"model.layers.{layer}.self_attn.q_a_proj.weight": (width, hidden)},
            ),
            Copy(
                megatron="decoder.layers.{layer}.self_attention.linear_q_up_proj.layer_norm_weight",
                hf={"model.layers.{layer}.self_attn.q_a_layernorm.weight": (width,)},
            ),
            ColumnSplit(
                megatron="decoder.layers.{layer}.self_attention.linear_q_up_proj.weight",
                hf={"model.layers.{layer}.self_attn.q_b_proj.weight": (query, width)},
            ),
        ]
    attention: list[Mapping] = [
        Copy(
            megatron="decoder.layers.{layer}.input_layernorm.weight",
            hf={"model.layers.{layer}.input_layernorm.weight": (hidden,)},
        ),
        *queries,
        Copy(
            megatron="decoder.layers.{layer}.self_attention.linear_kv_down_proj.weight",
            hf={
                "model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight": (
                    rank + latent.rotated_dim,
                    hidden,
                )
            },
        ),
        Copy(
            megatron="decoder.layers.{layer}.self_attention.linear_kv_up_proj.layer_norm_weight",
            hf={"model.layers.{layer}.self_attn.kv_a_layernorm.weight": (rank,)},
        ),
        ColumnSplit(
            megatron="decoder.layers.{layer}.self_attention.linear_kv_up_proj.weight",
            hf={
                "model.layers.{layer}.self_attn.kv_b_proj.weight": (
                    heads * (latent.unrotated_dim + latent.value_dim),
                    rank,
                )
            },
        ),
        RowSplit(
            megatron="decoder.layers.{layer}.self_attention.linear_proj.weight",
            hf={"model.layers.{layer}.self_attn.o_proj.weight": (hidden, heads * latent.value_dim)},
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
    model_type="deepseek_v3",
    fields=FIELDS,
    architecture=architecture,
    mappings=mappings,
    unread=unread,
    other_model_types=("kimi_k2",),
)
