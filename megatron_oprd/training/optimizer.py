"""Megatron's data parallelism, optimizer and learning-rate schedule around the student."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_oprd.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What changes during training.

    Attributes:
        chunks: The student's chunks, wrapped for data parallelism.
        optimizer: Megatron's optimizer over their trainable parameters.
        scheduler: The learning-rate schedule.
        offload: Whether states and gradient buffers leave the device while they are not used.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    offload: bool

    @property
    def modules(self) -> list[GPTModel]:
        """The student's chunks without the wrappers."""
        return [chunk.module for chunk in self.chunks]

    def clear_gradients(self) -> None:
        """Has the gradient buffers on the device, all zero."""
        for chunk in self.chunks:
            if self.offload:
                chunk.restore_grad_buffers()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @contextmanager
    def states_on_device(self) -> Iterator[None]:
        """Has the optimizer's states on the device inside the block."""
        if self.offload:
            self.optimizer.restore_from_cpu()
            _keep_step_counters_on_host(self.optimizer)
        yield
        if self.offload:
            self.optimizer.offload_to_cpu()

    def free_gradients(self) -> None:
        """Gives the gradient buffers' memory back, until gradients are cleared again."""
        if self.offload:
            for chunk in self.chunks:
                chunk.offload_grad_buffers()

    def gather_parameters(self) -> None:
        """Waits until this rank has all updated parameters, which the next forward pass would do.

        Call it on every rank before parameters are read in any other way. Communicates on the
        data-parallel group where ``optimizer.overlap_param_gather`` is on, else does nothing.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()


def make_train_state(
    config: RunConfig, transformer_config: TransformerConfig, chunks: Sequence[GPTModel]
) -> TrainState:
    """Wraps the student's chunks, whose frozen parameters are already frozen."""
    options = config.optimizer
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        use_distributed_optimizer=options.use_distributed_optimizer,
    )
    wrapped = [
        # As in Megatron's training script: later chunks reduce in one bucket, since their
        # gradients are ready while the pipeline still works on the first.
        DistributedDataParallel(
            transformer_config, ddp_config, module=chunk, disable_bucketing=number > 0
        )
        for number, chunk in enumerate(chunks)
    ]
    if options.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        transformer_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            min_lr=options.min_lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.adam_beta1,
            adam_beta2=options.adam_beta2,
            adam_eps=options.adam_eps,
            clip_grad=options.clip_grad,
            bf16=config.model.params_dtype == "bf16",
            params_dtype=transformer_config.params_dtype,
            use_distributed_optimizer=options.use_distributed_optimizer,
            overlap_param_gather=options.overlap_param_gather,
        ),
        wrapped,
    )
    _allocate_adam_states(optimizer)
    state = TrainState(
        chunks=wrapped,
        optimizer=optimizer,
        scheduler=_make_scheduler(config, optimizer),
        offload=options.offload_states,
    )
    with state.states_on_device():
        pass  # they leave the device at the end of the block
    state.free_gradients()
    return state


def _allocate_adam_states(optimizer: MegatronOptimizer) -> None:
    """Gives torch's Adam the states it would get in its first step.

    Megatron cannot save or load the distributed optimizer without them. (Transformer Engine's and
    Apex's Adam need nothing of the kind.)
    """
    for one in optimizer.chained_optimizers:
        adam = one.optimizer
        if not isinstance(adam, torch.optim.Adam):
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _keep_step_counters_on_host(optimizer: MegatronOptimizer) -> None:
    """Moves back the counters that torch's Adam wants on the host, and Megatron moves along."""
    for one in optimizer.chained_optimizers:
        if isinstance(one.optimizer, torch.optim.Adam):
            for state in one.optimizer.state.values():
                state["step"] = state["step"].cpu()


def _make_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    options = config.optimizer
    length = config.decay_iters
    warmup = min(round(options.lr_warmup_fraction * length), length - 1)
    return OptimizerParamScheduler(
        optimizer,
        # Step 0 is the first rung of the warm-up, not a step with learning rate 0.
        init_lr=options.lr / (warmup + 1),
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=length,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
