"""A chunk of a `.distcp` file, which is a zip written by torch.save: location of its tensor."""

import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from megatron_oprd.weights.positioned_reads import TensorInfo, read_into

# The fixed part of a zip entry's local header; lengths of name and extra field are at 26 and 28.
_LOCAL_HEADER_BYTES = 30
# Legacy storage classes, under which torch.save pickles these dtypes. Newer dtypes have none.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def find_plain_tensor(descriptor: int, path: Path, offset: int, length: int) -> TensorInfo | None:
    """Finds the tensor's bytes of the chunk at [offset, offset + length) of an open file.

    None if they do not lie plainly in the file (not row-major, compressed, or not a plain tensor).

    Raises:
        UserError: The file ends before the chunk.
        zipfile.BadZipFile: The chunk is not a zip.
    """
    window = _Window(descriptor, path, offset, length)
    with zipfile.ZipFile(io.BufferedReader(window)) as archive:
        # All names begin with a folder named by torch.save.
        entries = {one.filename.partition("/")[2]: one for one in archive.infolist()}
    data = [one for name, one in entries.items() if name.startswith("data/")]
    pickled = entries.get("data.pkl")
    if pickled is None or len(data) != 1:
        return None
    if any(one.compress_type != zipfile.ZIP_STORED for one in entries.values()):
        return None

    def start_of(entry: zipfile.ZipInfo) -> int:
        # The central directory does not give the length of the local header before the bytes.
        header = bytearray(_LOCAL_HEADER_BYTES)
        start = offset + entry.header_offset
        read_into(descriptor, path, memoryview(header), start)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return start + len(header) + names

    def read(entry: zipfile.ZipInfo) -> bytes:
        # Not zipfile's own read, which verifies the CRC32 that torch.save may leave out.
        content = bytearray(entry.file_size)
        read_into(descriptor, path, memoryview(content), start_of(entry))
        return bytes(content)

    if "byteorder" in entries and read(entries["byteorder"]).decode() != sys.byteorder:
        return None
    tensor = _parse(read(pickled))
    if tensor is None:
        return None
    dtype, first, shape, stride, numel = tensor
    if not _is_row_major(shape, stride) or data[0].file_size != numel * dtype.itemsize:
        return None
    return TensorInfo(offset=start_of(data[0]) + first * dtype.itemsize, shape=shape, dtype=dtype)


def load_chunk(descriptor: int, path: Path, offset: int, length: int) -> Tensor:
    """Loads a whole chunk with torch.load(weights_only=True), and raises any error of it.

    Raises `UserError` if the file ends early, `TypeError` if the chunk is not a tensor.
    """
    content = bytearray(length)
    read_into(descriptor, path, memoryview(content), offset)
    tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"it holds a {type(tensor).__name__}")
    return tensor


class _Window(io.RawIOBase):
    """A byte range of an open file, as a file for zipfile."""

    def __init__(self, descriptor: int, path: Path, offset: int, length: int):
        self._descriptor, self._path = descriptor, path
        self._offset, self._length = offset, length
        self._position = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(base + offset, 0)
        return self._position

    @override
    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._length - self._position), 0)
        target = memoryview(buffer)[:count]
        read_into(self._descriptor, self._path, target, self._offset + self._position)
        self._position += count
        return count


_Parsed = tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...], int]


def _parse(pickled: bytes) -> _Parsed | None:
    """(dtype, first element, shape, stride, storage elements) of a pickled plain tensor."""
    try:
        tensor = _TensorUnpickler(io.BytesIO(pickled)).load()
    except pickle.UnpicklingError:
        return None
    return tensor if isinstance(tensor, tuple) and len(tensor) == 5 else None


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles the description of a plain tensor and refuses every other class."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    @override
    def persistent_load(self, pid: Any) -> Any:
        return pid  # (kind, storage class, key, device, elements), for _describe


def _describe(
    storage: tuple[Any, ...],
    storage_offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: Any,
) -> _Parsed:
    _, dtype, _, _, numel = storage
    return dtype, storage_offset, tuple(size), tuple(stride), numel


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        # The stride of a dimension of size 1 is arbitrary.
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
