"""One safetensors file: its header, and reads of exactly the bytes asked for.

safetensors' own reader either maps the file, whose pages then count as the process's memory, or
reads whole tensors where a slice was asked for. Here a slice is read with positioned reads of its
bytes only, and nothing stays mapped.
"""

import itertools
import json
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_oprd.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    offset: int  # its first byte in the file
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file, opened for reading; opening reads its header only.

    The file handle is opened by the first read and kept. Reads are safe from several threads.

    Attributes:
        path: The file.
        tensors: Its tensors by name, in the order of their bytes.

    Raises:
        UserError: If the file is no safetensors file, is not whole, or has a dtype that torch does
            not know.
    """

    path: Path
    tensors: dict[str, TensorInfo]

    def __init__(self, path: Path):
        self.path = path
        self.tensors = _read_header(path)
        self._opened: list[BinaryIO] = []  # empty until the first read
        weakref.finalize(self, _close_all, self._opened)

    def read_slice(self, name: str, slices: Sequence[slice]) -> Tensor:
        """Reads `tensor[slices]` of tensor `name`, and only those bytes of the file.

        Args:
            name: A name in `tensors`.
            slices: One slice a leading dimension, step 1, with Python's meaning of missing,
                negative and too large bounds; dimensions without a slice are read whole.

        Returns:
            A new contiguous CPU tensor with the file's dtype.

        Raises:
            UserError: If the file cannot be read any more.
            ValueError: If there are more slices than dimensions, or a step is not 1.
        """
        info = self.tensors[name]
        if len(slices) > len(info.shape):
            raise ValueError(f"{len(slices)} slices for {name} of shape {list(info.shape)}")
        if any(part.step not in (None, 1) for part in slices):
            raise ValueError(f"slices of {name} must have step 1, got {list(slices)}")
        whole = itertools.repeat(slice(None), len(info.shape) - len(slices))
        bounds = [
            part.indices(size)[:2] for part, size in zip((*slices, *whole), info.shape, strict=True)
        ]
        result = torch.empty([max(0, stop - start) for start, stop in bounds], dtype=info.dtype)
        if result.numel():
            buffer = memoryview(result.reshape(-1).view(torch.uint8).numpy().data)
            descriptor = self._descriptor()
            starts, length = _runs(info, bounds)
            for number, start in enumerate(starts):
                self._read_into(descriptor, buffer[number * length : (number + 1) * length], start)
        return result

    def _read_into(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from `offset` on; one read call returns 2 GiB at most."""
        while (count := os.preadv(descriptor, [buffer], offset)) != len(buffer):
            if count == 0:
                raise UserError(f"{self.path} became shorter while open; copy it again.")
            buffer = buffer[count:]
            offset += count

    def _descriptor(self) -> int:
        if not self._opened:
            try:
                self._opened.append(self.path.open("rb", buffering=0))
            except OSError as error:
                raise UserError(f"cannot read {self.path}: {error.strerror}.") from error
        return self._opened[0].fileno()


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes; reads its header only."""
    try:
        with safe_open(path, framework="pt"):  # checks the layout and that the file is whole
            pass
        with path.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_size))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({path.stat().st_size} bytes): {error}; copy "
            "or download it again."
        ) from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if fields["dtype"] not in _DTYPES:
            raise UserError(
                f"{path}: tensor {name!r} has dtype {fields['dtype']}; supported are "
                f"{', '.join(_DTYPES)}."
            )
        tensors[name] = TensorInfo(
            offset=8 + header_size + fields["data_offsets"][0],
            shape=tuple(fields["shape"]),
            dtype=_DTYPES[fields["dtype"]],
        )
    return tensors


def _runs(info: TensorInfo, bounds: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """The pieces of a non-empty slice in the file: where each starts, and the length of all.

    They are in row-major order. A piece covers every dimension after the last one that is cut, so
    a slice of leading rows is one piece.
    """
    cut = [dim for dim, (start, stop) in enumerate(bounds) if stop - start != info.shape[dim]]
    if not cut:
        return [info.offset], info.num_bytes
    strides = [math.prod(info.shape[dim + 1 :]) * info.dtype.itemsize for dim in range(len(bounds))]
    last = cut[-1]
    start, stop = bounds[last]
    starts = [info.offset + start * strides[last]]
    for dim in range(last):
        starts = [begin + i * strides[dim] for begin in starts for i in range(*bounds[dim])]
    return starts, (stop - start) * strides[last]


def _close_all(files: list[BinaryIO]) -> None:
    for file in files:
        file.close()
