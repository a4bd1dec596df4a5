"""Steps with a teacher that follows the student; every rank writes its parameters of both."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.training import checkpoints
from megatron_oprd.training.identity import RunIdentity
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.megatron_keys import named_parameters
from tests.helpers.pairs import as_rollouts, config_of, fixed_rollouts


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides, load, steps}; saves after the second step."""
    overrides = [*case["overrides"], f"output_dir={directory / case['name']}"]
    config = config_of(Path(case["pair"]), overrides)
    with parallel_run(config.parallel, seed=config.seed) as context:
        plan = make_plan(config, world_size=dist.get_world_size())
        distiller = Distiller(plan, context)
        done = checkpoints.Progress()
        if case["load"]:
            folder = checkpoints.whole_checkpoints(directory / case["load"])[-1]
            done = checkpoints.load(
                folder, plan, distiller.state, context=context, refresh=distiller.refresh
            )
        seen: dict[str, list[dict[str, torch.Tensor]]] = {"student": [], "teacher": []}

        def look() -> None:
            distiller.state.gather_parameters()
            for name, chunks in (
                ("student", distiller.state.modules),
                ("teacher", distiller.teachers[0].chunks),
            ):
                parameters = named_parameters(chunks)
                seen[name].append({key: p.detach().clone() for key, p in parameters.items()})

        look()
        for step in range(done.step, case["steps"]):
            distiller.step(as_rollouts(*fixed_rollouts()), step)
            distiller.refresh_teacher(step + 1)
            look()
            if step == 1:
                done = checkpoints.Progress(step=2)
                checkpoints.save(
                    plan,
                    distiller.state,
                    done,
                    context=context,
                    identity=RunIdentity.new(plan),
                    refresh=distiller.refresh,
                )
        torch.save(seen, directory / f"{case['name']}_{context.rank}.pt")
