"""A teacher that reads other sequences: its micro-batches, and which positions are compared.

Its micro-batches have the sequences of the student's in the same order, with their own lengths. A
pair of positions, one of each side, has a number in its micro-batch, so that ranks that share
sequences can tell whose hidden state is whose.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oprd.data.batching import MicroBatch, Pairs, Rows, collate


@dataclass(frozen=True, kw_only=True)
class TeacherReading:
    """What the teacher reads in a step.

    Attributes:
        sequences: Token ids of every sequence.
        positions: For each position of each of the student's sequences the one of the teacher's
            that it is compared with, [length of the student's], int64; -1 is none.
        output_positions: The same for the output-space loss; None without one.
    """

    sequences: Sequence[Sequence[int]]
    positions: Sequence[Tensor]
    output_positions: Sequence[Tensor] | None


def with_teacher(
    micro_batches: Sequence[MicroBatch],
    batches: Sequence[Sequence[int]],
    reading: TeacherReading,
    *,
    is_packed: bool,
    pad_to_multiple_of: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Adds to the student's micro-batches what the teacher reads.

    Args:
        micro_batches: The student's.
        batches: Indices of each micro-batch's sequences.
        reading: Of all sequences of the step.
        is_packed: See `collate`, of both sides.
        pad_to_multiple_of: Likewise.
        device: Likewise.
    """
    nothing = [torch.zeros(len(sequence)) for sequence in reading.sequences]
    of_teacher = collate(
        batches,
        reading.sequences,
        nothing,
        is_packed=is_packed,
        pad_to_multiple_of=pad_to_multiple_of,
        device=device,
    )

    def pairs_of(
        batch: Sequence[int], positions: Sequence[Tensor] | None
    ) -> tuple[Pairs, Pairs] | tuple[None, None]:
        if positions is None:
            return None, None
        lengths = [len(reading.sequences[i]) for i in batch]
        of_student, of_teacher, count = _numbers([positions[i] for i in batch], lengths)
        on_student, on_teacher = (
            Rows([len(ids) for ids in side], is_packed=is_packed, multiple=pad_to_multiple_of)
            for side in (of_student, of_teacher)
        )
        return (
            Pairs(ids=on_student.fill(of_student), count=count),
            Pairs(ids=on_teacher.fill(of_teacher), count=count),
        )

    result = []
    for student, teacher, batch in zip(micro_batches, of_teacher, batches, strict=True):
        pairs, their_pairs = pairs_of(batch, reading.positions)
        output_pairs, their_output_pairs = pairs_of(batch, reading.output_positions)
        teacher = dataclasses.replace(teacher, pairs=their_pairs, output_pairs=their_output_pairs)
        result.append(
            dataclasses.replace(student, teacher=teacher, pairs=pairs, output_pairs=output_pairs)
        )
    return result


def _numbers(
    positions: Sequence[Tensor], teacher_lengths: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], int]:
    """The pair that each position of the student and of the teacher is in, from 1, and how many."""
    of_student, of_teacher, count = [], [], 0
    for targets, length in zip(positions, teacher_lengths, strict=True):
        is_paired = targets >= 0
        ids = torch.where(is_paired, is_paired.cumsum(0) + count, 0)
        mirrored = torch.zeros(length, dtype=torch.int64)
        mirrored[targets[is_paired]] = ids[is_paired]
        count += int(is_paired.sum())
        of_student.append(ids)
        of_teacher.append(mirrored)
    return of_student, of_teacher, count
