"""A buffer of fixed size that processes share, through which a stream of tensors goes.

On a GPU all map the same device memory (CUDA IPC), elsewhere the same anonymous file in memory. The
sender fills one half, says what is in it, and fills the other while the receivers take the first.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_oprd.rollout.vllm.sockets import TrainerSocket, WorkerSocket


class Piece(NamedTuple):
    """Elements of one tensor that lie in the buffer.

    Attributes:
        name: The tensor.
        shape: Its full shape.
        start: The first of these elements in the flattened tensor.
        length: How many they are.
        offset: Where they begin in the buffer, in elements.
    """

    name: str
    shape: Sequence[int]
    start: int
    length: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class BucketHandle:
    """What another process needs to map the buffer.

    Attributes:
        dtype: Of the elements.
        num_elements: The buffer's size.
        file: Path of the file in memory, for processes of the same user; None on a GPU.
        cuda: torch's description of the device memory; None on the host.
    """

    dtype: torch.dtype
    num_elements: int
    file: str | None = None
    cuda: tuple[Any, ...] | None = None


class SendingBucket:
    """The sender's end."""

    def __init__(self, *, num_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates the buffer.

        Args:
            num_bytes: Its size, of both halves, rounded down to whole elements.
            dtype: What every tensor is converted to when it is put in.
            device: A CUDA device, or the CPU.
        """
        count = max(num_bytes // dtype.itemsize // 2, 1) * 2
        self._file: int | None = None
        if device.type == "cuda":
            self._buffer = torch.empty(count, dtype=dtype, device=device)
            _, arguments = torch.multiprocessing.reductions.reduce_tensor(self._buffer)
            self.handle = BucketHandle(dtype=dtype, num_elements=count, cuda=arguments)
        else:
            self._file = os.memfd_create("rollout weights")
            os.truncate(self._file, count * dtype.itemsize)
            path = f"/proc/{os.getpid()}/fd/{self._file}"
            self.handle = BucketHandle(dtype=dtype, num_elements=count, file=path)
            self._buffer = _map(self.handle)

    def fill(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[list[Piece]]:
        """Puts the stream's tensors into the buffer, one behind the other.

        Yields what is in a half whenever it is full, and at the end. A half is overwritten when the
        iterator goes on for the second time. A larger tensor comes in several fillings.
        """
        size = self.handle.num_elements // 2
        half, used = 0, 0
        pieces: list[Piece] = []
        for name, tensor in stream:
            flat, start = tensor.detach().reshape(-1), 0
            while start < len(flat):
                if used == size:
                    _synchronize(self._buffer)
                    yield pieces
                    half, used, pieces = 1 - half, 0, []
                count = min(len(flat) - start, size - used)
                offset = half * size + used
                # Conversion and copy are one pass over the memory.
                self._buffer[offset : offset + count].copy_(flat[start : start + count])
                pieces.append(
                    Piece(
                        name=name,
                        shape=tuple(tensor.shape),
                        start=start,
                        length=count,
                        offset=offset,
                    )
                )
                start, used = start + count, used + count
        _synchronize(self._buffer)
        yield pieces

    def close(self) -> None:
        """Gives the memory back. A second call does nothing."""
        self._buffer = self._buffer.new_empty(0)
        if self._file is not None:
            os.close(self._file)
            self._file = None


class ReceivingBucket:
    """A receiver's end."""

    def __init__(self, handle: BucketHandle) -> None:
        if handle.cuda is not None:
            arguments = list(handle.cuda)
            # The seventh is the device's index: the sender's is the first that engines see.
            arguments[6] = 0
            self._buffer = torch.multiprocessing.reductions.rebuild_cuda_tensor(*arguments)
            self._own_device = torch.device("cuda", torch.cuda.current_device())
        else:
            _keep_freed_memory()
            self._buffer = _map(handle)
            self._own_device = self._buffer.device
        self._unfinished: dict[str, tuple[Tensor, int]] = {}

    def take(self, pieces: Sequence[Piece]) -> Iterator[tuple[str, Tensor]]:
        """Copies one filling out of the buffer; yields every tensor that is then whole.

        At its end the filling may be overwritten.
        """
        for piece in pieces:
            count = prod(piece.shape)
            tensor, have = self._unfinished.pop(piece.name, (None, 0))
            assert have == piece.start, f"{piece.name}: element {piece.start} came after {have}"
            if tensor is None:
                tensor = torch.empty(count, dtype=self._buffer.dtype, device=self._own_device)
            source = self._buffer[piece.offset : piece.offset + piece.length]
            tensor[piece.start : piece.start + piece.length].copy_(source)
            if piece.start + piece.length == count:
                yield piece.name, tensor.view(piece.shape)
            else:
                self._unfinished[piece.name] = tensor, piece.start + piece.length
        _synchronize(self._buffer)


def send_through(
    bucket: SendingBucket, workers: TrainerSocket, stream: Iterable[tuple[str, Tensor]]
) -> None:
    """Sends every worker the stream's tensors through a buffer that all of them map.

    Raises:
        OSError: A worker left, or takes too long.
    """
    is_first = True
    for pieces in bucket.fill(stream):
        workers.tell(pieces)
        if not is_first:
            workers.hear()  # all have taken the filling before this one, which is overwritten next
        is_first = False
    workers.tell(None)


def receive_through(bucket: ReceivingBucket, trainer: WorkerSocket) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `send_through` sends, on this worker's device.

    Raises:
        OSError: The trainer left in the middle, or takes too long.
    """
    while (filling := trainer.hear()) is not None:
        yield from bucket.take([Piece(*fields) for fields in filling])
        trainer.tell("taken")


def _synchronize(buffer: Tensor) -> None:
    """Waits for copies: another process does not share this one's streams."""
    if buffer.is_cuda:
        torch.cuda.synchronize()  # this process's device, which need not be the buffer's
        torch.cuda.synchronize(buffer.device)


def _keep_freed_memory() -> None:
    """Lets this process keep the host memory that it frees, for the next tensors of a stream.

    glibc gives blocks of some size back at once, and every page of a new one costs a fault: more
    time than the copy itself.
    """
    trim_threshold, mmap_max, most = -1, -4, 2**31 - 1  # glibc's malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, most)
    libc.mallopt(mmap_max, 0)


def _map(handle: BucketHandle) -> Tensor:
    assert handle.file is not None
    size, dtype = handle.num_elements, handle.dtype
    return torch.from_file(handle.file, shared=True, size=size, dtype=dtype)
