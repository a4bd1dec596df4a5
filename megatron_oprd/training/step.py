"""One distillation step on given sequences: teacher pass, student pass, update."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_oprd.data.batching import MicroBatch, collate, pack
from megatron_oprd.models.build import build_model, transformer_config
from megatron_oprd.models.student import freeze_past_deepest_tap
from megatron_oprd.models.teacher import freeze
from megatron_oprd.parallel import ParallelContext
from megatron_oprd.taps.supervision import position_weights
from megatron_oprd.taps.tap import Selection, Taps
from megatron_oprd.training.optimizer import make_train_state
from megatron_oprd.training.plan import ModelPlan, RunPlan
from megatron_oprd.weights.load import load_weights


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did; the same on every rank.

    Attributes:
        loss: The distillation loss, its coefficient included.
        loss_per_layer: The loss of each matched pair, without the coefficient.
        cosine_per_layer: Mean cosine of each matched pair.
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
    grad_norm: float
    lr: float
    skipped: bool
    seconds_teacher: float
    seconds_student: float
    seconds_optimizer: float


class Distiller:
    """Teacher, student and optimizer of one run on this rank.

    Args:
        plan: The run.
        context: This rank's place.
    """

    def __init__(self, plan: RunPlan, context: ParallelContext) -> None:
        config = plan.config
        self.plan = plan
        self.context = context
        self._taps = Taps(
            plan.pairs,
            normalize=config.loss.normalize,
            coefficient=config.loss.coefficient,
            post_norm=config.taps.last_layer == "post_norm",
            device=context.device,
        )
        teacher, _ = self._build(plan.teacher)
        freeze(teacher)
        self._taps.attach_teacher(teacher, depth=plan.teacher.architecture.num_layers)
        self._teacher = teacher
        student, student_config = self._build(plan.student)
        freeze_past_deepest_tap(
            student,
            num_running_layers=plan.num_running_layers,
            trains_final_norm=plan.trains_final_norm,
        )
        self._taps.attach_student(student, depth=plan.student.architecture.num_layers)
        self.state = make_train_state(config, student_config, student)

    def micro_batches(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[MicroBatch]:
        """This replica's micro-batches of the global batch.

        Args:
            prompts: Token ids of the prompt of every sequence of the global batch.
            responses: Token ids of the responses.
        """
        config = self.plan.config
        parallel, taps = config.parallel, config.taps
        sequences = [
            [*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)
        ]
        weights = position_weights(
            [len(prompt) for prompt in prompts],
            [len(response) for response in responses],
            positions=taps.positions,
            k=taps.k,
            alignment=taps.alignment,
            aggregation=config.loss.aggregation,
        )
        interleaved = parallel.virtual_pipeline_model_parallel_size is not None
        batches = pack(
            [len(sequence) for sequence in sequences],
            max_tokens=config.batch.max_tokens,
            micro_batch_size=config.batch.micro_batch_size,
            num_replicas=self.context.dp_size,
            multiple=self.context.pp_size if interleaved else 1,
        )
        return collate(
            batches[self.context.dp_rank],
            sequences,
            weights,
            pad_to_multiple_of=self.context.tp_size if parallel.sequence_parallel else 1,
            device=self.context.device,
        )

    def teacher_pass(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Runs the teacher over all micro-batches, keeping the targets at the taps."""
        with torch.no_grad():
            self._run(self._teacher, micro_batches, forward_only=True)

    def student_pass(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Runs the student forward and backward; gradients are summed over replicas at the end.

        Returns:
            Loss (without the coefficient) and cosine of each matched pair over the global batch,
            [pairs], fp64, the same on every rank.
        """
        for chunk in self.state.chunks:
            chunk.zero_grad_buffer()
        self.state.optimizer.zero_grad()
        self._run(self.state.chunks, micro_batches, forward_only=False)
        metrics = torch.stack(self._taps.end_step())
        if self.context.tp_rank != 0 and not self.plan.config.parallel.sequence_parallel:
            metrics.zero_()  # these ranks saw the same positions as tensor rank 0
        dist.all_reduce(metrics)
        return metrics[0], metrics[1]

    def update(self, loss_is_finite: bool) -> tuple[float, bool]:
        """Updates the student, unless loss or gradient are not finite.

        Returns:
            The gradient norm before clipping, and whether the student was updated.
        """
        optimizer = self.state.optimizer
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        if not (loss_is_finite and math.isfinite(norm)):
            return norm, False
        updated, _, _ = optimizer.step()
        assert updated, "without a loss scaler the optimizer has no reason not to step"
        self.state.scheduler.step(increment=1)
        return norm, True

    def step(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> StepResult:
        """One whole step on the global batch, which every rank passes alike."""
        micro_batches = self.micro_batches(prompts, responses)
        clock = _Clock()
        self.teacher_pass(micro_batches)
        seconds_teacher = clock.lap()
        loss_per_layer, cosine_per_layer = self.student_pass(micro_batches)
        seconds_student = clock.lap()
        loss = float(loss_per_layer.mean()) * self.plan.config.loss.coefficient
        lr = self.state.optimizer.param_groups[0]["lr"]
        grad_norm, updated = self.update(math.isfinite(loss))
        return StepResult(
            loss=loss,
            loss_per_layer=loss_per_layer.tolist(),
            cosine_per_layer=cosine_per_layer.tolist(),
            grad_norm=grad_norm,
            lr=lr,
            skipped=not updated,
            seconds_teacher=seconds_teacher,
            seconds_student=seconds_student,
            seconds_optimizer=clock.lap(),
        )

    def _build(self, model: ModelPlan) -> tuple[list[GPTModel], Any]:
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
        )
        load_weights(
            chunks,
            model.table,
            model.checkpoint,
            tp_rank=self.context.tp_rank,
            tp_size=self.context.tp_size,
            tied=model.architecture.tied,
        )
        return chunks, megatron_config

    def _run(
        self, chunks: Sequence[Any], micro_batches: Sequence[MicroBatch], *, forward_only: bool
    ) -> None:
        """Runs chunks over micro-batches under Megatron's schedule."""
        sliced = self.plan.config.parallel.sequence_parallel
        select = partial(
            Selection.of,
            tp_rank=self.context.tp_rank if sliced else 0,
            tp_size=self.context.tp_size if sliced else 1,
        )

        def forward_step(data: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
            micro_batch = next(data)
            self._taps.begin(select(micro_batch))
            hidden = model(micro_batch.tokens, micro_batch.position_ids, None)
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


def _no_loss_at_the_end(hidden: Tensor) -> tuple[Tensor, dict]:
    """The schedule's loss: zero, since every loss is attached at its layer."""
    return hidden.flatten()[0].float() * 0.0, {}


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
