"""Floating-point operations of a model's passes, from its architecture alone.

A multiplication and an addition count as two. Counted are the matrix products of linear layers and
of causal attention (only the causal half); norms, rotary embeddings and losses are omitted. A
backward pass costs twice its forward pass, attention's 2.5 times, because it recomputes the scores.
"""

from collections.abc import Sequence

from megatron_oprd.models.architecture import Architecture


def linear_flops(a: Architecture, layers: Sequence[int]) -> int:
    """FLOPs of the linear layers of ``layers`` (numbers from 0) for one token."""
    attention = _attention_weights(a)
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


def _attention_weights(a: Architecture) -> int:
    """Elements of the matrices of a layer's attention; of the mean layer where kinds differ."""
    if (delta := a.delta) is not None:
        linear = sum(a.delta_layers)
        keys, values = delta.num_key_heads, delta.num_key_heads * delta.values_per_key
        of_delta = a.hidden_size * (keys * delta.channels_per_key + values * (delta.value_dim + 2))
        of_delta += a.hidden_size * values * delta.value_dim
        # The state is read twice and written once for each token, as if by matrices of its size.
        of_delta += 3 * values * delta.key_dim * delta.value_dim
        rest = _full_attention_weights(a)
        return (linear * of_delta + (a.num_layers - linear) * rest) // a.num_layers
    return _full_attention_weights(a)


def _full_attention_weights(a: Architecture) -> int:
    q, kv = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    out = a.num_attention_heads * a.value_dim * a.hidden_size
    if (latent := a.latent) is None:
        return a.hidden_size * ((1 + a.attention_gate) * q + 2 * kv) + out
    rank, query_rank = latent.key_value_rank, latent.query_rank
    queries = a.hidden_size * q if query_rank is None else query_rank * (a.hidden_size + q)
    keys_and_values = a.num_attention_heads * (latent.unrotated_dim + latent.value_dim)
    return queries + a.hidden_size * (rank + latent.rotated_dim) + rank * keys_and_values + out


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
    looks = looks * (a.num_layers - sum(a.delta_layers)) // a.num_layers
    # Two products (scores, and theirs with the values), each of two operations.
    return 2 * a.num_attention_heads * (a.head_dim + a.value_dim) * looks


def backward_flops(linear: int, attention: int) -> int:
    """FLOPs of a backward pass, of those of the forward pass."""
    return 2 * linear + 5 * attention // 2


def lm_head_flops(a: Architecture) -> int:
    """FLOPs of the LM head for one position."""
    return 2 * a.hidden_size * a.vocab_size
