"""What the dense families share: decoder layers of RMSNorm, rotary GQA and a gated SiLU MLP."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture, check_fields, read_rope
from megatron_oprd.weights.mapping import (
    QKV,
    Copy,
    GatedMLP,
    Mapping,
    RowSplit,
    Shape,
    Vocabulary,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    Attributes:
        name: The Hugging Face class.
        model_type: Its configuration's name; transformers builds the model that this names.
        qkv_bias: Whether query, key and value projections have a bias.
        qk_norm: Whether query and key heads are normalised.
        required: The family's own fields that are handled for some values only.
    """

    name: str
    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
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
        return Architecture(
            family=self.name,
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            ffn_hidden_size=hf_config.intermediate_size,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
            vocab_size=hf_config.vocab_size,
            layernorm_epsilon=hf_config.rms_norm_eps,
            rope=read_rope(hf_config, source),
            tied=hf_config.tie_word_embeddings,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            max_position_embeddings=hf_config.max_position_embeddings,
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
    h, f = a.hidden_size, a.ffn_hidden_size
    q_rows, kv_rows = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
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
            hf={
                f"{self_attn}.q_proj.weight": (q_rows, h),
                f"{self_attn}.k_proj.weight": (kv_rows, h),
                f"{self_attn}.v_proj.weight": (kv_rows, h),
            },
            **heads,
        ),
    ]
    if a.qkv_bias:
        mappings.append(
            QKV(
                megatron=f"{attention}.linear_qkv.bias",
                hf={
                    f"{self_attn}.q_proj.bias": (q_rows,),
                    f"{self_attn}.k_proj.bias": (kv_rows,),
                    f"{self_attn}.v_proj.bias": (kv_rows,),
                },
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
    mappings += [
        RowSplit(
            megatron=f"{attention}.linear_proj.weight",
            hf={f"{self_attn}.o_proj.weight": (h, q_rows)},
        ),
        Copy(
            megatron=f"{megatron}.mlp.linear_fc1.layer_norm_weight",
            hf={f"{hf}.post_attention_layernorm.weight": (h,)},
        ),
        GatedMLP(
            megatron=f"{megatron}.mlp.linear_fc1.weight",
            hf={
                f"{hf}.mlp.gate_proj.weight": (f, h),
                f"{hf}.mlp.up_proj.weight": (f, h),
            },
        ),
        RowSplit(
            megatron=f"{megatron}.mlp.linear_fc2.weight",
            hf={f"{hf}.mlp.down_proj.weight": (h, f)},
        ),
    ]
    return mappings
