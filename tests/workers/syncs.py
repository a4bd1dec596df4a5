"""One training step; rank 0 writes how often it asked a tensor for its values, by operation.

On a GPU also how often torch says that the host waited for the device.
"""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_oprd.distill.taps import RankSelector
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from tests.helpers.pairs import as_rollouts, config_of, fixed_rollouts

# Each waits for the device where its tensor is on one; of a tensor on the CPU tolist is neither.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
}


class CountedOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation in WAITING:
            self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides}."""
    config = config_of(Path(case["pair"]), case["overrides"])
    with parallel_run(config.parallel, seed=config.seed) as context:
        distiller = Distiller(make_plan(config, world_size=dist.get_world_size()), context)
        groups = distiller.micro_batches(as_rollouts(*fixed_rollouts())).groups
        tolist, select = torch.Tensor.tolist, RankSelector.select
        counted, on_gpu = CountedOperations(), context.device.type == "cuda"

        def counting_tolist(tensor: torch.Tensor) -> Any:
            counted.counts["tolist"] += 1
            return tolist(tensor)

        def counting_select(*args: Any, **kwargs: Any) -> Any:
            counted.counts["select"] += 1
            return select(*args, **kwargs)

        torch.Tensor.tolist, RankSelector.select = counting_tolist, counting_select  # type: ignore[method-assign, assignment]
        try:
            with counted, warnings.catch_warnings(record=True) as found_warnings:
                warnings.simplefilter("always")
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("warn")
                distiller.compute_gradients(groups)
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            torch.Tensor.tolist, RankSelector.select = tolist, select  # type: ignore[method-assign]
        if on_gpu:
            counted.counts["synchronizations"] = sum(
                "synchronizing CUDA operation" in str(one.message) for one in found_warnings
            )
        if context.rank == 0:
            found = {**counted.counts, "micro_batches": sum(map(len, groups))}
            (directory / f"{case['name']}.json").write_text(json.dumps(found))
