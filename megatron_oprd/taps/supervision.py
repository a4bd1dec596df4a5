"""What each position of each sequence counts for in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oprd.config import Alignment
from megatron_oprd.config_losses import Aggregation, Positions
from megatron_oprd.data.teacher_sequences import TeacherSequence
from megatron_oprd.taps.positions import position_mask


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
