"""Reads experts stored as two stacked tensors per layer, the form transformers 5 computes with.

``experts.gate_up_proj`` [e, 2 f, h] has each expert's gate rows and then its up rows,
``experts.down_proj`` [e, h, f] the down projections. Published checkpoints have three tensors per
expert; models saved with ``save_original_format=False`` have these. Then the other names of
Mixtral and MiniMax-M2 are transformers' as well.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.weights.source import WeightSource

_FUSED = re.compile(r"(.+\.experts)\.(gate_up|down)_proj")
_SINGLE = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
# Parts of names in these models -> parts of names in published checkpoints, which the mappings
# have. The models have no other MLP.
_OF_MIXTRAL = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".down_proj.": ".w2.",
    ".up_proj.": ".w3.",
}
_PUBLISHED = {"mixtral": _OF_MIXTRAL, "minimax_m2": _OF_MIXTRAL}  # by model_type


def published_name(name: str, model_type: str) -> str:
    """The name in published checkpoints of a tensor, or expert's matrix, of transformers' model."""
    for own, published in _PUBLISHED.get(model_type, {}).items():
        name = name.replace(own, published)
    return name


class UnfusedExperts:
    """A Hugging Face folder with stacked experts, read as one tensor per expert and projection."""

    def __init__(self, checkpoint: WeightSource) -> None:
        self._checkpoint = checkpoint
        model_type = checkpoint.config.get("model_type", "")
        names: list[str] = []
        for name in checkpoint.names():
            match = _FUSED.fullmatch(name)
            if match is None:
                names.append(name)
                continue
            parts = ("gate", "up") if match[2] == "gate_up" else ("down",)
            names += [
                f"{match[1]}.{expert}.{part}_proj.weight"
                for expert in range(checkpoint.shape(name)[0])
                for part in parts
            ]
        self._stored = {published_name(name, model_type): name for name in names}

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._checkpoint.folder

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return self._checkpoint.config

    @property
    def hf_folder(self) -> Path:
        """The folder with config.json and the companion files."""
        return self._checkpoint.hf_folder

    def names(self) -> list[str]:
        """The tensors' names, one for each matrix of each expert."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        place = self._place(name)
        return self._checkpoint.shape(self._stored.get(name, name)) if place is None else place[2]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        place = self._place(name)
        return self._checkpoint.dtype(self._stored.get(name, name) if place is None else place[0])

    def num_bytes(self) -> int:
        """The bytes of all tensors together."""
        return self._checkpoint.num_bytes()

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor."""
        return self.read_slice(name)

    def read_slice(self, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        """Reads a part of a tensor; the arguments are those of `WeightSource.read_slice`."""
        place = self._place(name)
        if place is None:
            return self._checkpoint.read_slice(self._stored.get(name, name), *slices, out=out)
        fused, (expert, first), (rows, _) = place
        # Bounds are resolved within the expert's rows before they are shifted into the stack.
        start, stop, _ = (slices[0] if slices else slice(None)).indices(rows)
        found = self._checkpoint.read_slice(
            fused,
            slice(expert, expert + 1),
            slice(first + start, first + stop),
            *slices[1:],
            out=None if out is None else out[None],
        )
        return found[0] if out is None else out

    def companion_files(self) -> list[Path]:
        """The files that an exported model carries along."""
        return self._checkpoint.companion_files()

    def files(self) -> list[Path]:
        """The files that config and tensors are read from."""
        return self._checkpoint.files()

    def _place(self, name: str) -> tuple[str, tuple[int, int], tuple[int, int]] | None:
        """(stacked tensor, (expert, first row in it), shape); None for a tensor stored as is."""
        # An unknown name stays as it is, for the checkpoint's own error.
        match = _SINGLE.fullmatch(self._stored.get(name, name))
        if match is None:
            return None
        fused = f"{match[1]}.{'down' if match[3] == 'down' else 'gate_up'}_proj"
        _, rows, columns = self._checkpoint.shape(fused)
        if match[3] == "down":
            return fused, (int(match[2]), 0), (rows, columns)
        half = rows // 2  # gate above up
        return fused, (int(match[2]), half if match[3] == "up" else 0), (half, columns)


def has_fused_experts(checkpoint: WeightSource) -> bool:
    """Whether the folder's experts are stacked."""
    return any(_FUSED.fullmatch(name) for name in checkpoint.names())
