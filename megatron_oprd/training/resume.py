"""Which checkpoint a run goes on from, and whether it is the same run."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_oprd.config import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.training.checkpoints import read_manifest, whole_checkpoints
from megatron_oprd.training.plan import RunPlan, export_folder

# Settings that change how a run is computed or how long it goes on, but not what it computes.
_MAY_CHANGE = (
    "output_dir",
    "train_iters",
    "tensorboard",
    "teacher.offload",
    "teacher.target_memory_gb",
    "parallel.",
    "batch.",
    "recompute.",
    "checkpoint.",
    "rollout.max_batch_size",
    "rollout.logprob_",
    "rollout.vllm.",
    "optimizer.overlap_",
    "optimizer.offload_states",
    "optimizer.max_skipped_in_a_row",
)


def checkpoint_to_resume(plan: RunPlan) -> Path | None:
    """The newest whole checkpoint of the run's folder, or None; only its manifest is read.

    Raises:
        UserError: The folder holds another run, or one that must not be resumed.
    """
    config = plan.config
    checkpoints = whole_checkpoints(Path(config.output_dir))
    if not checkpoints:
        if export_folder(config).exists():
            raise UserError(
                f"output_dir = {config.output_dir} holds a finished run without checkpoints; give "
                f"another folder, or remove {export_folder(config)} to run anew"
            )
        return None
    newest = checkpoints[-1]
    if config.checkpoint.resume == "never":
        raise UserError(
            f"output_dir = {config.output_dir} has checkpoints (newest: {newest.name}) and "
            "checkpoint.resume = never; give another folder, or resume = auto"
        )
    manifest = read_manifest(newest)
    for setting, model in (("student", plan.student), ("teacher", plan.teacher)):
        ours = dataclasses.asdict(model.architecture)
        for field, value in ours.items():
            found = manifest[setting].get(field)
            if found != value:
                raise UserError(
                    f"{newest} is of another model: {field} = {found!r}, but model.{setting} "
                    f"({model.checkpoint.folder}) has {value!r}; give another output_dir"
                )
    # A setting that there was not has had its default.
    defaults = _flat(dataclasses.asdict(RunConfig()))
    before, now = defaults | _flat(manifest["settings"]), _flat(dataclasses.asdict(config))
    for key, value in now.items():
        if not key.startswith(_MAY_CHANGE) and before[key] != value:
            raise UserError(
                f"{newest} was written with {key} = {before[key]!r}, now it is {value!r}; a run "
                "goes on with the settings it has. Give the old value, or another output_dir"
            )
    if config.train_iters < manifest["step"]:
        raise UserError(
            f"train_iters = {config.train_iters}, but {newest} is already of step "
            f"{manifest['step']}; give at least as many, or another output_dir"
        )
    return newest


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} --> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
