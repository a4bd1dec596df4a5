"""One distillation step on given sequences: teacher pass, student pass, update."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_oprd.data.batching import MicroBatch
from megatron_oprd.data.teacher_sequences import TeacherSequence
from megatron_oprd.models.build import build_model, transformer_config
from megatron_oprd.models.offload import OffloadedWeights
from megatron_oprd.models.refresh import TeacherRefresh
from megatron_oprd.models.student import freeze_past_deepest_tap
from megatron_oprd.models.teacher import build_teacher
from megatron_oprd.parallel import ParallelContext
from megatron_oprd.taps.head import HeadTap, head_weight
from megatron_oprd.taps.selection import RankSelector
from megatron_oprd.taps.tap import Taps
from megatron_oprd.training.batches import make_micro_batches
from megatron_oprd.training.optimizer import make_train_state
from megatron_oprd.training.plan import ModelPlan, RunPlan
from megatron_oprd.weights.load import load_weights


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did; the same on every rank.

    Attributes:
        loss: The whole loss, coefficients included.
        loss_per_layer: The loss of each matched pair, without coefficient and layer weight.
        cosine_per_layer: Mean cosine of each matched pair.
        output_loss: The output-space loss without its coefficient; None if there is none.
        grad_norm: Global gradient norm before clipping.
        lr: Learning rate of the update.
        skipped: Whether loss or gradient were not finite, so that nothing was updated.
        seconds_teacher: Wall-clock of the teacher pass.
        seconds_student: Wall-clock of the student's forward and backward pass.
        seconds_optimizer: Wall-clock of the update.
    """

    loss: float
    loss_per_layer: list[float]
    cosine_per_layer: list[float]
    output_loss: float | None
    grad_norm: float
    lr: float
    skipped: bool
    seconds_teacher: float
    seconds_student: float
    seconds_optimizer: float


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What came out beside the gradients themselves.

    Attributes:
        loss_per_layer: Loss of each matched pair over the global batch, without coefficient and
            layer weight, [pairs], fp64, the same on every rank.
        cosine_per_layer: Cosine of each matched pair, likewise.
        output_loss: The output-space loss without its coefficient, a scalar, likewise; 0 if there
            is none.
        seconds_teacher: Wall-clock of the teacher's passes.
        seconds_student: Wall-clock of the student's passes.
    """

    loss_per_layer: Tensor
    cosine_per_layer: Tensor
    output_loss: Tensor
    seconds_teacher: float
    seconds_student: float


class Distiller:
    """Teacher, student and optimizer of one run on this rank.

    Args:
        plan: The run.
        context: This rank's place.

    Attributes:
        plan: The run.
        context: This rank's place.
        state: What changes during training.
        refresh: How the teacher follows the student; None if it does not.
    """

    def __init__(self, plan: RunPlan, context: ParallelContext) -> None:
        config = plan.config
        self.plan = plan
        self.context = context
        self._taps = Taps(
            plan.pairs,
            normalize=config.loss.normalize,
            coefficients=plan.pair_coefficients,
            post_norm=config.taps.last_layer == "post_norm",
            device=context.device,
            projectors=plan.projectors(context),
        )
        teacher = build_teacher(
            plan.teacher.architecture,
            plan.teacher.extent,
            plan.teacher.table,
            plan.teacher.checkpoint,
            teacher=config.teacher,
            model=config.model,
            parallel=plan.teacher.parallel,
            context=context.with_expert_sizes(plan.teacher.parallel),
            padded_vocab_size=plan.teacher.padded_vocab_size,
            max_sequence_length=plan.teacher_max_sequence_length,
        )
        self._taps.attach_teacher(teacher, depth=plan.teacher.architecture.num_layers)
        self._teacher = teacher
        student, student_config = self._build_student(plan.student)
        freeze_past_deepest_tap(
            student,
            num_running_layers=plan.num_running_layers,
            trains_final_norm=plan.trains_final_norm,
        )
        self._taps.attach_student(student, depth=plan.student.architecture.num_layers)
        self._student_config = student_config
        self.refresh: TeacherRefresh | None = None
        if config.teacher.refresh_interval is not None:
            self.refresh = TeacherRefresh(
                teacher,
                student,
                interval=config.teacher.refresh_interval,
                ema_decay=config.teacher.ema_decay,
            )
        self._head: HeadTap | None = None
        if plan.compares_outputs and student[-1].post_process:
            self._head = HeadTap(
                config.output_loss,
                student=student[-1],
                teacher=teacher[-1],
                vocab_size=plan.vocab_size,
                padded_vocab_size=plan.student.padded_vocab_size,
                tp_group=context.groups.tp,
                cp_group=context.groups.cp,
                sequence_parallel=config.parallel.sequence_parallel,
            )
        self._teacher_weights = None
        if config.teacher.offload == "cpu":
            # The head is used in the student's pass.
            resident = [] if self._head is None else [head_weight(teacher[-1])]
            self._teacher_weights = OffloadedWeights(teacher, resident)
        self.state = make_train_state(config, student_config, student)

    def micro_batches(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        teacher_sequences: Sequence[TeacherSequence] | None = None,
    ) -> list[list[MicroBatch]]:
        """This replica's micro-batches of the global batch, in groups of one teacher pass each.

        Without ``teacher.target_memory_gb`` there is one group.

        Args:
            prompts: Token ids of the prompt of every sequence of the global batch.
            responses: Token ids of the responses.
            teacher_sequences: What the teacher reads in place of each; None is the same.
        """
        return make_micro_batches(self.plan, self.context, prompts, responses, teacher_sequences)

    def compute_gradients(self, groups: Sequence[Sequence[MicroBatch]]) -> Gradients:
        """Runs teacher and student over each group in turn; gradients are reduced at the end."""
        seconds_teacher = seconds_student = 0.0
        clock = _Clock()
        for number, group in enumerate(groups):
            self.teacher_pass(group)
            seconds_teacher += clock.lap()
            if number == 0:
                self.state.clear_gradients()
            self.student_pass(group, is_last=number == len(groups) - 1)
            seconds_student += clock.lap()
        metrics = torch.stack(self._taps.end_step())
        output_loss = metrics.new_zeros(()) if self._head is None else self._head.end_step()
        if self.context.tp_rank != 0:
            # These ranks saw the same positions as tensor rank 0.
            output_loss.zero_()
            if not self.plan.config.parallel.sequence_parallel:
                metrics.zero_()
        dist.all_reduce(metrics)
        dist.all_reduce(output_loss)
        return Gradients(
            loss_per_layer=metrics[0],
            cosine_per_layer=metrics[1],
            output_loss=output_loss,
            seconds_teacher=seconds_teacher,
            seconds_student=seconds_student,
        )

    def teacher_pass(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Runs the teacher over a group of micro-batches, keeping the targets at the taps."""
        offloaded = self._teacher_weights
        with torch.no_grad(), offloaded.on_device() if offloaded else nullcontext():
            self._run(self._teacher, micro_batches, forward_only=True)

    def student_pass(self, micro_batches: Sequence[MicroBatch], *, is_last: bool) -> None:
        """Runs the student forward and backward over a group of micro-batches.

        Gradients add up over groups; with the last they are summed over the replicas.
        """
        config = self._student_config
        if self._head is not None:
            # Megatron gathers parameters for modules that are called, which the head is not.
            self.state.gather_parameters()
        with ExitStack() as stack:
            if not is_last:
                # Megatron's schedule reduces gradients at its end, and, with overlap, in the last
                # micro-batch's backward pass.
                for chunk in self.state.chunks:
                    stack.enter_context(chunk.no_sync())
                stack.enter_context(_setting(config, "no_sync_func", None))
                stack.enter_context(_setting(config, "finalize_model_grads_func", None))
            self._run(self.state.chunks, micro_batches, forward_only=False)

    def update(self, loss_is_finite: bool) -> tuple[float, bool]:
        """Updates the student, unless loss or gradient are not finite.

        Returns:
            The gradient norm before clipping, and whether the student was updated.
        """
        optimizer = self.state.optimizer
        with self.state.states_on_device():
            optimizer.prepare_grads()
            norm = float(optimizer.get_grad_norm())
            is_finite = loss_is_finite and math.isfinite(norm)
            if is_finite:
                updated, _, _ = optimizer.step()
                assert updated, "without a loss scaler the optimizer has no reason not to step"
                self.state.scheduler.step(increment=1)
        self.state.free_gradients()
        return norm, is_finite

    def refresh_teacher(self, num_steps: int) -> None:
        """Has the teacher follow the student, if it does and it is time.

        Args:
            num_steps: Steps that are done.
        """
        if self.refresh is not None:
            self.state.gather_parameters()
            self.refresh.after_update(num_steps)

    def step(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        teacher_sequences: Sequence[TeacherSequence] | None = None,
    ) -> StepResult:
        """One whole step on the global batch, which every rank passes alike.

        Arguments are those of `micro_batches`.
        """
        gradients = self.compute_gradients(
            self.micro_batches(prompts, responses, teacher_sequences)
        )
        loss = sum(
            coefficient * float(of_layer)
            for coefficient, of_layer in zip(
                self.plan.pair_coefficients, gradients.loss_per_layer, strict=True
            )
        )
        output_loss = float(gradients.output_loss) if self.plan.compares_outputs else None
        if output_loss is not None:
            loss += output_loss * self.plan.config.output_loss.coefficient
        clock = _Clock()
        lr = self.state.optimizer.param_groups[0]["lr"]
        grad_norm, updated = self.update(math.isfinite(loss))
        return StepResult(
            loss=loss,
            loss_per_layer=gradients.loss_per_layer.tolist(),
            cosine_per_layer=gradients.cosine_per_layer.tolist(),
            output_loss=output_loss,
            grad_norm=grad_norm,
            lr=lr,
            skipped=not updated,
            seconds_teacher=gradients.seconds_teacher,
            seconds_student=gradients.seconds_student,
            seconds_optimizer=clock.lap(),
        )

    def _build_student(self, model: ModelPlan) -> tuple[list[GPTModel], Any]:
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
            max_sequence_length=self.plan.max_sequence_length,
        )
        load_weights(
            chunks,
            model.table,
            model.checkpoint,
            place=self.context.place,
            tied=model.architecture.tied,
        )
        return chunks, megatron_config

    def _run(
        self, chunks: Sequence[Any], micro_batches: Sequence[MicroBatch], *, forward_only: bool
    ) -> None:
        """Runs chunks over micro-batches under Megatron's schedule."""
        selector = RankSelector.of(
            self.context, sequence_parallel=self.plan.config.parallel.sequence_parallel
        )

        def forward_step(data: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
            micro_batch = next(data)
            read, selection = selector.select(micro_batch, for_teacher=forward_only)
            self._taps.begin(selection)
            hidden = model(
                read.tokens, read.position_ids, None, packed_seq_params=_packed_seq_params(read)
            )
            if self._head is not None and _is_last(model):
                if forward_only:
                    self._head.collect(hidden, micro_batch)
                else:
                    hidden = self._head.attach(hidden, micro_batch)
            return hidden, _no_loss_at_the_end

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            # Not used with variable sequence lengths, nor without a pipeline.
            seq_length=micro_batches[0].tokens.shape[1],
            micro_batch_size=micro_batches[0].tokens.shape[0],
            forward_only=forward_only,
        )


def _is_last(model: Any) -> bool:
    """Whether a chunk, wrapped or not, is the last of its model."""
    return get_attr_wrapped_model(model, "post_process")


def _packed_seq_params(micro_batch: MicroBatch) -> PackedSeqParams | None:
    """What attention and rotary embedding need to know of packed sequences."""
    lengths = micro_batch.packed_lengths
    if lengths is None:
        return None
    ends = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    ends = ends.to(micro_batch.tokens.device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def _no_loss_at_the_end(hidden: Tensor) -> tuple[Tensor, dict]:
    """The schedule's loss: zero, since every loss is attached at its layer."""
    return hidden.flatten()[0].float() * 0.0, {}


@contextmanager
def _setting(config: Any, name: str, value: Any) -> Iterator[None]:
    """Gives a setting another value inside the block."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)


class _Clock:
    """Wall-clock seconds between laps, with the device's work done."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._start = time.perf_counter()

    def lap(self) -> float:
        torch.cuda.synchronize()
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        return elapsed
