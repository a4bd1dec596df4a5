"""A run with what it can offload offloaded; rank 0 writes what is on the device in which phase."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.models import schedule
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.export import Exporter
from tests.helpers.pairs import as_rollouts, config_of, fixed_rollouts


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages."""
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides}."""
    config = config_of(Path(case["pair"]), case["overrides"])
    seen: dict[str, list[int]] = {"teacher": [], "gradients": []}
    with parallel_run(config.parallel, seed=config.seed) as context:
        plan = make_plan(config, world_size=dist.get_world_size())
        distiller = Distiller(plan, context)
        teacher = [p for chunk in distiller.teachers[0].chunks for p in chunk.parameters()]
        buffers = [b for chunk in distiller.state.chunks for b in chunk.buffers]

        def look() -> None:
            seen["teacher"].append(num_bytes(teacher))
            seen["gradients"].append(num_bytes(buffer.grad_data for buffer in buffers))

        def looking(*args: Any, **kwargs: Any) -> None:
            look()
            schedule.run_schedule(*args, **kwargs)

        exporter = Exporter(distiller.state.modules, plan.layout.student.table, context=context)
        look()
        losses = []
        with (
            patch("megatron_oprd.training.teachers.run_schedule", looking),
            patch("megatron_oprd.training.step.run_schedule", looking),
        ):
            for step in range(2):
                losses.append(distiller.step(as_rollouts(*fixed_rollouts()), step).loss)
        look()
        weights = dict(exporter.stream())
        if context.rank == 0:
            result = {"seen": seen, "losses": losses, "weights": weights}
            torch.save(result, directory / f"{case['name']}.pt")
