"""One `.distcp` file of a `torch_dist` checkpoint, written a chunk at a time and read back."""

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

# A larger tensor gets memory of its own, so that little is kept.
_LARGEST = 2**27


class AlternatingBuffers:
    """Tensors of which the last two are in use, and not the one before them."""

    def __init__(self) -> None:
        self._memory = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous CPU tensor with any values, in the memory of the last but one.

        Its storage is no larger than the tensor, as that of a view would be, since torch.save
        writes whole storages.
        """
        size = prod(shape) * dtype.itemsize
        if not 0 < size <= _LARGEST:
            return torch.empty(shape, dtype=dtype)
        if len(self._memory[0]) < size:
            self._memory[0] = torch.empty(0, dtype=torch.uint8)  # frees it first
            self._memory[0] = torch.empty(size, dtype=torch.uint8)
        self._memory.reverse()
        return torch.frombuffer(self._memory[1].numpy(), dtype=dtype, count=prod(shape)).view(shape)


# What a file has for each chunk or object beside its values.
OVERHEAD_BYTES = 2048
_MAX_BYTES_OF_TWO = 2**29  # of a chunk that is written and one that is read meanwhile
_COPIED_BYTES = 2**26
_READ_BACK_BYTES = 2**20  # stays in the processor's cache until it is hashed
# The extra state of a layer without FP8 training, as Transformer Engine writes it, in a list as
# Megatron does.
_EMPTY_OBJECT = [torch.empty(0, dtype=torch.uint8)]


def write_file(
    path: Path,
    file: File,
    source: WeightSource,
    buffers: AlternatingBuffers,
    *,
    on_written: Callable[[int], None],
) -> dict[str, Any]:
    """Writes one file; while one chunk is written, the next is read and examined.

    Args:
        path: The file to create or to overwrite.
        file: What goes into it.
        source: Where the weights come from.
        buffers: Memory for the chunks, the same for one file after another.
        on_written: Is called with the bytes of each chunk that was written, from another thread.

    Returns:
        JSON with ``entries``, (key, first element, offset, length) of everything in the file, the
        first element None for objects; ``checksums``, xxh3_128 of each chunk's values; ``nans``,
        how many values are NaN in the chunks that have any.

    Raises:
        OSError: The operating system refuses.
        UserError: The source cannot be read, or has finite values that a chunk's dtype has not.
    """
    record: dict[str, Any] = {"entries": [], "checksums": {}, "nans": {}}
    # The thread ends before the file is closed, whatever happens.
    with path.open("wb") as stream, ThreadPoolExecutor(1) as writer:

        def write(key: str, starts: tuple[int, ...] | None, value: Any) -> None:
            offset = stream.tell()
            try:
                with _without_zip_checksums():
                    torch.save(value, stream)
            except RuntimeError as error:
                # A write that the system refuses becomes an error of torch's, on top of its own.
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
            written.result()
            written, bytes_in_flight = writer.submit(write_chunk, chunk, tensor), chunk.num_bytes
            del tensor
        written.result()
        for key in file.objects:
            write(key, None, _EMPTY_OBJECT)
    return record


def read_back(path: Path, record: dict[str, Any]) -> None:
    """Checks that a file holds what was read from the source.

    Args:
        path: The file.
        record: What `write_file` returned.

    Raises:
        OSError: The operating system refuses.
        UserError: The file holds something else.
    """
    buffer = memoryview(bytearray(_READ_BACK_BYTES))
    with path.open("rb", buffering=0) as stream:
        for key, starts, offset, length in record["entries"]:
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
    """The values of a chunk; padding is zero.

    Args:
        source: Where the weights come from.
        chunk: The chunk.
        buffers: What gives memory; None takes fresh memory.

    Returns:
        A contiguous CPU tensor of the chunk's shape and dtype.

    Raises:
        UserError: The source cannot be read, or has finite values that the chunk's dtype has not.
    """
    result = (buffers or AlternatingBuffers()).empty(shape_of(chunk.bounds), chunk.dtype)
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
        # Some rows at a time, so that there is no second copy of a large tensor.
        (start, stop), *columns = there
        rows = max(1, _COPIED_BYTES // (target[0].numel() * chunk.dtype.itemsize))
        for row in range(start, stop, rows):
            block = [(row, min(row + rows, stop)), *columns]
            part = source.read_slice(piece.hf, *slices_of(block))
            if count_overflows(part, chunk.dtype):
                raise overflow_error(source, piece.hf, chunk.dtype)
            target[row - start : row - start + len(part)] = part
    return result.view(chunk.shape)


@contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """In this thread torch.save leaves out the zip's CRC32, which no torch.load looks at."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
