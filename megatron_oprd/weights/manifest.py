"""Verifies a folder that these tools have written against its own manifest."""

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

ROWS_BYTES = 2**26  # bytes of a tensor read at a time


class _Reader(Protocol):
    def __call__(self, name: str, *slices: slice) -> Tensor:
        """Reads a slice of a tensor."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a Hugging Face folder, or a chunk of a tensor in a `torch_dist` checkpoint."""

    name: str
    tensor: str  # the whole tensor's name
    bounds: Bounds  # the chunk's rectangle in the tensor
    dtype: torch.dtype
    read: _Reader

    @property
    def num_bytes(self) -> int:
        """The size of its values."""
        return prod(shape_of(self.bounds)) * self.dtype.itemsize

    def blocks(self) -> Iterator[Tensor]:
        """The values in row-major order, in blocks of rows."""
        for rows in row_blocks(self.bounds, self.dtype.itemsize, ROWS_BYTES):
            yield self.read(self.tensor, *slices_of(rows))


@dataclass(frozen=True, kw_only=True)
class ChecksumDifference:
    """A tensor, chunk or file that does not match the manifest."""

    name: str  # key in the manifest's checksums
    expected: str | None  # the manifest's checksum; None if it lists no such tensor
    found: str | None  # checksum of the values on disk; None if missing


def read_checksums(folder: Path) -> dict[str, str]:
    """Reads the checksums in a folder's manifest, by tensor or chunk; `UserError` if it has none.

    ``folder`` is a Hugging Face folder, a Megatron checkpoint, or the folder of one.
    """
    places = [folder]
    if is_megatron(folder):
        checkpoint = resolve_checkpoint_folder(folder)
        # `torch_dist_writer` puts the manifest next to release/, not into it.
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
    """(size, checksum) of each file of a training checkpoint, or of a run's newest one.

    None if the folder has no manifest of a training checkpoint.
    """
    file = resolve_checkpoint_folder(folder) / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        return None
    try:
        return {name: (int(size), str(checksum)) for name, (size, checksum) in files.items()}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{file}: an entry of files is not [bytes, checksum] ({error}); copy the checkpoint "
            "again."
        ) from error


def compare_files(
    folder: Path,
    expected: Mapping[str, tuple[int, str]],
    *,
    advance: Callable[[int], object] = lambda num_bytes: None,  # after each file
) -> list[ChecksumDifference]:
    """Compares the files of a training checkpoint with `read_file_checksums`; reads all of them."""
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
    """Lists a folder's tensors under their names in the manifest; reads no weights.

    ``folder`` is a Hugging Face folder, a Megatron checkpoint, or the folder of one; `UserError` if
    it cannot be read.
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

    ``advance`` is called with the bytes read since its last call.
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
