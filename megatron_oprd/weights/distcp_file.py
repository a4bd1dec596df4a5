"""Writes one `.distcp` file of a `torch_dist` checkpoint, chunk by chunk, and reads it back."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.weights.casting import count_overflows, overflow_error
from megatron_oprd.weights.checksum import Checksum, examine
from megatron_oprd.weights.positioned_reads import (
    bounds_of,
    common,
    moved,
    read_into,
    shape_of,
    slices_of,
)
from megatron_oprd.weights.source import WeightSource
from megatron_oprd.weights.torch_dist_chunk import find_plain_tensor
from megatron_oprd.weights.torch_dist_plan import Chunk, File, chunk_name

# Bytes. A larger tensor gets fresh memory, so that the two kept buffers stay small.
_LARGEST = 2**27


class AlternatingBuffers:
    """Two reused buffers: a tensor stays valid until the second allocation after it."""

    def __init__(self) -> None:
        self._memory = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized contiguous CPU tensor in the older of the two buffers."""
        size = prod(shape) * dtype.itemsize
        if not 0 < size <= _LARGEST:
            return torch.empty(shape, dtype=dtype)
        if len(self._memory[0]) < size:
            self._memory[0] = torch.empty(0, dtype=torch.uint8)  # frees it first
            self._memory[0] = torch.empty(size, dtype=torch.uint8)
        self._memory.reverse()
        # torch.save writes whole storages. frombuffer makes one of exactly `count` elements; a view
        # would keep the whole buffer's.
        return torch.frombuffer(self._memory[1].numpy(), dtype=dtype, count=prod(shape)).view(shape)


# Bytes of zip headers and pickle per chunk or object: an estimate for the check of free space.
OVERHEAD_BYTES = 2048
_MAX_BYTES_OF_TWO = 2**29  # most bytes in flight: one chunk being written, one being read
COPIED_BYTES = 2**26  # bytes of a chunk cast or copied at a time
_READ_BACK_BYTES = 2**20  # small enough to be hashed from the processor's cache
# Transformer Engine's extra state of a layer without FP8 training, in a list as Megatron saves it.
_EMPTY_OBJECT = [torch.empty(0, dtype=torch.uint8)]


def write_file(
    path: Path,
    file: File,
    source: WeightSource,
    buffers: AlternatingBuffers,  # reused from file to file
    *,
    on_written: Callable[[int], None],  # gets each chunk's bytes, in another thread
) -> dict[str, Any]:
    """Writes one file. While a chunk is written, the next is read, hashed and searched for NaNs.

    Returns a JSON-compatible record: ``entries``, a list of [key, first element, offset, length]
    with None for an object's first element; ``checksums``, xxh3_128 of each chunk's values;
    ``nans``, the number of NaNs in the chunks that have any.

    Raises:
        OSError: The operating system refuses.
        UserError: The source cannot be read, or finite values overflow a chunk's dtype.
    """
    record: dict[str, Any] = {"entries": [], "checksums": {}, "nans": {}}
    # The executor is entered last, so its thread ends before the file is closed, even on an error.
    with path.open("wb") as stream, ThreadPoolExecutor(1) as writer:

        def write(key: str, starts: tuple[int, ...] | None, value: Any) -> None:
            offset = stream.tell()
            try:
                with _without_zip_checksums():
                    torch.save(value, stream)
            except RuntimeError as error:
                # torch wraps a refused write (a full disk) in a RuntimeError; re-raise the OSError.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            record["entries"].append([key, starts, offset, stream.tell() - offset])

        def write_chunk(chunk: Chunk, tensor: Tensor) -> None:
            write(chunk.key, chunk.starts, tensor)
            on_written(chunk.num_bytes)

        written, bytes_in_flight = writer.submit(lambda: None), 0
        for chunk in file.chunks:
            if bytes_in_flight + chunk.num_bytes > _MAX_BYTES_OF_TWO:
                written.result()
            tensor = read_chunk(source, chunk, buffers)
            record["checksums"][chunk.name], nans = examine(tensor)
            if nans:
                record["nans"][chunk.name] = nans
            # At most one write is pending, which is what makes two buffers enough.
            written.result()
            written, bytes_in_flight = writer.submit(write_chunk, chunk, tensor), chunk.num_bytes
            # Only the writer thread holds the tensor now, so a large one is freed once it is
            # written.
            del tensor
        written.result()
        for key in file.objects:
            write(key, None, _EMPTY_OBJECT)
    return record


def read_back(path: Path, record: dict[str, Any]) -> None:
    """Checks a file against the ``record`` of `write_file`; `UserError` if it differs."""
    buffer = memoryview(bytearray(_READ_BACK_BYTES))
    with path.open("rb", buffering=0) as stream:
        for key, starts, offset, length in record["entries"]:
            # An object: always the same empty state, without a checksum.
            if starts is None:
                continue
            name = chunk_name(key, starts)
            info = find_plain_tensor(stream.fileno(), path, offset, length)
            assert info is not None, f"torch.save did not store {name} plainly"
            checksum = Checksum()
            for start in range(0, info.num_bytes, _READ_BACK_BYTES):
                part = buffer[: min(_READ_BACK_BYTES, info.num_bytes - start)]
                read_into(stream.fileno(), path, part, info.offset + start)
                checksum.update(torch.frombuffer(part, dtype=torch.uint8))
            if checksum.hexdigest() != record["checksums"][name]:
                raise UserError(
                    f"{path}: {name} reads back differently from what was written; the disk or "
                    "the memory of this machine is faulty. Start again, in another place."
                )


def read_chunk(
    source: WeightSource, chunk: Chunk, buffers: AlternatingBuffers | None = None
) -> Tensor:
    """Reads a chunk into a contiguous CPU tensor of its shape and dtype; padding is zero.

    Raises `UserError` if the source cannot be read, or finite values overflow the chunk's dtype.
    """
    result = (buffers or AlternatingBuffers()).empty(shape_of(chunk.bounds), chunk.dtype)
    # Rank 0 of 1: the pieces of the whole, unsplit parameter.
    for piece in chunk.mapping.pieces(0, 1):
        here = bounds_of(piece.local_index)
        both = common(chunk.bounds, here)
        if both is None:
            continue
        target = result[slices_of(moved(both, chunk.bounds))]
        if piece.hf is None:
            target.zero_()
            continue
        there = moved(both, here, bounds_of(piece.hf_index))
        if target.is_contiguous() and source.dtype(piece.hf) == chunk.dtype:
            source.read_slice(piece.hf, *slices_of(there), out=target)
            continue
        # In row blocks, to avoid a second copy of a large tensor.
        (start, stop), *columns = there
        rows = max(1, COPIED_BYTES // (target[0].numel() * chunk.dtype.itemsize))
        for row in range(start, stop, rows):
            block = [(row, min(row + rows, stop)), *columns]
            part = source.read_slice(piece.hf, *slices_of(block))
            if count_overflows(part, chunk.dtype):
                raise overflow_error(source, piece.hf, chunk.dtype)
            target[row - start : row - start + len(part)] = part
    return result.view(chunk.shape)


@contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """Makes torch.save omit the zip's CRC32 in this thread; torch.load never checks it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
