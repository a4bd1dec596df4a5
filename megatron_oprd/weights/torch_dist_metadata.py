"""Reads the `.metadata` file of a `torch_dist` folder without running what its pickle asks for."""

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from typing_extensions import override

_ITS_CLASSES = "torch.distributed.checkpoint."
# What torch and megatron-core write besides classes of torch.distributed.checkpoint and dtypes.
_OTHERS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
}


def read_metadata(file: Path) -> Metadata:
    """Reads a `.metadata` file; the same as torch's FileSystemReader reads.

    Raises:
        pickle.UnpicklingError: The pickle asks for something else than the format has.
        Exception: The file is damaged; of many types.
    """
    with file.open("rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds {type(metadata).__name__}, not Metadata")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OTHERS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module.startswith(_ITS_CLASSES):
            found = super().find_class(module, name)
            # A name with dots reaches whatever these modules import.
            if isinstance(found, type) and found.__module__.startswith(_ITS_CLASSES):
                return found
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")


def _member(owner: Any, name: str) -> Enum:
    """A member of an enumeration, which Python 3.11.0 to 3.11.3 pickle as a call of ``getattr``."""
    # Whatever else getattr reaches is refused. `find_class` let the class itself pass.
    if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"it asks for {name} of {owner}, which is not run")
