"""The parameters of live model chunks under their layout-independent names."""

from collections.abc import Sequence

import torch
from megatron.core.transformer.module import MegatronModule


def named_parameters(chunks: Sequence[MegatronModule]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by the name that Megatron's checkpoints give them.

    ``decoder.layers.<i>`` counts layers over the whole model, not over the stage, and a norm in
    front of a linear layer is ``<linear>.layer_norm_weight`` in every layer spec.

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
                name = f"decoder.layers.{layer.layer_number - 1}.{rest}"
            assert name not in named, f"two parameters are called {name}"
            named[name] = parameter
    return named
