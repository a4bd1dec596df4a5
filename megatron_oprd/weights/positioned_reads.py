"""Reads rectangles of tensors stored in files as plain row-major bytes.

Nothing is mapped: mapped pages would count as the process's memory, and a mapped file that becomes
shorter would end the process. Only the requested bytes are read, and gaps between them that are
read faster than skipped.
"""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_oprd.errors import UserError

# A rectangle: (start, stop) in every dimension.
Bounds = list[tuple[int, int]]

# Bytes. A read of one more run takes about as long as that of a gap of this size; the kernel would
# read the gap of a file on disk ahead anyway.
_LARGEST_GAP = 16 * 2**10
BLOCK = 4 * 2**20  # bytes read at a time with their gaps, unless one row is larger


def bounds_of(index: Sequence[slice]) -> Bounds:
    """Converts slices with explicit start and stop to a rectangle."""
    return [(part.start, part.stop) for part in index]


def slices_of(bounds: Bounds) -> tuple[slice, ...]:
    """Converts a rectangle to slices."""
    return tuple(slice(start, stop) for start, stop in bounds)


def shape_of(bounds: Bounds) -> tuple[int, ...]:
    """The shape of a rectangle."""
    return tuple(stop - start for start, stop in bounds)


def row_blocks(bounds: Bounds, itemsize: int, max_bytes: int) -> Iterator[Bounds]:
    """Cuts a rectangle into blocks of rows of at most ``max_bytes``, in row-major order.

    Cuts along the first dimension of more than one element. A single larger row is a block.
    """
    cut = next((dim for dim, (start, stop) in enumerate(bounds) if stop - start != 1), None)
    if cut is None:
        yield bounds
        return
    start, stop = bounds[cut]
    step = max(1, max_bytes // max(1, prod(shape_of(bounds[cut + 1 :])) * itemsize))
    for row in range(start, stop, step):
        yield [*bounds[:cut], (row, min(row + step, stop)), *bounds[cut + 1 :]]


def common(one: Bounds, other: Bounds) -> Bounds | None:
    """The intersection of two rectangles; None if empty."""
    both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True)]
    return None if any(stop <= start for start, stop in both) else both


def moved(bounds: Bounds, origin: Bounds, to: Bounds | None = None) -> Bounds:
    """Shifts a rectangle from the origin of ``origin`` to that of ``to``, by default to 0."""
    starts = [(0, 0)] * len(bounds) if to is None else to
    return [
        (start - old + new, stop - old + new)
        for (start, stop), (old, _), (new, _) in zip(bounds, origin, starts, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Location and type of a tensor in a file."""

    offset: int  # of the first byte, from the start of the file
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The tensor's size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def slice_bounds(name: str, shape: Sequence[int], slices: Sequence[slice]) -> Bounds:
    """Resolves one slice per leading dimension to a rectangle; other dimensions are whole.

    Missing, negative and too large bounds mean what they do in Python. Raises `ValueError` for too
    many slices or a step other than 1.
    """
    if len(slices) > len(shape):
        raise ValueError(f"{len(slices)} slices for {name} of shape {list(shape)}")
    if any(part.step not in (None, 1) for part in slices):
        raise ValueError(f"slices of {name} must have step 1, got {list(slices)}")
    whole = itertools.repeat(slice(None), len(shape) - len(slices))
    ends = (part.indices(n)[:2] for part, n in zip((*slices, *whole), shape, strict=True))
    return [(start, max(start, stop)) for start, stop in ends]  # empty, not negative, for 3:1


def read_bounds(
    descriptor: int, path: Path, info: TensorInfo, bounds: Bounds, out: Tensor | None = None
) -> Tensor:
    """Reads a rectangle of a tensor from an open file.

    Reads into ``out`` if given, a contiguous CPU tensor of the rectangle's shape and the file's
    dtype. The descriptor's position is neither used nor changed. Raises `UserError` if the file is
    too short.
    """
    result = torch.empty(shape_of(bounds), dtype=info.dtype) if out is None else out
    assert (tuple(result.shape), result.dtype) == (shape_of(bounds), info.dtype)
    if not result.numel():
        return result
    if (wide := _with_gaps(info, bounds)) != bounds:
        for block in row_blocks(wide, info.dtype.itemsize, BLOCK):
            read = read_bounds(descriptor, path, info, block)
            wanted = common(block, bounds)
            assert wanted is not None
            result[slices_of(moved(wanted, bounds))] = read[slices_of(moved(wanted, block))]
    else:
        # NumPy has no bfloat16, but shares the memory of the bytes.
        buffer = memoryview(result.view(-1).view(torch.uint8).numpy().data)
        starts, length = _runs(info, bounds)
        for number, start in enumerate(starts):
            read_into(descriptor, path, buffer[number * length : (number + 1) * length], start)
    return result


def read_into(descriptor: int, path: Path, buffer: memoryview, offset: int) -> None:
    """Fills ``buffer`` from ``offset`` on; `UserError` if the file ends early or is unreadable."""
    try:
        while (count := os.preadv(descriptor, [buffer], offset)) != len(buffer):  # 2 GiB at most
            if count == 0:
                raise UserError(f"{path} became shorter while open; copy it again.")
            buffer = buffer[count:]
            offset += count
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error


def _with_gaps(info: TensorInfo, bounds: Bounds) -> Bounds:
    """The rectangle with its last cut dimension whole, if it has several runs and small gaps."""
    cut = _cut(info, bounds)
    if not cut or all(stop - start == 1 for start, stop in bounds[: cut[-1]]):
        return bounds  # one run
    start, stop = bounds[cut[-1]]
    whole = info.shape[cut[-1]]
    element = math.prod(info.shape[cut[-1] + 1 :]) * info.dtype.itemsize
    if (whole - (stop - start)) * element > _LARGEST_GAP:
        return bounds
    return [*bounds[: cut[-1]], (0, whole), *bounds[cut[-1] + 1 :]]


def _cut(info: TensorInfo, bounds: Bounds) -> list[int]:
    """The dimensions of which the rectangle has only a part."""
    return [dim for dim, (start, stop) in enumerate(bounds) if stop - start != info.shape[dim]]


def _runs(info: TensorInfo, bounds: Bounds) -> tuple[list[int], int]:
    """The rectangle's contiguous runs in the file: the start of each, and their common length.

    A run covers all dimensions after the last one cut, so a slice of leading rows is one run.
    """
    cut = _cut(info, bounds)
    if not cut:
        return [info.offset], info.num_bytes
    strides = [math.prod(info.shape[dim + 1 :]) * info.dtype.itemsize for dim in range(len(bounds))]
    last = cut[-1]
    start, stop = bounds[last]
    starts = [info.offset + start * strides[last]]
    for dim in range(last):
        starts = [begin + i * strides[dim] for begin in starts for i in range(*bounds[dim])]
    return starts, (stop - start) * strides[last]
