"""Runs both models, frozen, on the same sequences under Megatron's schedule."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.bridge_build.config import BuildBridgeConfig
from megatron_oprd.bridge_build.sequences import Sequences
from megatron_oprd.config.schema import TeacherConfig
from megatron_oprd.data.batching import (
    MicroBatch,
    ModelInput,
    collate,
    context_parallel_shares,
    pack,
    with_teacher,
)
from megatron_oprd.distill.bridge_file import check_bridge_place
from megatron_oprd.distill.layer_map import LayerPair
from megatron_oprd.distill.taps import PairTaps, RankSelector
from megatron_oprd.errors import UserError, speaks
from megatron_oprd.models.build import Extent
from megatron_oprd.models.layers import Tap
from megatron_oprd.models.offload import OffloadedWeights
from megatron_oprd.models.schedule import run_schedule
from megatron_oprd.models.teacher import build_teacher
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.training.layout import ModelLayout
from megatron_oprd.training.plan import RunPlan, make_plan
from megatron_oprd.weights.progress import Progress
from megatron_oprd.weights.source import WeightSource


def plan_build(config: BuildBridgeConfig, *, world_size: int) -> RunPlan:
    """Places both models like a training run with the same settings.

    Raises:
        UserError: A model, a tokenizer or the prompts cannot be used, the settings do not fit the
            models or the number of processes, or ``output_dir`` is taken.
    """
    check_bridge_place(Path(config.output_dir))
    plan = make_plan(config.as_run(), world_size=world_size, builds_bridge=True)
    layout = plan.layout
    narrower = min(layout.student.architecture.hidden_size, layout.teacher.architecture.hidden_size)
    if max(config.fit.ranks) > narrower:
        raise UserError(
            f"fit.ranks = {config.fit.ranks} has a rank above {narrower}, the width of the "
            f"narrower model; give ranks of at most {narrower}"
        )
    return plan


def frozen_student_extent(plan: RunPlan) -> Extent:
    """The student up to its deepest tap, on the stages of training."""
    layout = plan.layout
    return Extent(
        layers_per_stage=layout.running_per_stage,
        final_norm=layout.trains_final_norm,
        lm_head=False,
    )


# Arguments: the pair's number, the rows' numbers from 1 [n], h_S [n, d_S], h_T [n, d_T].
Consumer = Callable[[int, Tensor, Tensor, Tensor], None]


class _RowTaps(PairTaps):
    """Passes the rows of each pair to a consumer."""

    consume: Consumer

    def _student_tap(self, number: int, pair: LayerPair) -> Tap:
        def take(hidden: Tensor) -> Tensor:
            selection = self._of_student
            rows = hidden.detach().flatten(0, 1).index_select(0, selection.index)
            teacher_rows = self._take_target(pair.teacher, selection.micro_batch)
            assert selection.numbers is not None
            self.consume(number, selection.numbers, rows, teacher_rows)
            return hidden

        return take


class FrozenModels:
    """Student and teacher of a run on this rank, both without gradients."""

    def __init__(self, plan: RunPlan, context: ParallelContext) -> None:
        self._plan = plan
        self._context = context
        layout = plan.layout
        self._taps = _RowTaps(layout.pairs, post_norm=plan.config.taps.last_layer == "post_norm")
        teacher = plan.config.teacher
        self._teacher = self._build(
            layout.teacher,
            plan.teachers[0].checkpoint,
            layout.teacher.extent,
            teacher,
            max_sequence_length=layout.teacher_max_sequence_length,
        )
        self._taps.attach_teacher(self._teacher, depth=layout.teacher.architecture.num_layers)
        self._offloaded = OffloadedWeights(self._teacher) if teacher.offload == "cpu" else None
        # Built like a teacher, because it is frozen here.
        self._student = self._build(
            layout.student,
            plan.student_checkpoint,
            frozen_student_extent(plan),
            TeacherConfig(),
            max_sequence_length=layout.max_sequence_length,
        )
        self._taps.attach_student(self._student, depth=layout.student.architecture.num_layers)

    def run(self, sequences: Sequences, consume: Consumer, *, what: str) -> None:
        """Runs both models over sequences, which are the same on every rank.

        Every rank has to call. ``consume`` gets the numbered rows of this rank's pairs, batch by
        batch. Ranks that share a pair each get the rows of their part of the sequences;
        without sequence parallelism all tensor-parallel ranks get the same rows. ``what`` names the
        work in rank 0's progress.
        """
        self._taps.consume = consume
        config = self._plan.config
        at_once = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        total = len(sequences.token_ids)
        with Progress(what, total, unit=" sequences", shown=speaks()) as progress:
            for start in range(0, total, at_once):
                for group in self._groups(sequences.part(start, start + at_once)):
                    self._run_group(group)
                progress.advance(min(at_once, total - start))

    def _build(
        self,
        model: ModelLayout,
        checkpoint: WeightSource,
        extent: Extent,
        teacher: TeacherConfig,
        *,
        max_sequence_length: int,
    ) -> list[Any]:
        config = self._plan.config
        return build_teacher(
            model.architecture,
            extent,
            model.table,
            checkpoint,
            teacher=teacher,
            model=config.model,
            parallel=model.parallel,
            context=self._context.with_expert_sizes(model.parallel),
            padded_vocab_size=model.padded_vocab_size,
            max_sequence_length=max_sequence_length,
        )

    def _groups(self, sequences: Sequences) -> list[list[MicroBatch]]:
        """This replica's micro-batches, in groups of as many as there are pipeline stages."""
        context, batch = self._context, self._plan.config.batch
        # The interleaved schedule needs a multiple of it, and small groups keep few teacher rows at
        # a time.
        multiple = context.pp_size
        # Every replica needs complete groups.
        sequences = sequences.filled_up(context.dp_size * multiple)
        replicas = pack(
            [len(one) for one in sequences.token_ids],
            max_tokens=batch.max_tokens,
            micro_batch_size=batch.micro_batch_size,
            num_replicas=context.dp_size,
            multiple=multiple,
        )
        batches = replicas[context.dp_rank]
        rows: dict[str, Any] = {
            "is_packed": False,
            "pad_to_multiple_of": self._plan.layout.parallel.pad_to_multiple_of,
            "device": context.device,
        }
        micro_batches = collate(batches, sequences.token_ids, numbers=sequences.row_numbers, **rows)
        if sequences.reading is not None:
            micro_batches = with_teacher(micro_batches, batches, sequences.reading, **rows)
        shares = context_parallel_shares(micro_batches, rank=context.cp_rank, size=context.cp_size)
        return [shares[i : i + multiple] for i in range(0, len(shares), multiple)]

    @torch.no_grad()
    def _run_group(self, group: Sequence[MicroBatch]) -> None:
        # The teacher first: its taps keep the rows that the student's taps take.
        if self._offloaded is None:
            self._forward(self._teacher, group, for_teacher=True)
        else:
            with self._offloaded.on_device():
                self._forward(self._teacher, group, for_teacher=True)
        self._forward(self._student, group, for_teacher=False)

    def _forward(
        self, chunks: Sequence[Any], group: Sequence[MicroBatch], *, for_teacher: bool
    ) -> None:
        selector = RankSelector.of(
            self._context, sequence_parallel=self._plan.config.parallel.sequence_parallel
        )

        def begin(micro_batch: MicroBatch) -> ModelInput:
            read, selection = selector.select(micro_batch, for_teacher=for_teacher)
            self._taps.begin(selection)
            return read

        run_schedule(chunks, group, forward_only=True, begin=begin)
