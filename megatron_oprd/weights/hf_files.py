"""Hugging Face checkpoint folders on disk: reading them slice by slice, writing them whole.

A folder holds `config.json`, the weights as `model.safetensors` or as shards named by
`model.safetensors.index.json`, and files to carry along (tokenizer, generation config, ...).
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from megatron_oprd.errors import UserError
from megatron_oprd.weights.safetensors_file import SafetensorsFile, TensorInfo

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_MAX_SHARD_SIZE = 5 * 10**9

# Not carried along to another model's folder: weights in any format, and the model card.
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack",
}  # fmt: skip
_LEFT_BEHIND = {CONFIG_FILE, "README.md"}


class HFCheckpoint:
    """A Hugging Face checkpoint folder, opened for reading.

    Opening reads config.json, the index and the shards' headers, no weights. Tensors are read with
    positioned reads of exactly the bytes asked for: nothing stays mapped, so the memory in use is
    that of the tensors the caller holds. Reads are safe from several threads.

    Attributes:
        folder: The folder.
        config: The content of its config.json.

    Raises:
        UserError: If the folder, its config.json or its safetensors weights are missing, unreadable
            or contradict each other. The message names the file.
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
        self.config = _read_json_object(self.folder / CONFIG_FILE)
        self._files = _open_files(self.folder)  # by tensor

    def names(self) -> list[str]:
        """The tensors' names, in the order in which they lie on disk."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`; `UserError` if the checkpoint has no such tensor."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of tensor `name`; `UserError` if the checkpoint has no such tensor."""
        return self._info(name).dtype

    def num_bytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(self._info(name).num_bytes for name in self._files)

    def read(self, name: str) -> Tensor:
        """Reads the whole tensor `name`.

        Returns:
            A new contiguous CPU tensor with the checkpoint's shape and dtype.

        Raises:
            UserError: If the checkpoint has no such tensor, or its file cannot be read any more.
        """
        return self.read_slice(name)

    def read_slice(self, name: str, *slices: slice) -> Tensor:
        """Reads `tensor[slices]` of tensor `name`, and only those bytes of its file.

        Args:
            name: The tensor's name.
            *slices: One slice a leading dimension, step 1, with Python's meaning of missing,
                negative and too large bounds; dimensions without a slice are read whole.

        Returns:
            A new contiguous CPU tensor with the checkpoint's dtype.

        Raises:
            UserError: If the checkpoint has no such tensor, or its file cannot be read any more.
            ValueError: If there are more slices than dimensions, or a step is not 1.
        """
        return self._file(name).read_slice(name, slices)

    def companion_files(self) -> list[Path]:
        """The files an exported model carries along: tokenizer, generation config, chat template...

        Every regular file at the folder's top level, but for weights, their indices, config.json,
        the model card and hidden files; sorted by name.
        """
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file()
            and path.name not in _LEFT_BEHIND
            and path.suffix not in _WEIGHT_SUFFIXES
            and not path.name.endswith(".index.json")
            and not path.name.startswith(".")
        )

    def _info(self, name: str) -> TensorInfo:
        return self._file(name).tensors[name]

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._files[name]
        except KeyError:
            raise UserError(
                f"checkpoint {self.folder} has no tensor {name!r}; it has {len(self._files)} "
                f"tensors, the first is {next(iter(self._files))!r}."
            ) from None


def check_output_folder(out: Path, *, force: bool) -> None:
    """Checks that a checkpoint may be written to `out`: it is free, or may be replaced.

    Raises:
        UserError: If `out` is a file, if it is not empty and `force` is not set, or if it is not
            empty and is no checkpoint (has no config.json), which `force` does not replace either.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"output folder {out}: a file has this name; give a folder to create.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise UserError(
            f"output folder {out} is not empty; give another folder, or --force to replace it."
        )
    if not (out / CONFIG_FILE).is_file():
        raise UserError(
            f"output folder {out} is not empty and has no {CONFIG_FILE}, so it is no checkpoint "
            "that --force would replace; give another folder."
        )


def write_hf_folder(
    out: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: dict[str, Any],
    companion_files: Sequence[Path],
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    force: bool = False,
) -> Path:
    """Writes a stream of tensors as a Hugging Face checkpoint folder.

    The folder is written under a temporary name beside `out` and renamed when it is whole. A folder
    it replaces stays until then. Whatever goes wrong, the temporary folder is removed and `out` is
    as it was. At most one shard of tensors is held in memory.

    Args:
        out: The folder to create; parents are created too.
        tensors: Names and tensors, on any device, in the order to write them. A tensor must not be
            changed after it was yielded, and no two of them may share memory.
        config: The content of config.json.
        companion_files: Files to copy into the folder under their own names.
        max_shard_size: The most bytes of tensors in one safetensors file; a tensor is never split,
            one that is larger gets a file of its own.
        force: Whether a checkpoint that is at `out` is replaced.

    Returns:
        `out`.

    Raises:
        UserError: If `out` is taken (before the stream is touched) or cannot be written.
        ValueError: If the stream is empty or yields a name twice.
    """
    check_output_folder(out, force=force)
    target = out.resolve()
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _writing(out):
        temporary.mkdir(parents=True)
    try:
        with _writing(out):
            _write_json(temporary / CONFIG_FILE, config)
            for file in companion_files:
                shutil.copyfile(file, temporary / file.name)
        _write_shards(temporary, tensors, max_shard_size, out)
        with _writing(out):
            _move_into_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def show_progress(
    tensors: Iterable[tuple[str, Tensor]], total_bytes: int, description: str
) -> Iterator[tuple[str, Tensor]]:
    """Passes the stream on, with a bar on stderr in bytes, rate and time left.

    The bar is drawn only when stderr is a terminal.
    """
    with tqdm(
        total=total_bytes, unit="B", unit_scale=True, desc=description, disable=None
    ) as progress:
        for name, tensor in tensors:
            yield name, tensor
            progress.update(tensor.nbytes)


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; a Hugging Face checkpoint folder has a {CONFIG_FILE}."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, found {type(content).__name__}.")
    return content


def _open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """The file of every tensor, in the order of the files' names and of the bytes in them."""
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


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to shard; None where there is one single file and no index."""
    index = folder / INDEX_FILE
    single = folder / SINGLE_FILE
    if not index.exists():
        if single.is_file():
            return None
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin*"))
        found = (
            f"found pickles only ({pickles[0]}); convert them to safetensors: load the folder with "
            "transformers' from_pretrained and write it with save_pretrained"
            if pickles
            else f"give a folder with {SINGLE_FILE}, or with shards and {INDEX_FILE}"
        )
        raise UserError(f"checkpoint {folder} has no safetensors weights: {found}.")
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
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


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turns the operating system's refusals into the user's error that names `out`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}.") from error


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: int, out: Path
) -> None:
    """Writes the stream into safetensors files, named when their number is known, and the index."""
    shards: list[list[str]] = []  # the tensors' names, by shard
    pending: dict[str, Tensor] = {}
    seen: set[str] = set()
    pending_bytes = total_bytes = 0

    def part(number: int) -> Path:
        return folder / f"part-{number:05d}"

    def flush() -> None:
        with _writing(out):
            file = part(len(shards))
            save_file(pending, file, metadata={"format": "pt"})
            file.chmod((folder / CONFIG_FILE).stat().st_mode)  # it makes files for the owner only
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"tensor {name} came twice")
        seen.add(name)
        if pending and pending_bytes + tensor.nbytes > max_shard_size:
            flush()
            pending_bytes = 0
        pending[name] = tensor.detach().cpu().contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if not seen:
        raise ValueError("no tensors to write")
    flush()

    with _writing(out):
        if len(shards) == 1:
            part(0).rename(folder / SINGLE_FILE)
            return
        weight_map = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            part(number).rename(folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _move_into_place(temporary: Path, target: Path) -> None:
    """Renames `temporary` to `target`; what was there is removed after that, or put back."""
    if not target.exists():
        temporary.rename(target)
        return
    old = temporary.with_suffix(".old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
