"""Floating-point operations of a model's passes, from its architecture alone.

A multiplication and an addition count as two. Counted are the matrix products of linear layers and
of causal attention (only the causal half); norms, rotary embeddings and losses are omitted. A
backward pass costs twice its forward pass, attention's 2.5 times, because it recomputes the scores.
"""

from collections.abc import Sequence

from megatron_oprd.models.architecture import Architecture


def linear_flops(a: Architecture, layers: Sequence[int]) -> int:
    """FLOPs of the linear layers of ``layers`` (numbers from 0) for one token."""
    q, kv = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    attention = a.hidden_size * (q + 2 * kv) + q * a.hidden_size
    sparse = a.num_with_experts(layers)
    mlps = (len(layers) - sparse) * 3 * a.hidden_size * a.ffn_hidden_size
    if a.moe is not None:
        moe = a.moe
        mlp = 3 * a.hidden_size * moe.ffn_hidden_size * moe.num_experts_per_token
        mlp += 3 * a.hidden_size * (moe.shared_ffn_hidden_size or 0)
        # The router, and the shared expert's gate.
        mlp += a.hidden_size * (moe.num_experts + moe.shared_expert_gate)
        mlps += sparse * mlp
    return 2 * (len(layers) * attention + mlps)


def attention_flops(a: Architecture, *, first: int, last: int) -> int:
    """FLOPs of one layer's attention core, for tokens ``first`` to ``last`` - 1 of a sequence.

    Where some layers have a sliding window, of the mean layer.
    """
    # Pairs: token t (from 0) attends to t + 1 tokens.
    looks = (last * (last + 1) - first * (first + 1)) // 2
    if a.sliding_window is not None:
        # Of the tokens from the window's length on, each attends to t + 1 - window fewer.
        hidden = [max(0, end - a.sliding_window) for end in (first, last)]
        fewer = (hidden[1] * (hidden[1] + 1) - hidden[0] * (hidden[0] + 1)) // 2
        looks -= fewer * sum(a.sliding_layers) // a.num_layers
    # Two products (scores, and their product with the values), two operations each.
    return 4 * a.num_attention_heads * a.head_dim * looks


def backward_flops(linear: int, attention: int) -> int:
    """FLOPs of a backward pass, of those of the forward pass."""
    return 2 * linear + 5 * attention // 2


def lm_head_flops(a: Architecture) -> int:
    """FLOPs of the LM head for one position."""
    return 2 * a.hidden_size * a.vocab_size
