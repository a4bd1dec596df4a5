"""The trained student: what of it trains, and what is frozen and not run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel


def freeze_past_deepest_tap(
    chunks: Sequence[GPTModel], *, num_running_layers: int, trains_final_norm: bool
) -> None:
    """Freezes the layers that no tap lies behind, so that they need no gradient and do not run.

    Call it before the chunks are wrapped: with overlapped gradient reduction every trainable
    parameter must get a gradient. An LM head that is not used is built frozen.

    Args:
        chunks: This rank's chunks.
        num_running_layers: Layers up to the deepest tap.
        trains_final_norm: Whether a tap lies behind the final norm.
    """
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if layer.layer_number > num_running_layers:
                layer.runs = False
                layer.requires_grad_(False)
        if chunk.decoder.final_layernorm is not None and not trains_final_norm:
            chunk.decoder.final_layernorm.requires_grad_(False)


@contextmanager
def whole_model(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Has all layers run inside the block, frozen ones as well, without gradients or recompute.

    Args:
        chunks: This rank's chunks, not wrapped.
    """
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    ran = [layer.runs for layer in layers]
    for chunk in chunks:
        chunk.eval()
    for layer in layers:
        layer.runs = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, runs in zip(layers, ran, strict=True):
            layer.runs = runs
        for chunk in chunks:
            chunk.train()
