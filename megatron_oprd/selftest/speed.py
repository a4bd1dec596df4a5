"""The seconds of a step's update, and on GPUs its share of the hardware's peak."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.config.load import load_config
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.selftest.cases import Place
from megatron_oprd.selftest.steps import rollouts
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller

_STEPS = 3


def run(arguments: dict[str, Any], place: Place) -> str:
    """Measures the last of some steps of the tiny pair on all ranks as replicas; {}.

    The models are too small to say how fast a real run is: a slow number here is of launches and
    of messages.
    """
    config = load_config(place.models / "dense" / "run.yaml")
    with parallel_run(config.parallel, seed=config.seed) as context:
        count = dist.get_world_size()
        distiller = Distiller(make_plan(config, world_size=count), context)
        fixed = rollouts(8 * count, longest=96)
        for number in range(_STEPS):
            result = distiller.step(fixed, number)
        tokens = sum(len(one.prompt_ids) + len(one.response_ids) for one in fixed)
        seconds = result.seconds_teacher + result.seconds_student + result.seconds_optimizer
        peak = torch.cuda.max_memory_allocated() / 1e9
    return (
        f"{tokens / seconds:,.0f} tokens/s: teacher {result.seconds_teacher:.2f} s, student "
        f"{result.seconds_student:.2f} s, optimizer {result.seconds_optimizer:.2f} s; "
        f"peak {peak:.1f} GB"
    )
