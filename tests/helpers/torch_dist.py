"""Checkpoints of torch.distributed.checkpoint, as torch itself writes them, and changes to them."""

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

FORMAT = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


def save_torch_dist(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Writes a checkpoint of Megatron's format, each tensor one chunk in a file of its own."""
    writer = FileSystemWriter(folder, single_file_per_rank=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    (folder / "metadata.json").write_text(FORMAT)
    return folder


def change_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    """Changes what ``.metadata`` says: ``change`` gets torch's ``Metadata``."""
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
