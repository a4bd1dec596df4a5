"""One of a run's teachers on this rank: its weights, its taps, its forward pass."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_oprd.data.batching import MicroBatch, ModelInput, TeacherBatch, teacher_batches
from megatron_oprd.distill.taps import RankSelector, Selection, Taps
from megatron_oprd.models.offload import OffloadedWeights
from megatron_oprd.models.schedule import run_schedule
from megatron_oprd.models.teacher import build_teacher
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.training.plan import TeacherPlan


class Teacher:
    """A teacher and the taps between it and the student.

    ``number`` is its index among the run's teachers.
    """

    def __init__(self, plan: TeacherPlan, context: ParallelContext, *, number: int) -> None:
        layout, config, model = plan.layout, plan.layout.config, plan.layout.teacher
        self.plan = plan
        self._number = number
        self.taps = Taps(
            layout.pairs,
            normalize=config.loss.normalize,
            post_norm=config.taps.last_layer == "post_norm",
            device=context.device,
            projectors=plan.projectors(context),
            compiles=config.taps.compile,
        )
        self.chunks: list[GPTModel] = build_teacher(
            model.architecture,
            model.extent,
            model.table,
            plan.checkpoint,
            teacher=config.teacher,
            model=config.model,
            parallel=model.parallel,
            context=context.with_expert_sizes(model.parallel),
            padded_vocab_size=model.padded_vocab_size,
            max_sequence_length=layout.teacher_max_sequence_length,
        )
        self.taps.attach_teacher(self.chunks, depth=model.architecture.num_layers)
        self._selector = RankSelector.of(
            context, sequence_parallel=config.parallel.sequence_parallel
        )
        self._weights: OffloadedWeights | None = None
        self._selections: dict[tuple[int, bool], Selection] = {}

    def offload(self, resident: Sequence[Tensor]) -> None:
        """Keeps all weights but ``resident`` in host memory from now on, except during `run`."""
        self._weights = OffloadedWeights(self.chunks, resident)

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        end: Callable[[Tensor, TeacherBatch, Any], Tensor],
    ) -> None:
        """Runs the teacher over a group of micro-batches and keeps the targets at the taps.

        ``end`` (see `run_schedule`) gets the micro-batches with this teacher's weights, as the
        teacher reads them.
        """

        def begin(batch: TeacherBatch) -> ModelInput:
            self.taps.begin(*(self._select(one, for_teacher=True) for one in batch.members))
            return batch.input

        weights = self._weights
        with torch.no_grad(), weights.on_device() if weights else nullcontext():
            run_schedule(
                self.chunks,
                teacher_batches([self._own(micro_batch) for micro_batch in micro_batches]),
                forward_only=True,
                begin=begin,
                end=end,
            )

    def begin_student(self, micro_batch: MicroBatch) -> None:
        """Announces the micro-batch of the student's next forward pass."""
        self.taps.begin(self._select(self._own(micro_batch), for_teacher=False))

    def end_step(self) -> tuple[Tensor, Tensor]:
        """The metrics of the step, see `Taps.end_step`."""
        self._selections.clear()
        return self.taps.end_step()

    def _select(self, micro_batch: MicroBatch, *, for_teacher: bool) -> Selection:
        """The compared positions of a micro-batch of the student, in what a model reads."""
        # Cached for the step, for all chunks and passes: building a selection copies to the GPU and
        # waits for it.
        key = micro_batch.index, for_teacher and micro_batch.other_input is not None
        if key not in self._selections:
            _, selection = self._selector.select(micro_batch, for_teacher=for_teacher)
            self._selections[key] = selection
        return self._selections[key]

    def _own(self, micro_batch: MicroBatch) -> MicroBatch:
        if self._number == 0:
            return micro_batch
        number, other = self._number - 1, micro_batch.other_input
        if other is not None:
            other = dataclasses.replace(other, pairs=other.extra_pairs[number])
        return dataclasses.replace(
            micro_batch, weights=micro_batch.extra_weights[number], other_input=other
        )
