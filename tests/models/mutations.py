"""Mistakes that a loader can make, made on a loaded model (one tensor-parallel rank)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_oprd.models.architecture import Architecture

LAYER = "decoder.layers.1"
_EMBEDDING = "embedding.word_embeddings.weight"


def mutate(
    name: str,
    architecture: Architecture,
    parameters: dict[str, torch.nn.Parameter],
    chunks: Sequence[GPTModel],
) -> None:
    """Makes the mistake ``name``, in layer 1 where it is a layer's.

    Args:
        name: One of ``swapped_kv``, ``flat_qkv``, ``flat_qkv_bias``, ``swapped_gate_up``,
            ``permuted_experts``, ``shifted_embedding``, ``other_rope_theta``, ``unscaled_rope``,
            ``full_rotary``, ``no_attention_factor``, ``longer_window``, ``shorter_window``
            (in layer 0), ``swapped_gate_up_of_experts``, ``all_rotated``,
            ``unscaled_embedding``, ``no_softcap``, or ``missing <norm>``.
        architecture: The model's.
        parameters: Its parameters under their layout-independent names.
        chunks: The model.
    """

    def change(parameter: str, to: Callable[[Tensor], Tensor]) -> None:
        parameters[parameter].data.copy_(to(parameters[parameter].data.clone()))

    def groups(weight: Tensor) -> Tensor:
        """[rows, ...] --> [group, its heads, its key and its value, head_dim, ...]."""
        return weight.unflatten(0, (architecture.num_query_groups, -1, architecture.head_dim))

    def flat(weight: Tensor) -> Tensor:
        by_group = groups(weight)
        parts = by_group[:, :-2], by_group[:, -2], by_group[:, -1]
        return torch.cat([part.reshape(-1, *weight.shape[1:]) for part in parts])

    def swapped_kv(weight: Tensor) -> Tensor:
        by_group = groups(weight)
        parts = by_group[:, :-2], by_group[:, -1:], by_group[:, -2:-1]
        return torch.cat(parts, dim=1).reshape(weight.shape)

    def permuted_experts() -> None:
        for linear in ("linear_fc1", "linear_fc2"):
            of_linear = [
                n for n in parameters if n.startswith(f"{LAYER}.mlp.experts") and linear in n
            ]
            for kind in ("weight", "bias"):
                names = [name for name in of_linear if name.endswith(kind)]
                values = [parameters[name].data.clone() for name in names]
                for name, value in zip(names, values[1:] + values[:1], strict=True):
                    parameters[name].data.copy_(value)

    def set_frequencies(rotary_dim: int) -> None:
        exponents = torch.arange(0, rotary_dim, 2) / rotary_dim
        chunks[0].rotary_pos_emb.inv_freq = architecture.rope.theta**-exponents

    def other_rope_theta() -> None:
        # theta becomes 1.05 theta.
        frequencies = chunks[0].rotary_pos_emb.inv_freq
        exponents = torch.arange(len(frequencies)) / len(frequencies)
        chunks[0].rotary_pos_emb.inv_freq = frequencies * 1.05**-exponents

    def no_attention_factor() -> None:
        chunks[0].config.yarn_mscale = 0.0
        for layer in chunks[0].decoder.layers:
            layer.self_attention._yarn_concentration_factor = 1.0  # megatron-core 0.19 keeps it

    def swapped_gate_up_of_experts() -> None:
        for name in parameters:
            if name.startswith(f"{LAYER}.mlp.experts") and "linear_fc1" in name:
                change(name, lambda rows: rows.roll(rows.shape[0] // 2, 0))

    def shorter_window() -> None:
        chunks[0].decoder.layers[0].self_attention.core_attention.window -= 1

    def longer_window() -> None:
        chunks[0].decoder.layers[1].self_attention.core_attention.window += 1

    def unscaled_embedding() -> None:
        chunks[0].embedding_multiplier = 1.0

    def no_softcap() -> None:
        chunks[0].decoder.layers[1].self_attention.core_attention.softcap = None

    def all_rotated() -> None:
        chunks[0].config.no_rope_freq = None

    qkv = f"{LAYER}.self_attention.linear_qkv"
    mistakes: dict[str, Callable[[], Any]] = {
        "swapped_kv": lambda: change(f"{qkv}.weight", swapped_kv),
        "flat_qkv": lambda: change(f"{qkv}.weight", flat),
        "flat_qkv_bias": lambda: change(f"{qkv}.bias", flat),
        "swapped_gate_up": lambda: change(
            f"{LAYER}.mlp.linear_fc1.weight", lambda weight: weight.roll(weight.shape[0] // 2, 0)
        ),
        "permuted_experts": permuted_experts,
        "shifted_embedding": lambda: change(_EMBEDDING, lambda weight: weight.roll(1, 0)),
        "other_rope_theta": other_rope_theta,
        "unscaled_rope": lambda: set_frequencies(
            architecture.rope.rotary_dim(architecture.head_dim)
        ),
        "full_rotary": lambda: set_frequencies(architecture.head_dim),
        "no_attention_factor": no_attention_factor,
        "longer_window": longer_window,
        "shorter_window": shorter_window,
        "swapped_gate_up_of_experts": swapped_gate_up_of_experts,
        "all_rotated": all_rotated,
        "no_softcap": no_softcap,
        "unscaled_embedding": unscaled_embedding,
    }
    if name.startswith("missing "):
        change(name.removeprefix("missing "), torch.ones_like)
    else:
        mistakes[name]()
