"""Several steps; rank 0 writes losses and weights, and of one rank what its updates came from."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.selftest.steps import gradient
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.export import Exporter
from megatron_oprd.weights.megatron_keys import named_parameters
from tests.helpers.pairs import as_rollouts, config_of, fixed_rollouts


def main_parameter(parameter: torch.nn.Parameter) -> Tensor:
    """The fp32 parameter that the optimizer updates (of one data-parallel rank)."""
    if not parameter.requires_grad:
        return parameter.data.float()
    main: Tensor = parameter.main_param  # type: ignore[attr-defined]
    return main.detach().view(parameter.shape)


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides, steps, trace}."""
    config = config_of(Path(case["pair"]), case["overrides"])
    with parallel_run(config.parallel, seed=config.seed) as context:
        plan = make_plan(config, world_size=dist.get_world_size())
        distiller = Distiller(plan, context)
        exporter = Exporter(distiller.state.modules, plan.layout.student.table, context=context)

        def weights() -> dict[str, Tensor | None]:
            return {
                name: tensor if tensor is None else tensor.clone()
                for name, tensor in exporter.stream()
            }

        losses, gradients, after_each_step = [], [], [weights()]
        for _ in range(case["steps"]):
            rollouts = as_rollouts(*fixed_rollouts())
            found = distiller.compute_gradients(distiller.micro_batches(rollouts).groups)
            losses.append(found.loss_per_layer)
            if case["trace"]:
                gradients.append(dict(exporter.stream(gradient, dtype=torch.float32)))
            distiller.update(loss_is_finite=True)
            after_each_step.append(weights())
        main = None
        if case["trace"]:
            main = dict(exporter.stream(main_parameter, dtype=torch.float32))
        models = (distiller.state.modules, distiller.teachers[0].chunks)
        if context.rank == 0:
            torch.save(
                {
                    "losses": torch.stack(losses),
                    "gradients": gradients,
                    "weights": after_each_step,
                    "main": main,
                    "dtypes": {p.dtype for m in models for p in named_parameters(m).values()},
                },
                directory / f"{case['name']}.pt",
            )
