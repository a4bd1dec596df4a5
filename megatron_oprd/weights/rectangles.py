"""Rectangles of tensors."""

from collections.abc import Iterator, Sequence
from math import prod

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
