"""What each position of each sequence counts for in the loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_oprd.config import Aggregation, Alignment, Positions
from megatron_oprd.taps.positions import position_mask


def position_weights(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    *,
    positions: Positions,
    k: int | None,
    alignment: Alignment,
    aggregation: Aggregation,
) -> list[Tensor]:
    """The weight of every position of every sequence of the global batch.

    A layer's loss is the sum over positions of weight times distance, so the normaliser counts
    the whole global batch however it is divided afterwards.

    Args:
        prompt_lengths: Tokens of each prompt, at least 1.
        response_lengths: Tokens of each response, at least 1.
        positions: Which response tokens are supervised (see `position_mask`).
        k: For last_k and first_k.
        alignment: ``token`` is the position that holds a response token, ``predictor`` the one
            before it.
        aggregation: ``token_mean`` divides by the supervised tokens of all sequences,
            ``sequence_mean`` by those of the sequence and by the number of sequences (eq. 6).

    Returns:
        For each sequence [prompt + response], fp32; all weights together sum to 1.
    """
    assert min(prompt_lengths) >= 1, "an empty prompt has no position to predict from"
    assert min(response_lengths) >= 1
    columns = torch.arange(max(response_lengths))
    # [B, T]
    response_mask = (columns < torch.tensor(response_lengths)[:, None]).double()
    mask = position_mask(response_mask, positions, k)
    if aggregation == "token_mean":
        weights = mask / mask.sum()
    else:
        weights = mask / mask.sum(dim=1, keepdim=True) / len(response_lengths)
    shift = 0 if alignment == "token" else -1
    rows = []
    for prompt, response, row in zip(prompt_lengths, response_lengths, weights, strict=True):
        sequence = torch.zeros(prompt + response)
        sequence[prompt + shift : prompt + shift + response] = row[:response].float()
        rows.append(sequence)
    return rows
