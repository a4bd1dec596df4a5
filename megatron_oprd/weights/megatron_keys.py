"""Names of a parameter of one layer or expert in Megatron's `torch_dist` checkpoints.

By default all layers of a model share one tensor with a leading dimension of layers, and all
experts of a layer share one, too. Models with unequal layers, and our training, store each layer
under its own name. Megatron's option singleton_local_shards also does so for experts:

    decoder.layers.mlp.linear_fc1.weight                     [layers, rows, columns]
    decoder.layers.3.mlp.linear_fc1.weight                   [rows, columns]
    decoder.layers.mlp.experts.experts.linear_fc1.weight     [layers, experts, rows, columns]
    decoder.layers.3.mlp.experts.experts.linear_fc1.weight   [experts, rows, columns]
    decoder.layers.3.mlp.experts.experts.5.linear_fc1.weight [rows, columns]
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule

from megatron_oprd.weights.mapping import Mapping

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
# A chunk's submodule with projectors that train with the student, and are no part of it.
PROJECTORS = "projectors"

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(mlp\.experts\.experts)\.\d+\.(.+)")
# A chained optimizer prefixes the keys of its parts with chained_<i>.
_OTHERS = re.compile(rf"(chained_\d+\.)?optimizer\.|teacher\.|{PROJECTORS}\.")
# The norm before experts, as named by Megatron's layer spec without Transformer Engine.
_OTHER_NAMES = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A parameter's position ``tensor[index]`` in a stored tensor."""

    key: str  # the tensor's name
    # The parameter's (layer, expert), one of them, or none if the tensor is the parameter; and the
    # sizes of these leading dimensions.
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


def num_layers(table: Iterable[Mapping]) -> int:
    """The number of decoder layers in a model's table."""
    return 1 + max(layer for mapping in table if (layer := layer_of(mapping)) is not None)


def layer_of(mapping: Mapping) -> int | None:
    """The layer of a parameter; None outside the decoder layers."""
    match = _LAYER.fullmatch(mapping.megatron)
    return None if match is None else int(match[1])


def slots(mapping: Mapping, layers: int) -> list[Slot]:
    """All slots where a checkpoint may store a parameter, Megatron's default first."""
    match = _LAYER.fullmatch(mapping.megatron)
    if match is None:
        return [Slot(key=mapping.megatron)]
    layer, rest = int(match[1]), match[2]
    index: tuple[int, ...] = (layer,)
    counts: tuple[int, ...] = (layers,)
    found = []
    if mapping.expert is not None:
        expert = _EXPERT.fullmatch(rest)
        assert expert is not None, mapping.megatron
        assert mapping.num_experts is not None
        found.append(Slot(key=f"decoder.layers.{layer}.{rest}"))
        rest = f"{expert[1]}.{expert[2]}"
        index, counts = (layer, mapping.expert), (layers, mapping.num_experts)
    for name in (_OTHER_NAMES.get(rest), rest):
        if name is not None:
            one_layer = f"decoder.layers.{layer}.{name}"
            found.append(Slot(key=one_layer, index=index[1:], counts=counts[1:]))
            found.append(Slot(key=f"decoder.layers.{name}", index=index, counts=counts))
    # Candidates were appended from the most specific name to Megatron's default.
    return found[::-1]


def written_slots(table: Sequence[Mapping]) -> list[Slot]:
    """The slot of each parameter of a model where Megatron would store it by default.

    A tensor of all layers has no place for layers that lack the parameter, so that Megatron stores
    each layer of a model with unequal layers under its own name.
    """
    layers = num_layers(table)
    kinds: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    for mapping in table:
        if match := _LAYER.fullmatch(mapping.megatron):
            kinds.setdefault(int(match[1]), set()).add((match[2], mapping.local_shape(1)))
    are_equal = all(kind == kinds[0] for kind in kinds.values())
    found = []
    for mapping in table:
        stacked, *single = slots(mapping, layers)
        found.append(stacked if are_equal or not single else single[0])
    return found


def is_gated(mapping: Mapping) -> bool:
    """Whether Megatron stores the parameter's gate and up halves as separate tensors or chunks."""
    # Chunks of one tensor by default, two tensors (`halves`) under singleton_local_shards.
    return mapping.megatron.endswith(("linear_fc1.weight", "linear_fc1.bias"))


def halves(key: str) -> tuple[str, str]:
    """The names of gate and up projection if stored as two tensors."""
    return f"{key}_w", f"{key}_v"


def is_no_weight(key: str) -> bool:
    """Whether a tensor belongs to the optimizer, a refreshed teacher or a projector."""
    return _OTHERS.match(key) is not None


# An expert's weight or bias, numbered within the rank: SequentialMLP has a module for each expert,
# TEGroupedMLP one module for all.
_EXPERT_PARAMETERS = (
    re.compile(
        r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>linear_fc[12])"
        r"\.(?P<kind>weight|bias)"
    ),
    re.compile(r"mlp\.experts\.(?P<linear>linear_fc[12])\.(?P<kind>weight|bias)(?P<expert>\d+)"),
)


def named_parameters(chunks: Sequence[MegatronModule]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters of the model under their names in Megatron's checkpoints.

    Layers are numbered over the whole model and experts over the whole layer, not within the rank.
    A norm before a linear layer is ``<linear>.layer_norm_weight`` in every layer spec. ``chunks``
    are this rank's model chunks, not wrapped.
    """
    named: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        layers = chunk.decoder.layers
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[0] == PROJECTORS:
                continue
            if parts[:2] == ["decoder", "layers"]:
                layer = layers[int(parts[2])]
                rest = ".".join(parts[3:])
                # The layer spec's own renaming, which makes checkpoints independent of the spec.
                for local, shared in layer.submodules_config.sharded_state_dict_keys_map.items():
                    if rest.startswith(local):
                        rest = shared + rest.removeprefix(local)
                for pattern in _EXPERT_PARAMETERS:
                    if expert := pattern.fullmatch(rest):
                        number = layer.mlp.local_expert_indices[int(expert["expert"])]
                        rest = f"mlp.experts.experts.{number}.{expert['linear']}.{expert['kind']}"
                # Megatron's layer_number starts at 1.
                name = f"decoder.layers.{layer.layer_number - 1}.{rest}"
            assert name not in named, f"two parameters are called {name}"
            named[name] = parameter
    return named


def is_linear_weight(name: str) -> bool:
    """Whether the checkpoint name is that of a linear layer's matrix in a decoder layer."""
    return (
        re.search(r"\.linear_(qkv|q_proj|q_up_proj|kv_up_proj|proj|fc1|fc2)\.weight$", name)
        is not None
    )
