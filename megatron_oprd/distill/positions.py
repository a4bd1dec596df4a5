"""The supervised response positions, and the weight of each in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from megatron_oprd.config.schema import Aggregation, Alignment, Positions
from megatron_oprd.data.teacher_sequences import TeacherSequence


def position_mask(response_mask: Tensor, positions: Positions, k: int | None) -> Tensor:
    """Masks the supervised response tokens: [B, T] --> [B, T], in ``response_mask``'s dtype.

    Args:
        response_mask: [B, T], nonzero at valid response tokens; padding on either side and holes
            are not counted.
        positions: ``all``; ``last`` (the last valid token); ``last_k`` or ``first_k``.
        k: Tokens of each response for ``last_k`` and ``first_k``; shorter responses are kept whole.

    Raises:
        ValueError: Unknown ``positions``, or ``last_k`` or ``first_k`` without a k of 1 or more.
    """
    if positions not in get_args(Positions):
        allowed = ", ".join(get_args(Positions))
        raise ValueError(f"positions is {positions!r}; it must be one of: {allowed}")
    if positions == "all":
        return response_mask.clone()
    if positions == "last":
        k = 1
    elif k is None or k < 1:
        raise ValueError(f"positions is {positions!r} and k is {k}; k must be 1 or more")

    valid = response_mask != 0  # [B, T]
    from_start = valid.long().cumsum(dim=1)  # [B, T]; 1 at the first valid token
    if positions == "first_k":
        chosen = valid & (from_start <= k)
    else:
        chosen = valid & (from_start > from_start[:, -1:] - k)
    return chosen.to(response_mask.dtype)


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The supervised positions of a step, by sequence."""

    weights: list[Tensor]  # see `position_weights`
    # For a teacher that reads other sequences: the teacher's position that each position is
    # compared with, int64, -1 for none.
    positions: list[Tensor] | None


def supervise(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    teacher_sequences: Sequence[TeacherSequence] | None,
    *,
    positions: Positions,
    k: int | None,
    alignment: Alignment,
    aggregation: Aggregation,
    is_taught: Sequence[bool] | None = None,
    written: Sequence[Sequence[bool] | None] | None = None,
) -> Supervision:
    """Position weights, and the teacher's counterpart of each position.

    ``teacher_sequences`` is None if the teacher reads the student's sequences. ``is_taught`` turns
    supervision off for whole sequences. The other arguments are those of `position_weights`.
    """
    counterparts = None
    if teacher_sequences is not None:
        counterparts = [
            sequence.positions(alignment, response_length=length)
            for sequence, length in zip(teacher_sequences, response_lengths, strict=True)
        ]
    has_counterpart = None
    if counterparts is not None:
        has_counterpart = [[position is not None for position in one] for one in counterparts]
    elif is_taught is not None:
        taught = zip(is_taught, response_lengths, strict=True)
        has_counterpart = [[is_so] * length for is_so, length in taught]
    weights = position_weights(
        prompt_lengths,
        response_lengths,
        positions=positions,
        k=k,
        alignment=alignment,
        aggregation=aggregation,
        has_counterpart=has_counterpart,
        written=written,
    )
    if counterparts is None:
        return Supervision(weights=weights, positions=None)
    placed = []
    # The predictor of a token is the position before it.
    shift = 0 if alignment == "token" else -1
    for weight, prompt, one in zip(weights, prompt_lengths, counterparts, strict=True):
        of_sequence = torch.full((len(weight),), -1, dtype=torch.int64)
        found = torch.tensor([-1 if position is None else position for position in one])
        of_sequence[prompt + shift : prompt + shift + len(one)] = found
        placed.append(torch.where(weight > 0, of_sequence, -1))
    return Supervision(weights=weights, positions=placed)


def position_weights(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    *,
    positions: Positions,
    k: int | None,
    alignment: Alignment,
    aggregation: Aggregation,
    has_counterpart: Sequence[Sequence[bool]] | None = None,
    written: Sequence[Sequence[bool] | None] | None = None,
) -> list[Tensor]:
    """The weight of every position of every sequence of the global batch.

    A layer's loss is the sum over positions of weight times distance. The weights are normalised
    here, over the global batch, so the loss does not depend on how the batch is split afterwards.

    Args:
        prompt_lengths: Tokens of each prompt, at least 1.
        response_lengths: Tokens of each response, at least 1.
        positions: The supervised response tokens (see `position_mask`).
        k: For last_k and first_k.
        alignment: ``token`` is the position that holds a response token, ``predictor`` the position
            before it.
        aggregation: ``token_mean`` divides by the supervised tokens of all sequences,
            ``sequence_mean`` by those of the sequence and by the number of sequences (eq. 6).
        has_counterpart: For each token of each response, whether the teacher's sequence has a
            counterpart; tokens without a counterpart are not supervised. None: all have.
        written: For each token of each response, whether the student wrote it. Other tokens are
            not supervised, and last_k and first_k do not count them. None, for a response or for
            all: it wrote all.

    Returns:
        For each sequence [prompt + response], fp32. All weights together sum to 1, or are all 0 if
        no token has a counterpart.
    """
    assert min(prompt_lengths) >= 1, "an empty prompt has no position to predict from"
    assert min(response_lengths) >= 1
    columns = torch.arange(max(response_lengths))
    # Computed in fp64; each weight is rounded to fp32 once, at the end.
    response_mask = (columns < torch.tensor(response_lengths)[:, None]).double()
    for row, of_response in zip(response_mask, written or (), strict=written is not None):
        if of_response is not None:
            row[: len(of_response)] *= torch.tensor(of_response)
    mask = position_mask(response_mask, positions, k)
    if has_counterpart is not None:
        for row, of_response in zip(mask, has_counterpart, strict=True):
            row[: len(of_response)] *= torch.tensor(of_response)
    if aggregation == "token_mean":
        weights = mask / mask.sum().clamp(min=1)
    else:
        # The mean is over sequences that have a supervised token, not over all of them.
        per_response = mask.sum(dim=1, keepdim=True)
        num_taught = (per_response > 0).sum().clamp(min=1)
        weights = mask / per_response.clamp(min=1) / num_taught
    shift = 0 if alignment == "token" else -1
    rows = []
    for prompt, response, row in zip(prompt_lengths, response_lengths, weights, strict=True):
        sequence = torch.zeros(prompt + response)
        sequence[prompt + shift : prompt + shift + response] = row[:response].float()
        rows.append(sequence)
    return rows
