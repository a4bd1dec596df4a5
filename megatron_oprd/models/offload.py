"""Keeps weights on the host, and on the device only while a model runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

# Bytes of a block of pinned memory. torch rounds pinned memory up to a power of two, which could
# double the size of a tensor's own allocation.
BLOCK_BYTES = 2**26


class Pinned:
    """Pinned host memory in blocks of a power of two, filled without gaps."""

    def __init__(self, num_bytes: int) -> None:
        self._blocks: list[Tensor] = []
        self._free = 0  # bytes of the last block
        self._left = num_bytes

    def take(self, num_bytes: int) -> list[Tensor]:
        """Reserves ``num_bytes``, in one or more pieces."""
        pieces = []
        while num_bytes:
            if not self._free:
                self._free = min(BLOCK_BYTES, self._left)
                self._left -= self._free
                self._blocks.append(torch.empty(self._free, dtype=torch.uint8).pin_memory())
            count = min(num_bytes, self._free)
            start = len(self._blocks[-1]) - self._free
            pieces.append(self._blocks[-1][start : start + count])
            self._free -= count
            num_bytes -= count
        return pieces


class Weight:
    """A tensor on the device and its copy in host memory."""

    def __init__(self, tensor: Tensor, host: Pinned) -> None:
        assert tensor.is_contiguous()
        self._tensor = tensor.detach()
        self._num_bytes = tensor.nbytes
        # Freeing the storage would also free tensors that share it.
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "it shares its memory"
        self._on_host = host.take(tensor.nbytes)
        for piece, on_host in self._pieces():
            on_host.copy_(piece)

    def allocate(self) -> None:
        """Takes device memory; the values are undefined."""
        # Resizing the storage keeps the tensor object, to which modules and views refer.
        self._tensor.untyped_storage().resize_(self._num_bytes)

    def copy_to_device(self) -> None:
        """Begins to copy the values from the host."""
        for piece, on_host in self._pieces():
            piece.copy_(on_host, non_blocking=True)

    def free(self) -> None:
        """Gives the device memory back."""
        self._tensor.untyped_storage().resize_(0)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(bytes on the device, the same bytes on the host)."""
        on_device = self._tensor.view(-1).view(torch.uint8)
        start = 0
        for on_host in self._on_host:
            yield on_device[start : start + len(on_host)], on_host
            start += len(on_host)


class OffloadedWeights:
    """Keeps a frozen model's weights in pinned host memory between its forward passes.

    Tensor objects stay; only their storage is freed and allocated. Each layer waits for its own
    copy, so the first layers compute while later ones are still being copied. The weights must not
    change after construction. ``resident`` weights stay on the device.
    """

    def __init__(self, chunks: Sequence[GPTModel], resident: Sequence[Tensor] = ()) -> None:
        self._stream = torch.cuda.Stream()
        # In order of use: everything outside the layers first, then layer by layer.
        layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        of_layers = [_tensors(layer) for layer in layers]
        elsewhere = {id(tensor) for tensors in (*of_layers, resident) for tensor in tensors}
        others = [t for chunk in chunks for t in _tensors(chunk) if id(t) not in elsewhere]
        moving = [*others, *(tensor for tensors in of_layers for tensor in tensors)]
        host = Pinned(sum(tensor.nbytes for tensor in moving))
        self._others = [Weight(tensor, host) for tensor in others]
        self._layers = [[Weight(tensor, host) for tensor in tensors] for tensors in of_layers]
        self._arrived: list[Any] = []
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._waiting_hook(number))
        self._free()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keeps the weights on the device inside the block."""
        # Allocated on the main stream, so that the student can reuse the memory once freed. Memory
        # of the copy stream would stay with that stream.
        for weights in (self._others, *self._layers):
            for weight in weights:
                weight.allocate()
        # Earlier work on the main stream may still read the memory that the copies overwrite.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for weight in self._others:
                weight.copy_to_device()
            others_arrived = self._stream.record_event()
            for weights in self._layers:
                for weight in weights:
                    weight.copy_to_device()
                self._arrived.append(self._stream.record_event())
        torch.cuda.current_stream().wait_event(others_arrived)
        try:
            yield
        finally:
            torch.cuda.synchronize()
            self._arrived.clear()
            self._free()

    def _waiting_hook(self, number: int) -> Any:
        def wait(*_: Any) -> None:
            torch.cuda.current_stream().wait_event(self._arrived[number])

        return wait

    def _free(self) -> None:
        for weights in (self._others, *self._layers):
            for weight in weights:
                weight.free()


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    """A module's parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]
