"""The gated delta rule (https://arxiv.org/abs/2412.06464): a state that is read and corrected.

For every token t of a sequence and every head, with a key k, a value v, a query q, a decay g <= 0
and a strength b, the state S, [key dim, value dim], is zero before the first token, and then

    S_t = exp(g_t) S_{t-1} + k_t u_t',   u_t = b_t (v_t - exp(g_t) S_{t-1}' k_t),   o_t = S_t' q_t

Here tokens go through in chunks. With G the sum of the decays from the chunk's start and S the
state before it, the corrections u of a chunk solve a triangular system:

    u_t + b_t sum_{j < t} exp(G_t - G_j) (k_t' k_j) u_j = b_t (v_t - exp(G_t) S' k_t)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, strength: Tensor
) -> Tensor:
    """Runs the rule over sequences that begin with a state of zero.

    Args:
        query: [b, heads, s, key dim], scaled by the caller.
        key: [b, heads, s, key dim].
        value: [b, heads, s, value dim].
        decay: [b, heads, s]; the logarithm of what is left of the state.
        strength: [b, heads, s].

    Returns:
        [b, heads, s, value dim]. All tensors are of one dtype, fp32 in a model.
    """
    length = query.shape[2]
    chunk = min(CHUNK, length)
    # Padding has strength 0 and decay 0, so that it leaves the state as it is.
    padding = -length % chunk
    query, key, value = (_chunks(F.pad(x, (0, 0, 0, padding)), chunk) for x in (query, key, value))
    decay, strength = (_chunks(F.pad(x, (0, padding)), chunk) for x in (decay, strength))
    total = decay.cumsum(-1)  # [b, heads, chunks, c], as below
    # [.., c, c]: what is left at row t of what came at column j. Above the diagonal the difference
    # is positive, and might be too large for exp.
    upper = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu(1)
    left = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(upper, -torch.inf).exp()
    strength = strength.unsqueeze(-1)
    system = strength * left * (key @ key.mT)
    # The corrections are linear in the state before the chunk: of values less what the state reads.
    # The diagonal counts as one.
    of_values, of_state = torch.linalg.solve_triangular(
        system,
        strength * torch.cat([value, key * total.exp().unsqueeze(-1)], dim=-1),
        upper=False,
        unitriangular=True,
    ).split([value.shape[-1], key.shape[-1]], dim=-1)
    within = left * (query @ key.mT)
    reading = query * total.exp().unsqueeze(-1)
    end = total[..., -1:]
    writing = key * (end - total).exp().unsqueeze(-1)
    kept = end.exp().unsqueeze(-1)  # [b, heads, chunks, 1, 1]
    state = torch.zeros(
        *query.shape[:2], key.shape[-1], value.shape[-1], dtype=query.dtype, device=query.device
    )
    outputs = []
    for number in range(query.shape[2]):
        correction = of_values[:, :, number] - of_state[:, :, number] @ state
        outputs.append(reading[:, :, number] @ state + within[:, :, number] @ correction)
        state = kept[:, :, number] * state + writing[:, :, number].mT @ correction
    return torch.cat(outputs, dim=2)[:, :, :length]


def _chunks(x: Tensor, size: int) -> Tensor:
    """[b, heads, s, ...] --> [b, heads, chunks, size, ...]."""
    return x.unflatten(2, (-1, size))
