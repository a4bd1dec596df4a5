"""Records of tensors and files: xxh3_128 checksums and counts of NaNs."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

# Field of manifest.json with the checksums of the folder's tensors.
CHECKSUMS_FIELD = "checksums_xxh3_128"

_logger = logging.getLogger(__name__)
# Elements examined at a time. They stay in the processor's cache between the hash and the search
# for NaNs.
_PIECE = 2**20
_BLOCK_BYTES = 2**24  # read at a time from a file
# As wide as a floating-point element of so many bytes.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES, _SAMPLE_BYTES = 64, 4096


class Checksum:
    """xxh3_128 of the bytes of a tensor that arrives in pieces."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, piece: Tensor) -> None:
        """Adds the bytes of ``piece``, of any dtype and on any device, in row-major order."""
        in_order = piece.detach().cpu().contiguous().reshape(-1)
        # Viewed as bytes first: NumPy has no bfloat16 or float8.
        self._hash.update(in_order.view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """The checksum so far, 32 hexadecimal digits."""
        return self._hash.hexdigest()


def checksum(tensor: Tensor) -> str:
    """xxh3_128 of the tensor's bytes in row-major order; any dtype, any device."""
    result = Checksum()
    result.update(tensor)
    return result.hexdigest()


def examine(tensor: Tensor) -> tuple[str, int]:
    """The tensor's checksum (xxh3_128 of its bytes) and its number of NaNs."""
    tensor = tensor.detach().cpu().contiguous()
    checksum, nans = Checksum(), 0
    for piece in tensor.reshape(-1).split(_PIECE):
        checksum.update(piece)
        nans += count_nans(piece)
    return checksum.hexdigest(), nans


def count_nans(piece: Tensor) -> int:
    """Counts NaNs in a small contiguous CPU tensor, in the calling thread."""
    if not piece.is_floating_point():
        return 0
    if piece.dtype.itemsize == 1:
        piece = piece.float()  # float8's formats differ in how they store NaN
    integers = _INTEGERS[piece.dtype.itemsize]
    infinity = torch.tensor(torch.inf, dtype=piece.dtype).view(integers).item()
    # Without the sign, only NaNs are larger than infinity. In NumPy: torch would share the work
    # with other threads, and wait for one whose core the thread that writes has.
    magnitudes = piece.view(integers).numpy() & torch.iinfo(integers).max
    return int(np.count_nonzero(magnitudes > infinity))


def warn_of_nans(out: Path, nans: Mapping[str, int], *, what: str) -> None:
    """Warns of NaNs from the source of ``out``: their number per tensor, file or chunk."""
    # `nans` has only entries above zero; `what` is the plural of what its keys are.
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
    """xxh3_128 of a file's size and of 64 samples of 4 KiB spread evenly over it.

    Training changes weights everywhere, so it changes samples. A file of any size takes
    milliseconds.
    """
    size = path.stat().st_size
    result = xxhash.xxh3_128(size.to_bytes(8, "little"))
    with path.open("rb", buffering=0) as file:
        for number in range(_SAMPLES):
            # The first sample is the start of the file, with the header of a safetensors file or
            # part of it; the last one is the end.
            file.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            result.update(file.read(_SAMPLE_BYTES))
    return result.hexdigest()
