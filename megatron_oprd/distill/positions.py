"""The supervised response positions, and the weight of each in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from megatron_oprd.config.schema import Aggregation, Alignment, Positions
from megatron_oprd.data.teacher_sequences import TeacherSequence


def position_mask(response_mask: Tensor, positions: Positions, k: int | None) -> Tensor:
    """The supervised ones among the valid response tokens.

    Tokens are counted, not columns: padding on either side and holes in the mask do not count. A
    response of fewer than k tokens gives all of them, an empty one none.

    Args:
        response_mask: [B, T], 1 at valid response tokens and 0 elsewhere; any dtype.
        positions: ``all``; ``last`` (the last valid token); ``last_k`` or ``first_k``.
        k: How many tokens of each response, at least 1; read for ``last_k`` and ``first_k`` only,
            and None is allowed for the others only.

    Returns:
        [B, T], 1 at the supervised tokens, in ``response_mask``'s dtype.

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
    """What a loss compares in a step.

    Attributes:
        weights: See `position_weights`.
        positions: For a teacher that reads other sequences, and each position of a sequence: the
            teacher's position that it is compared with, int64, -1 for none; None otherwise.
    """

    weights: list[Tensor]
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
) -> Supervision:
    """Position weights, and where the teacher's counterparts are.

    Args:
        prompt_lengths: See `position_weights`, and so are the other arguments.
        response_lengths: Likewise.
        teacher_sequences: What the teacher reads in place of each sequence; None is the same.
        positions: Likewise.
        k: Likewise.
        alignment: Likewise.
        aggregation: Likewise.
        is_taught: Whether the teacher teaches each sequence at all; None: all of them.
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
    )
    if counterparts is None:
        return Supervision(weights=weights, positions=None)
    placed = []
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
        has_counterpart: For each response, whether a token has one in what the teacher reads; the
            others are not supervised, nor are responses without any. None: all have.

    Returns:
        For each sequence [prompt + response], fp32; all weights together sum to 1, or are all 0 if
        no token has a counterpart.
    """
    assert min(prompt_lengths) >= 1, "an empty prompt has no position to predict from"
    assert min(response_lengths) >= 1
    columns = torch.arange(max(response_lengths))
    # [B, T]
    response_mask = (columns < torch.tensor(response_lengths)[:, None]).double()
    mask = position_mask(response_mask, positions, k)
    if has_counterpart is not None:
        for row, of_response in zip(mask, has_counterpart, strict=True):
            row[: len(of_response)] *= torch.tensor(of_response)
    if aggregation == "token_mean":
        weights = mask / mask.sum().clamp(min=1)
    else:
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
