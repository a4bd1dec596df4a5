"""What of a decoder's Hugging Face configuration decides its numbers, in one typed record."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_oprd.errors import UserError

# Fields that do not enter the forward pass of a decoder without dropout.
NEUTRAL_FIELDS = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "is_llama_config",
        "max_position_embeddings",
        "max_window_layers",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "vocab_size",
    }
)

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

    Attributes:
        theta: Base of the frequencies.
        rope_type: ``default`` or ``llama3``.
        factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: llama3's four
            numbers; None for ``default``.
    """

    theta: float
    rope_type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and gated SiLU.

    Attributes:
        family: The Hugging Face class, as in the configuration's ``architectures``.
        num_layers: Transformer layers.
        hidden_size: Width d of the hidden states.
        ffn_hidden_size: Width of the gated MLP.
        num_attention_heads: Query heads.
        num_query_groups: Key/value heads.
        head_dim: Width of a head; heads times this need not be ``hidden_size``.
        vocab_size: Rows of the embedding, without padding.
        layernorm_epsilon: Epsilon of every RMSNorm.
        rope: Rotary position embedding.
        tied: Whether embedding and LM head share one weight.
        qkv_bias: Whether query, key and value projections have a bias.
        qk_norm: Whether each query and key head is RMS-normalised before the rotation.
        max_position_embeddings: Longest sequence the model was made for, in tokens.
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
    qkv_bias: bool
    qk_norm: bool
    max_position_embeddings: int

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
        if field in required:
            if not required[field](value):
                raise UserError(
                    f"{source}: {field} = {value!r} changes the model's numbers in a way that is "
                    "not supported here"
                )
        elif field not in NEUTRAL_FIELDS and field not in READ_FIELDS:
            raise UserError(
                f"{source}: field {field!r} (value {value!r}) is not known here. It may change "
                "the model's numbers, so the model is refused rather than loaded wrongly"
            )


def read_rope(hf_config: Any, source: str) -> Rope:
    """Reads the rotary settings of a transformers configuration object.

    Raises:
        UserError: The rope type is neither ``default`` nor ``llama3``, or it is partial.
    """
    parameters = dict(hf_config.rope_parameters)
    rope_type = parameters.pop("rope_type", "default")
    parameters.pop("type", None)  # the old name of rope_type, which transformers fills from it
    theta = parameters.pop("rope_theta")
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{source}: partial_rotary_factor other than 1.0 is not supported")
    if rope_type == "default":
        allowed: set[str] = set()
    elif rope_type == "llama3":
        allowed = {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        }
    else:
        raise UserError(
            f"{source}: rope_type {rope_type!r} is not supported; supported are 'default' and "
            "'llama3'"
        )
    if set(parameters) != allowed:
        raise UserError(
            f"{source}: rope_type {rope_type!r} takes {sorted(allowed)}, found {sorted(parameters)}"
        )
    return Rope(theta=theta, rope_type=rope_type, **parameters)
