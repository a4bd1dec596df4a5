"""A run that was stopped and goes on in another layout, compared with one that was not."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.config.load import load_config
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.preflight import prepare
from megatron_oprd.selftest.cases import CaseFailedError, CaseSkippedError, Place
from megatron_oprd.selftest.steps import LINEAR_UPDATES
from megatron_oprd.training.loop import train
from megatron_oprd.weights.hf_files import HFCheckpoint

_STEPS, _STOP = 4, 2
_SETTINGS = [
    f"optimizer.lr_decay_iters={_STEPS}",
    f"checkpoint.save_interval={_STOP}",
    "rollout.temperature=0",
    *LINEAR_UPDATES,
]
_TOLERANCE = 1e-3


def run(arguments: dict[str, Any], place: Place) -> str:
    """Runs a case: {overrides, is_reference}.

    The reference does a run in one piece and half of another; the other cases do the second half.
    """
    whole, half = place.folder / "whole", place.folder / "half"
    if arguments["is_reference"]:
        _train(place, arguments["overrides"], whole, _STEPS)
        return _train(place, arguments["overrides"], half, _STOP)
    if not (half / "student").is_dir():
        raise CaseSkippedError("the run on one rank that it goes on with has failed")
    folder = place.folder / "_".join(["resumed", *arguments["overrides"]]).replace(".", "_")
    is_first = _train(place, arguments["overrides"], folder, _STEPS, goes_on_with=half)
    return _compare(folder, whole) if is_first else ""


def _train(
    place: Place,
    overrides: list[str],
    folder: Path,
    steps: int,
    *,
    goes_on_with: Path | None = None,
) -> str:
    """Trains to a step; returns a text on the first rank, an empty one on the others."""
    config = load_config(
        place.models / "dense" / "run.yaml",
        [*_SETTINGS, *overrides, f"output_dir={folder}", f"train_iters={steps}"],
    )
    with parallel_run(config.parallel, seed=config.seed) as context:
        if goes_on_with is not None and context.rank == 0:
            shutil.copytree(goes_on_with, folder)
        dist.barrier()
        plan, _ = prepare(config, dry_run=False)
        student = train(plan, context)
        assert student is not None
        return f"{steps} steps" if context.rank == 0 else ""


def _compare(found: Path, expected: Path) -> str:
    """The largest differences of losses and weights, relative to the values' size.

    Raises:
        CaseFailedError: One is larger than rounding.
    """
    ours, theirs = (_losses(folder) for folder in (found, expected))
    if len(ours) != _STEPS:
        raise CaseFailedError(f"the run went on to {len(ours)} steps instead of {_STEPS}")
    loss = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    student, reference = (HFCheckpoint(folder / "student") for folder in (found, expected))
    weights = max(
        _difference(student.read(name), reference.read(name)) for name in reference.names()
    )
    text = f"loss {loss:.0e}, weights {weights:.0e}"
    if not max(loss, weights) <= _TOLERANCE:
        raise CaseFailedError(
            f"{text} from the run that was not stopped; at most {_TOLERANCE:.0e} is rounding"
        )
    return text


def _losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())
