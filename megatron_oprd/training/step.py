"""One distillation step on given sequences: teachers' passes, student pass, update."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_oprd.data.batching import MicroBatch, ModelInput, TeacherBatch
from megatron_oprd.distill.coefficients import coefficient_at
from megatron_oprd.distill.head import HeadTap, head_weight
from megatron_oprd.distill.trainable_projectors import add_projectors
from megatron_oprd.models.build import DTYPES, build_model, transformer_config
from megatron_oprd.models.schedule import run_schedule
from megatron_oprd.models.student import freeze_past_deepest_tap, fuse_gradient_accumulation
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.phases import phase
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.training.batches import StepBatches, make_micro_batches
from megatron_oprd.training.flops import step_flops
from megatron_oprd.training.layout import ModelLayout
from megatron_oprd.training.optimizer import make_train_state
from megatron_oprd.training.plan import RunPlan, TeacherPlan
from megatron_oprd.training.teacher_refresh import TeacherRefresh
from megatron_oprd.training.teachers import Teacher
from megatron_oprd.weights.load import load_weights


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one step, the same on every rank."""

    # Coefficients included; None if no position was supervised.
    loss: float | None
    # By matched pair, without coefficient and layer weight; None if this teacher had no position.
    loss_per_layer: Sequence[float | None]
    cosine_per_layer: Sequence[float | None]
    # Without its coefficient; None without an output-space loss or positions for it.
    output_loss: float | None
    # (loss_per_layer, cosine_per_layer) of each extra teacher.
    extra_teachers: list[tuple[Sequence[float | None], Sequence[float | None]]]
    grad_norm: float | None  # global, before clipping
    lr: float
    skipped: bool  # loss or gradient not finite: no update
    flops: int  # of teachers' and student's passes, of all ranks (`step_flops`)
    seconds_teacher: float  # wall-clock of each phase
    seconds_student: float
    seconds_optimizer: float


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """The metrics of the backward passes; the same on every rank."""

    loss_per_layer: Tensor  # [pairs], fp64; without coefficient and layer weight
    cosine_per_layer: Tensor  # [pairs], fp64
    output_loss: Tensor  # scalar, fp64; without its coefficient; 0 if there is none
    extra_teachers: list[tuple[Tensor, Tensor]]  # (loss, cosine) as above
    seconds_teacher: float
    seconds_student: float


class Distiller:
    """Teachers, student and optimizer of one run on this rank.

    Attributes:
        plan: The run.
        context: This rank's place.
        teachers: The teachers, ``model.teacher`` first.
        state: The student's chunks, its optimizer and schedule.
        refresh: Updates the teacher from the student; None for a fixed teacher.
        head: The loss on distributions; None without it, and before the last stage.
    """

    def __init__(self, plan: RunPlan, context: ParallelContext) -> None:
        config = plan.config
        self.plan = plan
        self.context = context
        self.teachers = [
            Teacher(one, context, number=number) for number, one in enumerate(plan.teachers)
        ]
        student, student_config = self._build_student(plan.layout.student)
        # Before make_train_state, which gives gradient buffers and optimizer states to whatever
        # requires gradients.
        freeze_past_deepest_tap(
            student,
            num_running_layers=plan.layout.num_running_layers,
            trains_final_norm=any(one.layout.trains_final_norm for one in plan.teachers),
        )
        if plan.layout.trains_projectors:
            # Before make_train_state for the same reason.
            self.teachers[0].taps.trainable = add_projectors(
                student,
                [pair.student for pair in plan.layout.pairs],
                config.bridge,
                student_width=plan.layout.student.architecture.hidden_size,
                teacher_width=plan.layout.teacher.architecture.hidden_size,
                seed=config.seed,
                dtype=DTYPES[config.model.params_dtype],
                device=context.device,
                sequence_parallel=config.parallel.sequence_parallel,
            )
        for one in self.teachers:
            one.taps.attach_student(student, depth=plan.layout.student.architecture.num_layers)
        teacher = self.teachers[0].chunks
        self._student_config = student_config
        self.refresh: TeacherRefresh | None = None
        if config.teacher.refresh_interval is not None:
            self.refresh = TeacherRefresh(
                teacher,
                student,
                interval=config.teacher.refresh_interval,
                ema_decay=config.teacher.ema_decay,
            )
        # The taps sit on the unwrapped modules: DistributedDataParallel wraps them only at the end.
        self.head: HeadTap | None = None
        if plan.layout.compares_outputs and student[-1].post_process:
            self.head = HeadTap(
                config.output_loss,
                student=student[-1],
                teacher=teacher[-1],
                vocab_size=plan.layout.vocab_size,
                padded_vocab_size=plan.layout.student.padded_vocab_size,
                tp_group=context.groups.tp,
                cp_group=context.groups.cp,
                sequence_parallel=config.parallel.sequence_parallel,
            )
        for one in self.teachers:
            if one.plan.layout.config.teacher.offload == "cpu":
                # The first one's head is used in the student's pass.
                uses_head = self.head is not None and one is self.teachers[0]
                one.offload([head_weight(teacher[-1])] if uses_head else [])
        self.state = make_train_state(config, student_config, student)
        self.begin_step(0)

    def begin_step(self, number: int) -> None:
        """Sets the losses' coefficients to those of a step, counted from 0 over the whole run."""
        for one in self.teachers:
            one.taps.coefficients = one.plan.layout.pair_coefficients(number)
        if self.head is not None:
            self.head.coefficient = coefficient_at(self.plan.config.output_loss, number)

    def micro_batches(self, rollouts: Sequence[Rollout]) -> StepBatches:
        """This replica's micro-batches of the global batch, grouped into one teacher pass each.

        Without ``teacher.target_memory_gb`` there is one group.
        """
        return make_micro_batches(self.plan, self.context, rollouts)

    def compute_gradients(self, groups: Sequence[Sequence[MicroBatch]]) -> Gradients:
        """Runs teachers and student over each group in turn; the last reduces the gradients."""
        seconds_teacher = seconds_student = 0.0
        clock = _Clock()
        for number, group in enumerate(groups):
            self.teacher_pass(group)
            seconds_teacher += clock.lap()
            # After the first teacher pass, so that offloaded gradient buffers come back as late as
            # possible.
            if number == 0:
                self.state.clear_gradients()
            self.student_pass(group, is_last=number == len(groups) - 1)
            seconds_student += clock.lap()
        loss, cosine, output_loss, others = self.end_step()
        return Gradients(
            loss_per_layer=loss,
            cosine_per_layer=cosine,
            output_loss=output_loss,
            extra_teachers=others,
            seconds_teacher=seconds_teacher,
            seconds_student=seconds_student,
        )

    @phase("teacher")
    def teacher_pass(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Runs the teachers over a group of micro-batches and keeps the targets at the taps."""
        for one in self.teachers:
            keeps_hidden = self.head is not None and one is self.teachers[0]

            # A default argument for `keeps`: a closure would see the value of the last teacher.
            def end(
                hidden: Tensor, batch: TeacherBatch, chunk: Any, keeps: bool = keeps_hidden
            ) -> Tensor:
                if keeps and chunk.post_process:
                    assert self.head is not None
                    self.head.collect(hidden, batch.members)
                return hidden

            one.run(micro_batches, end)

    @phase("student")
    def student_pass(self, micro_batches: Sequence[MicroBatch], *, is_last: bool) -> None:
        """Runs the student forward and backward over a group of micro-batches.

        Gradients accumulate over groups; with the last group they are reduced over the replicas.
        """
        config = self._student_config
        if self.head is not None:
            # With overlap_param_gather, Megatron waits for a module's parameters in its forward
            # pre-hook. The head's weight is read directly, without calling the module.
            self.state.gather_parameters()
        with ExitStack() as stack:
            if not is_last:
                # Megatron's schedule reduces gradients at its end and, with overlap, in the last
                # micro-batch's backward pass. Before the last group both would reduce partial sums:
                # no_sync() holds the overlapped reduction back, and no_sync_func has to go, or the
                # schedule would leave no_sync() for its last micro-batch.
                for chunk in self.state.chunks:
                    stack.enter_context(chunk.no_sync())
                stack.enter_context(_setting(config, "no_sync_func", None))
                stack.enter_context(_setting(config, "finalize_model_grads_func", None))
            run_schedule(
                self.state.chunks,
                micro_batches,
                forward_only=False,
                begin=self._begin_student,
                end=self._end_student,
            )

    def end_step(self) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Returns the passes' metrics over the global batch and resets them.

        The result is the first four attributes of `Gradients`. All ranks have to call.
        """
        parts = [torch.stack(one.end_step()) for one in self.teachers]  # [2, pairs] of each
        metrics = torch.cat(parts, dim=1)
        output_loss = metrics.new_zeros(()) if self.head is None else self.head.end_step()
        if self.context.tp_rank != 0:
            # These ranks compared the same positions as tensor rank 0, and the sum below would
            # count them again. Under sequence parallelism hidden states are sharded, and each rank
            # has its own part.
            output_loss.zero_()
            if not self.plan.config.parallel.sequence_parallel:
                metrics.zero_()
        dist.all_reduce(metrics)
        dist.all_reduce(output_loss)
        (loss, cosine), *others = metrics.split([part.shape[1] for part in parts], dim=1)
        return loss, cosine, output_loss, [(of_other[0], of_other[1]) for of_other in others]

    @phase("optimizer")
    def update(self, loss_is_finite: bool) -> tuple[float, bool]:
        """Updates the student unless loss or gradient are not finite.

        Returns the gradient norm before clipping, and whether the student was updated.
        """
        optimizer = self.state.optimizer
        with self.state.states_on_device():
            optimizer.prepare_grads()
            norm = float(optimizer.get_grad_norm())
            # Both are reduced over all ranks, so every rank decides the same.
            is_finite = loss_is_finite and math.isfinite(norm)
            if is_finite:
                updated, _, _ = optimizer.step()
                assert updated, "without a loss scaler the optimizer has no reason not to step"
                # Not for skipped steps: the schedule counts updates, as the optimizer's step
                # counter does.
                self.state.scheduler.step(increment=1)
        self.state.free_gradients()
        return norm, is_finite

    def refresh_teacher(self, num_steps: int) -> None:
        """Updates a teacher that follows the student, if it is due after ``num_steps`` steps."""
        if self.refresh is not None:
            self.state.gather_parameters()
            self.refresh.after_update(num_steps)

    def step(self, rollouts: Sequence[Rollout], number: int) -> StepResult:
        """One whole step on the rollouts of the global batch, which are the same on every rank.

        ``number`` is the step's, from 0 over the whole run, for the schedules of coefficients.
        """
        self.begin_step(number)
        batches = self.micro_batches(rollouts)
        # Read before the update, which moves the schedule on.
        lr = self.state.optimizer.param_groups[0]["lr"]
        if batches.is_empty:
            return self._nothing_supervised(lr)
        gradients = self.compute_gradients(batches.groups)
        losses = [gradients.loss_per_layer, *(loss for loss, _ in gradients.extra_teachers)]
        loss = sum(
            coefficient * float(of_layer)
            for one, of_teacher in zip(self.teachers, losses, strict=True)
            for coefficient, of_layer in zip(one.taps.coefficients, of_teacher, strict=True)
        )
        output_loss = float(gradients.output_loss) if batches.supervises_outputs else None
        if output_loss is not None:
            loss += output_loss * coefficient_at(self.plan.config.output_loss, number)
        clock = _Clock()
        grad_norm, updated = self.update(math.isfinite(loss))
        of_teachers = [
            (gradients.loss_per_layer, gradients.cosine_per_layer),
            *gradients.extra_teachers,
        ]
        (of_layers, cosines), *others = [
            (of_teacher.tolist(), cosine.tolist()) if is_supervised else _nothing(one.plan)
            for one, (of_teacher, cosine), is_supervised in zip(
                self.teachers, of_teachers, batches.supervises, strict=True
            )
        ]
        return StepResult(
            loss=loss,
            loss_per_layer=of_layers,
            cosine_per_layer=cosines,
            output_loss=output_loss,
            extra_teachers=others,
            grad_norm=grad_norm,
            lr=lr,
            skipped=not updated,
            flops=step_flops(self.plan, rollouts, num_output_rows=batches.num_output_rows),
            seconds_teacher=gradients.seconds_teacher,
            seconds_student=gradients.seconds_student,
            seconds_optimizer=clock.lap(),
        )

    def _nothing_supervised(self, lr: float) -> StepResult:
        """The result of a step without supervised positions."""
        # No update: it would consist of weight decay and old moments alone.
        (loss, cosine), *others = [_nothing(one.plan) for one in self.teachers]
        return StepResult(
            loss=None,
            loss_per_layer=loss,
            cosine_per_layer=cosine,
            output_loss=None,
            extra_teachers=others,
            grad_norm=None,
            lr=lr,
            skipped=False,
            flops=0,
            seconds_teacher=0.0,
            seconds_student=0.0,
            seconds_optimizer=0.0,
        )

    def _build_student(self, model: ModelLayout) -> tuple[list[GPTModel], Any]:
        config = self.plan.config
        megatron_config = transformer_config(
            model.architecture,
            model.extent,
            model=config.model,
            parallel=config.parallel,
            recompute=config.recompute,
            fused_kernels=self.context.transformer_engine,
        )
        chunks = build_model(
            model.architecture,
            model.extent,
            megatron_config,
            context=self.context,
            padded_vocab_size=model.padded_vocab_size,
            max_sequence_length=self.plan.layout.max_sequence_length,
        )
        load_weights(
            chunks,
            model.table,
            self.plan.student_checkpoint,
            place=self.context.place,
            tied=model.architecture.tied,
        )
        if config.optimizer.gradient_accumulation_fusion:
            fuse_gradient_accumulation(chunks)
        return chunks, megatron_config

    def _begin_student(self, micro_batch: MicroBatch) -> ModelInput:
        for one in self.teachers:
            one.begin_student(micro_batch)
        return micro_batch.input

    def _end_student(self, hidden: Tensor, micro_batch: MicroBatch, chunk: Any) -> Tensor:
        if self.head is not None and get_attr_wrapped_model(chunk, "post_process"):
            return self.head.attach(hidden, micro_batch)
        return hidden


def _nothing(plan: TeacherPlan) -> tuple[Sequence[float | None], Sequence[float | None]]:
    """Loss and cosine of each matched pair of a teacher without supervised positions."""
    return [None] * len(plan.layout.pairs), [None] * len(plan.layout.pairs)


@contextmanager
def _setting(config: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of a configuration inside the block."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)


class _Clock:
    """Wall-clock seconds between laps; each lap waits for the GPU."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._start = time.perf_counter()

    def lap(self) -> float:
        torch.cuda.synchronize()
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        return elapsed
