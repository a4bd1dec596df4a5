"""Two training steps on fixed rollouts; rank 0 writes everything a layout must not change."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.data.batching import teacher_batches
from megatron_oprd.distill import head as taps_logprobs
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.selftest.steps import gradient
from megatron_oprd.training.logprob_check import LogprobCheck
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.export import Exporter
from tests.helpers import projectors
from tests.helpers.pairs import (
    as_rollouts,
    config_of,
    fixed_rollouts,
    fixed_teacher_sequences,
    fixed_written,
)


def _same_everywhere(value: Tensor) -> Tensor:
    everyone = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, value)
    assert all(torch.equal(one, value) for one in everyone)
    return value


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides, reading: None or a kind of other sequences,
    taught_by: None or whether each teacher teaches each sequence, gaps: whether the student wrote
    some of the response tokens only, logprobs: whether the student's
    log-probabilities are taken, before the first step and after the last, one_step: whether there
    is no second step}.
    """
    config = config_of(Path(case["pair"]), case["overrides"])
    with parallel_run(config.parallel, seed=config.seed) as context:
        plan = make_plan(config, world_size=dist.get_world_size())
        distiller = Distiller(plan, context)
        exporter = Exporter(distiller.state.modules, plan.layout.student.table, context=context)
        reading = None
        if case.get("reading"):
            reading = fixed_teacher_sequences(case["reading"])

        rollouts = as_rollouts(
            *fixed_rollouts(),
            reading,
            case.get("taught_by"),
            fixed_written() if case.get("gaps") else None,
        )
        logprobs = []
        if case.get("logprobs"):
            taps_logprobs.CHUNK_TOKENS = 7  # several chunks of a micro-batch's tokens
            logprobs.append(_same_everywhere(LogprobCheck(distiller).student_logprobs(rollouts)))
        modules = distiller.state.modules
        initial_projectors = projectors.gathered(modules)
        groups = distiller.micro_batches(rollouts).groups
        first = distiller.compute_gradients(groups)
        gradients = dict(exporter.stream(gradient, dtype=torch.float32))
        of_projectors = projectors.gathered(
            modules, gradient, same_everywhere=not config.optimizer.use_distributed_optimizer
        )
        grad_norm, _ = distiller.update(loss_is_finite=True)
        second = None
        if not case.get("one_step"):
            second = distiller.step(rollouts, 1)
        if case.get("logprobs"):
            logprobs.append(_same_everywhere(LogprobCheck(distiller).student_logprobs(rollouts)))
        distiller.state.gather_parameters()
        weights = dict(exporter.stream())
        projectors_after = projectors.gathered(modules)
        if context.rank == 0:
            torch.save(
                {
                    "loss": first.loss_per_layer,
                    "cosine": first.cosine_per_layer,
                    "output_loss": first.output_loss,
                    "extra_teachers": [torch.stack(one) for one in first.extra_teachers],
                    "grad_norm": torch.tensor([grad_norm, *([second.grad_norm] if second else [])]),
                    "second_loss": torch.tensor(
                        [*second.loss_per_layer, second.loss] if second else []
                    ),
                    "gradients": gradients,
                    "weights": weights,
                    "initial_projectors": initial_projectors,
                    "projector_gradients": of_projectors,
                    "projectors": projectors_after,
                    "num_micro_batches": sum(len(group) for group in groups),
                    "num_teacher_batches": sum(len(teacher_batches(group)) for group in groups),
                    "num_groups": len(groups),
                    "logprobs": logprobs,
                },
                directory / f"{case['name']}.pt",
            )
