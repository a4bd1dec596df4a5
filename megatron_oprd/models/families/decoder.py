"""Helpers of the family files: checks of fields, shared fields, numbered mappings."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import (
    ROPE_TYPES,
    Architecture,
    MixtureOfExperts,
    check_fields,
    read_rope,
)
from megatron_oprd.weights.mapping import Mapping

Check = Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family, as its file defines it."""

    name: str  # the Hugging Face class
    model_type: str  # in config.json; transformers builds the model that it names
    # Fields handled for some values only, with the check of the value. `models.architecture` lists
    # those that every family reads and those without an effect.
    fields: dict[str, Check]
    # (transformers configuration object, its file for messages) -> Architecture
    architecture: Callable[[Any, str], Architecture]
    # (architecture, padded vocabulary size) -> every parameter, in the order of the Hugging Face
    # model.
    mappings: Callable[[Architecture, int], list[Mapping]]
    # config.json -> beginnings of tensors' names that are no part of the model that is trained.
    unread: Callable[[dict[str, Any]], tuple[str, ...]] = lambda raw: ()
    # In the place of `model.` in names of tensors, where transformers has read the decoder out of a
    # folder with more parts and saved it; "": the names are the plain ones then, too.
    longer_prefix: str = ""
    # model_types of folders whose own code is that of this family's class.
    other_model_types: tuple[str, ...] = ()

    def check(self, raw: dict[str, Any], source: str) -> None:
        """Refuses a configuration that this family's model would not compute exactly."""
        if raw.get("model_type") != self.model_type:
            raise UserError(
                f"{source}: model_type = {raw.get('model_type')!r} does not fit {self.name}, "
                f"whose model_type is {self.model_type!r}"
            )
        check_fields(raw, required=self.fields, source=source)

    def under_its_model_type(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The same configuration for transformers' class, where a folder brings its own along."""
        if raw.get("model_type") not in self.other_model_types:
            return raw
        return raw | {"model_type": self.model_type}


def off(value: Any) -> bool:
    """Whether a field is false, 0 or empty."""
    return not value


def on(value: Any) -> bool:
    """Whether a field is true; 1 is not."""
    return value is True


def anything(value: Any) -> bool:
    """Accepts every value of a field."""
    return True


def equals(wanted: Any) -> Check:
    """A check for one value."""
    return lambda value: value == wanted


LAYER_TYPES = ("full_attention", "sliding_attention")


def full_attention_only(layer_types: list[str] | None) -> bool:
    """Whether no layer uses a sliding window."""
    return not layer_types or set(layer_types) == {"full_attention"}


# These fields take the same values in every family.
SHARED_FIELDS: dict[str, Check] = {
    "hidden_act": equals("silu"),
    "attention_dropout": off,
    "rope_interleaved": off,
    # Written by other tools, or read by code that all models of transformers share.
    "layer_types": full_attention_only,
    "is_causal": on,
    # Without it transformers' own models fail: they return tuples to themselves.
    "return_dict": on,
    # These say nothing where they are off, 0 or empty.
    **dict.fromkeys(
        (
            "shared_expert_intermediate_size", "num_shared_experts", "n_shared_experts",
            "num_nextn_predict_layers", "router_jitter_noise", "use_mrope", "is_encoder_decoder",
            "add_cross_attention", "tie_encoder_decoder", "torchscript", "use_bfloat16",
            "pruned_heads", "per_layer_config",
        ),
        off,
    ),
}  # fmt: skip


def read_shared(config: Any, source: str, *, ffn_hidden_size: int | None = None) -> dict[str, Any]:
    """Reads the arguments of `Architecture` that stand in the same fields in every family.

    ``ffn_hidden_size`` stands in the place of ``intermediate_size``, which a class may not have.

    Raises:
        UserError: num_attention_heads is not a multiple of num_key_value_heads.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise UserError(
            f"{source}: num_attention_heads = {heads} is not a multiple of "
            f"num_key_value_heads = {groups}"
        )
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": (
            config.intermediate_size if ffn_hidden_size is None else ffn_hidden_size
        ),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
        "layernorm_epsilon": config.rms_norm_eps,
        "tied": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        **_dynamic_length_field(config.rope_parameters),
    }


def _dynamic_length_field(rope: dict[str, Any]) -> dict[str, str]:
    """Why sequences are no longer, where rotations change with the length."""
    types = {rope.get("rope_type")} | {
        kind.get("rope_type") for kind in rope.values() if isinstance(kind, dict)
    }
    if "dynamic" not in types:
        return {}
    return {
        "length_field": (
            "max_position_embeddings, past which rope_type 'dynamic' changes all rotations with "
            "the sequence's length, which is not supported"
        )
    }


def read_windows(config: Any, source: str, *, by_layer: bool) -> dict[str, Any]:
    """Reads the arguments of `Architecture` on sliding windows.

    A window that is too long to have an effect is none. ``by_layer``: the model's class reads
    ``layer_types``; in other classes every layer slides.

    Raises:
        UserError: The fields contradict each other.
    """
    window = config.sliding_window
    if by_layer:
        kinds = config.layer_types
        if len(kinds) != config.num_hidden_layers or not set(kinds) <= set(LAYER_TYPES):
            raise UserError(
                f"{source}: layer_types = {kinds} has to have {config.num_hidden_layers} entries "
                f"(num_hidden_layers) of {' and '.join(LAYER_TYPES)}"
            )
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
        if any(sliding) and window is None:
            raise UserError(
                f"{source}: layer_types has sliding_attention, but no window is set; give "
                "sliding_window, and use_sliding_window = true"
            )
    else:
        sliding = (True,) * config.num_hidden_layers
    if getattr(config, "use_sliding_window", False) and window is None:
        raise UserError(f"{source}: use_sliding_window = true needs a sliding_window, found null")
    if window is None or window >= config.max_position_embeddings or not any(sliding):
        return {}
    if window < 1:
        raise UserError(f"{source}: sliding_window = {window} has to be at least 1")
    return {"sliding_window": window, "sliding_layers": sliding}


def read_softcap(config: Any, source: str, field: str) -> float | None:
    """Reads a softcap of `Architecture`; None: there is none.

    Raises:
        UserError: It is not above 0.
    """
    cap = getattr(config, field)
    if cap is not None and cap <= 0:
        raise UserError(f"{source}: {field} = {cap} has to be above 0; null is no softcap")
    return None if cap is None else float(cap)


def own_code_of(**classes: str) -> Check:
    """A check of ``auto_map``: the code in the folder has the names of transformers' classes."""
    return lambda auto_map: all(
        str(path).rpartition(".")[2] == classes.get(name) for name, path in auto_map.items()
    )


def read_windows_with_ropes(config: Any, source: str, *, head_dim: int) -> dict[str, Any]:
    """Reads the arguments of `Architecture` on windows, and on a rotation of each kind of layers.

    Raises:
        UserError: The fields contradict each other.
    """
    windows = read_windows(config, source, by_layer=True)
    ropes = {
        kind: read_rope(config, source, head_dim=head_dim, rope_types=ROPE_TYPES, layer_type=kind)
        for kind in LAYER_TYPES
    }
    if not windows and len({ropes[kind] for kind in config.layer_types}) > 1:
        raise UserError(
            f"{source}: sliding_window = {config.sliding_window} has to be below "
            f"max_position_embeddings = {config.max_position_embeddings}, since layers with the "
            "window have a rope of their own"
        )
    if not windows:
        return {"rope": ropes[config.layer_types[0]]}
    others, sliding = ropes["full_attention"], ropes["sliding_attention"]
    return {**windows, "rope": others, "sliding_rope": sliding if sliding != others else None}


def check_experts(experts: int, chosen: int, source: str, *, field: str) -> None:
    """Refuses a router that normalises its probabilities and has less than two experts to choose.

    ``field`` has the number of experts.
    """
    if not 2 <= chosen <= experts:
        raise UserError(
            f"{source}: num_experts_per_tok = {chosen} is not between 2 and the {experts} experts "
            f"({field}); with one the router would not train"
        )


def read_groups(config: Any, source: str) -> tuple[int, int]:
    """Reads the numbers of groups of experts, and of those that a token chooses.

    Raises:
        UserError: The numbers do not fit each other, or Megatron would rank groups otherwise than
            transformers.
    """
    groups, chosen_groups = config.n_group, config.topk_group
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    if groups < 1 or experts % groups or not 1 <= chosen_groups <= groups:
        raise UserError(
            f"{source}: n_group = {groups} and topk_group = {chosen_groups} do not fit the "
            f"{experts} experts: n_group has to divide them, and topk_group to be from 1 to n_group"
        )
    # All groups are chosen, so that groups have no effect.
    if chosen_groups == groups:
        return 1, 1
    if chosen > chosen_groups * (experts // groups):
        raise UserError(
            f"{source}: topk_group = {chosen_groups} groups of n_group = {groups} have "
            f"{chosen_groups * (experts // groups)} experts, fewer than num_experts_per_tok = "
            f"{chosen}"
        )
    # transformers ranks groups by their two best experts, Megatron by so many as come on each.
    if chosen // chosen_groups != 2:
        raise UserError(
            f"{source}: num_experts_per_tok = {chosen} with topk_group = {chosen_groups} is not "
            "supported: there have to be two experts for each chosen group"
        )
    return groups, chosen_groups


def read_experts(config: Any, source: str) -> dict[str, Any]:
    """Reads the arguments of `MixtureOfExperts` that stand in Qwen's fields.

    Raises:
        UserError: A number is missing or does not fit, or the router would not train.
    """
    experts, chosen = config.num_experts, config.num_experts_per_tok
    if experts is None or chosen is None:
        raise UserError(
            f"{source} has num_experts = {experts} and num_experts_per_tok = {chosen}; both have "
            "to be numbers (a null num_local_experts counts before num_experts: remove it)"
        )
    if not 1 <= chosen <= experts:
        raise UserError(
            f"{source}: num_experts_per_tok = {chosen} is not between 1 and the {experts} experts "
            "(num_experts or num_local_experts)"
        )
    if chosen == 1 and config.norm_topk_prob:
        raise UserError(
            f"{source}: norm_topk_prob = true with num_experts_per_tok = 1 makes every "
            "probability 1, and the router would not train; it is not supported"
        )
    return {
        "num_experts": experts,
        "num_experts_per_token": chosen,
        "ffn_hidden_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
    }


def layers_behind_the_last(raw: dict[str, Any], count: int) -> tuple[str, ...]:
    """Beginnings of the names of layers that predict further tokens: `Family.unread`."""
    last = raw["num_hidden_layers"]
    return tuple(f"model.layers.{layer}." for layer in range(last, last + count))


def each_layer(
    a: Architecture, mappings: Sequence[Mapping], *, layers: range | None = None
) -> list[Mapping]:
    """The mappings of all layers, or of ``layers``, with numbers in the place of ``{layer}``."""
    return [
        _numbered(mapping, "{layer}", layer)
        for layer in (range(a.num_layers) if layers is None else layers)
        for mapping in mappings
    ]


def each_expert(moe: MixtureOfExperts, mappings: Sequence[Mapping]) -> list[Mapping]:
    """The mappings of every expert of a layer, with its number in the place of ``{expert}``."""
    return [
        dataclasses.replace(
            _numbered(mapping, "{expert}", expert), expert=expert, num_experts=moe.num_experts
        )
        for expert in range(moe.num_experts)
        for mapping in mappings
    ]


def _numbered(mapping: Mapping, placeholder: str, number: int) -> Mapping:
    def fill(name: str) -> str:
        # Without a number every layer or expert would read the same tensor.
        assert placeholder in name, f"{name} has no {placeholder}"
        return name.replace(placeholder, str(number))

    return dataclasses.replace(
        mapping,
        megatron=fill(mapping.megatron),
        hf={fill(name): shape for name, shape in mapping.hf.items()},
    )
