"""The frozen teacher: cut at its deepest mapped layer, without LM head, outside autograd."""

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel


def freeze(chunks: Sequence[GPTModel]) -> None:
    """Makes a model inference-only."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
        for layer in chunk.decoder.layers:
            # Megatron re-enables grad around the residual addition, which would keep a graph
            # from each stage's input on.
            layer.bias_dropout_add_exec_handler = torch.no_grad
