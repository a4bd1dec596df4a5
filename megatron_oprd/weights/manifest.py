"""A folder that these tools have written, compared with what its own manifest says of it."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.weights.checksum import CHECKSUMS_FIELD, Checksum, file_checksum
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.megatron_checkpoint import is_megatron, resolve_checkpoint_folder
from megatron_oprd.weights.output_folder import MANIFEST_FILE
from megatron_oprd.weights.positioned_reads import Bounds, row_blocks, shape_of, slices_of
from megatron_oprd.weights.torch_dist_files import RELEASE, TorchDistFiles
from megatron_oprd.weights.torch_dist_plan import chunk_name

_ROWS_BYTES = 2**26  # of a tensor that are read at a time


class _Reader(Protocol):
    def __call__(self, name: str, *slices: slice) -> Tensor:
        """Reads a part of a tensor."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a Hugging Face folder, or a chunk of one in a `torch_dist` checkpoint.

    Attributes:
        name: Its name in the manifest.
        tensor: The tensor that it is or is a part of.
        bounds: Which part.
        dtype: Its dtype.
        read: Reads parts of the tensor.
    """

    name: str
    tensor: str
    bounds: Bounds
    dtype: torch.dtype
    read: _Reader

    @property
    def num_bytes(self) -> int:
        """The bytes of its values."""
        return prod(shape_of(self.bounds)) * self.dtype.itemsize

    def blocks(self) -> Iterator[Tensor]:
        """Its values in row-major order, some rows at a time."""
        for rows in row_blocks(self.bounds, self.dtype.itemsize, _ROWS_BYTES):
            yield self.read(self.tensor, *slices_of(rows))


@dataclass(frozen=True, kw_only=True)
class ChecksumDifference:
    """A tensor or chunk that is not what the manifest says.

    Attributes:
        name: Its name in the manifest.
        expected: The manifest's checksum; None if it has none, so that the tensor is too much.
        found: That of the values on disk; None if they are missing.
    """

    name: str
    expected: str | None
    found: str | None


def read_checksums(folder: Path) -> dict[str, str]:
    """The checksums that the manifest of a folder has, by tensor or chunk.

    Args:
        folder: A Hugging Face folder, a Megatron checkpoint, or the folder that holds one.

    Raises:
        UserError: There is no manifest, or none with checksums.
    """
    places = [folder]
    if is_megatron(folder):
        checkpoint = resolve_checkpoint_folder(folder)
        places = [checkpoint, *([checkpoint.parent] if checkpoint.name == RELEASE else [])]
    file = next(
        (place / MANIFEST_FILE for place in places if (place / MANIFEST_FILE).exists()), None
    )
    if file is None:
        raise UserError(
            f"{folder} has no {MANIFEST_FILE}, which hf_to_megatron, megatron_to_hf and the other "
            "tools write, so there is nothing to check it against; give a second checkpoint to "
            "compare it with."
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}.") from error
    checksums = manifest.get(CHECKSUMS_FIELD) if isinstance(manifest, dict) else None
    if not isinstance(checksums, dict):
        raise UserError(
            f"{file} has no {CHECKSUMS_FIELD}, so there is nothing to check {folder} against; give "
            "a second checkpoint to compare it with."
        )
    return checksums


def read_file_checksums(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Size and checksum of each file of a training checkpoint; None for what is none.

    Args:
        folder: A training checkpoint, or the folder of a run.
    """
    file = resolve_checkpoint_folder(folder) / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        return None
    return {name: (int(size), str(checksum)) for name, (size, checksum) in files.items()}


def compare_files(
    folder: Path,
    expected: Mapping[str, tuple[int, str]],
    *,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> list[ChecksumDifference]:
    """Reads every file of a training checkpoint and compares its checksum with the manifest's.

    Args:
        folder: The checkpoint, or the folder of a run.
        expected: See `read_file_checksums`.
        advance: Called with the bytes that were read.
    """
    checkpoint = resolve_checkpoint_folder(folder)
    different = []
    for name, (size, checksum) in expected.items():
        path = checkpoint / name
        found = file_checksum(path) if path.is_file() else None
        if found != checksum:
            different.append(ChecksumDifference(name=name, expected=checksum, found=found))
        advance(size)
    return different


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """What a folder holds, named as in a manifest; no weight is read.

    Args:
        folder: A Hugging Face folder, a Megatron checkpoint, or the folder that holds one.

    Raises:
        UserError: It cannot be read.
    """
    if not is_megatron(folder):
        source = HFCheckpoint(folder)
        return [
            StoredTensor(
                name=name,
                tensor=name,
                bounds=[(0, size) for size in source.shape(name)],
                dtype=source.dtype(name),
                read=source.read_slice,
            )
            for name in source.names()
        ]
    files = TorchDistFiles(resolve_checkpoint_folder(folder))
    return [
        StoredTensor(
            name=chunk_name(name, [start for start, _ in chunk]),
            tensor=name,
            bounds=chunk,
            dtype=files.dtype(name),
            read=files.read_slice,
        )
        for name in files.names()
        for chunk in files.chunks(name)
    ]


def compare_checksums(
    stored: Iterable[StoredTensor],
    expected: Mapping[str, str],
    *,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> list[ChecksumDifference]:
    """Reads every tensor and compares its checksum with the manifest's.

    Args:
        stored: What the folder holds.
        expected: The manifest's checksums.
        advance: Called with the bytes that were read.

    Raises:
        UserError: A file cannot be read.
    """
    found: dict[str, str] = {}
    for one in stored:
        checksum = Checksum()
        for block in one.blocks():
            checksum.update(block)
            advance(block.nbytes)
        found[one.name] = checksum.hexdigest()
    return [
        ChecksumDifference(name=name, expected=expected.get(name), found=found.get(name))
        for name in {**expected, **found}
        if expected.get(name) != found.get(name)
    ]
