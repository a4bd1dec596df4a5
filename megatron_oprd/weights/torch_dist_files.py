"""Reads folders of Megatron's `torch_dist` format: global tensors, slice by slice.

The format is that of torch.distributed.checkpoint: `.metadata` lists each tensor's chunks and the
location of each in a `.distcp` file. Megatron adds metadata.json, and common.pt for everything
else.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_oprd.errors import UserError
from megatron_oprd.weights.positioned_reads import (
    Bounds,
    TensorInfo,
    common,
    moved,
    read_bounds,
    shape_of,
    slice_bounds,
    slices_of,
)
from megatron_oprd.weights.torch_dist_chunk import find_plain_tensor, load_chunk
from megatron_oprd.weights.torch_dist_metadata import read_metadata

METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
RELEASE = "release"  # Megatron's name for a checkpoint without training state
TRACKER_FILE = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A chunk of a tensor: its rectangle and its byte range in a file."""

    starts: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A global tensor and its chunks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    # Chunks are grouped by the leading dimensions (layers, experts) in which each has size 1, so
    # that a read visits only the groups it needs.
    num_leading: int
    chunks: dict[tuple[int, ...], list[_Chunk]] = field(default_factory=dict)


class TorchDistFiles:
    """A `torch_dist` folder, opened for reading.

    Opening reads `.metadata` and checks the sizes of all files. No code of a folder is run: the
    pickle in `.metadata` may name the format's own classes only (torch's FileSystemReader and
    Megatron restrict nothing). Tensors are read by positioned reads of exactly the requested bytes,
    other chunks by torch.load(weights_only=True). Reads are thread-safe.

    Raises:
        UserError: The folder is incomplete or of another format; the message says which.
    """

    folder: Path
    objects: list[str]  # names of other entries (random states, layers' extra states)

    def __init__(self, folder: Path):
        self.folder = folder
        check_format(folder)
        metadata = _read_metadata(folder)
        self._check_files(metadata)
        self._stored: dict[str, TensorStorageMetadata] = {}
        self.objects = []
        for name, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                self._stored[name] = stored
            else:
                self.objects.append(name)
        self._places: dict[MetadataIndex, Any] = metadata.storage_data
        # Filled on demand: most tensors of a training checkpoint are the optimizer's.
        self._tensors: dict[str, _Tensor] = {}
        self._plain: dict[_Chunk, TensorInfo | None] = {}

    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._stored)

    def files(self) -> list[Path]:
        """The metadata and the files that hold tensors."""
        stored = sorted({place.relative_path for place in self._places.values()})
        return [self.folder / name for name in (FORMAT_FILE, METADATA_FILE, *stored)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of global tensor ``name``; `UserError` if its chunks do not cover it."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of global tensor ``name``; `UserError` if its chunks do not cover it."""
        return self._tensor(name).dtype

    def chunks(self, name: str) -> list[Bounds]:
        """The rectangles in which ``name`` is stored; `UserError` if they do not cover it."""
        return [
            [(start, start + size) for start, size in zip(one.starts, one.shape, strict=True)]
            for of_leading in self._tensor(name).chunks.values()
            for one in of_leading
        ]

    def read_slice(self, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        """Implements `WeightSource.read_slice`; `UserError` if a chunk contradicts `.metadata`."""
        tensor = self._tensor(name)
        bounds = slice_bounds(name, tensor.shape, slices)
        if out is None:
            out = torch.empty(shape_of(bounds), dtype=tensor.dtype)
        num_found = 0
        for chunk in _touched(tensor, bounds):
            place = [(a, a + n) for a, n in zip(chunk.starts, chunk.shape, strict=True)]
            both = common(bounds, place)
            if both is None:
                continue
            target = out[slices_of(moved(both, bounds))]
            inside = moved(both, place)
            if target.is_contiguous():
                self._read_chunk(name, tensor, chunk, inside, target)
            else:
                part = torch.empty(target.shape, dtype=tensor.dtype)
                target.copy_(self._read_chunk(name, tensor, chunk, inside, part))
            num_found += target.numel()
        # Chunks that overlap elsewhere can have the right total and still leave a gap here.
        if num_found != out.numel():
            raise self._missing_chunks(name, tensor.shape)
        return out

    def read_object(self, name: str) -> bytes:
        """The bytes of an entry of `objects`, as saved by torch.save; `UserError` if unreadable."""
        place = self._places[MetadataIndex(name)]
        file = self.folder / place.relative_path
        try:
            with file.open("rb") as content:
                content.seek(place.offset)
                return content.read(place.length)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}.") from error

    def _read_chunk(
        self,
        name: str,
        tensor: _Tensor,
        chunk: _Chunk,
        bounds: Bounds,
        out: Tensor,
    ) -> Tensor:
        try:
            descriptor = os.open(chunk.file, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {chunk.file}: {error.strerror}.") from error
        try:
            if chunk not in self._plain:
                self._plain[chunk] = find_plain_tensor(
                    descriptor, chunk.file, chunk.offset, chunk.length
                )
            plain = self._plain[chunk]
            if plain is not None:
                _check_chunk(name, tensor, chunk, (plain.shape, plain.dtype))
                return read_bounds(descriptor, chunk.file, plain, bounds, out)
            whole = load_chunk(descriptor, chunk.file, chunk.offset, chunk.length)
        except UserError:
            raise
        except Exception as error:  # a damaged chunk makes zipfile and torch.load raise many types
            raise UserError(
                f"{chunk.file}: the chunk of {name} at byte {chunk.offset} is damaged "
                f"({' '.join(str(error).split())}); copy the checkpoint again."
            ) from error
        finally:
            os.close(descriptor)
        _check_chunk(name, tensor, chunk, (tuple(whole.shape), whole.dtype))
        return out.copy_(whole[slices_of(bounds)])

    def _check_files(self, metadata: Metadata) -> None:
        """Checks that every file in `.metadata` exists and is long enough."""
        needed: dict[str, int] = defaultdict(int)
        for place in metadata.storage_data.values():
            end = place.offset + place.length
            needed[place.relative_path] = max(needed[place.relative_path], end)
            if getattr(place, "transform_descriptors", None):
                raise UserError(
                    f"checkpoint {self.folder}: {place.relative_path} was written with "
                    f"{', '.join(place.transform_descriptors)}, which is not supported; write it "
                    "without stream transforms."
                )
        missing = sorted(name for name in needed if not (self.folder / name).is_file())
        if missing:
            raise UserError(
                f"checkpoint {self.folder}: {missing[0]} is missing ({len(missing)} of "
                f"{len(needed)} files are); copy the checkpoint again."
            )
        for name, size in needed.items():
            found = (self.folder / name).stat().st_size
            if found < size:
                raise UserError(
                    f"{self.folder / name} is not whole: it has {found} bytes, and "
                    f"{METADATA_FILE} says at least {size}; copy the checkpoint again."
                )

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            self._tensors[name] = self._find_chunks(name)
        return self._tensors[name]

    def _find_chunks(self, name: str) -> _Tensor:
        stored = self._stored[name]
        chunks = []
        for chunk in stored.chunks:
            place = self._places.get(MetadataIndex(name, chunk.offsets))
            if place is None:
                raise UserError(
                    f"checkpoint {self.folder}: {METADATA_FILE} does not say where the chunk of "
                    f"{name} at {list(chunk.offsets)} is stored; write the checkpoint again."
                )
            chunks.append(
                _Chunk(
                    starts=tuple(chunk.offsets),
                    shape=tuple(chunk.sizes),
                    file=self.folder / place.relative_path,
                    offset=place.offset,
                    length=place.length,
                )
            )
        size = tuple(stored.size)
        if sum(prod(chunk.shape) for chunk in chunks) != prod(size):
            raise self._missing_chunks(name, size)
        num_leading = 0
        while num_leading < len(size) and all(one.shape[num_leading] == 1 for one in chunks):
            num_leading += 1
        tensor = _Tensor(shape=size, dtype=stored.properties.dtype, num_leading=num_leading)
        for one in chunks:
            tensor.chunks.setdefault(one.starts[:num_leading], []).append(one)
        return tensor

    def _missing_chunks(self, name: str, shape: tuple[int, ...]) -> UserError:
        return UserError(
            f"checkpoint {self.folder}: the chunks of {name} do not make up its shape "
            f"{list(shape)}; write the checkpoint again."
        )


def read_tracker(folder: Path) -> str | None:
    """The newest checkpoint's folder name according to Megatron's tracker file in ``folder``.

    None if there is no such file or it says something else. The named checkpoint may not exist.
    """
    try:
        text = (folder / TRACKER_FILE).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    if text.isdecimal():
        return f"iter_{int(text):07d}"
    return text if text == RELEASE else None


def check_format(folder: Path) -> None:
    """Raises `UserError` unless the folder is a `torch_dist` checkpoint; names the other format."""
    found = _other_format(folder)
    if found is not None:
        raise UserError(
            f"checkpoint {folder} cannot be read: {found}; only the format torch_dist is "
            "supported (Megatron-LM: --ckpt-format torch_dist)."
        )


def _other_format(folder: Path) -> str | None:
    """A description of a folder that is not `torch_dist`; None if it is."""
    if not folder.is_dir():
        return "it is a file" if folder.exists() else "it does not exist"
    has_metadata = (folder / METADATA_FILE).is_file()
    if (folder / FORMAT_FILE).is_file():
        try:
            backend = json.loads((folder / FORMAT_FILE).read_text()).get("sharded_backend")
        except (OSError, ValueError, AttributeError) as error:
            return f"{FORMAT_FILE} cannot be read ({error})"
        if backend != "torch_dist":
            return f"{FORMAT_FILE} says that its format is {backend}"
        return None if has_metadata else f"{METADATA_FILE} is missing"
    if any(folder.glob("mp_rank_*")):
        return "it has the legacy format torch (mp_rank_* folders)"
    if has_metadata:
        return (
            f"it has {METADATA_FILE} but no {FORMAT_FILE}, as the formats torch_dcp and "
            "fsdp_dtensor do"
        )
    return f"it has no {FORMAT_FILE} and no {METADATA_FILE}"


def _read_metadata(folder: Path) -> Metadata:
    try:
        return read_metadata(folder / METADATA_FILE)
    except Exception as error:  # a damaged pickle raises exceptions of many types
        raise UserError(
            f"{folder / METADATA_FILE} cannot be read ({type(error).__name__}: {error}); copy the "
            "checkpoint again."
        ) from error


def _touched(tensor: _Tensor, bounds: Bounds) -> Iterator[_Chunk]:
    """The chunks that may overlap with ``bounds``."""
    for leading in product(*(range(*ends) for ends in bounds[: tensor.num_leading])):
        yield from tensor.chunks.get(leading, ())


def _check_chunk(
    name: str, tensor: _Tensor, chunk: _Chunk, found: tuple[tuple[int, ...], torch.dtype]
) -> None:
    if found != (chunk.shape, tensor.dtype):
        raise UserError(
            f"{chunk.file}: the chunk of {name} at {list(chunk.starts)} has shape {list(found[0])} "
            f"and dtype {found[1]}; {METADATA_FILE} says {list(chunk.shape)} and {tensor.dtype}."
        )
