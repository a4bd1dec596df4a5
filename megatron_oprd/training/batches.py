"""A step's micro-batches of both models, in groups whose teacher targets fit a memory budget.

Every rank works out all replicas' batches from the same rollouts, without communication.

With ``teacher.max_tokens`` the teachers read several micro-batches of a group together. These are
whole micro-batches, of any place in the group, so that each target still belongs to one of the
student's passes, and nothing changes for the student. A target's row is found as for a teacher that
reads other sequences, by pairs of positions (`with_teacher`): where ranks share sequences
(sequence and context parallelism) a position of a longer micro-batch can be on another rank, and
the rows are exchanged. Every replica makes the same number of micro-batches, as experts communicate
across replicas. All targets of a group are kept until the student's pass in any case, so only the
working memory of the teacher's pass grows.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.config.schema import Alignment, Positions
from megatron_oprd.data.batching import (
    MicroBatch,
    TeacherReading,
    collate,
    collate_weights,
    context_parallel_shares,
    merge,
    pack,
    with_teacher,
)
from megatron_oprd.data.teacher_sequences import TeacherSequence
from megatron_oprd.distill.positions import Supervision, supervise
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.rollout.engine import Rollout, teacher_sequences_of
from megatron_oprd.training.layout import RunLayout
from megatron_oprd.training.plan import RunPlan


def supervised_rows(
    batch: Sequence[int], weights: Sequence[Tensor], split: ParallelLayout, *, is_packed: bool
) -> int:
    """The number of supervised positions of a micro-batch on the rank that has most of them.

    ``batch`` has indices of sequences; ``weights`` has the position weights of every sequence of
    the step, each [length]; positions of weight 0 are not supervised.
    """
    if is_packed:
        return split.largest_share(torch.cat([weights[i] > 0 for i in batch]).long())
    # Padded sequences are split by column: the ranks share [b, s] along s.
    counts = torch.zeros(max(len(weights[i]) for i in batch), dtype=torch.int64)
    for i in batch:
        counts[: len(weights[i])] += weights[i] > 0
    return split.largest_share(counts)


def target_rows(layout: RunLayout, batch: Sequence[int], weights: Sequence[Tensor]) -> int:
    """`supervised_rows` for the weights of the loss on hidden states."""
    is_packed = layout.config.batch.sequence_packing
    return supervised_rows(batch, weights, layout.parallel, is_packed=is_packed)


def output_target_rows(layout: RunLayout, batch: Sequence[int], weights: Sequence[Tensor]) -> int:
    """`supervised_rows` for the weights of the output-space loss."""
    # The head tap gathers the sequence over the tensor-parallel ranks first, so each keeps all
    # rows.
    whole = dataclasses.replace(layout.parallel, sequence_parallel=False)
    is_packed = layout.config.batch.sequence_packing
    return supervised_rows(batch, weights, whole, is_packed=is_packed)


def target_bytes(layouts: Sequence[RunLayout], rows: Sequence[int], output_rows: int) -> int:
    """Bytes of a micro-batch's targets: ``rows`` of each teacher, ``output_rows`` of the first."""
    size = sum(
        of_teacher * one.target_bytes_per_row for one, of_teacher in zip(layouts, rows, strict=True)
    )
    return size + output_rows * layouts[0].output_target_bytes_per_row


def groups_of_run(layout: RunLayout, sizes: Sequence[int]) -> list[range]:
    """`target_groups` under the run's settings."""
    budget = layout.config.teacher.target_memory_gb
    return target_groups(
        sizes,
        max_bytes=None if budget is None else budget * 1e9,
        multiple=micro_batch_multiple(layout),
    )


def target_groups(sizes: Sequence[int], *, max_bytes: float | None, multiple: int) -> list[range]:
    """Divides micro-batches into consecutive groups whose targets take at most ``max_bytes``.

    ``sizes`` are the bytes of each micro-batch's targets. Without ``max_bytes`` there is one group.
    The size of a group is a multiple of ``multiple``, as the number of micro-batches is; the
    smallest group is made even if it exceeds the budget.
    """
    if max_bytes is None:
        return [range(len(sizes))]
    ends, in_group = [0], 0
    for start in range(0, len(sizes), multiple):
        more = sum(sizes[start : start + multiple])
        if in_group and in_group + more > max_bytes:
            ends.append(start)
            in_group = 0
        in_group += more
    return [range(start, end) for start, end in zip(ends, [*ends[1:], len(sizes)], strict=True)]


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """A step's micro-batches of one replica."""

    # One teacher pass for each group.
    groups: list[list[MicroBatch]]
    # By teacher: whether any hidden state of the global batch is compared with its.
    supervises: list[bool]
    num_output_rows: int  # positions of the global batch whose distributions are compared

    @property
    def supervises_outputs(self) -> bool:
        """Whether any next-token distribution is compared."""
        return self.num_output_rows > 0

    @property
    def is_empty(self) -> bool:
        """Whether the whole global batch has no supervised position."""
        return not any(self.supervises) and not self.supervises_outputs


def make_micro_batches(
    plan: RunPlan,
    context: ParallelContext,
    rollouts: Sequence[Rollout],
) -> StepBatches:
    """This replica's micro-batches of the global batch; see `Distiller.micro_batches`."""
    sequences = [[*rollout.prompt_ids, *rollout.response_ids] for rollout in rollouts]
    layouts = [one.layout for one in plan.teachers]
    weights, output_weights, reading = _supervision(
        plan.layout, rollouts, 0, teacher_sequences_of(rollouts)
    )
    of_others = [
        _supervision(layout, rollouts, number, None)[0]
        for number, layout in enumerate(layouts[1:], start=1)
    ]
    replicas = replica_batches(plan.layout, [len(sequence) for sequence in sequences])
    batches, rows = replicas[context.dp_rank], _row_options(plan, context)
    micro_batches = collate(batches, sequences, weights, output_weights, **rows)

    def size(batch: Sequence[int]) -> int:
        of_teachers = [
            target_rows(one, batch, of_teacher)
            for one, of_teacher in zip(layouts, [weights, *of_others], strict=True)
        ]
        of_outputs = (
            0 if output_weights is None else output_target_rows(plan.layout, batch, output_weights)
        )
        return target_bytes(layouts, of_teachers, of_outputs)

    groups = groups_of_run(
        plan.layout,
        # The largest of all replicas, so that every rank makes the same groups: with expert
        # parallelism the passes communicate across replicas.
        [max(map(size, batches)) for batches in zip(*replicas, strict=True)],
    )
    if reading is None and plan.config.teacher.max_tokens is not None:
        reading = _same_sequences(sequences, weights, output_weights, of_others)
    if reading is not None:
        lengths = [len(sequence) for sequence in reading.sequences]
        together = read_together(plan.layout, replicas, groups, lengths)[context.dp_rank]
        micro_batches = with_teacher(micro_batches, batches, reading, together=together, **rows)
    del rows["device"]
    extra = [collate_weights(batches, one, **rows) for one in of_others]
    micro_batches = [
        dataclasses.replace(one, extra_weights=tuple(of_one[number] for of_one in extra))
        for number, one in enumerate(micro_batches)
    ]
    shares = context_parallel_shares(micro_batches, rank=context.cp_rank, size=context.cp_size)
    return StepBatches(
        groups=[[shares[i] for i in group] for group in groups],
        supervises=[_any(one) for one in (weights, *of_others)],
        num_output_rows=sum(int((one > 0).sum()) for one in output_weights or ()),
    )


def _any(weights: Sequence[Tensor]) -> bool:
    return any(bool(one.any()) for one in weights)


def make_response_micro_batches(
    plan: RunPlan, context: ParallelContext, rollouts: Sequence[Rollout]
) -> list[MicroBatch]:
    """This replica's micro-batches of a pass without a loss, with response tokens as numbers.

    They are split like those of training. Response tokens count from 1 over the whole step, at the
    position that predicts them.
    """
    sequences = [[*rollout.prompt_ids, *rollout.response_ids] for rollout in rollouts]
    numbers, first = [], 1
    for rollout in rollouts:
        prompt, response = rollout.prompt_ids, rollout.response_ids
        predicted = torch.zeros(len(prompt) + len(response), dtype=torch.int64)
        start = len(prompt) - 1
        predicted[start : start + len(response)] = torch.arange(first, first + len(response))
        numbers.append(predicted)
        first += len(response)
    micro_batches = collate(
        replica_batches(plan.layout, [len(one) for one in sequences])[context.dp_rank],
        sequences,
        numbers=numbers,
        **_row_options(plan, context),
    )
    return context_parallel_shares(micro_batches, rank=context.cp_rank, size=context.cp_size)


def micro_batch_multiple(layout: RunLayout) -> int:
    """The number of a replica's micro-batches has to be a multiple of this."""
    # Megatron's interleaved schedule needs a multiple of the pipeline size.
    parallel = layout.config.parallel
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return parallel.pipeline_model_parallel_size if interleaved else 1


def replica_batches(layout: RunLayout, lengths: Sequence[int]) -> list[list[list[int]]]:
    """`pack` under the run's settings, for sequences of ``lengths`` tokens."""
    batch = layout.config.batch
    return pack(
        lengths,
        max_tokens=batch.max_tokens,
        micro_batch_size=batch.micro_batch_size,
        num_replicas=layout.data_parallel_size,
        multiple=micro_batch_multiple(layout),
        is_padded=not batch.sequence_packing,
    )


def read_together(
    layout: RunLayout,
    replicas: Sequence[Sequence[Sequence[int]]],
    groups: Sequence[range],
    lengths: Sequence[int],
) -> list[list[list[int]]]:
    """For each replica, the numbers of the micro-batches that teachers read together.

    ``replicas`` are those of `replica_batches`, and ``groups`` of `groups_of_run`; ``lengths`` are
    those of all sequences as the teachers read them.
    """
    max_tokens = layout.config.teacher.max_tokens
    if max_tokens is None:
        return [[[number] for number in range(len(batches))] for batches in replicas]
    found: list[list[list[int]]] = [[] for _ in replicas]
    for group in groups:
        merged = merge(
            [[batches[number] for number in group] for batches in replicas],
            lengths,
            max_tokens=max_tokens,
            multiple=micro_batch_multiple(layout),
            is_padded=not layout.config.batch.sequence_packing,
        )
        for of_replica, parts in zip(found, merged, strict=True):
            of_replica += [[group[number] for number in part] for part in parts]
    return found


def _same_sequences(
    sequences: Sequence[Sequence[int]],
    weights: Sequence[Tensor],
    output_weights: Sequence[Tensor] | None,
    of_others: Sequence[Sequence[Tensor]],
) -> TeacherReading:
    """The reading of teachers that read the student's sequences, in other micro-batches.

    The weights are the position weights of the first teacher's two losses and of the others'.
    """

    def supervised(of_loss: Sequence[Tensor]) -> list[Tensor]:
        return [torch.where(one > 0, torch.arange(len(one)), -1) for one in of_loss]

    return TeacherReading(
        sequences=sequences,
        positions=supervised(weights),
        output_positions=None if output_weights is None else supervised(output_weights),
        extra_positions=[supervised(one) for one in of_others],
    )


def _row_options(plan: RunPlan, context: ParallelContext) -> dict[str, Any]:
    return {
        "is_packed": plan.config.batch.sequence_packing,
        "pad_to_multiple_of": plan.layout.parallel.pad_to_multiple_of,
        "device": context.device,
    }


def _supervision(
    layout: RunLayout,
    rollouts: Sequence[Rollout],
    number: int,
    teacher_sequences: Sequence[TeacherSequence] | None,
) -> tuple[list[Tensor], list[Tensor] | None, TeacherReading | None]:
    """The ``number``-th teacher's position weights for both losses, and its reading."""
    states, outputs = supervise_both(
        layout,
        [len(rollout.prompt_ids) for rollout in rollouts],
        [len(rollout.response_ids) for rollout in rollouts],
        teacher_sequences,
        is_taught=[one.taught_by is None or one.taught_by[number] for one in rollouts],
        written=[rollout.written for rollout in rollouts],
    )
    reading = None
    if teacher_sequences is not None:
        assert states.positions is not None
        reading = TeacherReading(
            sequences=[[*one.prompt_ids, *one.response_ids] for one in teacher_sequences],
            positions=states.positions,
            output_positions=None if outputs is None else outputs.positions,
        )
    return states.weights, None if outputs is None else outputs.weights, reading


def supervise_both(
    layout: RunLayout,
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    teacher_sequences: Sequence[TeacherSequence] | None = None,
    *,
    is_taught: Sequence[bool] | None = None,
    written: Sequence[Sequence[bool] | None] | None = None,
) -> tuple[Supervision, Supervision | None]:
    """`supervise` under the run's settings, for hidden states and for the output-space loss.

    The second is None without an output-space loss.
    """
    config = layout.config
    taps, output = config.taps, config.output_loss

    def of(positions: Positions, k: int | None, alignment: Alignment) -> Supervision:
        return supervise(
            prompt_lengths,
            response_lengths,
            teacher_sequences,
            positions=positions,
            k=k,
            alignment=alignment,
            aggregation=config.loss.aggregation,
            is_taught=is_taught,
            written=written,
        )

    states = of(taps.positions, taps.k, taps.alignment)
    outputs = None
    if layout.compares_outputs:
        # Logits at the position before a token predict it, so the alignment is not a choice here.
        outputs = of(output.positions, output.positions_k, "predictor")
    return states, outputs
