"""Megatron's data parallelism, optimizer and learning-rate schedule for the student."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from typing_extensions import override

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.weights.megatron_keys import PROJECTORS

_FACTOR = "lr_mult"  # of a parameter group; Megatron gives every group one of 1


class _Scheduler(OptimizerParamScheduler):
    """Megatron's schedule, times the factor of the parameter group."""

    @override
    def get_lr(self, param_group: dict[str, Any]) -> float:
        return super().get_lr(param_group) * param_group[_FACTOR]


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state that changes during training."""

    chunks: list[DistributedDataParallel]  # the student's, wrapped for data parallelism
    optimizer: MegatronOptimizer  # over the trainable parameters
    scheduler: OptimizerParamScheduler
    # Keeps optimizer states and gradient buffers in host memory while they are not used.
    offload: bool

    @property
    def modules(self) -> list[GPTModel]:
        """The student's chunks without the wrappers."""
        return [chunk.module for chunk in self.chunks]

    def clear_gradients(self) -> None:
        """Zeroes the gradient buffers, on the device again if they were offloaded."""
        for chunk in self.chunks:
            if self.offload:
                chunk.restore_grad_buffers()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @contextmanager
    def states_on_device(self) -> Iterator[None]:
        """Keeps the optimizer's states on the device inside the block."""
        _fuse_adam_on_cpu(self.optimizer)
        if self.offload:
            self.optimizer.restore_from_cpu()
            _keep_step_counters_on_host(self.optimizer)
        yield
        if self.offload:
            self.optimizer.offload_to_cpu()

    def free_gradients(self) -> None:
        """Frees the gradient buffers' memory until `clear_gradients`, if offloading is on."""
        if self.offload:
            for chunk in self.chunks:
                chunk.offload_grad_buffers()

    def gather_parameters(self) -> None:
        """Waits for all updated parameters, which otherwise the next forward pass does.

        Call it on every rank before parameters are read in any other way. It communicates on the
        data-parallel group if ``optimizer.overlap_param_gather`` is on, and does nothing otherwise.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                # Megatron gathers synchronously when its hooks are removed.
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()


def make_train_state(
    config: RunConfig, transformer_config: TransformerConfig, chunks: Sequence[GPTModel]
) -> TrainState:
    """Wraps the student's chunks. Parameters must be frozen before."""
    options = config.optimizer
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        use_distributed_optimizer=options.use_distributed_optimizer,
    )
    wrapped = [
        # As in Megatron's training script: later chunks reduce in one bucket, because their
        # gradients are ready while the pipeline still works on the first chunk.
        DistributedDataParallel(
            transformer_config, ddp_config, module=chunk, disable_bucketing=number > 0
        )
        for number, chunk in enumerate(chunks)
    ]
    if options.overlap_grad_reduce:
        # Megatron's schedules call it to reduce only in the last micro-batch; a list is for virtual
        # stages.
        no_sync = [chunk.no_sync for chunk in wrapped]
        transformer_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    optimizer_config = OptimizerConfig(
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
    )
    # Groups of parameters whose settings differ; by themselves biases have no weight decay.
    groups = get_standard_config_overrides(optimizer_config)
    if config.bridge.trainable != "none":
        groups[ParamKey(name=f"*{PROJECTORS}.*")] = {_FACTOR: config.bridge.lr_mult}
    optimizer = get_megatron_optimizer(optimizer_config, wrapped, config_overrides=groups)
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


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Adam]:
    """The optimizer's parts that are torch's Adam, not Transformer Engine's or Apex's."""
    inner = [one.optimizer for one in optimizer.chained_optimizers]
    return [one for one in inner if isinstance(one, torch.optim.Adam)]


def _allocate_adam_states(optimizer: MegatronOptimizer) -> None:
    """Gives torch's Adam the states that its first step would create.

    Megatron cannot save or load the distributed optimizer without them. Transformer Engine's and
    Apex's Adam do not need this.
    """
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _fuse_adam_on_cpu(optimizer: MegatronOptimizer) -> None:
    """Lets torch's Adam update parameters on the CPU in one pass, a seventh of the time.

    Megatron offers no option for it. It is set before each update, because a checkpoint may bring
    parameter groups from another device.
    """
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            on_cpu = all(p.device.type == "cpu" for p in group["params"])
            group["fused"] = True if on_cpu else None  # None: torch's own choice


def _keep_step_counters_on_host(optimizer: MegatronOptimizer) -> None:
    """Moves step counters back: torch's Adam wants them on the CPU, Megatron moves them too."""
    for adam in _torch_adams(optimizer):
        for state in adam.state.values():
            state["step"] = state["step"].cpu()


def _make_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    options = config.optimizer
    length = config.decay_iters
    warmup = min(round(options.lr_warmup_fraction * length), length - 1)
    return _Scheduler(
        optimizer,
        # The first step has the first nonzero learning rate of the warm-up.
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
