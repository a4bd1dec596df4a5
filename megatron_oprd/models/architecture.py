"""Typed record of the Hugging Face configuration fields that determine a decoder's numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_oprd.errors import UserError

# Fields without an effect on the forward pass of a decoder without dropout. All other unknown
# fields are refused.
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

# Fields of generation_config.json, which transformers 4 also wrote into config.json.
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

# Fields that every family reads into an `Architecture`.
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
    """Rotary position embedding; fields that a rope type does not use are None."""

    theta: float  # base of the frequencies
    rope_type: str = "default"  # "default", "dynamic", "linear", "llama3", "yarn" or "longrope"
    partial_rotary_factor: float = 1.0  # rotating share of a head's dimensions, from the first
    # Whether neighbours are the two dimensions of a pair; otherwise each is in one half.
    interleaved: bool = False
    # linear, llama3 and yarn: divisor of (slow) frequencies. dynamic: without an effect up to
    # max_position_embeddings tokens.
    factor: float | None = None
    # llama3 only.
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    # llama3, yarn and longrope: training length in tokens, before the extension.
    original_max_position_embeddings: int | None = None
    # yarn only: turns over the training length, above which a frequency is kept and below which it
    # is divided by `factor`; then whether the dimensions with these many turns are rounded outwards
    # to whole ones.
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    # longrope only: divisors of the frequencies for runs whose longest sequence is within
    # original_max_position_embeddings, and for runs with longer ones.
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    attention_factor: float = 1.0  # yarn and longrope: factor on cosine and sine

    def rotary_dim(self, head_dim: int) -> int:
        """The number of dimensions of a head that rotate."""
        return int(head_dim * self.partial_rotary_factor)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What a gated MLP makes of gate and up: function(gate) * (up + offset)."""

    # "silu"; "gelu_tanh": GELU with tanh in the place of erf; "quick_gelu": x * sigmoid(1.702 x).
    function: str = "silu"
    up_offset: float = 0.0
    # Gates are at most this, and ups are between this and its negative; None: as they come.
    clamp: float | None = None


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """Gated MLPs with a router that picks some for each token."""

    num_experts: int  # per layer
    num_experts_per_token: int
    ffn_hidden_size: int  # of each expert
    norm_topk_prob: bool  # scales the chosen experts' probabilities to sum to one
    # Of an expert that every token goes through, in addition; None: there is none.
    shared_ffn_hidden_size: int | None = None
    shared_expert_gate: bool = False  # scales its output with the sigmoid of a linear layer's
    # Each expert's probability is a sigmoid in fp32 instead of a softmax over all, and a bias of
    # each expert counts in the choice, not in the probability.
    sigmoid_router: bool = False
    routed_scaling_factor: float = 1.0  # on the chosen experts' probabilities
    first_dense_layers: int = 0  # so many layers from the first have a gated MLP instead
    # Of so many groups of experts, one behind the other, a token chooses those with the largest
    # sums of their two best experts' probabilities, and experts in these groups only.
    num_groups: int = 1
    num_groups_per_token: int = 1


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: heads are made of narrow states, which are normalised."""

    query_rank: int | None  # width of the queries' narrow state; None: made of the hidden state
    key_value_rank: int  # width of the narrow state of keys and values
    # A query or key head has dimensions without rotation, then some with rotation. Of keys, all
    # heads share the latter.
    unrotated_dim: int
    rotated_dim: int
    value_dim: int  # of a value head
    norm_epsilon: float  # of the narrow states' norms


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Gated DeltaNet: linear attention whose state is corrected by each token's value."""

    num_key_heads: int  # and as many query heads
    values_per_key: int  # value heads of each key head
    key_dim: int  # of a query or key head
    value_dim: int  # of a value head
    kernel_size: int  # tokens of the convolution over queries, keys and values

    @property
    def channels_per_key(self) -> int:
        """Dimensions of a query, its key and their values together."""
        return 2 * self.key_dim + self.values_per_key * self.value_dim


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder with RMSNorm, rotary positions, grouped-query attention and gated MLPs."""

    family: str  # the Hugging Face class in `architectures`
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of the gated MLP; without meaning if all layers have experts
    num_attention_heads: int  # query heads
    num_query_groups: int  # key/value heads
    head_dim: int  # of queries and keys; heads x head_dim need not equal hidden_size
    vocab_size: int  # without padding
    layernorm_epsilon: float
    rope: Rope
    tied: bool  # embedding and LM head share one weight
    max_position_embeddings: int  # tokens of the longest sequence
    length_field: str = "max_position_embeddings"  # the configuration's field that sets this limit
    qkv_bias: bool = False
    output_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False  # of the gated MLPs, or of the router and the experts
    attention_sinks: bool = False  # a learned logit of each head in the softmax's denominator
    activation: Activation = Activation()  # of the gated MLPs
    qk_norm: bool = False  # RMSNorm of each query and key head, before the rotation
    qk_norm_over_all_heads: bool = False  # with qk_norm: one norm of all heads together
    latent: Latent | None = None  # replaces the projections of queries, keys and values
    attention_gate: bool = False  # sigmoids of a projection of the input scale attention's output
    # In the place of attention, and for each layer whether it is there. None and () without.
    delta: DeltaNet | None = None
    delta_layers: tuple[bool, ...] = ()
    zero_centered_norms: bool = False  # norms multiply with 1 + their weight
    pre_norms: bool = True  # RMSNorm of the inputs of attention and MLP
    moe: MixtureOfExperts | None = None  # replaces the gated MLPs; None: dense
    # Latest positions that a token attends to, itself included, and for each layer whether it has
    # this window. None and () without one that is shorter than max_position_embeddings.
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    sliding_rope: Rope | None = None  # of layers with the window; None: `rope`, as of the others
    # For each layer whether its queries and keys are rotated; () where all are.
    rotated_layers: tuple[bool, ...] = ()
    softmax_scale: float | None = None  # on attention's scores; None: 1 / sqrt(head_dim)
    score_softcap: float | None = None  # c: scores are c tanh(score / c); None: as they come
    embedding_multiplier: float = 1.0  # on the embedding's output
    rounds_embedding_multiplier: bool = False  # to the dtype of the weights
    residual_multiplier: float = 1.0  # on outputs of attention and MLP, before they are added
    logits_divisor: float = 1.0  # of the LM head's output
    logits_softcap: float | None = None  # as score_softcap, of the divided output
    post_norms: bool = False  # RMSNorm of the outputs of attention and MLP, before they are added

    @property
    def value_dim(self) -> int:
        """The width of a value head."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def rotary_dim(self) -> int:
        """The number of dimensions of a query or key head that rotate."""
        return self.rope.rotary_dim(
            self.head_dim if self.latent is None else self.latent.rotated_dim
        )

    def has_delta_net(self, layer: int) -> bool:
        """Whether a layer, from 0, has a gated DeltaNet in the place of its attention."""
        return bool(self.delta_layers) and self.delta_layers[layer]

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, from 0, has experts in the place of its MLP."""
        return self.moe is not None and layer >= self.moe.first_dense_layers

    def num_with_experts(self, layers: Sequence[int]) -> int:
        """How many of some layers have experts."""
        return sum(map(self.has_experts, layers))

    def padded_vocab_size(self, multiple: int) -> int:
        """The vocabulary rounded up to ``multiple`` rows."""
        return -(-self.vocab_size // multiple) * multiple


def check_fields(
    raw: dict[str, Any], *, required: dict[str, Callable[[Any], bool]], source: str
) -> None:
    """Refuses fields whose effect on the model's numbers is unknown or not handled.

    Raises `UserError` for an unknown field, or a value that its test in ``required`` rejects.
    """
    # None sets nothing, and unsloth_* are notes of the tool that wrote the folder.
    for field, value in raw.items():
        if value is None or field.startswith("unsloth_"):
            continue
        if field in required:
            if not required[field](value):
                raise UserError(
                    f"{source} has {field} = {value!r}, which changes the model's numbers in a "
                    "way that is not supported"
                )
        elif field not in NEUTRAL_FIELDS | GENERATION_FIELDS | READ_FIELDS:
            raise UserError(
                f"{source} has the field {field!r} (value {value!r}), which this package does not "
                "know. It may change the model's numbers, so the model is refused rather than "
                "loaded wrongly"
            )


# The rope types of all classes but Phi-3's.
ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "yarn")
_ROPE_FIELDS: dict[str, set[str]] = {
    "default": set(),
    "dynamic": {"factor"},
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "longrope": {"short_factor", "long_factor", "original_max_position_embeddings"},
}
# Fields with a default. Of longrope's, the two lengths imply `factor`.
_OPTIONAL_ROPE_FIELDS: dict[str, set[str]] = {
    "yarn": {
        "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    },
    "longrope": {"factor", "attention_factor"},
}  # fmt: skip
# Written into published configurations, and read neither by transformers nor by rollout engines.
_UNREAD_ROPE_FIELDS = {"yarn": {"attn_factor", "finetuned"}}


def read_rope(
    hf_config: Any,
    source: str,  # the file, for messages
    *,
    head_dim: int,
    rope_types: tuple[str, ...],  # computed alike by the model's class and this package
    partial: bool = False,  # the model's class can rotate a part of each head
    interleaved: bool = False,  # the model's class pairs neighbours
    layer_type: str | None = None,  # the kind of layers to read, where kinds have their own
    beside: tuple[str, ...] = (),  # fields among the rotary ones that the family reads itself
) -> Rope:
    """Reads the rotary settings of a transformers configuration object.

    Raises `UserError` if they are incomplete or not of a type in ``rope_types``.
    """
    written = hf_config.rope_parameters
    if layer_type is not None:
        of_all = [name for name, value in written.items() if not isinstance(value, dict)]
        if of_all:
            raise UserError(
                f"{source}: rope_parameters has {of_all} beside the kinds of layers; each kind has "
                "to have its own"
            )
        written = written[layer_type]
    parameters = {name: value for name, value in written.items() if value is not None}
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
        raise UserError(
            f"{source}: partial_rotary_factor = {share} is not supported for this model; it has "
            "to be 1.0"
        )
    if rope_type not in rope_types:
        raise UserError(
            f"{source}: rope_type {rope_type!r} is not supported; supported are "
            f"{' and '.join(repr(name) for name in rope_types)}"
        )
    needed, optional = _ROPE_FIELDS[rope_type], _OPTIONAL_ROPE_FIELDS.get(rope_type, set())
    for name in _UNREAD_ROPE_FIELDS.get(rope_type, set()).union(beside):
        parameters.pop(name, None)
    if not needed <= set(parameters) <= needed | optional:
        raise UserError(
            f"{source}: rope_parameters of type {rope_type!r} has {sorted(parameters)}; it has to "
            f"have {sorted(needed)}"
            + (f" and may have {sorted(optional)}" if rope_type == "yarn" else "")
        )
    if rope_type == "longrope":
        parameters = _longrope(parameters, int(head_dim * share), hf_config, source)
    if rope_type == "yarn":
        parameters = _yarn(parameters)
    return Rope(
        theta=theta,
        rope_type=rope_type,
        partial_rotary_factor=share,
        interleaved=interleaved,
        **parameters,
    )


def yarn_stretch(factor: float, mscale: float) -> float:
    """What YaRN multiplies queries and keys with, for longer sequences by ``factor``."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(parameters: dict[str, Any]) -> dict[str, Any]:
    """Reads `Rope`'s yarn fields (https://arxiv.org/abs/2309.00071), as transformers does."""
    factor = parameters["factor"]
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    attention_factor = parameters.get("attention_factor")

    if attention_factor is None:
        # One of the two alone counts for nothing.
        attention_factor = yarn_stretch(factor, 1)
        if mscale and mscale_all_dim:
            attention_factor = yarn_stretch(factor, mscale) / yarn_stretch(factor, mscale_all_dim)
    return {
        "factor": factor,
        "original_max_position_embeddings": parameters["original_max_position_embeddings"],
        "attention_factor": float(attention_factor),
        "beta_fast": parameters.get("beta_fast") or 32,
        "beta_slow": parameters.get("beta_slow") or 1,
        "truncate": parameters.get("truncate", True),
    }


def _longrope(
    parameters: dict[str, Any], rotary_dim: int, hf_config: Any, source: str
) -> dict[str, Any]:
    """Reads `Rope`'s longrope fields; attention factor from https://arxiv.org/abs/2402.13753."""
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
        # transformers 4 computes the default from the ratio, transformers 5 from the factor.
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
