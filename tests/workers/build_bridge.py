"""Builds a bridge; rank 0 also writes the rollouts that it was built on."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.bridge_build import run as building
from megatron_oprd.bridge_build.config import load_build_config
from megatron_oprd.bridge_build.models import plan_build
from megatron_oprd.parallel.context import parallel_run


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, config, overrides}; the bridge is ``directory / name``."""
    overrides = [*case["overrides"], f"output_dir={directory / case['name']}"]
    config = load_build_config(Path(case["config"]), overrides)
    rollouts: list[Any] = []
    collect = building.collect

    def recording_collect(*args: Any, **kwargs: Any) -> Any:
        of_step = collect(*args, **kwargs)
        rollouts.extend(of_step)
        return of_step

    building.collect = recording_collect
    with parallel_run(config.parallel, seed=config.seed) as context:
        plan = plan_build(config, world_size=dist.get_world_size())
        manifest = building.build_bridge(config, plan, context)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, manifest)
        assert all(one == manifest for one in everyone), "ranks know different cosines"
        if context.rank == 0:
            torch.save(rollouts, directory / f"{case['name']}.rollouts.pt")
    building.collect = collect
