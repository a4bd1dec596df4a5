"""Attention sinks: a learned logit of each head in the softmax's denominator, without a value.

As in transformers' GPT-OSS. A sink is one more key, ahead of all others, whose score is the head's
logit and whose value is zero. So torch's fused attention computes it, and its gradient.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

# Added to the heads' dimensions, of which one carries the logit: fused kernels want multiples of 8.
_PADDING = 8


def mark_sinks(sinks: torch.nn.Parameter) -> None:
    """Tells Megatron that ranks hold different heads: else a norm of gradients misses most."""
    set_tensor_model_parallel_attributes(sinks, is_parallel=True, dim=0, stride=1)


def with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Puts the sinks ahead of the keys; `without_sinks` takes the additions off the output.

    Query is [s, b, heads, dim], key and value are [k, b, groups, dim], the mask is [s, k] and
    ``sinks`` [heads]. With a mask the result has one key more, without one (causal) also one query.
    """
    length, rows, heads, dim = query.shape
    # The score of a query and a key is their product times the scale. Real keys have a zero where
    # queries have the logit, and the sink has a one there and zeros elsewhere.
    logits = (sinks / scale).to(query.dtype)[None, None, :, None].expand(length, rows, heads, 1)
    query = torch.cat([query, F.pad(logits, (0, _PADDING - 1))], dim=-1)
    ahead = (0, _PADDING, 0, 0, 0, 0, 1, 0)
    key, value = F.pad(key, ahead), F.pad(value, ahead)
    key[0, ..., dim] = 1.0
    if mask is not None:
        return query, key, value, F.pad(mask, (1, 0), value=True)
    # One more query keeps the pattern causal: it sees the sink alone, and its output is not used.
    return F.pad(query, (0, 0, 0, 0, 0, 0, 1, 0)), key, value, None


def without_sinks(output: Tensor, *, length: int, dim: int) -> Tensor:
    """The output [length, b, heads, dim] of attention over what `with_sinks` returned."""
    return output[-length:, ..., :dim]
