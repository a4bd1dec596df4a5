"""Workload of one data-parallel replica in a step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from megatron_oprd.data.batching import Rows
from megatron_oprd.training.batches import (
    groups_of_run,
    output_target_rows,
    read_together,
    replica_batches,
    supervise_both,
    target_bytes,
    target_rows,
)
from megatron_oprd.training.layout import RunLayout


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Micro-batches of a step in which all sequences have the same length."""

    num_sequences: int  # of this replica
    prompt_tokens: int  # per prompt
    response_tokens: int  # per response
    num_micro_batches: int  # of this replica
    micro_batch_size: int  # sequences of the largest micro-batch
    num_rows: int  # of the largest micro-batch: one if packed, else one per sequence
    row_tokens: int  # padding included
    # Supervised positions of the largest micro-batch, on the sequence-sharing rank with most of
    # them.
    target_rows: int
    # Supervised positions whose targets a rank keeps at the same time: of a step, or of a group of
    # micro-batches under teacher.target_memory_gb.
    kept_rows: int
    # Positions of the output-space loss in the largest micro-batch, on every tensor-parallel rank;
    # 0 without the loss.
    output_rows: int
    kept_output_rows: int  # of these, kept at the same time
    group_size: int  # micro-batches per group
    # Supervised positions of the largest micro-batch on all ranks together, for either loss.
    supervised_rows: int
    supervised_output_rows: int
    # Micro-batches, rows and prompts as the teachers read them: larger micro-batches under
    # teacher.max_tokens, longer rows of a teacher with prompts or tokens of its own.
    teacher_num_micro_batches: int
    teacher_micro_batch_size: int
    teacher_num_rows: int
    teacher_row_tokens: int
    teacher_prompt_tokens: int
    teacher_group_size: int

    @property
    def of_teacher(self) -> Self:
        """The workload as the teachers read it."""
        return replace(
            self,
            num_micro_batches=self.teacher_num_micro_batches,
            micro_batch_size=self.teacher_micro_batch_size,
            num_rows=self.teacher_num_rows,
            row_tokens=self.teacher_row_tokens,
            prompt_tokens=self.teacher_prompt_tokens,
            group_size=self.teacher_group_size,
        )

    @property
    def tokens(self) -> int:
        """Tokens of the step, padding included."""
        return self.num_sequences * self.num_rows * self.row_tokens // self.micro_batch_size

    @property
    def num_groups(self) -> int:
        """Number of turns of teacher and student."""
        return -(-self.num_micro_batches // self.group_size)


def workload(
    layout: RunLayout,
    *,
    prompt_tokens: int,
    response_tokens: int,
    others: Sequence[RunLayout] = (),
) -> Workload:
    """Builds the workload of a step in which all prompts and all responses have equal lengths.

    ``others`` are the layouts of further teachers, whose targets share the memory of a group. A
    teacher with sequences of its own reads sequences that are longer than the student's by the same
    factor as the longest.
    """
    config = layout.config
    length = prompt_tokens + response_tokens
    longer = layout.teacher_max_sequence_length / layout.max_sequence_length
    teacher_length = math.ceil(length * longer) if config.teacher_prompt.is_own else length
    count = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    replicas = replica_batches(layout, [length] * count)
    replica = replicas[0]
    states, outputs = supervise_both(layout, [prompt_tokens], [response_tokens])
    # Sequences are equal: rows depend only on a micro-batch's size.
    of_size, outputs_of_size = {}, {}
    for size in set(map(len, replica)):
        batch = [0] * size
        of_size[size] = target_rows(layout, batch, states.weights)
        outputs_of_size[size] = (
            0 if outputs is None else output_target_rows(layout, batch, outputs.weights)
        )
    rows = [of_size[len(batch)] for batch in replica]
    output_rows = [outputs_of_size[len(batch)] for batch in replica]
    groups = groups_of_run(
        layout,
        [
            target_bytes([layout, *others], [count] * (1 + len(others)), output_count)
            for count, output_count in zip(rows, output_rows, strict=True)
        ],
    )
    largest = max(groups, key=lambda group: sum(rows[i] for i in group))
    size = max(map(len, replica))
    together = read_together(layout, replicas, groups, [teacher_length] * count)[0]
    teacher_size = max(sum(len(replica[number]) for number in part) for part in together)
    is_packed = config.batch.sequence_packing
    multiple = layout.parallel.pad_to_multiple_of
    return Workload(
        num_sequences=sum(map(len, replica)),
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        num_micro_batches=len(replica),
        micro_batch_size=size,
        num_rows=1 if is_packed else size,
        row_tokens=Rows([length] * size, is_packed=is_packed, multiple=multiple).length,
        target_rows=max(rows),
        kept_rows=sum(rows[i] for i in largest),
        output_rows=max(output_rows),
        kept_output_rows=sum(output_rows[i] for i in largest),
        group_size=len(largest),
        supervised_rows=size * int((states.weights[0] > 0).sum()),
        supervised_output_rows=(
            0 if outputs is None else size * int((outputs.weights[0] > 0).sum())
        ),
        teacher_num_micro_batches=len(together),
        teacher_micro_batch_size=teacher_size,
        teacher_num_rows=1 if is_packed else teacher_size,
        teacher_row_tokens=Rows(
            [teacher_length] * teacher_size, is_packed=is_packed, multiple=multiple
        ).length,
        teacher_prompt_tokens=teacher_length - response_tokens,
        teacher_group_size=sum(part[0] in largest for part in together),
    )
