"""What is noted of a tensor's values: a checksum of its bytes, and whether there are NaNs."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

# Where a manifest has the checksums of what is in its folder.
CHECKSUMS_FIELD = "checksums_xxh3_128"

_logger = logging.getLogger(__name__)
_PIECE = 2**20  # elements that are examined at a time, so that they stay in the processor's cache
_BLOCK_BYTES = 2**24
_SAMPLES, _SAMPLE_BYTES = 64, 4096


class Checksum:
    """xxh3_128 of a tensor's bytes, for a tensor that comes in pieces."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, piece: Tensor) -> None:
        """Adds the bytes of ``piece``, of any dtype and device, in row-major order."""
        in_order = piece.detach().cpu().contiguous().reshape(-1)
        self._hash.update(in_order.view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """The checksum of what was added so far, 32 hexadecimal digits."""
        return self._hash.hexdigest()


def checksum(tensor: Tensor) -> str:
    """xxh3_128 of the tensor's bytes in row-major order, of any dtype and device."""
    result = Checksum()
    result.update(tensor)
    return result.hexdigest()


def examine(tensor: Tensor) -> tuple[str, int]:
    """A tensor's checksum (xxh3_128 of its bytes) and how many of its values are NaN."""
    tensor = tensor.detach().cpu().contiguous()
    checksum, nans = Checksum(), 0
    for piece in tensor.reshape(-1).split(_PIECE):
        checksum.update(piece)
        nans += count_nans(piece)
    return checksum.hexdigest(), nans


def count_nans(piece: Tensor) -> int:
    """How many values of a small tensor are NaN, fast where none is."""
    if not piece.is_floating_point():
        return 0
    if piece.dtype.itemsize == 1:
        piece = piece.float()  # torch neither adds float8 up nor compares it
    # A sum with a NaN in it is one; so is one over infinities of both signs, hence the second look.
    return int(piece.isnan().sum()) if piece.sum().isnan() else 0


def warn_of_nans(out: Path, nans: Mapping[str, int], *, what: str) -> None:
    """Warns of NaNs that a folder got from its source.

    Args:
        out: The folder.
        nans: How many are in each of the ``what`` that have any; nothing is said of none.
        what: What was counted.
    """
    if nans:
        _logger.warning(
            "%s: %d values are NaN, as they came, in %d %s; the first is %s",
            out,
            sum(nans.values()),
            len(nans),
            what,
            next(iter(nans)),
        )


def file_checksum(path: Path) -> str:
    """xxh3_128 of a file's bytes, 32 hexadecimal digits."""
    result = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            result.update(block)
    return result.hexdigest()


def sampled_checksum(path: Path) -> str:
    """xxh3_128 of a file's size and of samples of its bytes: of 64 pieces evenly over it.

    Training changes weights everywhere, so it changes samples; and a file of any size is sampled
    in milliseconds.
    """
    size = path.stat().st_size
    result = xxhash.xxh3_128(size.to_bytes(8, "little"))
    with path.open("rb", buffering=0) as file:
        for number in range(_SAMPLES):
            # The first piece is the file's start, with a safetensors file's header or part of it,
            # the last one its end.
            file.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            result.update(file.read(_SAMPLE_BYTES))
    return result.hexdigest()
