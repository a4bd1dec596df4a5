"""Reads slices of safetensors files, and writes such files one tensor at a time.

safetensors' `get_slice` maps the file. Its pages then count as the process's memory: a pass over a
file of 538 MB, tensor by tensor, raised the peak by 516 MB, and by 111 MB (twice the largest
tensor) with positioned reads. And if a mapped file becomes shorter, a signal ends the process,
where a read raises an error. Only slices of columns are faster from a mapped file
(docs/benchmarks.md). safetensors' writer needs all tensors of a file at once. Here, reads are
positioned reads, and writes follow a header made from names, shapes and dtypes.
"""

import json
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.weights.positioned_reads import TensorInfo, read_bounds, slice_bounds

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
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor's shape and dtype, known before its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file, opened for reading; opening reads the header only. Thread-safe.

    Raises `UserError` if it is not a safetensors file, is truncated, or has a dtype unknown to
    torch.
    """

    path: Path
    tensors: dict[str, TensorInfo]  # in the order of their bytes

    def __init__(self, path: Path):
        self.path = path
        self.tensors = _read_header(path)
        self._opened: list[BinaryIO] = []  # empty until the first read
        # A list rather than self: a finalizer that refers to self would keep it alive.
        weakref.finalize(self, _close_all, self._opened)

    def read_slice(
        self, name: str, slices: Sequence[slice], *, out: Tensor | None = None
    ) -> Tensor:
        """Implements `WeightSource.read_slice` for a ``name`` in `tensors`."""
        info = self.tensors[name]
        bounds = slice_bounds(name, info.shape, slices)
        return read_bounds(self._descriptor(), self.path, info, bounds, out)

    def _descriptor(self) -> int:
        if not self._opened:
            try:
                self._opened.append(self.path.open("rb", buffering=0))
            except OSError as error:
                raise UserError(f"cannot read {self.path}: {error.strerror}.") from error
        return self._opened[0].fileno()


class SafetensorsWriter:
    """Writes a safetensors file: first the header, then one tensor at a time.

    Raises:
        OSError: On any call, the operating system refuses.
        ValueError: safetensors has no name for a dtype, or, on exit, a tensor was not written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec]) -> None:
        self.path = path
        header, self._missing = _make_header(tensors)
        self._stream = path.open("wb", buffering=0)
        self._write(memoryview(header), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()
        if error is None and self._missing:
            raise ValueError(f"{self.path.name} did not get tensor {next(iter(self._missing))}")

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor, on any device; in any order and from any thread.

        Raises `ValueError` if ``name`` is unknown or already written, or shape or dtype not as
        announced.
        """
        if (info := self._missing.pop(name, None)) is None:
            raise ValueError(f"{self.path.name} has no place for tensor {name}, or has it already")
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise ValueError(
                f"tensor {name} is {list(tensor.shape)} of {tensor.dtype}; {self.path.name} was to "
                f"get {list(info.shape)} of {info.dtype}"
            )
        self._write(_bytes_of(tensor.detach().cpu().contiguous()), info.offset)

    def _write(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = os.pwrite(self._stream.fileno(), buffer, offset)  # writes 2 GiB at most
            buffer = buffer[count:]
            offset += count


def _make_header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header with its length in front, and the location of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wider dtypes first, as in safetensors' own files, so that every tensor is aligned to its
    # dtype.
    in_order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, spec in in_order:
        if spec.dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {name}: safetensors has no {spec.dtype}")
        begin, end = end, end + spec.num_bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Padded to 8 bytes, so that the tensors' alignment in the file is that in the data section.
    text += b" " * (-len(text) % 8)
    offset = 8 + len(text)
    places = {}
    for name, spec in in_order:
        places[name] = TensorInfo(shape=spec.shape, dtype=spec.dtype, offset=offset)
        offset += spec.num_bytes
    return len(text).to_bytes(8, "little") + text, places


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors in the order of their bytes."""
    try:
        with safe_open(path, framework="pt"):  # checks the layout and that the file is whole
            pass
        with path.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = read_json_once(stream.read(header_size))
    except KeyError as error:
        raise UserError(
            f"{path}: its header has tensor {error.args[0]!r} twice; get the file anew."
        ) from None
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


def read_json_once(text: str | bytes) -> Any:
    """Parses JSON; raises `KeyError` for a duplicate key, where json keeps the last value."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise KeyError(key)
            content[key] = value
        return content

    return json.loads(text, object_pairs_hook=once)


def _close_all(files: list[BinaryIO]) -> None:
    for file in files:
        file.close()
