"""What of a decoder's Hugging Face configuration decides its numbers, in one typed record."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_oprd.errors import UserError

# Fields that do not enter the forward pass of a decoder without dropout.
NEUTRAL_FIELDS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_flash_attn_2_enabled",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "max_position_embeddings",
        "max_window_layers",
        "model_max_length",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "vocab_size",
    }
)

# What transformers 4 wrote of generation_config.json into config.json as well.
GENERATION_FIELDS = frozenset(
    {
        "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
        "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
        "length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "min_p",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
        "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
        "suppress_tokens", "temperature", "tf_legacy_loss", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip

# Fields every family here reads into an `Architecture`.
READ_FIELDS = frozenset(
    {
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
    }
)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding.

    `megatron_oprd.models.rotary` computes with it. What a rope type does not use is None.

    Attributes:
        theta: Base of the frequencies.
        rope_type: ``default``, ``llama3`` or ``longrope``.
        partial_rotary_factor: Share of a head's dimensions that is rotated, the first ones.
        factor, low_freq_factor, high_freq_factor: llama3's.
        original_max_position_embeddings: llama3's and longrope's: length in tokens that the model
            was trained at before it was extended.
        short_factor, long_factor: longrope's: what each frequency is divided by, in runs with
            sequences of at most ``original_max_position_embeddings`` and in longer ones.
        attention_factor: longrope's: what cosine and sine are multiplied by.
    """

    theta: float
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    attention_factor: float = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """Dimensions of a head that are rotated."""
        return int(head_dim * self.partial_rotary_factor)


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """Gated MLPs of which a router chooses some for each token, in every layer.

    Attributes:
        num_experts: MLPs of a layer.
        num_experts_per_token: How many of them a token goes through.
        ffn_hidden_size: Width of each gated MLP.
        norm_topk_prob: Whether the chosen experts' probabilities are scaled to sum to one.
    """

    num_experts: int
    num_experts_per_token: int
    ffn_hidden_size: int
    norm_topk_prob: bool


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and gated SiLU.

    Attributes:
        family: The Hugging Face class, as in the configuration's ``architectures``.
        num_layers: Transformer layers.
        hidden_size: Width d of the hidden states.
        ffn_hidden_size: Width of the gated MLP; says nothing where there is a mixture of experts.
        num_attention_heads: Query heads.
        num_query_groups: Key/value heads.
        head_dim: Width of a head; heads times this need not be ``hidden_size``.
        vocab_size: Rows of the embedding, without padding.
        layernorm_epsilon: Epsilon of every RMSNorm.
        rope: Rotary position embedding.
        tied: Whether embedding and LM head share one weight.
        max_position_embeddings: Longest sequence the model was made for, in tokens.
        qkv_bias: Whether query, key and value projections have a bias.
        qk_norm: Whether each query and key head is RMS-normalised before the rotation.
        moe: The mixture of experts that is in the gated MLP's place; None is a dense model.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    layernorm_epsilon: float
    rope: Rope
    tied: bool
    max_position_embeddings: int
    qkv_bias: bool = False
    qk_norm: bool = False
    moe: MixtureOfExperts | None = None

    def padded_vocab_size(self, multiple: int) -> int:
        """The vocabulary rounded up to ``multiple`` rows."""
        return -(-self.vocab_size // multiple) * multiple


def check_fields(
    raw: dict[str, Any], *, required: dict[str, Callable[[Any], bool]], source: str
) -> None:
    """Refuses a configuration with a field that is not known to be harmless or handled.

    Args:
        raw: The contents of config.json.
        required: Fields that are handled for some values only, with the test of the value.
        source: The file, for messages.

    Raises:
        UserError: A field is unknown, or has a value that is not handled.
    """
    for field, value in raw.items():
        if value is None or field.startswith("unsloth_"):
            continue  # nothing is said; a note of the tool that wrote the folder
        if field in required:
            if not required[field](value):
                raise UserError(
                    f"{source}: {field} = {value!r} changes the model's numbers in a way that is "
                    "not supported here"
                )
        elif field not in NEUTRAL_FIELDS | GENERATION_FIELDS | READ_FIELDS:
            raise UserError(
                f"{source}: field {field!r} (value {value!r}) is not known here. It may change "
                "the model's numbers, so the model is refused rather than loaded wrongly"
            )


_ROPE_FIELDS = {
    "default": set(),
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "longrope": {"short_factor", "long_factor", "original_max_position_embeddings"},
}


def read_rope(
    hf_config: Any,
    source: str,
    *,
    head_dim: int,
    rope_types: tuple[str, ...],
    partial: bool = False,
) -> Rope:
    """Reads the rotary settings of a transformers configuration object.

    Args:
        hf_config: The configuration.
        source: Its file, for messages.
        head_dim: Width of a head.
        rope_types: The rope types that the model's class and this package compute alike.
        partial: Whether the model's class can rotate a part of each head only.

    Raises:
        UserError: The settings are not those of one of ``rope_types``, or incomplete.
    """
    parameters = {
        name: value for name, value in hf_config.rope_parameters.items() if value is not None
    }
    rope_type = parameters.pop("rope_type", "default")
    parameters.pop("type", None)  # the old name of rope_type, which transformers fills from it
    if "rope_theta" not in parameters:
        raise UserError(
            f"{source}: rope_parameters has {sorted(parameters)}, but no rope_theta; settings by "
            "layer type are not supported"
        )
    theta = parameters.pop("rope_theta")
    share = parameters.pop("partial_rotary_factor", 1.0)
    if share != 1.0 and not partial:
        raise UserError(f"{source}: partial_rotary_factor other than 1.0 is not supported")
    if rope_type not in rope_types:
        raise UserError(
            f"{source}: rope_type {rope_type!r} is not supported; supported are "
            f"{' and '.join(repr(name) for name in rope_types)}"
        )
    needed = _ROPE_FIELDS[rope_type]
    optional = {"factor", "attention_factor"} if rope_type == "longrope" else set()
    if not needed <= set(parameters) <= needed | optional:
        raise UserError(
            f"{source}: rope_type {rope_type!r} takes {sorted(needed)}, found {sorted(parameters)}"
        )
    if rope_type == "longrope":
        parameters = _longrope(parameters, int(head_dim * share), hf_config, source)
    return Rope(theta=theta, rope_type=rope_type, partial_rotary_factor=share, **parameters)


def _longrope(
    parameters: dict[str, Any], rotary_dim: int, hf_config: Any, source: str
) -> dict[str, Any]:
    """`Rope`'s fields for longrope; https://arxiv.org/abs/2402.13753 for the attention factor."""
    for name in ("short_factor", "long_factor"):
        if len(parameters[name]) != rotary_dim // 2:
            raise UserError(
                f"{source}: {name} has {len(parameters[name])} entries; {rotary_dim} rotated "
                f"dimensions need {rotary_dim // 2}"
            )
    original = parameters["original_max_position_embeddings"]
    ratio = hf_config.max_position_embeddings / original
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        # transformers 4 takes the ratio, transformers 5 the factor.
        if parameters.get("factor", ratio) != ratio:
            raise UserError(
                f"{source}: longrope's factor = {parameters['factor']} is not "
                "max_position_embeddings / original_max_position_embeddings = "
                f"{ratio}. Versions of transformers compute different numbers from this; set "
                "attention_factor"
            )
        stretch = math.log(ratio) / math.log(original) if ratio > 1 else 0.0
        attention_factor = math.sqrt(1 + stretch)
    return {
        "original_max_position_embeddings": original,
        "short_factor": tuple(float(factor) for factor in parameters["short_factor"]),
        "long_factor": tuple(float(factor) for factor in parameters["long_factor"]),
        "attention_factor": float(attention_factor),
    }
