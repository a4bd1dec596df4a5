"""Workload of one data-parallel replica in a step."""

from dataclasses import dataclass, replace

from megatron_oprd.config.schema import Alignment, Positions
from megatron_oprd.data.batching import pack
from megatron_oprd.distill.positions import position_weights
from megatron_oprd.parallel.layout import SequenceSplit
from megatron_oprd.training.batches import supervised_rows, target_groups
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

    @property
    def tokens(self) -> int:
        """Tokens of the step, padding included."""
        return self.num_sequences * self.num_rows * self.row_tokens // self.micro_batch_size

    @property
    def num_groups(self) -> int:
        """Number of turns of teacher and student."""
        return -(-self.num_micro_batches // self.group_size)


def workload(layout: RunLayout, *, prompt_tokens: int, response_tokens: int) -> Workload:
    """Builds the workload of a step in which all prompts and all responses have equal lengths."""
    config = layout.config
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    multiple = parallel.pipeline_model_parallel_size if interleaved else 1
    split, is_packed = layout.sequence_split, config.batch.sequence_packing
    length = prompt_tokens + response_tokens
    replica = pack(
        [length] * (config.rollout.prompts_per_step * config.rollout.samples_per_prompt),
        max_tokens=config.batch.max_tokens,
        micro_batch_size=config.batch.micro_batch_size,
        num_replicas=layout.data_parallel_size,
        multiple=multiple,
        is_padded=not is_packed,
    )[0]
    taps, output = config.taps, config.output_loss

    def rows_of(
        positions: Positions, k: int | None, alignment: Alignment, split: SequenceSplit
    ) -> list[int]:
        weights = position_weights(
            [prompt_tokens],
            [response_tokens],
            positions=positions,
            k=k,
            alignment=alignment,
            aggregation=config.loss.aggregation,
        )
        # Sequences are equal: rows depend only on a micro-batch's size.
        of_size = {
            size: supervised_rows([0] * size, weights, split, is_packed=is_packed)
            for size in set(map(len, replica))
        }
        return [of_size[len(batch)] for batch in replica]

    rows = rows_of(taps.positions, taps.k, taps.alignment, split)
    output_rows = [0] * len(replica)
    if layout.compares_outputs:
        # Tensor-parallel ranks split the vocabulary at the LM head, not the positions.
        whole = replace(split, tp_size=1)
        output_rows = rows_of(output.positions, output.positions_k, "predictor", whole)
    budget = config.teacher.target_memory_gb
    groups = target_groups(
        [
            count * layout.target_bytes_per_row + output_count * layout.output_target_bytes_per_row
            for count, output_count in zip(rows, output_rows, strict=True)
        ],
        max_bytes=None if budget is None else budget * 1e9,
        multiple=multiple,
    )
    largest = max(groups, key=lambda group: sum(rows[i] for i in group))
    size = max(map(len, replica))
    row, multiple = (length * size if is_packed else length), split.pad_to_multiple_of
    return Workload(
        num_sequences=sum(map(len, replica)),
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        num_micro_batches=len(replica),
        micro_batch_size=size,
        num_rows=1 if is_packed else size,
        row_tokens=-(-row // multiple) * multiple,
        target_rows=max(rows),
        kept_rows=sum(rows[i] for i in largest),
        output_rows=max(output_rows),
        kept_output_rows=sum(output_rows[i] for i in largest),
        group_size=len(largest),
    )
