"""Reads Hugging Face checkpoint folders from disk, slice by slice.

A folder has `config.json`, the weights (`model.safetensors`, or shards listed in
`model.safetensors.index.json`) and companion files such as the tokenizer and generation config.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from megatron_oprd.errors import UserError
from megatron_oprd.weights.output_folder import MANIFEST_FILE
from megatron_oprd.weights.safetensors_file import SafetensorsFile, TensorInfo, read_json_once

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Not copied to another model's folder: weights in any format, and files about this folder.
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack",
}  # fmt: skip
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth"}
# Files that transformers' Trainer pickles next to the weights.
_TRAINER_STATES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
# With one of these files, the folder's weights are not the whole model.
_OTHER_WEIGHTS = {
    "adapter_config.json": "it is a LoRA adapter's, and transformers would take it into account "
    "where peft is installed. Merge it first (peft: merge_and_unload, then save_pretrained), or "
    "remove the adapter's files",
    "hf_quant_config.json": "its weights are quantised by ModelOpt. Give the model's unquantised "
    "folder",
}
CHAT_TEMPLATES = "additional_chat_templates"
_LEFT_BEHIND = {CONFIG_FILE, "README.md", MANIFEST_FILE}


class HFFolder:
    """A Hugging Face model folder without its weights: config.json and companion files.

    Raises:
        UserError: The folder or its config.json is missing or unreadable.
    """

    folder: Path
    config: dict[str, Any]

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            found = "it is a file" if self.folder.exists() else "it does not exist"
            raise UserError(
                f"Hugging Face checkpoint {self.folder}: {found}; give a folder with {CONFIG_FILE} "
                f"and {SINGLE_FILE} (or shards with {INDEX_FILE})."
            )
        for name, instead in _OTHER_WEIGHTS.items():
            if (self.folder / name).exists():
                raise UserError(f"Hugging Face checkpoint {self.folder} has {name}: {instead}.")
        self.config = _read_json_object(self.folder / CONFIG_FILE)

    @property
    def hf_folder(self) -> Path:
        """The folder with config.json and the companion files: the folder itself."""
        return self.folder

    def companion_files(self) -> list[Path]:
        """The files to copy into a folder of the exported model, sorted by name.

        All regular top-level files except weights and their indices, config.json, the manifest, the
        model card and hidden files; then the tokenizer's named chat templates from their subfolder.
        """
        return [
            *sorted(
                path
                for path in self.folder.iterdir()
                if path.is_file()
                and path.name not in _LEFT_BEHIND
                and path.suffix not in _WEIGHT_SUFFIXES
                and not path.name.endswith(".index.json")
                and not path.name.startswith(".")
            ),
            *sorted((self.folder / CHAT_TEMPLATES).glob("*.jinja")),
        ]


def companion_name(file: Path) -> str:
    """A companion file's path relative to its folder."""
    in_folder = file.parent.name == CHAT_TEMPLATES
    return f"{CHAT_TEMPLATES}/{file.name}" if in_folder else file.name


def copy_companions(files: Iterable[Path], folder: Path) -> None:
    """Copies companion files into another folder."""
    for file in files:
        target = folder / companion_name(file)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


class HFCheckpoint(HFFolder):
    """A Hugging Face checkpoint folder, opened for reading; a `WeightSource`.

    Opening reads config.json, the index and the shards' headers. Tensors are read by positioned
    reads of exactly the requested bytes and nothing is mapped, so only the tensors that the caller
    holds are in memory. Reads are thread-safe.

    Raises:
        UserError: The folder, config.json or the safetensors files are missing, unreadable or
            inconsistent. The message names the file.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        super().__init__(folder)
        self._files = _open_files(self.folder)  # by tensor
        self._stored: dict[str, str] = {}  # names in the files, of tensors that were renamed
        self._written: TemporaryDirectory[str] | None = None  # with another config.json

    @property
    @override
    def hf_folder(self) -> Path:
        """The folder with config.json and the companion files."""
        return self.folder if self._written is None else Path(self._written.name)

    def replace_config(self, config: dict[str, Any]) -> None:
        """Gives the model another configuration, whose `hf_folder` is gone with this object."""
        # Tokenizers, engines and converters read the configuration by path.
        self._written = TemporaryDirectory(prefix="config-of-")
        self.config = config
        folder = Path(self._written.name)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(self.companion_files(), folder)

    def leave_out(self, prefixes: tuple[str, ...]) -> None:
        """Hides the tensors whose names begin with one of ``prefixes``."""
        self._files = {
            name: file for name, file in self._files.items() if not name.startswith(prefixes)
        }

    def rename(self, names: dict[str, str]) -> None:
        """Gives tensors other names: ``names`` are the present ones -> the new ones."""
        self._stored |= {new: self._stored.get(old, old) for old, new in names.items()}
        self._files = {names.get(name, name): file for name, file in self._files.items()}

    def names(self) -> list[str]:
        """The tensors' names, in their order on disk."""
        return list(self._files)

    def has(self, name: str) -> bool:
        """Whether there is a tensor `name`."""
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`; `UserError` if the checkpoint has no such tensor."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of tensor `name`; `UserError` if the checkpoint has no such tensor."""
        return self._info(name).dtype

    def num_bytes(self) -> int:
        """The total size of all tensors."""
        return sum(self._info(name).num_bytes for name in self._files)

    def read(self, name: str) -> Tensor:
        """Reads the whole tensor ``name`` into a new contiguous CPU tensor."""
        return self.read_slice(name)

    def read_slice(self, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        """Implements `WeightSource.read_slice`."""
        return self._file(name).read_slice(self._stored.get(name, name), slices, out=out)

    def files(self) -> list[Path]:
        """The files that hold the configuration and the tensors."""
        shards = {file.path for file in self._files.values()}
        index = self.folder / INDEX_FILE
        return [self.folder / CONFIG_FILE, *([index] if index.exists() else []), *sorted(shards)]

    def _info(self, name: str) -> TensorInfo:
        return self._file(name).tensors[self._stored.get(name, name)]

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._files[name]
        except KeyError:
            raise UserError(
                f"checkpoint {self.folder} has no tensor {name!r}; it has {len(self._files)} "
                f"tensors, the first is {next(iter(self._files))!r}."
            ) from None


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = read_json_once(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; a Hugging Face checkpoint folder has a {CONFIG_FILE}."
        ) from None
    except KeyError as error:
        raise UserError(f"{path} has {error.args[0]!r} twice; it must be there once.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, found {type(content).__name__}.")
    return content


def _open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """The file of every tensor, sorted by file name and position in the file."""
    weight_map = _read_weight_map(folder)
    names = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
    files: dict[str, SafetensorsFile] = {}
    for file in (SafetensorsFile(folder / name) for name in names):
        for tensor in file.tensors:
            if tensor in files:
                raise UserError(
                    f"checkpoint {folder}: tensor {tensor!r} is in two shards, "
                    f"{files[tensor].path.name} and {file.path.name}; it must be in one."
                )
            files[tensor] = file
    for tensor, shard in (weight_map or {}).items():
        if tensor not in files or files[tensor].path.name != shard:
            raise UserError(
                f"{folder / INDEX_FILE} says that tensor {tensor!r} is in {shard}, but that shard "
                "has no such tensor; write the index anew or get the shard it belongs to."
            )
    if not files:
        raise UserError(f"checkpoint {folder}: its safetensors files hold no tensors.")
    return files


def _is_pickle(name: str) -> bool:
    """Whether a file has weights in a format that can run code when loaded."""
    if name.endswith(".bin.index.json"):
        return True
    return Path(name).suffix in _PICKLE_SUFFIXES and not name.startswith(_TRAINER_STATES)


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to shard; None for a single file without an index."""
    index = folder / INDEX_FILE
    single = folder / SINGLE_FILE
    if not index.exists():
        if single.is_file():
            return None
        pickles = sorted(path.name for path in folder.iterdir() if _is_pickle(path.name))
        found = (
            f"found pickles only ({pickles[0]}); convert them to safetensors: load the folder with "
            "transformers' from_pretrained and write it with save_pretrained"
            if pickles
            else f"give a folder with {SINGLE_FILE}, or with shards and {INDEX_FILE}"
        )
        raise UserError(f"checkpoint {folder} has no safetensors weights: {found}.")
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        # A name with a path would read outside of the folder.
        isinstance(file, str) and Path(file).name == file
        for file in weight_map.values()
    ):
        raise UserError(
            f"{index} must have a 'weight_map' from tensor names to names of files in its folder."
        )
    shards = set(weight_map.values())
    if single.exists() and SINGLE_FILE not in shards:
        raise UserError(
            f"checkpoint {folder} has both {SINGLE_FILE} and {INDEX_FILE}, which does not name it; "
            "remove the one that is not meant."
        )
    if missing := sorted(file for file in shards if not (folder / file).is_file()):
        raise UserError(
            f"{index} names {missing[0]}, which is missing ({len(missing)} of {len(shards)} shards "
            "are); copy or download the folder again."
        )
    return weight_map
