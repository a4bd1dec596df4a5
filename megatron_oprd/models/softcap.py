"""Attention with a softcap: c tanh(score / c) in the place of a score (Gemma 2).

Torch's fused attention has none. Here scores exist for a block of queries at a time, and the
backward pass computes them again, so that no matrix of [s, s] is kept.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 256  # queries


def softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, cap: float
) -> Tensor:
    """Attention whose scores, in fp32 (fp64 for fp64 queries), are cap tanh(score / cap).

    Args:
        query: [s, b, heads, dim].
        key: [k, b, groups, dim].
        value: [k, b, groups, dim].
        mask: [s, k], bool: where a query attends. None: causal, with s = k.
        scale: Factor on the products of queries and keys.
        cap: Bound of the scores.

    Returns:
        [s, b, heads, dim], in the values' dtype.
    """
    query = query.unflatten(2, (key.shape[2], -1))  # --> [s, b, groups, heads of a group, dim]
    parts = []
    for start in range(0, query.shape[0], BLOCK):
        rows = slice(start, min(start + BLOCK, query.shape[0]))
        seen = slice(0, rows.stop if mask is None else None)
        block = partial(_attend, first=start, scale=scale, cap=cap)
        inputs = query[rows], key[seen], value[seen], None if mask is None else mask[rows]
        # Megatron's own kind of checkpoint; the other does not save through autograd's hooks.
        parts.append(
            checkpoint(block, *inputs, use_reentrant=True, preserve_rng_state=False)
            if torch.is_grad_enabled() and query.requires_grad
            else block(*inputs)
        )
    return torch.cat(parts).flatten(2, 3)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    first: int,  # the first query's position, where the mask is None
    scale: float,
    cap: float,
) -> Tensor:
    """[s, b, groups, heads, dim], and [k, b, groups, dim] twice --> [s, b, groups, heads, dim]."""
    if mask is None:
        mask = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool, device=query.device)
        mask = mask.tril(first)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("sbgnd,kbgd->bgnsk", query, key).to(dtype) * (scale / cap)
    scores = (scores.tanh() * cap).masked_fill(~mask, -torch.inf)
    return torch.einsum("bgnsk,kbgd->sbgnd", scores.softmax(-1).to(value.dtype), value)
