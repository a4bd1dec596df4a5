"""Collates a step's sequences into micro-batches, the same number for every data-parallel replica.

A teacher that reads other sequences, or several micro-batches of the student together, gets its own
micro-batches, and the pairs of positions that are compared. Each consists of whole micro-batches of
the student.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.parallel.layout import context_parallel_positions


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What a model reads: sequences that go through it together.

    They are either padded on the right to the same length s, or concatenated into one row of s
    tokens (b = 1), with padding at the end. Under context parallelism s is a rank's share.
    """

    tokens: Tensor  # [b, s], int64; padding is 0
    position_ids: Tensor  # [b, s], int64
    num_tokens: int  # without padding
    # Tokens of each packed sequence, with the padding as one more; None for padded sequences.
    packed_lengths: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """What a teacher supervises: the weight of each position in both losses; 0 is not supervised.

    On the CPU, where the supervised positions are selected.
    """

    states: Tensor  # [b, s], fp32: in the loss on hidden states
    # [b, s], fp32: in the output-space loss, at the positions that predict a response token. None
    # without such a loss.
    outputs: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of a student's and a teacher's position in a micro-batch of the student.

    Pairs are numbered from 1 over the teacher's micro-batch, so that all of its parts have one
    ``teacher``; 0 is no pair. On the CPU, int64. Under context parallelism s is a rank's share.
    """

    student: Tensor  # [b, s]; the pair of each of the student's positions
    teacher: Tensor  # [b, s] of the teacher's micro-batch
    first: int  # the pairs before this micro-batch's
    count: int  # of this micro-batch


@dataclass(frozen=True, kw_only=True)
class OtherInput:
    """What teachers read if it is not the student's micro-batch, and the compared positions.

    Micro-batches of the student that teachers read together have one ``input``.
    """

    input: ModelInput
    pairs: Pairs  # the first teacher's, of the loss on hidden states
    output_pairs: Pairs | None  # of the output-space loss
    extra_pairs: tuple[Pairs, ...] = ()  # `pairs` of each extra teacher


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A part of a step's sequences: what the models read, and what is compared."""

    index: int  # among this replica's micro-batches of the step
    input: ModelInput  # the student's, and the teachers' unless `other_input` is set
    labels: Tensor  # [b, s], int64, CPU: the next token; 0 after the last
    weights: LossWeights | None = None  # the first teacher's; None in passes without a loss
    extra_weights: tuple[LossWeights, ...] = ()  # of each extra teacher
    other_input: OtherInput | None = None
    # [b, s], int64, CPU: in passes without a loss, the number, from 1, of what is collected at each
    # position; 0 is nothing.
    numbers: Tensor | None = None

    @property
    def teacher_input(self) -> ModelInput:
        """What teachers read."""
        return self.input if self.other_input is None else self.other_input.input


@dataclass(frozen=True, kw_only=True)
class TeacherBatch:
    """A micro-batch of a teacher's pass."""

    input: ModelInput
    members: tuple[MicroBatch, ...]  # the student's micro-batches that it consists of


def teacher_batches(micro_batches: Sequence[MicroBatch]) -> list[TeacherBatch]:
    """The micro-batches in which a teacher reads those of the student."""
    members: dict[int, list[MicroBatch]] = {}
    for one in micro_batches:
        # By identity: tensors have no cheap equality, and parts of one micro-batch share the input.
        members.setdefault(id(one.teacher_input), []).append(one)
    return [
        TeacherBatch(input=parts[0].teacher_input, members=tuple(parts))
        for parts in members.values()
    ]


def pack(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    micro_batch_size: int | None,
    num_replicas: int,
    multiple: int = 1,
    is_padded: bool = True,
) -> list[list[list[int]]]:
    """Divides sequences into micro-batches, and these over the replicas.

    Sequences are sorted by length, which keeps padding low, and filled into micro-batches up to the
    token budget. The largest micro-batches are then halved until every replica gets the same
    number, and dealt out so that replicas get about the same number of tokens.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Budget of a micro-batch, padding included. A longer sequence is a micro-batch by
            itself.
        micro_batch_size: The most sequences in a micro-batch; None is no limit.
        num_replicas: Data-parallel replicas.
        multiple: The number of a replica's micro-batches is a multiple of this.
        is_padded: Whether sequences are padded to the longest of their micro-batch.

    Returns:
        For each replica its micro-batches, each a list of indices into ``lengths``.

    Raises:
        ValueError: The number of sequences is not a positive multiple of ``num_replicas`` times
            ``multiple``, so that even micro-batches of one sequence could not be dealt out evenly.
    """
    per_round = num_replicas * multiple
    if not lengths or len(lengths) % per_round:
        raise ValueError(
            f"{len(lengths)} sequences cannot be dealt out evenly; {num_replicas} replicas with a "
            f"multiple of {multiple} micro-batches each need a multiple of {per_round}"
        )

    def cost(batch: Sequence[int]) -> int:
        return batch_tokens([lengths[i] for i in batch], is_padded=is_padded)

    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches:
            last = batches[-1]
            fits = cost([*last, index]) <= max_tokens
            if fits and (micro_batch_size is None or len(last) < micro_batch_size):
                last.append(index)
                continue
        batches.append([index])
    while len(batches) % per_round:
        largest = max((b for b in batches if len(b) > 1), key=cost)
        batches.remove(largest)
        half = len(largest) // 2
        batches += [largest[:half], largest[half:]]
    batches.sort(key=cost, reverse=True)
    replicas: list[list[list[int]]] = [[] for _ in range(num_replicas)]
    for start in range(0, len(batches), num_replicas):
        # Back and forth: the replica with the largest of one round gets the smallest of the next.
        deal = batches[start : start + num_replicas]
        if start // num_replicas % 2:
            deal.reverse()
        for replica, batch in zip(replicas, deal, strict=True):
            replica.append(batch)
    return replicas


def merge(
    replicas: Sequence[Sequence[Sequence[int]]],
    lengths: Sequence[int],
    *,
    max_tokens: int,
    multiple: int = 1,
    is_padded: bool = True,
) -> list[list[list[int]]]:
    """Puts micro-batches together into larger ones, the same number for every replica.

    Those with the longest sequences come first, which keeps padding low, and fill up the token
    budget. Then the largest are halved until every replica has the same number.

    Args:
        replicas: For each replica its micro-batches, each a list of indices into ``lengths``. All
            have the same number of them, a multiple of ``multiple``.
        lengths: Tokens of each sequence.
        max_tokens: Budget of what is put together, padding included. A micro-batch that takes more
            stays by itself.
        multiple: The number of a replica's larger micro-batches is a multiple of this.
        is_padded: Whether sequences are padded to the longest of their micro-batch.

    Returns:
        For each replica the numbers of the micro-batches that are together.
    """

    def cost(batches: Sequence[Sequence[int]], numbers: Sequence[int]) -> int:
        of_all = [lengths[i] for number in numbers for i in batches[number]]
        return batch_tokens(of_all, is_padded=is_padded)

    merged: list[list[list[int]]] = []
    for batches in replicas:
        longest = [max(lengths[i] for i in batch) for batch in batches]
        parts: list[list[int]] = []
        for number in sorted(range(len(batches)), key=lambda n: -longest[n]):
            if parts and cost(batches, [*parts[-1], number]) <= max_tokens:
                parts[-1].append(number)
            else:
                parts.append([number])
        merged.append(parts)
    most = max(map(len, merged))
    needed = most + -most % multiple
    for batches, parts in zip(replicas, merged, strict=True):
        while len(parts) < needed:
            several = [part for part in parts if len(part) > 1]
            largest = max(several, key=partial(cost, batches))
            half = len(largest) // 2
            parts.remove(largest)
            parts += [largest[:half], largest[half:]]
    return merged


def batch_tokens(lengths: Sequence[int], *, is_padded: bool) -> int:
    """Tokens of a micro-batch with sequences of ``lengths``, padded to the longest or not."""
    return max(lengths) * len(lengths) if is_padded else sum(lengths)


def collate(
    batches: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[int]],
    weights: Sequence[Tensor] | None = None,
    output_weights: Sequence[Tensor] | None = None,
    *,
    numbers: Sequence[Tensor] | None = None,
    is_packed: bool = False,
    pad_to_multiple_of: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Builds one replica's micro-batches.

    Args:
        batches: Indices of each micro-batch's sequences.
        sequences: Token ids of every sequence of the step.
        weights: Position weights of every sequence, each [length]; None without a loss.
        output_weights: Position weights of the output-space loss, each [length].
        numbers: `MicroBatch.numbers` of every sequence, each [length].
        is_packed: Whether the sequences of a micro-batch are concatenated into one row.
        pad_to_multiple_of: Micro-batches are padded to a multiple of this many tokens.
        device: Where tokens and position ids go.
    """
    rows: dict[str, Any] = {"is_packed": is_packed, "pad_to_multiple_of": pad_to_multiple_of}
    inputs = collate_inputs(batches, sequences, device=device, **rows)
    labels = _collate_values(batches, [_followers(one) for one in sequences], **rows)
    of_batches: Sequence[LossWeights | None] = [None] * len(batches)
    if weights is not None:
        of_batches = collate_weights(batches, weights, output_weights, **rows)
    numbered: Sequence[Tensor | None] = [None] * len(batches)
    if numbers is not None:
        numbered = _collate_values(batches, numbers, **rows)
    return [
        MicroBatch(
            index=index,
            input=inputs[index],
            labels=labels[index],
            weights=of_batches[index],
            numbers=numbered[index],
        )
        for index in range(len(batches))
    ]


def collate_inputs(
    batches: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[int]],
    *,
    is_packed: bool,
    pad_to_multiple_of: int,
    device: torch.device,
) -> list[ModelInput]:
    """Builds what a model reads. The arguments are those of `collate`."""
    inputs = []
    for batch in batches:
        lengths = [len(sequences[i]) for i in batch]
        rows = Rows(lengths, is_packed=is_packed, multiple=pad_to_multiple_of)
        position_ids = torch.arange(rows.length).expand(len(batch), rows.length)
        if rows.packed_lengths is not None:
            position_ids = torch.cat([torch.arange(n) for n in rows.packed_lengths])[None]
        inputs.append(
            ModelInput(
                tokens=rows.fill([torch.tensor(sequences[i]) for i in batch]).to(device),
                position_ids=position_ids.to(device),
                num_tokens=sum(lengths),
                packed_lengths=rows.packed_lengths,
            )
        )
    return inputs


def collate_weights(
    batches: Sequence[Sequence[int]],
    weights: Sequence[Tensor],
    output_weights: Sequence[Tensor] | None = None,
    *,
    is_packed: bool,
    pad_to_multiple_of: int,
) -> list[LossWeights]:
    """Builds what a teacher supervises. The arguments are those of `collate`."""
    rows: dict[str, Any] = {"is_packed": is_packed, "pad_to_multiple_of": pad_to_multiple_of}
    outputs: Sequence[Tensor | None] = [None] * len(batches)
    if output_weights is not None:
        outputs = _collate_values(batches, output_weights, **rows)
    states = _collate_values(batches, weights, **rows)
    return [LossWeights(states=s, outputs=o) for s, o in zip(states, outputs, strict=True)]


def _collate_values(
    batches: Sequence[Sequence[int]],
    values: Sequence[Tensor],
    *,
    is_packed: bool,
    pad_to_multiple_of: int,
) -> list[Tensor]:
    """The values of each sequence, [length] each, by micro-batch, [b, s] each."""
    filled = []
    for batch in batches:
        of_batch = [values[i] for i in batch]
        lengths = [len(one) for one in of_batch]
        rows = Rows(lengths, is_packed=is_packed, multiple=pad_to_multiple_of)
        filled.append(rows.fill(of_batch))
    return filled


class Rows:
    """The placement of a micro-batch's sequences in a tensor [b, s], padded with zeros."""

    def __init__(self, lengths: Sequence[int], *, is_packed: bool, multiple: int) -> None:
        longest = sum(lengths) if is_packed else max(lengths)
        padding = -longest % multiple
        self.length = longest + padding  # s
        self.packed_lengths: tuple[int, ...] | None = None
        if is_packed:
            self.packed_lengths = (*lengths, padding) if padding else tuple(lengths)

    def fill(self, parts: Sequence[Tensor]) -> Tensor:
        """Places the values of each sequence, [length] each --> [b, s]."""
        rows = parts if self.packed_lengths is None else [torch.cat(list(parts))]
        filled = rows[0].new_zeros(len(rows), self.length)
        for row, content in zip(filled, rows, strict=True):
            row[: len(content)] = content
        return filled


def _followers(sequence: Sequence[int]) -> Tensor:
    """The token after each token, 0 after the last."""
    return torch.tensor([*sequence[1:], 0])


def context_parallel_shares(
    micro_batches: Sequence[MicroBatch], *, rank: int, size: int
) -> list[MicroBatch]:
    """The part of each micro-batch on one rank of ``size`` in the context-parallel group.

    ``micro_batches`` are padded to a multiple of twice the ranks (Megatron's zigzag split).
    """
    # What several micro-batches have in common is divided once, and stays one object.
    found: dict[int, Any] = {}

    def share(value: Any) -> Any:
        if id(value) not in found:
            found[id(value)] = divided(value)
        return found[id(value)]

    def divided(value: Any) -> Any:
        if isinstance(value, Tensor):
            # By its own length: a teacher can read longer sequences than the student.
            positions = context_parallel_positions(value.shape[1], rank=rank, size=size)
            return value[:, positions.to(value.device)]
        if isinstance(value, tuple):
            return tuple(share(one) for one in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **{name: share(one) for name, one in fields.items()})
        return value

    return [share(one) for one in micro_batches]


@dataclass(frozen=True, kw_only=True)
class TeacherReading:
    """The sequences that teachers read in a step."""

    sequences: Sequence[Sequence[int]]
    # For each of the student's sequences [length], int64: the teacher's position that each position
    # is compared with; -1 is none.
    positions: Sequence[Tensor]
    output_positions: Sequence[Tensor] | None  # the same for the output-space loss
    extra_positions: Sequence[Sequence[Tensor]] = ()  # `positions` of each extra teacher


def with_teacher(
    micro_batches: Sequence[MicroBatch],
    batches: Sequence[Sequence[int]],
    reading: TeacherReading,
    *,
    together: Sequence[Sequence[int]] | None = None,
    is_packed: bool,
    pad_to_multiple_of: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Adds what teachers read, and the pairs, to the student's micro-batches.

    ``reading`` has all sequences of the step. ``together`` has the numbers of the micro-batches
    that teachers read together; by default each is read by itself. The other arguments are those of
    `collate`.
    """
    rows: dict[str, Any] = {"is_packed": is_packed, "pad_to_multiple_of": pad_to_multiple_of}
    if together is None:
        together = [[number] for number in range(len(batches))]
    parts = [[batches[number] for number in numbers] for numbers in together]
    merged = [[i for batch in of_one for i in batch] for of_one in parts]
    inputs = collate_inputs(merged, reading.sequences, device=device, **rows)
    lengths = [len(sequence) for sequence in reading.sequences]
    result = list(micro_batches)
    for numbers, of_one, read in zip(together, parts, inputs, strict=True):
        pairs, *of_extra = [
            _pairs(of_one, positions, lengths, **rows)
            for positions in (reading.positions, *reading.extra_positions)
        ]
        outputs: Sequence[Pairs | None] = [None] * len(numbers)
        if reading.output_positions is not None:
            outputs = _pairs(of_one, reading.output_positions, lengths, **rows)
        for place, number in enumerate(numbers):
            other = OtherInput(
                input=read,
                pairs=pairs[place],
                output_pairs=outputs[place],
                extra_pairs=tuple(one[place] for one in of_extra),
            )
            result[number] = dataclasses.replace(result[number], other_input=other)
    return result


def _pairs(
    parts: Sequence[Sequence[int]],
    positions: Sequence[Tensor],
    lengths: Sequence[int],
    *,
    is_packed: bool,
    pad_to_multiple_of: int,
) -> list[Pairs]:
    """The pairs of each of the student's micro-batches in one of the teacher's.

    ``parts`` has the indices of each one's sequences; ``positions`` is as in `TeacherReading`, and
    ``lengths`` are of all sequences as the teacher reads them.
    """
    rows: dict[str, Any] = {"is_packed": is_packed, "pad_to_multiple_of": pad_to_multiple_of}
    merged = [i for part in parts for i in part]
    of_student, of_teacher = _numbers([positions[i] for i in merged], [lengths[i] for i in merged])
    (teacher,) = _collate_values([range(len(merged))], of_teacher, **rows)
    found, first = [], 0
    for start, end in pairwise(accumulate(map(len, parts), initial=0)):
        (student,) = _collate_values([range(start, end)], of_student, **rows)
        count = int((student > 0).sum())
        found.append(Pairs(student=student, teacher=teacher, first=first, count=count))
        first += count
    return found


def _numbers(
    positions: Sequence[Tensor], teacher_lengths: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The pair (from 1) of each position of the student and of the teacher, by sequence."""
    of_student, of_teacher, count = [], [], 0
    for targets, length in zip(positions, teacher_lengths, strict=True):
        is_paired = targets >= 0
        ids = torch.where(is_paired, is_paired.cumsum(0) + count, 0)
        mirrored = torch.zeros(length, dtype=torch.int64)
        mirrored[targets[is_paired]] = ids[is_paired]
        count += int(is_paired.sum())
        of_student.append(ids)
        of_teacher.append(mirrored)
    return of_student, of_teacher
