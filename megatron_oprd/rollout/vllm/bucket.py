"""Fixed-size buffer shared between processes, through which a stream of tensors is sent.

On a GPU all processes map the same device memory (CUDA IPC), otherwise the same anonymous file in
memory. It has two halves: the sender fills one while receivers copy the other.
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
    """A run of a tensor's elements in the buffer."""

    name: str
    shape: Sequence[int]  # the whole tensor's
    start: int  # index of the first element in the flattened tensor
    length: int  # elements
    offset: int  # first element in the buffer


@dataclass(frozen=True, kw_only=True)
class BucketHandle:
    """Description with which another process maps the buffer."""

    dtype: torch.dtype
    num_elements: int  # both halves
    file: str | None = None  # path for processes of the same user; None on a GPU
    # Arguments of torch's rebuild_cuda_tensor; None on the host.
    cuda: tuple[Any, ...] | None = None


class SendingBucket:
    """The sender's end."""

    def __init__(self, *, num_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates the buffer on a CUDA device or on the CPU."""
        # Two equal halves of whole elements; num_bytes is the size of both.
        count = max(num_bytes // dtype.itemsize // 2, 1) * 2
        self._file: int | None = None
        if device.type == "cuda":
            self._buffer = torch.empty(count, dtype=dtype, device=device)
            _, arguments = torch.multiprocessing.reductions.reduce_tensor(self._buffer)
            self.handle = BucketHandle(dtype=dtype, num_elements=count, cuda=arguments)
        else:
            self._file = os.memfd_create("rollout weights")
            os.truncate(self._file, count * dtype.itemsize)
            # Other processes open the anonymous file through this process's descriptor.
            path = f"/proc/{os.getpid()}/fd/{self._file}"
            self.handle = BucketHandle(dtype=dtype, num_elements=count, file=path)
            self._buffer = _map(self.handle)

    def fill(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[list[Piece]]:
        """Copies the stream's tensors into the buffer, back to back.

        Yields the pieces of a half whenever it is full, and at the end. The second advance of the
        iterator after a yield overwrites that half. A tensor larger than a half spans several
        yields.
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
                # copy_ converts, too: one pass over the memory.
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
        """Frees the buffer. A second call does nothing."""
        self._buffer = self._buffer.new_empty(0)
        if self._file is not None:
            os.close(self._file)
            self._file = None


class ReceivingBucket:
    """A receiver's end."""

    def __init__(self, handle: BucketHandle) -> None:
        if handle.cuda is not None:
            arguments = list(handle.cuda)
            # Element 6 is the device's index. The sender's GPU is the first in an engine's
            # CUDA_VISIBLE_DEVICES.
            arguments[6] = 0
            self._buffer = torch.multiprocessing.reductions.rebuild_cuda_tensor(*arguments)
            self._own_device = torch.device("cuda", torch.cuda.current_device())
        else:
            _keep_freed_memory()
            self._buffer = _map(handle)
            self._own_device = self._buffer.device
        self._unfinished: dict[str, tuple[Tensor, int]] = {}

    def take(self, pieces: Sequence[Piece]) -> Iterator[tuple[str, Tensor]]:
        """Copies the pieces of one half out of the buffer; yields each tensor once it is complete.

        When the iterator is exhausted, the half may be overwritten.
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
    """Sends the tensors to every worker through the shared buffer; OSError as `TrainerSocket`."""
    is_first = True
    for pieces in bucket.fill(stream):
        workers.tell(pieces)
        # One filling ahead: receivers copy a half while the next one is filled.
        if not is_first:
            workers.hear()  # all have copied the other half, which is filled next
        is_first = False
    workers.tell(None)


def receive_through(bucket: ReceivingBucket, trainer: WorkerSocket) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of `send_through` on this worker's device; OSError as `WorkerSocket`."""
    while (filling := trainer.hear()) is not None:
        yield from bucket.take([Piece(*fields) for fields in filling])
        trainer.tell("taken")


def _synchronize(buffer: Tensor) -> None:
    """Waits for copies: processes do not share streams, so nothing orders them otherwise."""
    if buffer.is_cuda:
        torch.cuda.synchronize()  # this process's device, which need not be the buffer's
        torch.cuda.synchronize(buffer.device)


def _keep_freed_memory() -> None:
    """Makes glibc keep freed host memory for the next tensors of a stream.

    By default it returns large blocks at once, and each page of a new block costs a fault: more
    time than the copy.
    """
    trim_threshold, mmap_max, most = -1, -4, 2**31 - 1  # glibc's malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, most)
    libc.mallopt(mmap_max, 0)


def _map(handle: BucketHandle) -> Tensor:
    assert handle.file is not None
    size, dtype = handle.num_elements, handle.dtype
    return torch.from_file(handle.file, shared=True, size=size, dtype=dtype)
