"""A step's sequences as micro-batches of both models, in groups of one teacher pass each."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_oprd.config import Alignment
from megatron_oprd.config_losses import Positions
from megatron_oprd.data.batching import MicroBatch, collate, context_parallel_share, pack
from megatron_oprd.data.pairing import TeacherReading, with_teacher
from megatron_oprd.data.teacher_sequences import TeacherSequence
from megatron_oprd.parallel import ParallelContext
from megatron_oprd.taps.supervision import Supervision, supervise
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.target_groups import supervised_rows, target_groups


def make_micro_batches(
    plan: RunPlan,
    context: ParallelContext,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    teacher_sequences: Sequence[TeacherSequence] | None,
    taught_by: Sequence[Sequence[bool]] | None,
) -> list[list[MicroBatch]]:
    """This replica's micro-batches of the global batch; see `Distiller.micro_batches`."""
    config = plan.config
    parallel = config.parallel
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    plans = [plan, *plan.others]
    taught = [None] * len(plans) if taught_by is None else list(taught_by)
    weights, output_weights, reading = _supervision(
        plan, prompts, responses, teacher_sequences, taught[0]
    )
    of_others = [
        _supervision(one, prompts, responses, None, is_taught)[0]
        for one, is_taught in zip(plan.others, taught[1:], strict=True)
    ]
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    multiple = context.pp_size if interleaved else 1
    split, is_packed = plan.sequence_split, config.batch.sequence_packing
    replicas = pack(
        [len(sequence) for sequence in sequences],
        max_tokens=config.batch.max_tokens,
        micro_batch_size=config.batch.micro_batch_size,
        num_replicas=context.dp_size,
        multiple=multiple,
        is_padded=not is_packed,
    )
    batches = replicas[context.dp_rank]
    rows: dict[str, Any] = {
        "is_packed": is_packed,
        "pad_to_multiple_of": split.pad_to_multiple_of,
        "device": context.device,
    }
    micro_batches = collate(batches, sequences, weights, output_weights, **rows)
    if reading is not None:
        micro_batches = with_teacher(micro_batches, batches, reading, **rows)
    others = [collate(batches, sequences, one, **rows) for one in of_others]
    micro_batches = [
        dataclasses.replace(one, others=tuple(other[number] for other in others))
        for number, one in enumerate(micro_batches)
    ]
    budget = config.teacher.target_memory_gb

    def target_bytes(batch: Sequence[int]) -> int:
        size = sum(
            supervised_rows(batch, of_teacher, split, is_packed=is_packed)
            * one.target_bytes_per_row
            for one, of_teacher in zip(plans, [weights, *of_others], strict=True)
        )
        if output_weights is not None:
            whole = dataclasses.replace(split, tp_size=1)
            rows = supervised_rows(batch, output_weights, whole, is_packed=is_packed)
            size += rows * plan.output_target_bytes_per_row
        return size

    groups = target_groups(
        # The largest of all replicas, so that every rank makes the same groups.
        [max(map(target_bytes, batches)) for batches in zip(*replicas, strict=True)],
        max_bytes=None if budget is None else budget * 1e9,
        multiple=multiple,
    )
    shares = [
        context_parallel_share(one, rank=context.cp_rank, size=context.cp_size)
        for one in micro_batches
    ]
    return [[shares[i] for i in group] for group in groups]


def _supervision(
    plan: RunPlan,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    teacher_sequences: Sequence[TeacherSequence] | None,
    is_taught: Sequence[bool] | None,
) -> tuple[list[Tensor], list[Tensor] | None, TeacherReading | None]:
    """Position weights of the step, of both losses, and what the teacher reads."""
    config = plan.config
    taps, output = config.taps, config.output_loss
    lengths = [len(prompt) for prompt in prompts], [len(response) for response in responses]

    def of(positions: Positions, k: int | None, alignment: Alignment) -> Supervision:
        return supervise(
            *lengths,
            teacher_sequences,
            positions=positions,
            k=k,
            alignment=alignment,
            aggregation=config.loss.aggregation,
            is_taught=is_taught,
        )

    states = of(taps.positions, taps.k, taps.alignment)
    outputs = None
    if plan.compares_outputs:
        outputs = of(output.positions, output.positions_k, "predictor")
    reading = None
    if teacher_sequences is not None:
        assert states.positions is not None
        reading = TeacherReading(
            sequences=[[*one.prompt_ids, *one.response_ids] for one in teacher_sequences],
            positions=states.positions,
            output_positions=None if outputs is None else outputs.positions,
        )
    return states.weights, None if outputs is None else outputs.weights, reading
