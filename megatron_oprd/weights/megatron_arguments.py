"""Reads the training arguments of a Megatron checkpoint without running any of its code.

Megatron-LM stores them as an ``argparse.Namespace`` in common.pt or, more recently, in an object
among the tensors; Megatron-Bridge writes run_config.yaml.
"""

import argparse
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_oprd.errors import UserError
from megatron_oprd.weights.torch_dist_files import TorchDistFiles

COMMON_FILE, CONFIG_FILE = "common.pt", "run_config.yaml"
_COMMON_OBJECT = "common_state/shard_0_1"  # recent Megatron-LM: shard 0 of 1


class _Opaque:
    """Inert stand-in for every pickled class except argparse.Namespace."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_arguments(files: TorchDistFiles) -> tuple[str, dict[str, Any]] | None:
    """Returns (file name, arguments of the model); None if the checkpoint has none.

    Raises `UserError` if the file cannot be read or the weights are an adapter's.
    """
    config = files.folder / CONFIG_FILE
    if config.is_file():
        return CONFIG_FILE, _read_config(config)
    common = files.folder / COMMON_FILE
    if common.is_file():
        content = _read_common(common, common.read_bytes())
    elif _COMMON_OBJECT in files.objects:
        content = _read_common(files.folder, files.read_object(_COMMON_OBJECT))
    else:
        return None
    # Megatron wraps an object among the tensors in a list of one.
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    arguments = content.get("args") if isinstance(content, dict) else None
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return (COMMON_FILE, arguments) if isinstance(arguments, dict) else None


def _read_common(path: Path, content: bytes) -> Any:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
        # weights_only=True refuses unknown classes. Mapping their names to an inert class lets it
        # load everything else.
        inert = [(_Opaque, name) for name in names if name != "argparse.Namespace"]
        with torch.serialization.safe_globals([argparse.Namespace, *inert]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise UserError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}); copy the checkpoint "
            "again."
        ) from error


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    content = content if isinstance(content, dict) else {}
    if content.get("peft"):
        raise UserError(
            f"{file} has peft: the checkpoint is an adapter's. Merge it first, then convert it."
        )
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    nested = model.get("transformer")
    # Megatron-Bridge may nest the transformer's settings; they win over the outer ones.
    return {**model, **(nested if isinstance(nested, dict) else {})}
