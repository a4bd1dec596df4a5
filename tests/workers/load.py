"""Builds and loads a run's models; every rank writes how many numbers it read of each tensor."""

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.pairs import config_of


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides}."""
    config = config_of(Path(case["pair"]), case["overrides"])
    reads: Counter[str] = Counter()
    error = None
    read_slice = HFCheckpoint.read_slice

    def counting(checkpoint: HFCheckpoint, name: str, *slices: slice) -> Tensor:
        tensor = read_slice(checkpoint, name, *slices)
        reads[f"{checkpoint.folder.name}/{name}"] += tensor.numel()
        return tensor

    with parallel_run(config.parallel, seed=config.seed) as context:
        plan = make_plan(config, world_size=dist.get_world_size())
        with patch.object(HFCheckpoint, "read_slice", counting):
            try:
                Distiller(plan, context)
            except UserError as found:
                error = str(found)
        result = {"reads": reads, "error": error}
        (directory / f"{case['name']}_{context.rank}.json").write_text(json.dumps(result))
