"""Search for the smallest change of settings with which a run fits."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.planning.activations import Kernels
from megatron_oprd.planning.changes import Change, changed
from megatron_oprd.planning.estimate import MemoryEstimate, Models, estimate_memory
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.rollout.registry import engine_kind

_MOST_CHANGES = 3
_LARGEST_TP = 8  # beyond a node's fast links it rarely pays
_LARGEST_PP = 16


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Changes of settings, with the resulting memory."""

    changes: tuple[Change, ...]
    estimate: MemoryEstimate

    def __str__(self) -> str:
        return " ".join(map(str, self.changes))


def check_fits(
    memory: MemoryEstimate, models: Models, kernels: Kernels, hardware: Hardware, *, num_gpus: int
) -> None:
    """Checks that every rank has enough memory.

    Raises UserError if not, with the nearest change that fits; or if the rollout engine has no room
    for the longest sequence.
    """
    if memory.fits(hardware):
        return
    if memory.engine is not None:
        rollout = memory.layout.config.rollout
        engine_kind(rollout).check_memory(rollout, memory.engine, hardware.memory_gb)
    fullest = memory.fullest
    nearest = nearest_that_fits(memory.layout.config, models, kernels, hardware, num_gpus=num_gpus)
    if nearest is None:
        advice = (
            f"None of the changes that were tried, up to {_MOST_CHANGES} at once, makes it fit; "
            "take more GPUs, or smaller batches, responses or models"
        )
    else:
        needed = nearest.estimate.fullest.peak_bytes / 1e9
        advice = f"The nearest change that fits, in {needed:.1f} GB: {nearest}"
    owner = " (an engine's owner)" if fullest.owns_engine else ""
    raise UserError(
        f"the run does not fit: the {fullest.peak_phase} phase needs "
        f"{fullest.peak_bytes / 1e9:.1f} GB on pipeline rank {fullest.pp_rank}{owner}, "
        f"but a GPU has {hardware.memory_gb:g} (--gpu-memory). {advice}"
    )


def nearest_that_fits(
    config: RunConfig, models: Models, kernels: Kernels, hardware: Hardware, *, num_gpus: int
) -> Suggestion | None:
    """Returns the first combination of changes that fits, or None.

    One change is tried before two, two before three, each in the ladder's order.
    """
    rungs = _ladder(config)
    for number in range(1, _MOST_CHANGES + 1):
        for chosen in itertools.combinations(rungs, number):
            for changes in itertools.product(*chosen):
                estimate = _estimate_with(
                    changes, config, models, kernels, num_gpus, hardware.memory_gb
                )
                if estimate is not None and estimate.fits(hardware):
                    return Suggestion(changes=changes, estimate=estimate)
    return None


def _estimate_with(
    changes: tuple[Change, ...],
    config: RunConfig,
    models: Models,
    kernels: Kernels,
    num_gpus: int,
    memory_gb: float,
) -> MemoryEstimate | None:
    """Memory with some changes; None if they are incompatible with settings, models or GPUs."""
    try:
        new = changed(config, changes)
        return estimate_memory(new, models, kernels, num_gpus=num_gpus, memory_gb=memory_gb)
    except UserError:
        return None


def _ladder(config: RunConfig) -> list[list[Change]]:
    """Rungs from cheapest to most expensive, each a list of alternatives."""
    parallel, teacher = config.parallel, config.teacher
    length = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    # An explicit list of layers per stage has the old pipeline size: drop it with a new size.
    any_layout = (("parallel.num_layers_per_stage", None),) if parallel.num_layers_per_stage else ()
    of_engine = engine_kind(config.rollout).memory_changes(config.rollout)
    rungs = [
        [_change(("teacher.max_tokens", None))],
        [_change(change) for change in of_engine.cheap],
        [_change(("parallel.sequence_parallel", True))],
        [
            _change(
                ("recompute.recompute_granularity", "full"),
                ("recompute.recompute_method", "uniform"),
                ("recompute.recompute_num_layers", 1),
            )
        ],
        [_change(("teacher.precision", "fp8"))],
        [_change(("teacher.offload", "cpu"))],
        [_change(("optimizer.offload_states", True))],
        [
            _change(("teacher.target_memory_gb", gb))
            for gb in (16.0, 8.0, 4.0, 2.0)
            if teacher.target_memory_gb is None or gb < teacher.target_memory_gb
        ],
        [
            _change(
                ("parallel.tensor_model_parallel_size", tp), ("parallel.sequence_parallel", True)
            )
            for tp in _doubled(parallel.tensor_model_parallel_size, _LARGEST_TP)
        ],
        [
            _change(("parallel.pipeline_model_parallel_size", pp), *any_layout)
            for pp in _doubled(parallel.pipeline_model_parallel_size, _LARGEST_PP)
        ],
        [
            _change(("batch.max_tokens", tokens))
            for tokens in _halved(config.batch.max_tokens, length)
        ],
        *([_change(change) for change in changes] for changes in of_engine.costly),
    ]
    # Drop changes that are already set.
    return [new for steps in rungs if (new := [s for s in steps if not s.is_in(config)])]


def _change(*settings: tuple[str, Any]) -> Change:
    return Change(settings)


def _doubled(number: int, most: int) -> Iterator[int]:
    while (number := 2 * number) <= most:
        yield number


def _halved(number: int, least: int) -> Iterator[int]:
    while (number := number // 2) >= least:
        yield number
