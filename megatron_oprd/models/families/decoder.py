"""What the families share: decoder layers of RMSNorm, rotary GQA and gated SiLU MLPs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import (
    Architecture,
    MixtureOfExperts,
    check_fields,
    read_rope,
)
from megatron_oprd.weights.mapping import (
    QKV,
    Copy,
    GatedMLP,
    Mapping,
    RowSplit,
    Shape,
    Vocabulary,
)

# Fields that say nothing where they are off, 0 or empty.
_OFF_FIELDS = (
    "shared_expert_intermediate_size", "num_shared_experts", "n_shared_experts",
    "num_nextn_predict_layers", "router_jitter_noise", "use_mrope", "is_encoder_decoder",
    "add_cross_attention", "tie_encoder_decoder", "torchscript", "use_bfloat16", "pruned_heads",
    "per_layer_config",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    Attributes:
        name: The Hugging Face class.
        model_type: Its configuration's name; transformers builds the model that this names.
        qkv_bias: Whether query, key and value projections have a bias.
        qk_norm: Whether query and key heads are normalised.
        fused_projections: Whether query, key and value are one tensor, and gate and up another.
        slides: Whether every layer attends to the last ``sliding_window`` positions only, where
            the configuration or its class sets that.
        rope_types: The rope types that the Hugging Face class and this package compute alike.
        partial_rotary: Whether the Hugging Face class can rotate a part of each head only.
        moe: Reads the mixture of experts from a transformers configuration object (with the
            configuration's file, for messages); None for a dense family.
        required: The family's own fields that are handled for some values only.
    """

    name: str
    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    fused_projections: bool = False
    slides: bool = False
    rope_types: tuple[str, ...] = ("default", "llama3")
    partial_rotary: bool = False
    moe: Callable[[Any, str], MixtureOfExperts] | None = None
    required: dict[str, Callable[[Any], bool]] = field(default_factory=dict)

    def check(self, raw: dict[str, Any], source: str) -> None:
        """Refuses a configuration that this family's model would not compute exactly."""
        if raw.get("model_type") != self.model_type:
            raise UserError(
                f"{source}: model_type = {raw.get('model_type')!r}; {self.name} has "
                f"{self.model_type!r}"
            )
        check_fields(
            raw,
            required={
                "hidden_act": lambda value: value == "silu",
                "attention_dropout": lambda value: not value,
                "rope_interleaved": lambda value: not value,
                # Written by other tools, or read by code that all models of transformers share.
                "qkv_bias": lambda value: value == self.qkv_bias,
                "use_qk_norm": lambda value: value == self.qk_norm,
                "layer_types": full_attention_only,
                "is_causal": lambda value: value is True,
                # Without it transformers' own models fail: they return tuples to themselves.
                "return_dict": lambda value: value is True,
                **dict.fromkeys(_OFF_FIELDS, lambda value: not value),
                # `architecture` looks at its value.
                **({"sliding_window": lambda value: True} if self.slides else {}),
                **self.required,
            },
            source=source,
        )

    def architecture(self, hf_config: Any, source: str) -> Architecture:
        """Translates a transformers configuration object."""
        heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads
        if heads % groups:
            raise UserError(
                f"{source}: num_attention_heads = {heads} is not a multiple of "
                f"num_key_value_heads = {groups}"
            )
        window = hf_config.sliding_window if self.slides else None
        if window is not None and window < hf_config.max_position_embeddings:
            raise UserError(
                f"{source}: sliding_window = {window} (as written, or the default of "
                f"{self.model_type}) is shorter than max_position_embeddings = "
                f"{hf_config.max_position_embeddings}. Sliding windows are not supported; "
                "sliding_window has to be null, or too long to have an effect"
            )
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        return Architecture(
            family=self.name,
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            ffn_hidden_size=hf_config.intermediate_size,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            vocab_size=hf_config.vocab_size,
            layernorm_epsilon=hf_config.rms_norm_eps,
            rope=read_rope(
                hf_config,
                source,
                head_dim=head_dim,
                rope_types=self.rope_types,
                partial=self.partial_rotary,
            ),
            tied=hf_config.tie_word_embeddings,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            fused_projections=self.fused_projections,
            max_position_embeddings=hf_config.max_position_embeddings,
            moe=self.moe(hf_config, source) if self.moe is not None else None,
        )


def full_attention_only(layer_types: list[str] | None) -> bool:
    """Whether no layer uses a sliding window."""
    return not layer_types or set(layer_types) == {"full_attention"}


def mapping_table(architecture: Architecture, *, padded_vocab_size: int) -> list[Mapping]:
    """Every parameter of the model, in the order of the Hugging Face model's own tensors."""
    a = architecture
    h = a.hidden_size

    def weight(name: str, *shape: int) -> dict[str, Shape]:
        return {name: shape}

    table: list[Mapping] = [
        Vocabulary(
            megatron="embedding.word_embeddings.weight",
            hf=weight("model.embed_tokens.weight", a.vocab_size, h),
            padded_vocab_size=padded_vocab_size,
        )
    ]
    for layer in range(a.num_layers):
        table += _layer_mappings(a, f"decoder.layers.{layer}", f"model.layers.{layer}")
    table.append(Copy(megatron="decoder.final_layernorm.weight", hf=weight("model.norm.weight", h)))
    if not a.tied:
        table.append(
            Vocabulary(
                megatron="output_layer.weight",
                hf=weight("lm_head.weight", a.vocab_size, h),
                padded_vocab_size=padded_vocab_size,
            )
        )
    return table


def _layer_mappings(a: Architecture, megatron: str, hf: str) -> list[Mapping]:
    h = a.hidden_size
    attention, self_attn = f"{megatron}.self_attention", f"{hf}.self_attn"
    heads = {
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "head_dim": a.head_dim,
    }
    mappings: list[Mapping] = [
        Copy(
            megatron=f"{attention}.linear_qkv.layer_norm_weight",
            hf={f"{hf}.input_layernorm.weight": (h,)},
        ),
        QKV(
            megatron=f"{attention}.linear_qkv.weight",
            hf=_qkv_tensors(a, self_attn, "weight", h),
            **heads,
        ),
    ]
    if a.qkv_bias:
        mappings.append(
            QKV(
                megatron=f"{attention}.linear_qkv.bias",
                hf=_qkv_tensors(a, self_attn, "bias"),
                **heads,
            )
        )
    if a.qk_norm:
        mappings += [
            Copy(
                megatron=f"{attention}.{part}_layernorm.weight",
                hf={f"{self_attn}.{part}_norm.weight": (a.head_dim,)},
            )
            for part in ("q", "k")
        ]
    mappings.append(
        RowSplit(
            megatron=f"{attention}.linear_proj.weight",
            hf={f"{self_attn}.o_proj.weight": (h, a.num_attention_heads * a.head_dim)},
        )
    )
    if a.moe is None:
        mappings += _mlp_mappings(
            h, a.ffn_hidden_size, f"{megatron}.mlp", f"{hf}.mlp", fused=a.fused_projections
        )
    else:
        mappings += _moe_mappings(h, a.moe, f"{megatron}.mlp", f"{hf}.mlp")
    # Transformer Engine fuses this norm into a dense MLP's first layer, not into the experts'.
    norm = "mlp.linear_fc1.layer_norm_weight" if a.moe is None else "pre_mlp_layernorm.weight"
    mappings.append(
        Copy(megatron=f"{megatron}.{norm}", hf={f"{hf}.post_attention_layernorm.weight": (h,)})
    )
    return mappings


def _qkv_tensors(a: Architecture, self_attn: str, kind: str, *trailing: int) -> dict[str, Shape]:
    """Weights or biases of query, key and value, three tensors or one."""
    groups = a.num_query_groups * a.head_dim
    rows = {"q": a.num_attention_heads * a.head_dim, "k": groups, "v": groups}
    if a.fused_projections:
        rows = {"qkv": sum(rows.values())}
    return {f"{self_attn}.{part}_proj.{kind}": (count, *trailing) for part, count in rows.items()}


def _moe_mappings(h: int, moe: MixtureOfExperts, megatron: str, hf: str) -> list[Mapping]:
    mappings: list[Mapping] = [
        Copy(
            megatron=f"{megatron}.router.weight",
            hf={f"{hf}.gate.weight": (moe.num_experts, h)},
        )
    ]
    for expert in range(moe.num_experts):
        mappings += _mlp_mappings(
            h,
            moe.ffn_hidden_size,
            f"{megatron}.experts.experts.{expert}",
            f"{hf}.experts.{expert}",
            expert=expert,
            num_experts=moe.num_experts,
        )
    return mappings


def _mlp_mappings(
    h: int,
    f: int,
    megatron: str,
    hf: str,
    *,
    fused: bool = False,
    expert: int | None = None,
    num_experts: int | None = None,
) -> list[Mapping]:
    """A gated MLP, which may be an expert."""
    parts = {"gate": f, "up": f} if not fused else {"gate_up": 2 * f}
    return [
        GatedMLP(
            megatron=f"{megatron}.linear_fc1.weight",
            hf={f"{hf}.{part}_proj.weight": (rows, h) for part, rows in parts.items()},
            expert=expert,
            num_experts=num_experts,
        ),
        RowSplit(
            megatron=f"{megatron}.linear_fc2.weight",
            hf={f"{hf}.down_proj.weight": (h, f)},
            expert=expert,
            num_experts=num_experts,
        ),
    ]
