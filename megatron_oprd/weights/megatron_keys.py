"""Under which names Megatron's `torch_dist` checkpoints keep a parameter of one layer or expert.

By default the layers of a model are one tensor, with a dimension of layers in front, and so are
the experts of its layers. Models whose layers differ, and our training, keep every layer under a
name of its own; Megatron's option singleton_local_shards does the same with experts:

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

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(mlp\.experts\.experts)\.\d+\.(.+)")
_OTHERS = re.compile(r"(chained_\d+\.)?optimizer\.|teacher\.")
# What Megatron's layer spec without Transformer Engine calls the norm in front of experts.
_OTHER_NAMES = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A parameter's place in a global tensor: ``tensor[index]``.

    Attributes:
        key: The tensor's name.
        index: The parameter's layer, expert or both, in as many leading dimensions; empty where
            the tensor is the parameter.
        counts: The sizes of these leading dimensions.
    """

    key: str
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


def num_layers(table: Iterable[Mapping]) -> int:
    """The layers of a model's mappings."""
    return 1 + max(layer for mapping in table if (layer := layer_of(mapping)) is not None)


def layer_of(mapping: Mapping) -> int | None:
    """The layer that a parameter belongs to; None for those outside the layers."""
    match = _LAYER.fullmatch(mapping.megatron)
    return None if match is None else int(match[1])


def slots(mapping: Mapping, layers: int) -> list[Slot]:
    """Where a checkpoint may keep a parameter, Megatron's default first.

    Args:
        mapping: The parameter's mapping.
        layers: Layers of the model.
    """
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
    return found[::-1]


def is_gated(mapping: Mapping) -> bool:
    """Whether Megatron stores the parameter's two halves, gate and up, as tensors of their own.

    They are chunks of one tensor by default, two tensors (`halves`) under singleton_local_shards.
    """
    return mapping.megatron.endswith("linear_fc1.weight")


def halves(key: str) -> tuple[str, str]:
    """The names of gate and up projection where they are tensors of their own."""
    return f"{key}_w", f"{key}_v"


def is_no_weight(key: str) -> bool:
    """Whether a tensor of a training checkpoint is the optimizer's, or of a refreshed teacher."""
    return _OTHERS.match(key) is not None


# An expert's weight, numbered among the rank's own: in Megatron's SequentialMLP, which has a module
# for each expert, and in TEGroupedMLP, which has all of them in one.
_EXPERT_WEIGHTS = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>linear_fc[12])\.weight"),
    re.compile(r"mlp\.experts\.(?P<linear>linear_fc[12])\.weight(?P<expert>\d+)"),
)


def named_parameters(chunks: Sequence[MegatronModule]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by the name that Megatron's checkpoints give them.

    ``decoder.layers.<i>`` counts layers over the whole model, not over the stage, and
    ``experts.<e>`` experts over the whole layer, not over the rank. A norm in front of a linear
    layer is ``<linear>.layer_norm_weight`` in every layer spec.

    Args:
        chunks: This rank's model chunks, not wrapped.
    """
    named: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        layers = chunk.decoder.layers
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer = layers[int(parts[2])]
                rest = ".".join(parts[3:])
                for local, shared in layer.submodules_config.sharded_state_dict_keys_map.items():
                    if rest.startswith(local):
                        rest = shared + rest.removeprefix(local)
                for pattern in _EXPERT_WEIGHTS:
                    if expert := pattern.fullmatch(rest):
                        number = layer.mlp.local_expert_indices[int(expert["expert"])]
                        rest = f"mlp.experts.experts.{number}.{expert['linear']}.weight"
                name = f"decoder.layers.{layer.layer_number - 1}.{rest}"
            assert name not in named, f"two parameters are called {name}"
            named[name] = parameter
    return named


def is_linear_weight(name: str) -> bool:
    """Whether a parameter, by its name above, is the matrix of a decoder layer's linear layer."""
    return re.search(r"\.linear_(qkv|proj|fc1|fc2)\.weight$", name) is not None
