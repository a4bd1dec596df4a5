"""Memory that processes of a machine share, and the form of a chunk of weights in it."""

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

Chunk = Sequence[tuple[str, Tensor]]

# Parts of the memory begin at multiples of it, as values of any dtype need it.
_ALIGNMENT = 64


class SharedMemory:
    """An anonymous file in memory.

    Attributes:
        path: With which other processes of the same user map it (`map_memory`).
        values: Its bytes, uint8 [n].
    """

    def __init__(self, num_bytes: int) -> None:
        """Allocates the memory; pages that are never written take none."""
        self._file: int | None = os.memfd_create("rollout weights")
        os.truncate(self._file, num_bytes)
        # Other processes open the anonymous file through this process's descriptor.
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self.values = map_memory(self.path, num_bytes)

    def close(self) -> None:
        """Frees it once no process maps it. A second call does nothing."""
        self.values = self.values.new_empty(0)
        if self._file is not None:
            os.close(self._file)
            self._file = None


def map_memory(path: str, num_bytes: int) -> Tensor:
    """The bytes of another process's `SharedMemory`, uint8 [n]."""
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


def aligned(num_bytes: int) -> int:
    """The next size, in bytes, at which another part may begin."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def chunks(
    stream: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype, num_bytes: int
) -> Iterator[Chunk]:
    """Divides a stream into chunks of at most ``num_bytes``, or of one larger tensor.

    Tensors are converted to ``dtype``.
    """
    chunk: list[tuple[str, Tensor]] = []
    used = 0
    for name, tensor in stream:
        converted = tensor.detach().to(dtype)
        if chunk and used + converted.nbytes > num_bytes:
            yield chunk
            chunk, used = [], 0
        chunk.append((name, converted))
        used += converted.nbytes
    if chunk:
        yield chunk


def update_info(chunk: Chunk) -> dict[str, list[Any]]:
    """What vLLM's update of a chunk says of its tensors, as vLLM's own engines say it."""
    return {
        "names": [name for name, _ in chunk],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
        "shapes": [list(tensor.shape) for _, tensor in chunk],
    }


def pieces(chunk: Chunk, *, num_bytes: int) -> Iterator[tuple[Chunk, dict[str, Any]]]:
    """Divides a chunk's tensor that is larger than ``num_bytes``; yields other chunks as they are.

    Beside each piece is its `update_info`; of a divided tensor also its ``whole`` shape, and the
    place of the piece's ``first`` value.
    """
    name, tensor = chunk[0]
    if tensor.nbytes <= num_bytes:
        yield chunk, update_info(chunk)
        return
    first = 0
    for values in tensor.reshape(-1).split(num_bytes // tensor.itemsize):
        piece = [(name, values)]
        yield piece, update_info(piece) | {"whole": list(tensor.shape), "first": first}
        first += values.numel()


def write(chunk: Chunk, values: Tensor) -> None:
    """Copies the tensors into memory, back to back; they have one dtype."""
    used = 0
    for _, tensor in chunk:
        part = values[used : used + tensor.nbytes].view(tensor.dtype)
        part.copy_(tensor.reshape(-1))
        used += tensor.nbytes


def read(
    values: Tensor, *, dtypes: Iterable[torch.dtype], shapes: Iterable[Sequence[int]]
) -> Iterator[Tensor]:
    """Copies of the tensors of `write`, one by one."""
    used = 0
    for dtype, shape in zip(dtypes, shapes, strict=True):
        length = prod(shape) * dtype.itemsize
        # A copy: vLLM keeps a module's tensors until all have come, when others are here.
        yield values[used : used + length].view(dtype).clone().view(list(shape))
        used += length


def keep_freed_memory() -> None:
    """Makes glibc keep freed host memory for the next tensors of a stream.

    By default it returns large blocks at once, and each page of a new block costs a fault: more
    time than the copy.
    """
    trim_threshold, mmap_max, most = -1, -4, 2**31 - 1  # glibc's malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, most)
    libc.mallopt(mmap_max, 0)
