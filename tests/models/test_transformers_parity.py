"""Loaded models compute what transformers' own models compute, in every layout."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from tests.helpers.closeness import assert_close_relative
from tests.helpers.ranks import ROOT, run_ranks
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config, with_vision

TOLERANCE = 1e-4
MAX_SEQUENCE_LENGTH = 64
SMOLLM2 = ROOT / ".cache/smollm2/SmolLM2-135M-Instruct"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# With an original length of 64 every sequence here is short, with one of 2 every one is long.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.2, 4.0, 20.0],
}
# Sequences are longer than this original length, or shorter.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    # Biases of all linear layers but the head, of some of them.
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "granite_biased": ("granite", {"attention_bias": False, "mlp_bias": True}),
    "smollm3_biased": ("smollm3", {"attention_bias": True, "mlp_bias": False}),
    "seed_oss_biased": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "qwen3_biased": ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    "olmo2_biased": ("olmo2", {"attention_bias": True}),
    "olmo3_biased": ("olmo3", {"attention_bias": True}),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    ),
    # The longest sequence here is as long as the rotation stays the same.
    "llama_dynamic": (
        "llama",
        {
            "max_position_embeddings": 40,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "qwen3_yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen2_yarn": (
        "qwen2",
        {
            "rope_parameters": YARN
            | {"beta_fast": 4, "beta_slow": 0.5, "mscale": 2.0, "mscale_all_dim": 0.5}
            | {"truncate": False},
        },
    ),
    # The first two layers look at everything.
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    ),
    "qwen3_window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full")],
            "rope_parameters": YARN | {"attention_factor": 0.9},
        },
    ),
    # Fewer key/value heads than tensor-parallel ranks.
    "llama_one_group": ("llama", {"num_key_value_heads": 1}),
    # A window as long as the longest sequence has no effect.
    "mistral": ("mistral", {"sliding_window": 256}),
    "mistral_window": ("mistral", {"sliding_window": 5}),
    # Decoders of models with vision.
    "vision_gemma3": ("gemma3_text", {"tie_word_embeddings": True}),
    "mistral3": ("mistral", {"sliding_window": 6}),
    "mistral3_tied": ("mistral", {"tie_word_embeddings": True}),
    "mistral3_ministral3": ("ministral3", {}),
    "ministral3": ("ministral3", {"sliding_window": 7, "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "phi3_window": ("phi3", {"sliding_window": 6}),
    "phi3_short": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": MAX_SEQUENCE_LENGTH},
    ),
    "phi3_long_tied": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "seed_oss": ("seed_oss", {}),
    "granite": ("granite", {"num_key_value_heads": 1}),
    "granite_tied": ("granite", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "olmo2": ("olmo2", {"rope_parameters": YARN}),
    # One key head for all ranks.
    "olmo2_one_group": ("olmo2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    # Only the last layer has YaRN.
    "olmo3": ("olmo3", {}),
    # Another base in layers with a window.
    "olmo3_bases": (
        "olmo3",
        {
            "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full")],
            "rope_parameters": {
                "full_attention": LLAMA3_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "gemma2": ("gemma2", {}),
    # One key head for all ranks, biases; layers with a window alone, and no cap on scores.
    "gemma2_biased_tied": (
        "gemma2",
        {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True}
        | {"layer_types": ["sliding_attention"] * 4, "attn_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", {"final_logit_softcapping": 2.5}),
    # One key head for all ranks, biases, a pattern in the place of layer_types.
    "gemma3_biased_tied": (
        "gemma3_text",
        {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True}
        | {"layer_types": None, "sliding_window_pattern": 2},
    ),
    "glm4": ("glm4", {"attention_bias": True}),
    "glm4_yarn": (
        "glm4",
        {"attention_bias": False, "rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    ),
    # The third layer looks at everything, and is not rotated.
    "exaone4": (
        "exaone4",
        {
            "sliding_window": 5,
            "layer_types": [f"{k}_attention" for k in ("sliding", "sliding", "full", "sliding")],
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "exaone4_full": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    ),
    # Layers 1 and 3 are not rotated.
    "smollm3": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "glm4_moe": ("glm4_moe", {"attention_bias": True, "n_group": 2}),
    "glm4_moe_normed": (
        "glm4_moe",
        {
            "use_qk_norm": True,
            "first_k_dense_replace": 2,
            "num_experts_per_tok": 3,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
        },
    ),
    # YaRN's factor is on the scores, and not on cosine and sine.
    "deepseek_v3_moe": (
        "deepseek_v3",
        {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 2.0}},
    ),
    # Queries without a narrow state, halves rotated in the place of neighbours; no groups. The
    # norms of narrow states have not this epsilon.
    "deepseek_v3_moe_plain": (
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "rms_norm_eps": 1e-2,
            "rope_interleave": False,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 2,
            "rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
        },
    ),
    "gpt_oss_moe": ("gpt_oss", {}),
    # One key head for all ranks, and no limit that anything reaches.
    "gpt_oss_moe_tied": (
        "gpt_oss",
        {"num_key_value_heads": 1, "swiglu_limit": 700.0, "tie_word_embeddings": True},
    ),
    "minimax_m2_moe": ("minimax_m2", {}),
    # One key head for all ranks; three experts for each token.
    "minimax_m2_moe_yarn": (
        "minimax_m2",
        {
            "num_key_value_heads": 1,
            "num_experts_per_tok": 3,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.25},
        },
    ),
    "mixtral_moe": ("mixtral", {"sliding_window": 6}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe_normed": (
        "qwen2_moe",
        {"qkv_bias": False, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen3_next_moe": ("qwen3_next", {}),
    # One key head for all ranks; probabilities as they are.
    "qwen3_next_moe_raw": (
        "qwen3_next",
        {
            "num_key_value_heads": 1,
            "norm_topk_prob": False,
            "layer_types": [f"{kind}_attention" for kind in ("full", "linear", "full", "linear")],
            "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
        },
    ),
    # Linear attention's projections of the input apart; dense, and with experts.
    "vision_qwen3_5": ("qwen3_5_text", {}),
    "vision_qwen3_5_moe": (
        "qwen3_5_moe_text",
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        },
    ),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe_biased": ("qwen3_moe", {"attention_bias": True}),
    "qwen3_moe_window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}),
    "qwen3_moe_raw_tied": (
        "qwen3_moe",
        {"norm_topk_prob": False, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    ),
}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SP, VPP2 = {"sequence_parallel": True}, {"virtual_pipeline_model_parallel_size": 2}
# name: (ranks, parallel settings)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, TP2),
    "tp2_sp": (2, TP2 | SP),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, PP2 | VPP2),
    "tp2_pp2": (4, TP2 | PP2),
}
EP2, ETP1 = {"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 1}
# Expert parallelism over data-parallel ranks, over tensor-parallel ranks (ETP 1), and over both.
MOE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, EP2),
    "tp2_sp_etp1": (2, TP2 | SP | ETP1),
    "tp2_sp_etp1_ep2": (2, TP2 | SP | ETP1 | EP2),
    "etp2": (2, {"expert_tensor_parallel_size": 2}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "ep2_pp2": (4, EP2 | PP2),
    "ep2_pp2_vpp2": (4, EP2 | PP2 | VPP2),
    "tp2_sp_ep2": (4, TP2 | SP | EP2),
    "tp2_sp_etp1_ep4": (4, TP2 | SP | ETP1 | {"expert_model_parallel_size": 4}),
    "tp2_sp_pp2_etp1_ep2": (4, TP2 | SP | PP2 | ETP1 | EP2),
}
ALL_LAYOUTS = LAYOUTS | MOE_LAYOUTS
# What differs does not depend on the layout, or on the layer's number only.
FEW_LAYOUTS = {
    "gemma2": ("tp1", "tp2_sp", "pp2_vpp2"),
    "gemma2_biased_tied": ("tp1", "tp2"),
    "gemma3": ("tp1", "tp2_sp", "pp2_vpp2"),
    "gemma3_biased_tied": ("tp1", "tp2_sp"),
    "vision_gemma3": ("tp1", "pp2"),
    "llama_biased": ("tp1", "tp2", "tp2_sp", "pp2_vpp2"),
    **dict.fromkeys(("granite_biased", "smollm3_biased", "seed_oss_biased"), ("tp1", "tp2_sp")),
    **dict.fromkeys(("qwen3_biased", "olmo2_biased"), ("tp1", "tp2_sp")),
    "olmo3_biased": ("tp2",),
    **dict.fromkeys(
        ("llama_linear", "qwen3_yarn", "qwen2_yarn", "mistral_window"), ("tp1", "tp2", "pp2")
    ),
    "llama_dynamic": ("tp1", "pp2"),
    "mistral3": ("tp1", "tp2_sp", "pp2_vpp2"),
    "mistral3_tied": ("tp1", "pp2"),
    "mistral3_ministral3": ("tp1", "tp2"),
    "ministral3": ("tp1", "pp2"),
    "phi3_window": ("tp1",),
    "qwen2_window": ("tp1", "pp2_vpp2"),
    "qwen3_window": ("tp2_sp", "pp2", "tp2_pp2"),
    "vision_qwen3_5": ("tp1", "tp2_pp2", "tp2_sp"),
    "seed_oss": ("tp1", "tp2_sp", "pp2"),
    "granite": ("tp1", "tp2_sp", "pp2_vpp2"),
    "granite_tied": ("tp1", "pp2"),
    "olmo2": ("tp1", "tp2", "tp2_sp", "pp2_vpp2"),
    "olmo2_one_group": ("tp1", "tp2_sp"),
    "olmo3": ("tp1", "tp2_sp", "pp2_vpp2"),
    "olmo3_bases": ("tp1", "pp2"),
    "glm4": ("tp1", "tp2_sp", "pp2"),
    "glm4_yarn": ("tp1", "tp2"),
    "exaone4": ("tp1", "tp2_sp", "pp2_vpp2"),
    "exaone4_full": ("tp1",),
    "smollm3": ("tp1", "tp2", "pp2", "pp2_vpp2"),
}
COMBINATIONS = [
    *(
        (model, layout)
        for model in MODELS
        if "moe" not in model
        for layout in FEW_LAYOUTS.get(model, LAYOUTS)
    ),
    ("qwen3_moe_window", "tp1"),
    ("qwen3_moe_biased", "tp2_sp_ep2"),
    *(("glm4_moe", layout) for layout in ("tp1", "tp2_sp_ep2", "ep2_pp2_vpp2")),
    *(("glm4_moe_normed", layout) for layout in ("tp1", "ep2_pp2")),
    *(
        ("deepseek_v3_moe", layout)
        for layout in ("tp1", "tp2_pp2", "ep2_pp2_vpp2", "tp2_sp_etp1_ep2")
    ),
    *(("deepseek_v3_moe_plain", layout) for layout in ("tp1", "tp2_sp_etp1")),
    *(("gpt_oss_moe", layout) for layout in ("tp1", "tp2_sp_etp1", "ep2_pp2_vpp2")),
    *(("gpt_oss_moe", layout) for layout in ("tp2_sp_pp2_etp1_ep2", "ep4", "tp2_sp_etp1_ep2")),
    *(("gpt_oss_moe_tied", layout) for layout in ("tp1", "tp2_sp_etp1")),
    *(("minimax_m2_moe", layout) for layout in ("tp1", "tp2_sp_ep2", "ep2_pp2_vpp2")),
    *(("minimax_m2_moe_yarn", layout) for layout in ("tp1", "tp2_sp_etp1")),
    *(("mixtral_moe", layout) for layout in ("tp1", "ep2_pp2")),
    *(("qwen2_moe", layout) for layout in ("tp1", "tp2_sp_ep2", "ep2_pp2_vpp2")),
    *(("qwen2_moe_normed", layout) for layout in ("tp1", "tp2_sp_etp1")),
    *(
        ("qwen3_next_moe", layout)
        for layout in ("tp1", "tp2_pp2", "ep2_pp2_vpp2", "tp2_sp_etp1_ep2")
    ),
    *(("qwen3_next_moe_raw", layout) for layout in ("tp1", "tp2_sp_etp1")),
    *(("vision_qwen3_5_moe", layout) for layout in ("ep2_pp2_vpp2", "tp2_sp_etp1", "tp1")),
    *(("qwen3_moe", layout) for layout in ALL_LAYOUTS),
    *(("qwen3_moe_raw_tied", layout) for layout in ("tp1", "ep2_pp2", "tp2_sp_etp1_ep2")),
]
# Left to the nightly run: of most models the layouts but the last.
WHOLE = ("llama",)
NIGHTLY = {
    (model, layout)
    for model, layout in COMBINATIONS
    if model not in WHOLE and layout != dict(COMBINATIONS)[model]
}
# Models whose loading mistakes are not left to the nightly run.
MISTAKEN = ("llama", "llama_tied", "qwen2", "qwen3_tied", "qwen3_moe", "phi3", "glm4_moe")
# (mistake, model): (first layer whose output is wrong, tensors that the export finds changed).
# The mistakes are made in layer 1; layer 4 stands for the final norm.
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
QKV = {f"{ATTENTION}.{part}_proj.weight" for part in "qkv"}
NORM = "decoder.layers.1"
BIAS = ("", "_bias")
MISTAKES: dict[tuple[str, str], tuple[int, set[str]]] = {
    ("swapped_kv", "llama"): (1, QKV - {f"{ATTENTION}.q_proj.weight"}),
    ("swapped_kv", "qwen3_tied"): (1, QKV - {f"{ATTENTION}.q_proj.weight"}),
    ("flat_qkv", "llama"): (1, QKV),
    ("flat_qkv", "qwen3_tied"): (1, QKV),
    ("flat_qkv_bias", "qwen2"): (1, {f"{ATTENTION}.{part}_proj.bias" for part in "qkv"}),
    ("swapped_gate_up", "llama"): (1, {f"{MLP}.{part}_proj.weight" for part in ("gate", "up")}),
    ("shifted_embedding", "llama"): (0, {"model.embed_tokens.weight"}),
    ("shifted_embedding", "llama_tied"): (0, {"model.embed_tokens.weight"}),
    (f"missing {NORM}.self_attention.linear_qkv.layer_norm_weight", "llama"): (
        1,
        {"model.layers.1.input_layernorm.weight"},
    ),
    (f"missing {NORM}.mlp.linear_fc1.layer_norm_weight", "llama"): (
        1,
        {"model.layers.1.post_attention_layernorm.weight"},
    ),
    (f"missing {NORM}.self_attention.q_layernorm.weight", "qwen3_tied"): (
        1,
        {f"{ATTENTION}.q_norm.weight"},
    ),
    (f"missing {NORM}.self_attention.k_layernorm.weight", "qwen3_tied"): (
        1,
        {f"{ATTENTION}.k_norm.weight"},
    ),
    ("missing decoder.final_layernorm.weight", "llama"): (4, {"model.norm.weight"}),
    ("unscaled_rope", "llama3_rope"): (0, set()),
    ("other_rope_theta", "llama"): (0, set()),
    ("other_rope_theta", "mistral"): (0, set()),
    ("unscaled_rope", "phi3_long_tied"): (0, set()),
    ("longer_window", "mistral_window"): (1, set()),
    ("longer_window", "mistral3"): (1, set()),
    ("no_attention_factor", "mistral3_ministral3"): (0, set()),
    ("longer_window", "qwen3_window"): (1, set()),
    ("all_rotated", "smollm3"): (1, set()),
    ("flat_qkv_bias", "seed_oss"): (1, {f"{ATTENTION}.{part}_proj.bias" for part in "qkv"}),
    ("unscaled_rope", "llama_linear"): (0, set()),
    ("unscaled_rope", "qwen3_yarn"): (0, set()),
    ("no_attention_factor", "qwen3_yarn"): (0, set()),
    ("no_attention_factor", "qwen2_yarn"): (0, set()),
    ("full_rotary", "phi3_short"): (0, set()),
    ("no_attention_factor", "phi3_short"): (0, set()),
    ("no_attention_factor", "phi3_long_tied"): (0, set()),
    ("flat_qkv", "phi3"): (1, {f"{ATTENTION}.qkv_proj.weight"}),
    ("swapped_gate_up", "phi3"): (1, {f"{MLP}.gate_up_proj.weight"}),
    ("permuted_experts", "qwen3_moe"): (
        1,
        {
            f"{MLP}.experts.{expert}.{part}_proj.weight"
            for expert in range(8)
            for part in ("gate", "up", "down")
        },
    ),
    (f"missing {NORM}.self_attention.q_layernorm.weight", "olmo2"): (
        1,
        {f"{ATTENTION}.q_norm.weight"},
    ),
    (f"missing {NORM}.self_attention.linear_proj.post_layernorm.weight", "olmo2"): (
        1,
        {"model.layers.1.post_attention_layernorm.weight"},
    ),
    # Norms of 1 + weight: 2 in the place of the weight's.
    (f"missing {NORM}.self_attention.q_layernorm.weight", "gemma3"): (
        1,
        {f"{ATTENTION}.q_norm.weight"},
    ),
    (f"missing {NORM}.mlp.linear_fc1.layer_norm_weight", "gemma3"): (
        1,
        {"model.layers.1.pre_feedforward_layernorm.weight"},
    ),
    ("longer_window", "gemma3"): (1, set()),
    ("unscaled_embedding", "gemma3"): (0, set()),
    ("no_softcap", "gemma2"): (1, set()),
    (f"missing {NORM}.mlp.linear_fc2.post_layernorm.weight", "glm4"): (
        1,
        {"model.layers.1.post_mlp_layernorm.weight"},
    ),
    # Ones in the place of the bias: the choice is as without it.
    (f"missing {NORM}.mlp.router.expert_bias", "glm4_moe"): (
        1,
        {f"{MLP}.gate.e_score_correction_bias"},
    ),
    (f"missing {NORM}.self_attention.linear_kv_up_proj.layer_norm_weight", "deepseek_v3_moe"): (
        1,
        {f"{ATTENTION}.kv_a_layernorm.weight"},
    ),
    (f"missing {NORM}.mlp.router.expert_bias", "minimax_m2_moe"): (
        1,
        {"model.layers.1.block_sparse_moe.e_score_correction_bias"},
    ),
    (f"missing {NORM}.self_attention.k_layernorm.weight", "minimax_m2_moe"): (
        1,
        {f"{ATTENTION}.k_norm.weight"},
    ),
    ("full_rotary", "minimax_m2_moe"): (0, set()),
    # Ones in the place of the sinks and of one expert's biases.
    (f"missing {NORM}.self_attention.core_attention.softmax_offset", "gpt_oss_moe"): (
        1,
        {f"{ATTENTION}.sinks"},
    ),
    (f"missing {NORM}.self_attention.linear_proj.bias", "llama_biased"): (
        1,
        {f"{ATTENTION}.o_proj.bias"},
    ),
    (f"missing {NORM}.mlp.linear_fc1.bias", "llama_biased"): (
        1,
        {f"{MLP}.{part}_proj.bias" for part in ("gate", "up")},
    ),
    (f"missing {NORM}.mlp.linear_fc2.bias", "granite_biased"): (1, {f"{MLP}.down_proj.bias"}),
    (f"missing {NORM}.self_attention.linear_proj.bias", "gpt_oss_moe"): (
        1,
        {f"{ATTENTION}.o_proj.bias"},
    ),
    ("permuted_experts", "gpt_oss_moe"): (
        1,
        {f"{MLP}.experts.{part}_proj{kind}" for part in ("gate_up", "down") for kind in BIAS},
    ),
    ("swapped_gate_up_of_experts", "gpt_oss_moe"): (
        1,
        {f"{MLP}.experts.gate_up_proj{kind}" for kind in BIAS},
    ),
    ("shorter_window", "gpt_oss_moe"): (0, set()),
    (f"missing {NORM}.mlp.shared_experts.gate_weight", "qwen2_moe"): (
        1,
        {f"{MLP}.shared_expert_gate.weight"},
    ),
    (f"missing {NORM}.pre_mlp_layernorm.weight", "qwen3_moe"): (
        1,
        {"model.layers.1.post_attention_layernorm.weight"},
    ),
}


def _sequences() -> list[list[int]]:
    draw = random.Random(0)
    # The first and the last row of the embedding are read as well.
    return [[0, 96, *(draw.randrange(97) for _ in range(length - 2))] for length in (40, 13, 9, 3)]


def _case(name: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """Right-padded micro-batches of sequences of different lengths, in another order."""
    return {
        "name": name,
        "folder": str(folder),
        "sequences": _sequences(),
        "batches": [[1, 0], [2, 3]],
        "parallel": {},
        "mutation": None,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    } | settings


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of the cases that this run selected."""
    selected = {
        tuple(item.callspec.params.values())
        for item in request.session.items
        # Parameters of other files need not be hashable.
        if item.path == request.path and hasattr(item, "callspec")
    }
    root = tmp_path_factory.mktemp("parity")
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    for number, (model, (family, fields)) in enumerate(MODELS.items()):
        config = tiny_config(family, **fields)
        nested = model.startswith(("mistral3", "vision"))
        save_tiny_model(root / model, with_vision(config) if nested else config, seed=number)
    for model, layout in [case for case in COMBINATIONS if case in selected]:
        ranks, parallel = ALL_LAYOUTS[layout]
        cases[ranks].append(_case(f"{model}.{layout}", root / model, parallel=parallel))
    cases[1].append(
        _case(
            "phi3_short.longer_run",
            root / "phi3_short",
            max_sequence_length=MAX_SEQUENCE_LENGTH + 1,
        )
    )
    for mistake, model in [case for case in MISTAKES if case in selected]:
        cases[1].append(_case(f"{model}.{mistake}", root / model, mutation=mistake))
    if SMOLLM2.is_dir():
        sequences = _smollm2_sequences()
        cases[2].append(
            _case("smollm2.pp2", SMOLLM2, sequences=sequences, batches=[[1, 0]], parallel=PP2)
        )
    for ranks, of_ranks in cases.items():
        run_ranks("parity", of_ranks, ranks, root)
    return root


def _smollm2_sequences() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    texts = ["The capital of France is Paris, and", "Twelve plus thirty is"]
    return [tokenizer(text)["input_ids"] for text in texts]


def _transformers(folder: Path, sequences: list[list[int]]) -> dict[str, list]:
    """The same quantities from transformers' model, one sequence at a time, without padding."""
    nested = "text_config" in json.loads((folder / "config.json").read_text())
    kind = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    decoder = model.model.language_model if nested else model.model
    layers: list[list[Tensor]] = [[] for _ in decoder.layers]
    for layer, outputs in zip(decoder.layers, layers, strict=True):
        layer.register_forward_hook(
            lambda _module, _inputs, output, outputs=outputs: outputs.append(output[0])
        )
    found: dict[str, list] = {"layers": layers, "normed": [], "logits": []}
    with torch.no_grad():
        for sequence in sequences:
            output = model(torch.tensor([sequence]), output_hidden_states=True)
            found["normed"].append(output.hidden_states[-1][0])
            found["logits"].append(output.logits[0])
    return found


def _differences(found: dict[str, list], expected: dict[str, list]) -> dict[str, float]:
    """The largest difference of each layer, of the final norm and of the logits.

    It is relative to the largest value of its position: in some models one position's states are a
    thousand times as large as the others'.
    """
    names = [f"layer {layer}" for layer in range(len(expected["layers"]))]
    pairs = zip(names, found["layers"], expected["layers"], strict=True)
    tensors = {name: (of_found, of_expected) for name, of_found, of_expected in pairs}
    tensors |= {name: (found[name], expected[name]) for name in ("normed", "logits")}
    return {
        name: max(
            float(((one - other).abs().amax(-1) / other.abs().amax(-1)).max())
            if one.shape == other.shape
            else float("inf")
            for one, other in zip(of_found, of_expected, strict=True)
        )
        for name, (of_found, of_expected) in tensors.items()
    }


@pytest.mark.parametrize(
    ("model", "layout"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case in NIGHTLY)) for case in COMBINATIONS],
)
def test_equals_transformers(results: Path, model: str, layout: str) -> None:
    found = torch.load(results / f"{model}.{layout}.pt")
    differences = _differences(found, _transformers(results / model, _sequences()))
    assert max(differences.values()) <= TOLERANCE, differences
    assert sorted(found["exported"]) == sorted(found["source"])
    assert found["changed"] == []


def test_the_run_chooses_longropes_factors(results: Path, tmp_path: Path) -> None:
    """In a run that allows longer sequences, short ones have the long factors as well."""
    found = torch.load(results / "phi3_short.longer_run.pt")
    config = json.loads((results / "phi3_short" / "config.json").read_text())
    rope = config["rope_parameters"] | {"short_factor": LONGROPE["long_factor"]}
    always_long = copy_with_config(
        results / "phi3_short", tmp_path / "always_long", rope_parameters=rope
    )
    differences = _differences(found, _transformers(always_long, _sequences()))
    assert max(differences.values()) <= TOLERANCE, differences
    differences = _differences(found, _transformers(results / "phi3_short", _sequences()))
    assert min(differences.values()) > 30 * TOLERANCE, differences


@pytest.mark.parametrize(
    ("mistake", "model"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case[1] not in MISTAKEN))
        for case in MISTAKES
    ],
)
def test_a_loading_mistake_shows(results: Path, mistake: str, model: str) -> None:
    """Each makes the comparison fail where it was made, and not before."""
    found = torch.load(results / f"{model}.{mistake}.pt")
    differences = _differences(found, _transformers(results / model, _sequences()))
    first, changed = MISTAKES[mistake, model]
    in_order = list(differences.values())
    assert max(in_order[:first], default=0.0) <= TOLERANCE, differences
    assert min(in_order[first:]) > 30 * TOLERANCE, differences
    assert set(found["changed"]) == changed


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"no {SMOLLM2.name}: make demo fetches it")
def test_smollm2(results: Path) -> None:
    found = torch.load(results / "smollm2.pp2.pt")
    expected = _transformers(SMOLLM2, _smollm2_sequences())
    differences = _differences(found, expected)
    assert max(differences.values()) <= TOLERANCE, differences
    assert sorted(found["exported"]) == sorted(found["source"])
    assert found["changed"] == []
    for one, other in zip(found["logits"], expected["logits"], strict=True):
        chosen = other.gather(-1, one.argmax(-1, keepdim=True)).squeeze(-1)
        assert_close_relative(chosen, other.amax(-1), TOLERANCE)
