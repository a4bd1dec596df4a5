"""What is done to a vLLM model where it runs: weights in, ids masked."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_tied_head(
    stream: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """The stream as vLLM's ``reload_weights`` wants it; ``shapes`` gets what came."""
    for name, tensor in stream:
        shapes[name] = tuple(tensor.shape)
        yield name, tensor
        if tied and name == EMBEDDING:
            # vLLM may keep a packed copy for the LM head, which only its own name renews.
            yield HEAD, tensor


@contextmanager
def quiet_about_missing(quiet: bool) -> Iterator[None]:
    """Where weights stay on purpose, vLLM does not warn of each module that it got none for."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload")
    level = logger.level
    if quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def mask_ids(model: Any, ids: Sequence[int]) -> None:
    """Makes the logits of some ids -inf, whatever samples from them. Again: of others instead.

    Args:
        model: One of vLLM's decoders.
        ids: Ids that mean nothing.
    """
    never = torch.tensor(ids, dtype=torch.long, device=next(model.parameters()).device)
    compute_logits = type(model).compute_logits

    def masked(*args: Any, **kwargs: Any) -> Tensor | None:
        logits = compute_logits(model, *args, **kwargs)
        return None if logits is None else logits.index_fill_(-1, never, float("-inf"))

    model.compute_logits = masked
