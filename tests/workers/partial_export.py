"""Streams of a student without what is frozen; rank 0 writes them, and what was asked for."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.export import Exporter
from megatron_oprd.weights.megatron_keys import named_parameters
from tests.helpers.pairs import config_of


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides, trains}.

    trains: Megatron parameters that train besides what the overrides leave trainable; all others
    of the student's are frozen then. None changes nothing.
    """
    config = config_of(Path(case["pair"]), case["overrides"])
    with parallel_run(config.parallel, seed=config.seed) as context:
        plan = make_plan(config, world_size=dist.get_world_size())
        modules = Distiller(plan, context).state.modules
        if case["trains"] is not None:
            for name, parameter in named_parameters(modules).items():
                parameter.requires_grad_(name in case["trains"])
        exporter = Exporter(modules, plan.layout.student.table, context=context)
        partial = list(exporter.stream(trainable_only=True))
        whole = list(exporter.stream())
        frozen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(frozen, exporter.frozen_names)
        assert all(names == frozen[0] for names in frozen), "ranks know different things"
        if context.rank == 0:
            assert {name for name, _ in whole} == {name for name, _ in partial} | frozen[0]
            assert len(whole) == len(partial) + len(frozen[0])
            torch.save({"partial": dict(partial), "whole": dict(whole)}, directory / case["name"])
