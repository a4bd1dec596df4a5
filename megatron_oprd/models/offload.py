"""Weights that live on the host and are on the device only while a model runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """A tensor of the device and its copy in host memory."""

    on_device: Tensor
    on_host: Tensor
    num_bytes: int

    def copy_to_device(self) -> None:
        self.on_device.untyped_storage().resize_(self.num_bytes)
        self.on_device.copy_(self.on_host, non_blocking=True)

    def free(self) -> None:
        self.on_device.untyped_storage().resize_(0)


class OffloadedWeights:
    """Keeps a frozen model's weights in pinned host memory between its passes.

    Tensors stay the same objects; only their storage comes and goes. Each layer's copy is waited
    for by itself, so the first layers compute while the later ones are still under way.

    Args:
        chunks: The model's chunks on this rank, loaded, and never changed from here on.
        resident: Weights that stay on the device.
    """

    def __init__(self, chunks: Sequence[GPTModel], resident: Sequence[Tensor] = ()) -> None:
        self._stream = torch.cuda.Stream()
        # In the order in which they are used: what is in front of the layers, the layers, the rest.
        layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        of_layers = [_tensors(layer) for layer in layers]
        elsewhere = {id(tensor) for tensors in (*of_layers, resident) for tensor in tensors}
        others = [t for chunk in chunks for t in _tensors(chunk) if id(t) not in elsewhere]
        self._others = [_offload(tensor) for tensor in others]
        self._layers = [[_offload(tensor) for tensor in tensors] for tensors in of_layers]
        self._arrived: list[Any] = []
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._waiting_hook(number))
        self._free()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Has the weights on the device inside the block."""
        # The copies go to memory that earlier work of the main stream may still read.
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


def _offload(tensor: Tensor) -> _Weight:
    assert tensor.is_contiguous()
    return _Weight(
        on_device=tensor.detach(),
        on_host=tensor.to("cpu", copy=True).pin_memory(),
        num_bytes=tensor.untyped_storage().nbytes(),
    )
