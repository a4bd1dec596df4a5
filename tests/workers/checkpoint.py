"""Steps on fixed rollouts with a checkpoint loaded before or saved after the first of them."""

import dataclasses
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.training import checkpoints
from megatron_oprd.training import optimizer as training_optimizer
from megatron_oprd.training.identity import RunIdentity
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.export import Exporter
from tests.helpers import projectors
from tests.helpers.pairs import as_rollouts, config_of, fixed_rollouts

STATES = ("param", "exp_avg", "exp_avg_sq")


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides, load, steps}, with optional entries; saves after the
    first step.

    bucket_size: Elements of a bucket of a gradient buffer; None leaves it to Megatron.
    count: Sequences of a step.
    """
    overrides = [*case["overrides"], f"output_dir={directory / case['name']}"]
    config = config_of(Path(case["pair"]), overrides)
    with (
        parallel_run(config.parallel, seed=config.seed) as context,
        buckets_of(case.get("bucket_size")),
    ):
        plan = make_plan(config, world_size=dist.get_world_size())
        distiller = Distiller(plan, context)
        exporter = Exporter(distiller.state.modules, plan.layout.student.table, context=context)
        done = checkpoints.Progress()
        result: dict[str, Any] = {}
        if case["load"]:
            loaded = checkpoints.whole_checkpoints(directory / case["load"])[-1]
            done = checkpoints.load(loaded, plan, distiller.state, context=context)
            result["loaded"] = optimizer_states(distiller, exporter)
        prompts, responses = fixed_rollouts(case.get("count", 8))
        for step in range(done.step, done.step + case["steps"]):
            distiller.step(as_rollouts(prompts, responses), step)
            if step == 0:
                saved = dict(exporter.stream())
                result["saved"] = optimizer_states(distiller, exporter)
                checkpoints.save(
                    plan,
                    distiller.state,
                    dataclasses.replace(done, step=1),
                    context=context,
                    identity=RunIdentity.new(plan),
                )
                assert not multiprocessing.active_children(), "a save leaves processes"
                if context.rank == 0:
                    torch.save(saved, directory / f"{case['name']}_saved.pt")
        result["weights"] = dict(exporter.stream())
        result["weights"] |= projectors.gathered(distiller.state.modules)
        result["lr"] = distiller.state.optimizer.param_groups[0]["lr"]
        if context.rank == 0:
            torch.save(result, directory / f"{case['name']}.pt")


@contextmanager
def buckets_of(size: int | None) -> Iterator[None]:
    """Has gradient buffers in buckets of about so many elements inside the block."""
    if size is None:
        yield
        return
    original = training_optimizer.DistributedDataParallelConfig
    training_optimizer.DistributedDataParallelConfig = partial(original, bucket_size=size)
    try:
        yield
    finally:
        training_optimizer.DistributedDataParallelConfig = original


@torch.no_grad()
def optimizer_states(distiller: Distiller, exporter: Exporter) -> dict[str, dict[str, Tensor]]:
    """Main parameters and moments under Hugging Face's names, by Megatron's own account of them.

    Those of projectors are under the names of their parameters.

    Each in turn lies where the weights are while these are exported. A weight that is not trained
    has zeros.
    """
    modules = distiller.state.modules
    parameters = [parameter for module in modules for parameter in module.parameters()]
    weights = [parameter.clone() for parameter in parameters]
    result = {}
    for key in STATES:
        found = [state_of(distiller, parameter, key) for parameter in parameters]
        for parameter, state in zip(parameters, found, strict=True):
            parameter.copy_(state)
        exported = exporter.stream()
        result[key] = {name: tensor.clone() for name, tensor in exported if tensor is not None}
        result[key] |= projectors.gathered(modules)
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return result


def state_of(distiller: Distiller, parameter: torch.nn.Parameter, key: str) -> Tensor:
    """A parameter's state on this rank, whole."""
    state = torch.zeros_like(parameter, dtype=torch.float32)
    if not parameter.requires_grad:
        return state
    for optimizer in distiller.state.optimizer.chained_optimizers:
        if isinstance(optimizer, DistributedOptimizer):
            if not any(parameter in buffer.param_index_map for buffer in optimizer.buffers):
                continue
            if parameter in optimizer.model_param_group_index_map:
                part = optimizer._get_model_param_range_map(parameter)["param"]
                own = optimizer._get_main_param_and_optimizer_states(parameter)[key]
                state.view(-1)[part.start : part.end] = own
            dist.all_reduce(state, group=optimizer.data_parallel_group)
            return state
        main = getattr(parameter, "main_param", parameter)
        if main in optimizer.optimizer.state:
            return main.data.float() if key == "param" else optimizer.optimizer.state[main][key]
    raise AssertionError("a trained parameter that no optimizer has")
