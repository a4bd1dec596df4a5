"""Checks a Megatron checkpoint's own arguments against its Hugging Face configuration.

Many arguments leave no trace in names and shapes of tensors; with another rotary base, for example,
the model would compute other numbers. The arguments are Megatron-LM's (``args``) or
Megatron-Bridge's (``run_config.yaml``), whose names differ in places.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture

# The supported values of arguments without a counterpart in `Architecture`. An absent argument or
# None passes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope", "yarn"),
    "gated_linear_unit": (True,),
    "squared_relu": (False,),
    "openai_gelu": (False,),
    "qk_l2_norm": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "is_hybrid_model": (False,),
    "mtp_num_layers": (0,),
}
# Supported only if absent or None.
_ABSENT = (
    "linear_attention_freq", "experimental_attention_variant",
    "hybrid_override_pattern", "hybrid_layer_pattern", "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
)  # fmt: skip
_FIXED_MOE: dict[str, tuple[Any, ...]] = {
    "moe_apply_probs_on_input": (False,),
}
_ABSENT_MOE = ("moe_latent_size",)
# Names of functions, by `Activation.function`.
_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "quick_gelu": ("quick_gelu",),
    "gelu_tanh": ("fast_gelu",),
}
# Megatron's constants of llama3 scaling, which are not among its arguments.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def check_arguments(
    folder: str, where: str, arguments: Mapping[str, Any], architecture: Architecture, config: str
) -> None:
    """Refuses a configuration that contradicts the checkpoint's own arguments.

    Raises `UserError` if they disagree, or if the model is of a kind that this package does not
    build. ``where`` is the file of the arguments and ``config`` that of the configuration, for
    messages.
    """
    moe = architecture.moe is not None
    fixed = _FIXED | (_FIXED_MOE if moe else {})
    absent = (*_ABSENT, *(_ABSENT_MOE if moe else ()))
    unlike = [
        name
        for name in (*fixed, *absent)
        if arguments.get(name) not in (None, *fixed.get(name, ()))
    ]
    if unlike := [*unlike, *_of_other_kinds(arguments, architecture)]:
        name = unlike[0]
        raise UserError(
            f"checkpoint {folder}: its {where} says {name} = {arguments.get(name)!r}, which is not "
            "supported here"
        )
    wrong = [
        f"{ours} where its {where} says {name} = {arguments.get(name)!r}"
        for name, ours, agrees in _compared(arguments, architecture)
        if not agrees
    ]
    if wrong:
        raise UserError(
            f"{config} is not the configuration of checkpoint {folder}: {'; '.join(wrong)}; give "
            "the configuration of this model"
        )


def _of_other_kinds(a: Mapping[str, Any], b: Architecture) -> Iterator[str]:
    """Yields unsupported arguments whose supported values follow a rule instead of a list."""
    function = a.get("activation_func")
    if isinstance(function, dict):  # as Megatron-Bridge writes a function
        function = function.get("_target_")
    names = _ACTIVATIONS[b.activation.function]
    if isinstance(function, str) and function.rpartition(".")[2].lower() not in names:
        yield "activation_func"
    latent = b.latent is not None
    if bool(a.get("multi_latent_attention")) != latent:
        yield "multi_latent_attention"
    # Megatron's latent attention has pairs of neighbours, whatever this argument says.
    if (latent or bool(a.get("rotary_interleaved"))) != b.rope.interleaved:
        yield "rotary_interleaved"
    window = a.get("window_size")
    # 0 to the right is causal; otherwise nothing, which the causal mask limits to this.
    if window is not None and tuple(window)[1] not in (-1, 0):
        yield "window_size"
    scale = a.get("softmax_scale")
    ours = b.head_dim**-0.5 if b.softmax_scale is None else b.softmax_scale
    # None is Megatron's default; a checkpoint need not say anything. Latent attention has no such
    # argument, but computes the scale from YaRN's.
    if not latent and not math.isclose(
        b.head_dim**-0.5 if scale is None else scale, ours, rel_tol=1e-6
    ):
        yield "softmax_scale"


def _compared(a: Mapping[str, Any], b: Architecture) -> Iterator[tuple[str, str, bool]]:
    """(argument, the configuration's value as text, whether both agree) of each given argument."""
    grouped = a.get("group_query_attention", True)
    expected: dict[str, tuple[str, Any]] = {
        "num_layers": ("num_hidden_layers", b.num_layers),
        "hidden_size": ("hidden_size", b.hidden_size),
        "num_attention_heads": ("num_attention_heads", b.num_attention_heads),
        "kv_channels": ("head_dim", b.head_dim),
        "rotary_base": ("rope_theta", b.rope.theta),
        "rotary_percent": ("partial_rotary_factor", b.rope.partial_rotary_factor),
        "norm_epsilon": ("rms_norm_eps", b.layernorm_epsilon),
        "layernorm_epsilon": ("rms_norm_eps", b.layernorm_epsilon),
        **dict.fromkeys(
            ("apply_layernorm_1p", "layernorm_zero_centered_gamma"),
            ("norms of 1 + weight", b.zero_centered_norms),
        ),
        "swiglu": ("silu of gates", b.activation.function == "silu"),
        "quick_geglu": ("quick GELU of gates", b.activation.function == "quick_gelu"),
        "glu_linear_offset": ("what is added to ups", b.activation.up_offset),
        "activation_func_clamp_value": ("clamp of gates and ups", b.activation.clamp),
        # Megatron-Bridge's arguments; None there is no statement.
        "attn_logit_softcapping": ("attn_logit_softcapping", b.score_softcap),
        "final_logit_softcapping": ("final_logit_softcapping", b.logits_softcap),
        "softmax_type": (
            "attention sinks",
            "learnable" if b.attention_sinks else "vanilla",
        ),
        "qk_layernorm": ("norms of q and k", b.qk_norm),
        "attention_output_gate": ("gate of attention", b.attention_gate),
        "untie_embeddings_and_output_weights": ("tie_word_embeddings", not b.tied),
        "share_embeddings_and_output_weights": ("tie_word_embeddings", b.tied),
        "use_rope_scaling": ("llama3 rope scaling", b.rope.rope_type == "llama3"),
        "rope_scaling": ("llama3 rope scaling", b.rope.rope_type == "llama3"),
        "position_embedding_type": (
            "rope_type",
            "yarn" if b.rope.rope_type == "yarn" else "rope",
        ),
        **dict.fromkeys(
            ("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor"),
            ("linear rope factor", b.rope.factor if b.rope.rope_type == "linear" else 1),
        ),
        "num_experts": ("experts", None if b.moe is None else b.moe.num_experts),
        "num_moe_experts": ("experts", None if b.moe is None else b.moe.num_experts),
    }
    # Megatron has one option for the biases of all linear layers, and another for q, k and v alone.
    of_all = b.output_bias if b.output_bias == b.mlp_bias else "of one of them only"
    expected["add_bias_linear"] = ("biases of o and of the MLP", of_all)
    if not a.get("add_bias_linear"):
        expected["add_qkv_bias"] = ("biases of q, k and v", b.qkv_bias)
    if b.latent is not None:
        # Heads have no kv_channels; norms of the narrow states are under this name.
        del expected["kv_channels"], expected["position_embedding_type"]
        expected |= _of_latent_attention(b) | {"qk_layernorm": ("norms of narrow states", True)}
    if "window_size" in a:
        # Megatron counts the positions to the left of a token; -1 is unlimited, as is None.
        left, _ = a["window_size"] or (-1, 0)
        window = None if left == -1 else left + 1
        layers = () if window is None else _windows(a)
        yield (
            "window_size",
            f"sliding_window = {b.sliding_window} in layers {_numbers(b.sliding_layers)}",
            (window, layers) == (b.sliding_window, b.sliding_layers),
        )
    if "no_rope_freq" in a:
        every, count = a["no_rope_freq"], b.num_layers
        if isinstance(every, int):
            every = [int(number % every == 0) for number in range(1, count + 1)] if every else None
        without = [int(not rotated) for rotated in b.rotated_layers] or [0] * count
        yield "no_rope_freq", f"layers without rope = {without}", (every or [0] * count) == without
    if grouped:
        expected["num_query_groups"] = ("num_key_value_heads", b.num_query_groups)
    if b.moe is None:
        expected["ffn_hidden_size"] = ("intermediate_size", b.ffn_hidden_size)
    else:
        expected |= {
            "moe_router_topk": ("num_experts_per_tok", b.moe.num_experts_per_token),
            "moe_ffn_hidden_size": ("moe_intermediate_size", b.moe.ffn_hidden_size),
            "moe_router_score_function": (
                "scores of the router",
                "sigmoid" if b.moe.sigmoid_router else "softmax",
            ),
            "moe_router_enable_expert_bias": ("bias of the router", b.moe.sigmoid_router),
            "moe_router_topk_scaling_factor": (
                "routed_scaling_factor",
                b.moe.routed_scaling_factor,
            ),
            "moe_router_num_groups": ("n_group", b.moe.num_groups),
            "moe_router_group_topk": ("topk_group", b.moe.num_groups_per_token),
            "moe_shared_expert_gate": ("gate of the shared expert", b.moe.shared_expert_gate),
            "moe_router_pre_softmax": ("norm_topk_prob = false", not b.moe.norm_topk_prob),
        }
        shared = "moe_shared_expert_intermediate_size"
        width = b.moe.shared_ffn_hidden_size
        # Megatron-LM writes None for none, other tools 0.
        yield shared, f"width of the shared expert = {width}", (a.get(shared) or None) == width
    if b.rope.rope_type == "yarn":
        original = b.rope.original_max_position_embeddings
        expected |= {
            "yarn_rotary_scaling_factor": ("rope factor", b.rope.factor),
            "yarn_original_max_position_embeddings": ("original_max_position_embeddings", original),
            "yarn_beta_fast": ("beta_fast", b.rope.beta_fast),
            "yarn_beta_slow": ("beta_slow", b.rope.beta_slow),
            "yarn_correction_range_round_to_int": ("truncate", b.rope.truncate),
        }
    if a.get("use_rope_scaling") or a.get("rope_scaling"):
        expected["rope_scaling_factor"] = ("rope factor", b.rope.factor)
    for name, (ours, value) in expected.items():
        if a.get(name) is not None:
            yield name, f"{ours} = {value!r}", _same(a[name], value)
    # Megatron's vocab_size may be the tokenizer's, below that of a padded Hugging Face embedding.
    if isinstance(a.get("vocab_size"), int):
        yield "vocab_size", f"vocab_size = {b.vocab_size}", a["vocab_size"] <= b.vocab_size
    scaled = "use_rope_scaling" if a.get("use_rope_scaling") else "rope_scaling"
    if a.get(scaled) and b.rope.rope_type == "llama3":
        for name, value in _LLAMA3.items():
            yield scaled, f"{name} = {getattr(b.rope, name)}", _same(getattr(b.rope, name), value)


def _of_latent_attention(b: Architecture) -> dict[str, tuple[str, Any]]:
    """What `_compared` expects of latent attention's own arguments."""
    latent, rope = b.latent, b.rope
    assert latent is not None
    expected: dict[str, tuple[str, Any]] = {
        "q_lora_rank": ("q_lora_rank", latent.query_rank),
        "kv_lora_rank": ("kv_lora_rank", latent.key_value_rank),
        "qk_head_dim": ("qk_nope_head_dim", latent.unrotated_dim),
        "qk_pos_emb_head_dim": ("qk_rope_head_dim", latent.rotated_dim),
        "v_head_dim": ("v_head_dim", latent.value_dim),
        "rope_type": ("rope_type", "yarn" if rope.rope_type == "yarn" else "rope"),
    }
    if rope.rope_type == "yarn":
        original = rope.original_max_position_embeddings
        expected |= {
            "rotary_scaling_factor": ("rope factor", rope.factor),
            "original_max_position_embeddings": ("original_max_position_embeddings", original),
            "beta_fast": ("beta_fast", rope.beta_fast),
            "beta_slow": ("beta_slow", rope.beta_slow),
        }
    return expected


def _windows(a: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """Whether each layer has the window, as Megatron reads ``window_attn_skip_freq``."""
    every, layers = a.get("window_attn_skip_freq"), a.get("num_layers")
    if isinstance(every, list):
        return tuple(bool(slides) for slides in every)
    if not isinstance(layers, int):
        return None
    return tuple(not every or number % every != 0 for number in range(1, layers + 1))


def _numbers(layers: tuple[bool, ...]) -> list[int]:
    return [number for number, slides in enumerate(layers) if slides]


def _same(found: Any, value: Any) -> bool:
    numbers = isinstance(found, int | float) and isinstance(value, int | float)
    if numbers and not isinstance(found, bool) and not isinstance(value, bool):
        return math.isclose(found, value, rel_tol=1e-6)
    return found == value
