"""Tiny random Hugging Face models and tokenizers, saved as real checkpoints are."""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    GenerationConfig,
    Mistral3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
)

PAD, EOS, UNK, USER, ASSISTANT = "<pad>", "<eos>", "<unk>", "<user>", "<assistant>"
SPECIAL_TOKENS = (PAD, EOS, UNK, USER, ASSISTANT)
PAD_ID, EOS_ID = 0, 1
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<' + m['role'] + '>' + m['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

# The most useful characters come first, so that a small vocabulary still has them. Space and
# newline are written as byte-level tokenizers write them.
_CHARACTERS = (
    "ĠĊabcdefghijklmnopqrstuvwxyz0123456789.,?!+-*/=()'ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    '"$%&:;<>@[]^_{|}\\#'
)


# Fields that a family has beside those of all, or with another value.
_WIDE_HEADS = {"head_dim": 16}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# The third layer has attention, the others have linear attention of 12 value heads.
_LINEAR_ATTENTION = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
    "layer_types": [f"{kind}_attention" for kind in ("linear", "linear", "full", "linear")],
}
# Images would have other positions in each section; tokens of text have one.
_SECTIONS = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": [1, 1, 0],
    "mrope_interleaved": True,
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    # One layer without experts; then two of four groups, and of their four experts all but one.
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 14,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
    # The window is in three layers; the last has none, and is not rotated.
    "exaone4": {**_WIDE_HEADS, "sliding_window": 7},
    # Both caps are below the largest scores and logits.
    "gemma2": {
        **_WIDE_HEADS,
        "query_pre_attn_scalar": 5,
        "sliding_window": 6,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    # Every third layer has no window, and the rotation of the others is another.
    "gemma3_text": {
        **_WIDE_HEADS,
        "query_pre_attn_scalar": 24,
        "sliding_window": 6,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "glm4": _WIDE_HEADS,
    # One layer without experts, then two shared experts in one MLP.
    "glm4_moe": {
        **_WIDE_HEADS,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
    },
    # Every other layer has a window. The limit clamps some of the gates and ups.
    "gpt_oss": {
        **_WIDE_HEADS,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 6,
        "swiglu_limit": 0.75,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    # Neither 1 nor 1 / sqrt(head_dim).
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.4,
        "logits_scaling": 5.0,
    },
    "minimax_m2": {
        **_WIDE_HEADS,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    # Sequences of up to 64 tokens, so that the scale of queries is 1.
    "ministral3": {
        **_WIDE_HEADS,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 256,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "mscale": 2.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mistral": {**_WIDE_HEADS, "sliding_window": None},  # the class's default is 4096
    "mixtral": {**_WIDE_HEADS, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmo3": {
        "sliding_window": 6,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "qwen2_moe": {**_EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 40},
    "qwen3": _WIDE_HEADS,
    "qwen3_moe": {**_WIDE_HEADS, **_EXPERTS, "norm_topk_prob": True},
    "qwen3_5_moe_text": {
        **_WIDE_HEADS,
        **_EXPERTS,
        **_LINEAR_ATTENTION,
        "shared_expert_intermediate_size": 40,
        "rope_parameters": _SECTIONS,
    },
    "qwen3_5_text": {**_WIDE_HEADS, **_LINEAR_ATTENTION, "rope_parameters": _SECTIONS},
    "qwen3_next": {
        **_WIDE_HEADS,
        **_EXPERTS,
        **_LINEAR_ATTENTION,
        "shared_expert_intermediate_size": 40,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    },
    "seed_oss": _WIDE_HEADS,
}


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """A config of ``family``, a transformers model_type: 4 layers, hidden size 32, 97 tokens.

    4 query heads share 2 key-value heads. The head_dim of EXAONE, Gemma, GLM, MiniMax, Ministral,
    Mistral, Mixtral, Qwen3 and Seed-OSS is 16, which is not hidden / heads. The last layer of
    SmolLM3 and EXAONE is not rotated. With a mixture of experts each token goes through 2 of 8. The
    embeddings are not tied unless ``tie_word_embeddings=True``.
    """
    fields: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    # Copied, because transformers completes the dictionaries it is given.
    return AutoConfig.for_model(
        family, **copy.deepcopy(fields | _OF_FAMILY.get(family, {}) | overrides)
    )


def with_vision(text: PretrainedConfig) -> PretrainedConfig:
    """A config of a model with the decoder ``text`` and one layer that sees images."""
    if text.model_type == "gemma3_text":
        return Gemma3Config(
            text_config=text.to_dict(),
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 4,
                "image_size": 16,
            },
            tie_word_embeddings=text.tie_word_embeddings,
            mm_tokens_per_image=4,
            image_token_index=10,
            boi_token_index=11,
            eoi_token_index=12,
        )
    if text.model_type in ("qwen3_5_text", "qwen3_5_moe_text"):
        kind = Qwen3_5Config if text.model_type == "qwen3_5_text" else Qwen3_5MoeConfig
        return kind(
            text_config=text.to_dict(),
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "out_hidden_size": text.hidden_size,
                "num_position_embeddings": 16,
            },
            tie_word_embeddings=text.tie_word_embeddings,
            image_token_id=10,
            video_token_id=11,
            vision_start_token_id=12,
            vision_end_token_id=13,
        )
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "image_size": 16,
    }
    return Mistral3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        tie_word_embeddings=text.tie_word_embeddings,
        image_token_index=10,
    )


def tiny_tokenizer(
    vocab_size: int = 97, *, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without merges: ``vocab_size`` entries, one a character.

    Ids 0 to 4 are the special tokens (<pad>, <eos>, <unk>, <user>, <assistant>). A vocabulary
    larger than the characters is filled up with tokens no text contains; a smaller one lacks the
    last characters, which then become <unk>. Byte-level, because transformers rebuilds a Qwen2
    folder's tokenizer as byte-level whatever its tokenizer.json says.
    """
    tokens = [*SPECIAL_TOKENS, *_CHARACTERS][:vocab_size]
    tokens += [f"<extra_{i}>" for i in range(vocab_size - len(tokens))]
    backend = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token=UNK)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A float32 value for one parameter: norms around 1, biases around 0, matrices 1/sqrt(in)."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1.0 + 0.3 * noise
    if name.endswith((".bias", "_bias", ".sinks")):
        return 0.3 * noise
    if name.endswith("embed_tokens.weight"):
        return 0.5 * noise
    return noise * shape[-1] ** -0.5


def save_tiny_model(
    folder: Path, config: PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a randomly initialised model with its tokenizer to ``folder``.

    No weight keeps a trivial value: norm weights are not all ones, biases are not zero. The
    values depend on ``seed`` and the parameters' order only, and are drawn in float32 before
    they are cast to ``dtype``. The folder has config.json, generation_config.json,
    model.safetensors, and the tokenizer's files with a chat template.
    """
    nested = config.get_text_config() is not config
    kind = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    model = kind.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape, generator))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # Of the size of differences between sigmoids, so that it changes some choices.
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    tiny_tokenizer(config.get_text_config().vocab_size).save_pretrained(folder)


def copy_with_config(
    source: Path, target: Path, *, drop: Sequence[str] = (), **fields: Any
) -> Path:
    """Copies a model folder; of its config.json, ``fields`` are set and those in ``drop`` gone."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if name not in drop}
    (target / "config.json").write_text(json.dumps(kept))
    return target
