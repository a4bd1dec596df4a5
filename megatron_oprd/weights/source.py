"""The interface of checkpoints to their readers, independent of the format on disk."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class WeightSource(Protocol):
    """A model on disk under its Hugging Face names.

    Loading, conversion and comparison use nothing else, so they treat Hugging Face folders and
    Megatron checkpoints alike.
    """

    @property
    def folder(self) -> Path:
        """The checkpoint's folder, for messages."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""

    @property
    def hf_folder(self) -> Path:
        """The folder with config.json and the companion files, for transformers to read."""

    def names(self) -> list[str]:
        """The tensors' Hugging Face names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor ``name``; `UserError` if the checkpoint has no such tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of tensor ``name``; `UserError` if the checkpoint has no such tensor."""

    def num_bytes(self) -> int:
        """The total size of all tensors."""

    def read(self, name: str) -> Tensor:
        """Reads the whole tensor ``name`` into a new contiguous CPU tensor."""

    def read_slice(self, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        """Reads ``tensor[slices]`` of tensor ``name``, and as little more as the format allows.

        Args:
            name: The tensor's name.
            *slices: One slice per leading dimension, step 1, with Python's meaning of missing,
                negative and too large bounds; other dimensions are read whole.
            out: A contiguous CPU tensor of the slice's shape and dtype to read into; None
                allocates.

        Returns:
            ``out``, or a new contiguous CPU tensor of the checkpoint's dtype.

        Raises:
            UserError: The checkpoint has no such tensor, or a file cannot be read.
            ValueError: There are more slices than dimensions, or a step is not 1.
        """

    def companion_files(self) -> list[Path]:
        """The files that an exported model carries along: tokenizer, generation config, ..."""

    def files(self) -> list[Path]:
        """The files that hold the configuration and the tensors."""
