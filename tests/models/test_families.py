import inspect
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import (
    Activation,
    Architecture,
    Latent,
    MixtureOfExperts,
    Rope,
)
from megatron_oprd.models.families import FAMILIES, mapping_table, read_architecture
from megatron_oprd.models.families.decoder import Family, each_layer
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.mapping import Copy
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Configurations as transformers 4 wrote them, field for field.
LLAMA_4 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008], "head_dim": 16,
    "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 6, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
    "use_cache": True, "vocab_size": 1001,
}  # fmt: skip
SMOLLM2_4 = LLAMA_4 | {
    "is_llama_config": True, "pad_token_id": 2, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}  # fmt: skip
QWEN2_4 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02,
    "intermediate_size": 80, "max_position_embeddings": 4096, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 6, "num_hidden_layers": 5,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 1001,
}  # fmt: skip
QWEN3_4 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 32, "hidden_act": "silu",
    "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 6, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 1001,
}  # fmt: skip
# As Qwen3-30B-A3B's, but for the sizes.
QWEN3_MOE_4 = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 32,
    "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 24, "norm_topk_prob": True,
    "num_attention_heads": 6, "num_experts": 16, "num_experts_per_tok": 3, "num_hidden_layers": 5,
    "num_key_value_heads": 2, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 1001,
}  # fmt: skip
GLM4_MOE_4 = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 32,
    "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "max_position_embeddings": 131072, "model_type": "glm4_moe", "moe_intermediate_size": 24,
    "n_group": 1, "n_routed_experts": 16, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 6, "num_experts_per_tok": 8, "num_hidden_layers": 5,
    "num_key_value_heads": 2, "num_nextn_predict_layers": 1, "pad_token_id": 329,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 1000000, "routed_scaling_factor": 1.0, "tie_word_embeddings": False,
    "topk_group": 1, "torch_dtype": "bfloat16", "transformers_version": "4.54.1",
    "use_cache": True, "use_qk_norm": False, "vocab_size": 1001,
}  # fmt: skip
# As DeepSeek-V3's, but for the sizes.
DEEPSEEK_V3_4 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "kv_lora_rank": 20, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 24, "moe_layer_freq": 1, "n_group": 4, "n_routed_experts": 16,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 6,
    "num_experts_per_tok": 4, "num_hidden_layers": 5, "num_key_value_heads": 6,
    "num_nextn_predict_layers": 1, "q_lora_rank": 28, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 2, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.46.3", "use_cache": True,
    "v_head_dim": 8, "vocab_size": 1001,
}  # fmt: skip
MIXTRAL_4 = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02,
    "intermediate_size": 80, "max_position_embeddings": 32768, "model_type": "mixtral",
    "num_attention_heads": 6, "num_experts_per_tok": 2, "num_hidden_layers": 5,
    "num_key_value_heads": 2, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 1001,
}  # fmt: skip
QWEN2_MOE_4 = {
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 48,
    "initializer_range": 0.02, "intermediate_size": 80, "max_position_embeddings": 32768,
    "max_window_layers": 28, "model_type": "qwen2_moe", "moe_intermediate_size": 24,
    "norm_topk_prob": False, "num_attention_heads": 6, "num_experts": 16,
    "num_experts_per_tok": 4, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 64,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 1001,
}  # fmt: skip
MINIMAX_M2_4 = {
    "architectures": ["MiniMaxM2ForCausalLM"], "attention_dropout": 0.0, "attn_type_list": [1] * 5,
    "auto_map": {
        "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
        "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
    },
    "head_dim": 32, "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02,
    "intermediate_size": 80, "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 196608, "mlp_intermediate_size": 128, "model_type": "minimax_m2",
    "mtp_transformer_layers": 1, "num_attention_heads": 6, "num_experts_per_tok": 8,
    "num_hidden_layers": 5, "num_key_value_heads": 2, "num_local_experts": 16,
    "num_mtp_modules": 3, "output_router_logits": False, "qk_norm_type": "per_layer",
    "rms_norm_eps": 1e-06, "rope_theta": 5000000, "rotary_dim": 8, "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0, "scoring_func": "sigmoid", "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.1", "use_cache": True, "use_mtp": True, "use_qk_norm": True,
    "use_routing_bias": True, "vocab_size": 1001,
}  # fmt: skip
MISTRAL_4 = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "head_dim": 32, "hidden_act": "silu", "hidden_size": 48,
    "initializer_range": 0.02, "intermediate_size": 80, "max_position_embeddings": 131072,
    "model_type": "mistral", "num_attention_heads": 6, "num_hidden_layers": 5,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 1001,
}  # fmt: skip
# A window that is as long as the longest sequence, and no head_dim.
MISTRAL_WINDOW_4 = {
    name: value for name, value in MISTRAL_4.items() if name != "head_dim"
} | {"max_position_embeddings": 4096, "sliding_window": 4096}  # fmt: skip
PHI3_4 = {
    "_name_or_path": "Phi-3-mini", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu",
    "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "max_position_embeddings": 131072, "model_type": "phi3", "num_attention_heads": 6,
    "num_hidden_layers": 5, "num_key_value_heads": 2, "original_max_position_embeddings": 4096,
    "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": {
        "long_factor": [1.5, 2, 30.25, 60.0], "short_factor": [1.0, 1.0, 1.5, 2.0],
        "type": "longrope",
    },
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.0", "use_cache": True,
    "vocab_size": 1001,
}  # fmt: skip
PHI4_MINI_4 = PHI3_4 | {
    "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
    "partial_rotary_factor": 0.75, "rope_scaling": {
        "long_factor": [1, 2, 30.25], "short_factor": [1.0] * 3, "type": "longrope",
    },
    "tie_word_embeddings": True,
}  # fmt: skip
# Phi-4: no longrope, no window.
PHI4_4 = PHI3_4 | {
    "max_position_embeddings": 16384, "original_max_position_embeddings": 16384,
    "rope_scaling": None, "rope_theta": 250000, "sliding_window": None,
}  # fmt: skip
SEED_OSS_4 = {
    "architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.1,
    "attention_out_bias": False, "bos_token_id": 0, "eos_token_id": 2, "head_dim": 32,
    "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "max_position_embeddings": 524288, "mlp_bias": False, "model_type": "seed_oss",
    "num_attention_heads": 6, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "pad_token_id": 1, "residual_dropout": 0.1, "rms_norm_eps": 1e-06,
    "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.55.0",
    "use_cache": True, "vocab_size": 1001,
}  # fmt: skip
SMOLLM3_4 = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 48,
    "initializer_range": 0.02, "intermediate_size": 80, "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
    "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1],
    "num_attention_heads": 6, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False,
    "vocab_size": 1001,
}  # fmt: skip
GRANITE_4 = LLAMA_4 | {
    "architectures": ["GraniteForCausalLM"], "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0, "logits_scaling": 16.0, "model_type": "granite",
    "residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
OLMO2_4 = {
    name: value for name, value in LLAMA_4.items() if name not in ("mlp_bias", "head_dim")
} | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "rope_scaling": None,
     "tie_word_embeddings": False}  # fmt: skip
OLMO3_4 = OLMO2_4 | {
    "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": 4096,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"],
    "rope_scaling": {
        "attention_factor": 1.25, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn",
    },
}  # fmt: skip
GLM4_4 = {
    "architectures": ["Glm4ForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338], "head_dim": 16, "hidden_act": "silu",
    "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "max_position_embeddings": 32768, "model_type": "glm4", "num_attention_heads": 6,
    "num_hidden_layers": 5, "num_key_value_heads": 2, "pad_token_id": 151,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.52.0.dev0", "use_cache": True, "vocab_size": 1001,
}  # fmt: skip
EXAONE4_4 = {
    "architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 361, "head_dim": 16, "hidden_act": "silu", "hidden_size": 48,
    "initializer_range": 0.02, "intermediate_size": 80,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"],
    "max_position_embeddings": 131072, "model_type": "exaone4", "num_attention_heads": 6,
    "num_hidden_layers": 5, "num_key_value_heads": 2, "pad_token_id": 0, "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3, "rope_theta": 500000.0, "sliding_window": 4096,
    "sliding_window_pattern": "LLLG", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0", "use_cache": True, "vocab_size": 1001,
}  # fmt: skip
# EXAONE 4.0 1.2B: no windows, and every layer is rotated.
EXAONE4_SMALL_4 = EXAONE4_4 | {
    "layer_types": ["full_attention"] * 5, "sliding_window": None, "sliding_window_pattern": None,
}  # fmt: skip
GPT_OSS_4 = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 16, "hidden_act": "silu",
    "hidden_size": 48, "initial_context_length": 4096, "initializer_range": 0.02,
    "intermediate_size": 80,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 6,
    "num_experts_per_tok": 4, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "num_local_experts": 16, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05, "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True,
    "vocab_size": 1001,
}  # fmt: skip
# As the 9B's, but for the sizes; layer_types is not written, and alternates.
GEMMA2_4 = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 6,
    "num_hidden_layers": 5, "num_key_value_heads": 2, "pad_token_id": 0,
    "query_pre_attn_scalar": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 1001,
}  # fmt: skip
# As the 1B's, but for the sizes. The class ties the head where the configuration does not say.
GEMMA3_4 = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 48, "initializer_range": 0.02,
    "intermediate_size": 80, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 6, "num_hidden_layers": 5, "num_key_value_heads": 2, "pad_token_id": 0,
    "query_pre_attn_scalar": 64, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 3, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "use_cache": True, "vocab_size": 1001,
}  # fmt: skip
COMMON: dict[str, Any] = {
    "num_layers": 5, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 6,
    "num_query_groups": 2, "vocab_size": 1001,
}  # fmt: skip
LLAMA3_ROPE = Rope(
    theta=5e5,
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# sqrt(1 + log 32 / log 4096)
PHI3_ATTENTION_FACTOR = (1 + 5 / 12) ** 0.5
WRITTEN_BY_4: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        LLAMA_4,
        {"family": "LlamaForCausalLM", "head_dim": 16, "layernorm_epsilon": 1e-5, "tied": True,
         "rope": LLAMA3_ROPE, "qkv_bias": False, "qk_norm": False,
         "max_position_embeddings": 131072},
    ),
    "smollm2": (
        SMOLLM2_4,
        {"family": "LlamaForCausalLM", "head_dim": 16, "layernorm_epsilon": 1e-5, "tied": True,
         "rope": Rope(theta=1e5), "qkv_bias": False, "qk_norm": False,
         "max_position_embeddings": 131072},
    ),
    "qwen2": (
        QWEN2_4,
        {"family": "Qwen2ForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-6, "tied": False,
         "rope": Rope(theta=1e4), "qkv_bias": True, "qk_norm": False,
         "max_position_embeddings": 4096},
    ),
    "qwen3": (
        QWEN3_4,
        {"family": "Qwen3ForCausalLM", "head_dim": 32, "layernorm_epsilon": 1e-6, "tied": True,
         "rope": Rope(theta=1e6), "qkv_bias": False, "qk_norm": True,
         "max_position_embeddings": 40960},
    ),
    "qwen3_moe": (
        QWEN3_MOE_4,
        {"family": "Qwen3MoeForCausalLM", "head_dim": 32, "layernorm_epsilon": 1e-6, "tied": False,
         "rope": Rope(theta=1e6), "qkv_bias": False, "qk_norm": True,
         "max_position_embeddings": 40960,
         "moe": MixtureOfExperts(num_experts=16, num_experts_per_token=3, ffn_hidden_size=24,
                                 norm_topk_prob=True)},
    ),
    "glm4_moe": (
        GLM4_MOE_4,
        {"family": "Glm4MoeForCausalLM", "head_dim": 32, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": Rope(theta=1e6, partial_rotary_factor=0.5), "qkv_bias": True,
         "max_position_embeddings": 131072,
         "moe": MixtureOfExperts(num_experts=16, num_experts_per_token=8, ffn_hidden_size=24,
                                 norm_topk_prob=True, shared_ffn_hidden_size=24,
                                 sigmoid_router=True, first_dense_layers=1)},
    ),
    # 0.1 ln 40 + 1 twice, once for queries and once for keys.
    "deepseek_v3": (
        DEEPSEEK_V3_4,
        {"family": "DeepseekV3ForCausalLM", "head_dim": 16, "layernorm_epsilon": 1e-5,
         "tied": False, "num_query_groups": 6, "max_position_embeddings": 163840,
         "softmax_scale": (0.1 * math.log(40) + 1) ** 2 / 4,
         "latent": Latent(query_rank=28, key_value_rank=20, unrotated_dim=12, rotated_dim=4,
                          value_dim=8, norm_epsilon=1e-6),
         "rope": Rope(theta=1e4, rope_type="yarn", interleaved=True, factor=40.0, beta_fast=32.0,
                      beta_slow=1.0, original_max_position_embeddings=4096, truncate=True),
         "moe": MixtureOfExperts(num_experts=16, num_experts_per_token=4, ffn_hidden_size=24,
                                 norm_topk_prob=True, shared_ffn_hidden_size=24,
                                 sigmoid_router=True, routed_scaling_factor=2.5,
                                 first_dense_layers=3, num_groups=4, num_groups_per_token=2)},
    ),
    "minimax_m2": (
        MINIMAX_M2_4,
        {"family": "MiniMaxM2ForCausalLM", "head_dim": 32, "layernorm_epsilon": 1e-6, "tied": False,
         "rope": Rope(theta=5e6, partial_rotary_factor=0.25), "max_position_embeddings": 196608,
         "qk_norm": True, "qk_norm_over_all_heads": True,
         "moe": MixtureOfExperts(num_experts=16, num_experts_per_token=8, ffn_hidden_size=80,
                                 norm_topk_prob=True, sigmoid_router=True)},
    ),
    "mixtral": (
        MIXTRAL_4,
        {"family": "MixtralForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": Rope(theta=1e6), "max_position_embeddings": 32768,
         "moe": MixtureOfExperts(num_experts=8, num_experts_per_token=2, ffn_hidden_size=80,
                                 norm_topk_prob=True)},
    ),
    "qwen2_moe": (
        QWEN2_MOE_4,
        {"family": "Qwen2MoeForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-6, "tied": False,
         "rope": Rope(theta=1e6), "qkv_bias": True, "max_position_embeddings": 32768,
         "moe": MixtureOfExperts(num_experts=16, num_experts_per_token=4, ffn_hidden_size=24,
                                 norm_topk_prob=False, shared_ffn_hidden_size=64,
                                 shared_expert_gate=True)},
    ),
    "mistral": (
        MISTRAL_4,
        {"family": "MistralForCausalLM", "head_dim": 32, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": Rope(theta=1e6), "qkv_bias": False, "qk_norm": False,
         "max_position_embeddings": 131072},
    ),
    "mistral_window": (
        MISTRAL_WINDOW_4,
        {"family": "MistralForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": Rope(theta=1e6), "qkv_bias": False, "qk_norm": False,
         "max_position_embeddings": 4096},
    ),
    "gpt_oss": (
        GPT_OSS_4,
        {"family": "GptOssForCausalLM", "head_dim": 16, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": Rope(theta=150000, rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0,
                      truncate=False, original_max_position_embeddings=4096,
                      attention_factor=0.1 * math.log(32) + 1),
         "qkv_bias": True, "output_bias": True, "mlp_bias": True, "attention_sinks": True,
         "activation": Activation(function="quick_gelu", up_offset=1.0, clamp=7.0),
         "sliding_window": 128, "sliding_layers": (True, False, True, False, True),
         "moe": MixtureOfExperts(num_experts=16, num_experts_per_token=4, ffn_hidden_size=80,
                                 norm_topk_prob=True),
         "max_position_embeddings": 131072},
    ),
    "gemma2": (
        GEMMA2_4,
        {"family": "Gemma2ForCausalLM", "head_dim": 32, "layernorm_epsilon": 1e-6, "tied": True,
         "rope": Rope(theta=10000), "max_position_embeddings": 8192,
         "sliding_window": 4096, "sliding_layers": (True, False, True, False, True),
         "zero_centered_norms": True, "post_norms": True, "softmax_scale": 0.125,
         "score_softcap": 50.0, "activation": Activation(function="gelu_tanh"),
         "embedding_multiplier": math.sqrt(48), "rounds_embedding_multiplier": True,
         "logits_softcap": 30.0},
    ),
    "gemma3": (
        GEMMA3_4,
        {"family": "Gemma3ForCausalLM", "head_dim": 32, "layernorm_epsilon": 1e-6, "tied": True,
         "rope": Rope(theta=1000000), "sliding_rope": Rope(theta=10000),
         "sliding_window": 512, "sliding_layers": (True, True, False, True, True),
         "qk_norm": True, "zero_centered_norms": True, "post_norms": True,
         "softmax_scale": 0.125, "activation": Activation(function="gelu_tanh"),
         "embedding_multiplier": math.sqrt(48), "rounds_embedding_multiplier": True,
         "max_position_embeddings": 32768},
    ),
    "phi3": (
        PHI3_4,
        {"family": "Phi3ForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": Rope(theta=1e4, rope_type="longrope", original_max_position_embeddings=4096,
                      short_factor=(1.0, 1.0, 1.5, 2.0), long_factor=(1.5, 2.0, 30.25, 60.0),
                      attention_factor=PHI3_ATTENTION_FACTOR),
         "qkv_bias": False, "qk_norm": False, "max_position_embeddings": 131072},
    ),
    "phi4_mini": (
        PHI4_MINI_4,
        {"family": "Phi3ForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-5, "tied": True,
         "rope": Rope(theta=1e4, rope_type="longrope", partial_rotary_factor=0.75,
                      original_max_position_embeddings=4096, short_factor=(1.0, 1.0, 1.0),
                      long_factor=(1.0, 2.0, 30.25), attention_factor=PHI3_ATTENTION_FACTOR),
         "qkv_bias": False, "qk_norm": False, "max_position_embeddings": 131072},
    ),
    "seed_oss": (
        SEED_OSS_4,
        {"family": "SeedOssForCausalLM", "head_dim": 32, "layernorm_epsilon": 1e-6, "tied": False,
         "rope": Rope(theta=1e7), "qkv_bias": True, "qk_norm": False,
         "max_position_embeddings": 524288},
    ),
    # The class ties the head where the configuration does not say.
    "smollm3": (
        SMOLLM3_4,
        {"family": "SmolLM3ForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-6, "tied": True,
         "rope": Rope(theta=5e6), "qkv_bias": False, "qk_norm": False,
         "max_position_embeddings": 65536, "rotated_layers": (True, True, True, False, True)},
    ),
    "granite": (
        GRANITE_4,
        {"family": "GraniteForCausalLM", "head_dim": 16, "layernorm_epsilon": 1e-5, "tied": True,
         "rope": Rope(theta=1e7), "max_position_embeddings": 131072, "softmax_scale": 0.0078125,
         "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_divisor": 16.0},
    ),
    "olmo2": (
        OLMO2_4,
        {"family": "Olmo2ForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": Rope(theta=5e5), "max_position_embeddings": 131072, "qk_norm": True,
         "qk_norm_over_all_heads": True, "pre_norms": False, "post_norms": True},
    ),
    "olmo3": (
        OLMO3_4,
        {"family": "Olmo3ForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": Rope(theta=5e5, rope_type="yarn", factor=8.0, beta_fast=32.0, beta_slow=1.0,
                      original_max_position_embeddings=8192, attention_factor=1.25,
                      truncate=True),
         "sliding_rope": Rope(theta=5e5), "max_position_embeddings": 131072, "qk_norm": True,
         "qk_norm_over_all_heads": True, "pre_norms": False, "post_norms": True,
         "sliding_window": 4096, "sliding_layers": (True, True, True, False, True)},
    ),
    "glm4": (
        GLM4_4,
        {"family": "Glm4ForCausalLM", "head_dim": 16, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": Rope(theta=1e4, partial_rotary_factor=0.5, interleaved=True), "qkv_bias": True,
         "max_position_embeddings": 32768, "post_norms": True},
    ),
    "exaone4": (
        EXAONE4_4,
        {"family": "Exaone4ForCausalLM", "head_dim": 16, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": LLAMA3_ROPE, "max_position_embeddings": 131072, "qk_norm": True,
         "pre_norms": False, "post_norms": True, "sliding_window": 4096,
         "sliding_layers": (True, True, True, False, True),
         "rotated_layers": (True, True, True, False, True)},
    ),
    "exaone4_small": (
        EXAONE4_SMALL_4,
        {"family": "Exaone4ForCausalLM", "head_dim": 16, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": LLAMA3_ROPE, "max_position_embeddings": 131072, "qk_norm": True,
         "pre_norms": False, "post_norms": True},
    ),
    "phi4": (
        PHI4_4,
        {"family": "Phi3ForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-5, "tied": False,
         "rope": Rope(theta=250000), "qkv_bias": False, "qk_norm": False,
         "max_position_embeddings": 16384},
    ),
}  # fmt: skip
MODEL_TYPES = [family.model_type for family in FAMILIES.values()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family, as the installed transformers writes them."""
    root = tmp_path_factory.mktemp("models")
    for family in MODEL_TYPES:
        save_tiny_model(root / family, tiny_config(family), seed=0)
    return root


def read(models: Path, tmp_path: Path, family: str, **changes: Any) -> Architecture:
    folder = copy_with_config(models / family, tmp_path / "changed", **changes)
    return read_architecture(HFCheckpoint(folder))


@pytest.mark.parametrize("name", WRITTEN_BY_4)
def test_configurations_of_transformers_4(models: Path, tmp_path: Path, name: str) -> None:
    config, expected = WRITTEN_BY_4[name]
    everything = list(json.loads((models / "llama" / "config.json").read_text()))
    folder = copy_with_config(models / "llama", tmp_path / name, drop=everything)
    (folder / "config.json").write_text(json.dumps(config))
    assert read_architecture(HFCheckpoint(folder)) == Architecture(**(COMMON | expected))


@pytest.mark.parametrize("name", WRITTEN_BY_4)
def test_configurations_of_transformers_5(models: Path, tmp_path: Path, name: str) -> None:
    """The same configuration, read and written again by the installed transformers."""
    config, expected = WRITTEN_BY_4[name]
    folder = copy_with_config(models / "llama", tmp_path / name)
    (folder / "config.json").write_text(json.dumps(config))
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in written
    assert "rope_theta" not in written
    assert read_architecture(HFCheckpoint(folder)) == Architecture(**(COMMON | expected))


def test_a_copy_of_the_class_under_another_model_type(models: Path, tmp_path: Path) -> None:
    """Kimi K2 is read, and handed on, under the model_type that transformers and engines know."""
    found = read(models, tmp_path, "deepseek_v3", model_type="kimi_k2")
    assert found == read(models, tmp_path / "as_it_is", "deepseek_v3")
    opened = open_checkpoint(tmp_path / "changed")
    opened.check_tensors()
    assert opened.source.config["model_type"] == "deepseek_v3"
    assert AutoConfig.from_pretrained(opened.source.hf_folder).model_type == "deepseek_v3"


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("gpt_oss", {"attention_bias": False}),
        ("gpt_oss", {"swiglu_alpha": 1.5}),
        ("gpt_oss", {"hidden_act": "gelu"}),
        ("gpt_oss", {"num_experts_per_tok": 1}),
        ("gpt_oss", {"num_experts_per_tok": 9}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("gemma3_text", {"final_logit_softcapping": 0.0}),
        ("gemma2", {"attn_logit_softcapping": -1.0}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"hidden_activation": "gelu"}),
        ("llama", {"attention_dropout": 0.1}),
        ("llama", {"rope_interleaved": True}),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}),
        ("llama", {"final_logit_softcapping": 30.0}),
        ("llama", {"qk_norm": False}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"sliding_window": 8}),
        ("qwen2", {"hidden_act": "relu"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}),
        (
            "qwen2",
            {"sliding_window": 0, "use_sliding_window": True}
            | {"max_window_layers": 0, "layer_types": None},
        ),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"] * 2}),
        ("qwen2", {"use_mrope": True}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("qwen2", {"attention_bias": True}),
        ("qwen3", {"use_sliding_window": True}),
        ("qwen3", {"layer_types": ["full_attention"] * 3}),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}),
        ("qwen3", {"mlp_bias": False}),
        ("qwen3", {"model_type": "mistral"}),
        ("qwen3", {"num_key_value_heads": 3}),
        ("qwen3", {"sliding_window_pattern": 2}),
        ("mistral", {"hidden_act": "gelu"}),
        ("mistral", {"sliding_window": 0}),
        ("mistral", {"attention_bias": True}),
        ("mistral", {"partial_rotary_factor": 0.5}),
        ("mistral", {"layer_types": ["sliding_attention"] * 4}),
        ("mistral", {"model_type": "llama"}),
        ("phi3", {"hidden_act": "gelu_new"}),
        ("phi3", {"attention_bias": True}),
        ("phi3", {"attention_dropout": 0.1}),
        ("phi3", {"resid_pdrop": 0.1}),
        ("phi3", {"embd_pdrop": 0.1}),
        ("phi3", {"mlp_bias": True}),
        ("phi3", {"lm_head_bias": True}),
        ("phi3", {"full_attn_mod": 2}),
        ("phi3", {"interpolate_factor": 2}),
        ("phi3", {"layer_types": ["sliding_attention"] * 4}),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3WithMemory"}}),
        ("phi3", {"auto_map": {"AutoModel": "modeling_phi3.Phi3Model"}}),
        ("phi3", {"mup_width_multiplier": 8.0}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("qwen3_moe", {"use_sliding_window": True}),
        ("qwen3_moe", {"num_experts_per_tok": 9}),
        ("qwen3_moe", {"num_experts_per_tok": 1}),
        ("qwen3_moe", {"shared_expert_intermediate_size": 32}),
        ("qwen3_moe", {"n_group": 4}),
        ("qwen3", {"num_experts": 8}),
        ("qwen3_next", {"attention_bias": True}),
        ("qwen3_next", {"decoder_sparse_step": 2}),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 3}),
        ("qwen3_next", {"layer_types": ["linear_attention", "sliding_attention"] * 2}),
        ("qwen3_next", {"linear_num_value_heads": 5}),
        ("qwen3_next", {"mlp_only_layers": [0]}),
        ("qwen3_5_text", {"attn_output_gate": False}),
        ("qwen3_5_text", {"mamba_ssm_dtype": "bfloat16"}),
        ("qwen3_5_moe_text", {"num_experts_per_tok": 1}),
        ("seed_oss", {"attention_bias": False}),
        ("smollm3", {"use_sliding_window": True}),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4}),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2]}),
        ("deepseek_v3", {"attention_bias": True}),
        ("deepseek_v3", {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}),
        ("deepseek_v3", {"first_k_dense_replace": 4}),
        ("deepseek_v3", {"head_dim": 16}),
        ("deepseek_v3", {"moe_layer_freq": 2}),
        ("deepseek_v3", {"n_group": 3}),
        ("deepseek_v3", {"n_shared_experts": 0}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3", {"num_experts_per_tok": 3}),
        ("deepseek_v3", {"num_experts_per_tok": 5}),
        ("deepseek_v3", {"num_key_value_heads": 2}),
        ("deepseek_v3", {"qk_head_dim": 17}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"topk_group": 5}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("glm4_moe", {"n_group": 3}),
        ("glm4_moe", {"topk_group": 2}),
        ("glm4_moe", {"norm_topk_prob": False}),
        ("glm4_moe", {"n_shared_experts": 0}),
        ("glm4_moe", {"first_k_dense_replace": 4}),
        ("glm4_moe", {"num_experts_per_tok": 1}),
        ("minimax_m2", {"attn_type_list": [1, 0, 1, 1]}),
        ("minimax_m2", {"use_qk_norm": False}),
        ("minimax_m2", {"qk_norm_type": "per_head"}),
        ("minimax_m2", {"use_routing_bias": False}),
        ("minimax_m2", {"scoring_func": "softmax"}),
        ("minimax_m2", {"shared_intermediate_size": 8}),
        ("minimax_m2", {"layernorm_mlp_beta": 2.0}),
        ("minimax_m2", {"num_experts_per_tok": 1}),
        ("minimax_m2", {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("qwen2_moe", {"decoder_sparse_step": 2}),
        ("qwen2_moe", {"mlp_only_layers": [0]}),
        ("qwen2_moe", {"num_experts_per_tok": 9}),
        ("olmo2", {"clip_qkv": 8.0}),
        ("olmo3", {"sliding_window": 0}),
        ("olmo3", {"sliding_window": 256}),
        ("glm4", {"hidden_act": "gelu"}),
        ("glm4", {"mlp_bias": True}),
        ("exaone4", {"layer_types": ["full_attention"] * 3}),
        ("exaone4", {"sliding_window": 0}),
        ("exaone4", {"attention_bias": True}),
        ("llama", {"hidden_size": "wide"}),
        ("llama", {"architectures": ["GemmaForCausalLM"]}),
        ("llama", {"architectures": ["LlamaForCausalLM", "LlamaModel"]}),
        ("llama", {"architectures": None}),
    ],
)
def test_a_refused_field_is_named(
    models: Path, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    field = next(iter(fields))
    with pytest.raises(UserError, match=rf"changed/config\.json.*{field}") as error:
        read(models, tmp_path, family, **fields)
    assert "\n" not in str(error.value)


def test_the_class_has_a_sliding_window_where_the_file_has_none(
    models: Path, tmp_path: Path
) -> None:
    """Transformers' Mistral then slides over 4096 positions."""
    found = read(models, tmp_path, "mistral", drop=["sliding_window"], max_position_embeddings=8192)
    assert (found.sliding_window, found.sliding_layers) == (4096, (True,) * 4)


ON = {"use_sliding_window": True, "sliding_window": 255}
OFF = {"use_sliding_window": False, "sliding_window": 255}
ALL, NO_WINDOW = (255, (True,) * 4), (None, ())


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("mistral", {"sliding_window": 255}, ALL),
        ("mistral", {"sliding_window": 256}, NO_WINDOW),  # as long as the longest sequence
        ("phi3", {"sliding_window": 255}, ALL),
        ("qwen3_moe", ON, ALL),
        ("qwen3_moe", OFF, NO_WINDOW),
        ("qwen2", OFF, NO_WINDOW),
        ("qwen2", ON | {"max_window_layers": 4, "layer_types": None}, NO_WINDOW),
        (
            "qwen2",
            ON | {"max_window_layers": 3, "layer_types": None},
            (255, (False, False, False, True)),
        ),
        # layer_types counts before max_window_layers.
        (
            "qwen3",
            ON
            | {"max_window_layers": 3}
            | {"layer_types": ["sliding_attention", "full_attention"] * 2},
            (255, (True, False) * 2),
        ),
    ],
)
def test_windows(
    models: Path, tmp_path: Path, family: str, fields: dict[str, Any], expected: Any
) -> None:
    found = read(models, tmp_path, family, **fields)
    assert (found.sliding_window, found.sliding_layers) == expected


@pytest.mark.parametrize("family", FAMILIES.values(), ids=MODEL_TYPES)
def test_a_family_file_has_every_name_as_written_on_disk(family: Family) -> None:
    """Somebody who searches for a tensor finds its pair in the family's own file."""
    source = inspect.getsource(sys.modules[family.mappings.__module__])
    architecture = family.architecture(tiny_config(family.model_type), "config.json")
    for mapping in mapping_table(architecture, padded_vocab_size=128):
        for name in (mapping.megatron, *mapping.hf):
            name = re.sub(r"(?<=layers\.)\d+", "{layer}", name)
            name = re.sub(r"(?<=experts\.)\d+", "{expert}", name)
            name = re.sub(r"(?<=\[)\d+", "{expert}", name)
            assert f'"{name}"' in source, name


def test_a_name_without_its_number_is_a_mistake() -> None:
    architecture = FAMILIES["LlamaForCausalLM"].architecture(tiny_config("llama"), "config.json")
    norm = Copy(megatron="decoder.layers.{layer}.norm", hf={"model.layers.0.norm": (32,)})
    with pytest.raises(AssertionError, match=r"model\.layers\.0\.norm has no \{layer\}"):
        each_layer(architecture, [norm])
