"""Freezes and runs parts of the trained student."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel

_FUSES = "fuse_wgrad_accumulation"  # an attribute of Transformer Engine's linear modules


def freeze_past_deepest_tap(
    chunks: Sequence[GPTModel], *, num_running_layers: int, trains_final_norm: bool
) -> None:
    """Freezes the layers after the deepest tap, which then neither run nor need gradients.

    Call it before wrapping the chunks: with overlapped gradient reduction every trainable parameter
    must get a gradient. An unused LM head is built frozen already. ``trains_final_norm`` says that
    there is a tap after the final norm.
    """
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if layer.layer_number > num_running_layers:  # layer_number counts from 1
                layer.runs = False
                layer.requires_grad_(False)
        if chunk.decoder.final_layernorm is not None and not trains_final_norm:
            chunk.decoder.final_layernorm.requires_grad_(False)


def fuse_gradient_accumulation(chunks: Sequence[GPTModel]) -> None:
    """Lets Transformer Engine's matrices add their gradients to the buffers, ``main_grad``.

    The chunks have to be wrapped by Megatron's `DistributedDataParallel` before their first pass.
    Modules of other kinds stay as they are.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, _FUSES):
                setattr(module, _FUSES, True)


@contextmanager
def whole_model(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Runs all layers inside the block, also frozen ones, without gradients or recompute."""
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    ran = [layer.runs for layer in layers]
    for chunk in chunks:
        # Megatron's full recompute is for training mode only.
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
