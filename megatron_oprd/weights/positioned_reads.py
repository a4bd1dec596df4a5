"""Reads of rectangles of tensors that lie in files as plain bytes, in row-major order.

Nothing is mapped, whose pages would count as the process's memory, and no other bytes than those
asked for are read.
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

# First element and end of every dimension.
Bounds = list[tuple[int, int]]


def bounds_of(index: Sequence[slice]) -> Bounds:
    """The rectangle of slices that name both ends."""
    return [(part.start, part.stop) for part in index]


def slices_of(bounds: Bounds) -> tuple[slice, ...]:
    """The slices that cut a rectangle out."""
    return tuple(slice(start, stop) for start, stop in bounds)


def shape_of(bounds: Bounds) -> tuple[int, ...]:
    """The shape of a rectangle."""
    return tuple(stop - start for start, stop in bounds)


def row_blocks(bounds: Bounds, itemsize: int, max_bytes: int) -> Iterator[Bounds]:
    """Rectangles that cover a rectangle in row-major order, one after the other.

    Each is some rows of the first dimension that has more than one element.

    Args:
        bounds: The whole.
        itemsize: Bytes of an element.
        max_bytes: The most bytes of each, but for a single row with more.
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
    """What two rectangles have in common; None where that is nothing."""
    both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True)]
    return None if any(stop <= start for start, stop in both) else both


def moved(bounds: Bounds, origin: Bounds, to: Bounds | None = None) -> Bounds:
    """A rectangle seen from the start of ``origin``, or put where ``to`` starts instead."""
    starts = [(0, 0)] * len(bounds) if to is None else to
    return [
        (start - old + new, stop - old + new)
        for (start, stop), (old, _), (new, _) in zip(bounds, origin, starts, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor in a file."""

    offset: int  # its first byte in the file
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def slice_bounds(name: str, shape: Sequence[int], slices: Sequence[slice]) -> Bounds:
    """What `slices` of a tensor of this shape cover.

    Args:
        name: The tensor's name, for messages.
        shape: Its shape.
        slices: One slice a leading dimension, step 1, with Python's meaning of missing, negative
            and too large bounds; dimensions without a slice are taken whole.

    Raises:
        ValueError: If there are more slices than dimensions, or a step is not 1.
    """
    if len(slices) > len(shape):
        raise ValueError(f"{len(slices)} slices for {name} of shape {list(shape)}")
    if any(part.step not in (None, 1) for part in slices):
        raise ValueError(f"slices of {name} must have step 1, got {list(slices)}")
    whole = itertools.repeat(slice(None), len(shape) - len(slices))
    ends = (part.indices(n)[:2] for part, n in zip((*slices, *whole), shape, strict=True))
    return [(start, max(start, stop)) for start, stop in ends]


def read_bounds(
    descriptor: int, path: Path, info: TensorInfo, bounds: Bounds, out: Tensor | None = None
) -> Tensor:
    """Reads a rectangle of a tensor, and only its bytes.

    Args:
        descriptor: The file, open for reading; its position is neither used nor changed.
        path: The file, for messages.
        info: The tensor in the file.
        bounds: The rectangle.
        out: A contiguous CPU tensor of the rectangle's shape and the file's dtype to read into;
            None makes one.

    Returns:
        ``out``, or a new contiguous CPU tensor with the file's dtype.

    Raises:
        UserError: If the file ends before the tensor does.
    """
    result = torch.empty(shape_of(bounds), dtype=info.dtype) if out is None else out
    assert (tuple(result.shape), result.dtype) == (shape_of(bounds), info.dtype)
    if result.numel():
        buffer = memoryview(result.view(-1).view(torch.uint8).numpy().data)
        starts, length = _runs(info, bounds)
        for number, start in enumerate(starts):
            read_into(descriptor, path, buffer[number * length : (number + 1) * length], start)
    return result


def read_into(descriptor: int, path: Path, buffer: memoryview, offset: int) -> None:
    """Fills `buffer` with the file's bytes from `offset` on.

    Raises:
        UserError: If the file ends before that, or the operating system cannot read it.
    """
    try:
        while (count := os.preadv(descriptor, [buffer], offset)) != len(buffer):  # 2 GiB at most
            if count == 0:
                raise UserError(f"{path} became shorter while open; copy it again.")
            buffer = buffer[count:]
            offset += count
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error


def _runs(info: TensorInfo, bounds: Bounds) -> tuple[list[int], int]:
    """The pieces of a non-empty rectangle in the file: where each starts, and the length of all.

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
