"""Training checkpoints: `torch_dist` folders, whole or not there, that any layout can load."""

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

import megatron_oprd
from megatron_oprd.config import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models.refresh import TeacherRefresh
from megatron_oprd.parallel import ParallelContext
from megatron_oprd.training.optimizer import TrainState
from megatron_oprd.training.plan import RunPlan

MANIFEST = "manifest.json"
_MANIFEST_KEYS = {"step", "skipped_steps", "student", "teacher", "layout", "settings"}
_NAME = re.compile(r"step_(\d{7,})")
# Each layer under its own name: frozen layers have no optimizer states, and Megatron's other way,
# all layers stacked in one tensor, has no place for gaps.
_MODEL_METADATA = {"non_homogeneous_layers": True}
# The one format of the distributed optimizer that loads under another TP and PP. It gathers states
# in the first replica's host memory; the other way every device would hold them all.
_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Steps that are done, skipped ones included.
        skipped_steps: Steps whose loss or gradient was not finite.
    """

    step: int = 0
    skipped_steps: int = 0


def is_due(steps_done: int, config: RunConfig) -> bool:
    """Whether there is a checkpoint after so many steps."""
    interval = config.checkpoint.save_interval
    at_end = steps_done == config.train_iters
    return interval is not None and (at_end or steps_done % interval == 0)


def checkpoint_folder(output_dir: Path) -> Path:
    """Where a run's checkpoints are."""
    return output_dir / "checkpoints"


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. One that was not finished has another name."""
    folder = checkpoint_folder(output_dir)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in found if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        UserError: It cannot be read, or is none.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; remove this checkpoint") from error
    missing = sorted(_MANIFEST_KEYS - set(manifest if isinstance(manifest, dict) else ()))
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; remove this checkpoint")
    return manifest


def save(
    plan: RunPlan,
    state: TrainState,
    progress: Progress,
    *,
    context: ParallelContext,
    refresh: TeacherRefresh | None = None,
) -> Path:
    """Writes a checkpoint, then removes the oldest beyond ``keep``.

    A teacher that is refreshed is part of it.

    It is written under a temporary name and renamed when it is whole. Every rank has to call.
    """
    folder = checkpoint_folder(Path(plan.config.output_dir))
    final = folder / f"step_{progress.step:07d}"
    temporary = folder / f".{final.name}.tmp"
    if context.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    state.gather_parameters()
    with state.states_on_device():
        content = _sharded_state(state, context, is_loading=False, with_rng=True)
        content["scheduler_steps"] = state.scheduler.num_steps
        if refresh is not None:
            content["teacher"] = refresh.sharded_state_dict(metadata=dict(_MODEL_METADATA))
        dist_checkpointing.save(content, str(temporary))
    dist.barrier()
    if context.rank == 0:
        _add_companions(temporary, plan, progress)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync_folder(folder)
        for old in whole_checkpoints(Path(plan.config.output_dir))[: -plan.config.checkpoint.keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(
    checkpoint: Path,
    plan: RunPlan,
    state: TrainState,
    *,
    context: ParallelContext,
    refresh: TeacherRefresh | None = None,
) -> Progress:
    """Restores a run's state in place, whatever layout the checkpoint was written in.

    Random states are restored when the layout is the same.

    Returns:
        How far the run was.
    """
    manifest = read_manifest(checkpoint)
    same_layout = manifest["layout"] == _layout(plan)
    with state.states_on_device():
        content = _sharded_state(state, context, is_loading=True, with_rng=same_layout)
        if refresh is not None:
            content["teacher"] = refresh.sharded_state_dict(metadata=dict(_MODEL_METADATA))
        loaded = dist_checkpointing.load(content, str(checkpoint))
        for name, module in _named_modules(state):
            module.load_state_dict(loaded[name])
        _load_optimizer(state, loaded["optimizer"])
        if refresh is not None:
            refresh.load(loaded["teacher"])
    state.scheduler.num_steps = 0
    state.scheduler.step(increment=loaded["scheduler_steps"])
    if same_layout:
        rng = loaded["rng_state"]
        torch.set_rng_state(rng["cpu"])
        torch.cuda.set_rng_state(rng["device"])
        get_cuda_rng_tracker().set_states(rng["tracker"])
    return Progress(step=manifest["step"], skipped_steps=manifest["skipped_steps"])


def remove_unfinished(output_dir: Path) -> None:
    """Removes what an interrupted write left behind."""
    leftovers = [
        *checkpoint_folder(output_dir).glob(".step_*.tmp"),
        *output_dir.glob(".student.*.tmp"),
    ]
    for path in leftovers:
        shutil.rmtree(path)


def _sharded_state(
    state: TrainState, context: ParallelContext, *, is_loading: bool, with_rng: bool
) -> dict[str, Any]:
    modules = _named_modules(state)
    content: dict[str, Any] = {
        name: module.sharded_state_dict(metadata=dict(_MODEL_METADATA)) for name, module in modules
    }
    for name, _ in modules:
        # The head's padding may differ with the layout, as the embedding's may, which Megatron
        # allows by itself.
        if "output_layer.weight" in content[name]:
            content[name]["output_layer.weight"].allow_shape_mismatch = True
    content["optimizer"] = state.optimizer.sharded_state_dict(
        content["model"] if "model" in content else dict(content),
        is_loading=is_loading,
        metadata=dict(_OPTIMIZER_METADATA),
    )
    if with_rng:
        rng = {
            "cpu": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(),
            "tracker": get_cuda_rng_tracker().get_states(),
        }
        content["rng_state"] = ShardedObject(
            "rng_state",
            rng,
            (context.pp_size, context.tp_size, context.groups.dp_cp.size()),
            (context.pp_rank, context.tp_rank, context.groups.dp_cp.rank()),
        )
    return content


def _load_optimizer(state: TrainState, loaded: dict[Any, Any]) -> None:
    """Loads each chained optimizer.

    Megatron's distributed optimizer trips over the step counter that torch's Adam keeps with
    every parameter, so the counters are out of its sight while it loads the rest; and it gives
    all parameters the one counter tensor, which torch would count up once for each of them.
    """
    chained = state.optimizer.chained_optimizers
    parts = [loaded] if len(chained) == 1 else [loaded[i] for i in range(len(chained))]
    for optimizer, part in zip(chained, parts, strict=True):
        adam = optimizer.optimizer
        if not (isinstance(optimizer, DistributedOptimizer) and isinstance(adam, torch.optim.Adam)):
            optimizer.load_state_dict(part)
            continue
        moments = part.pop("param_state")
        optimizer.load_state_dict(part)
        steps = {parameter: own.pop("step") for parameter, own in adam.state.items()}
        optimizer.load_parameter_state_from_fully_reshardable(moments)
        for parameter, step in steps.items():
            adam.state[parameter]["step"] = step.clone()


def _named_modules(state: TrainState) -> list[tuple[str, GPTModel]]:
    """This rank's chunks under the names that Megatron's training script gives them."""
    modules = state.modules
    if len(modules) == 1:
        return [("model", modules[0])]
    return [(f"model{number}", module) for number, module in enumerate(modules)]


def _layout(plan: RunPlan) -> dict[str, Any]:
    parallel = plan.config.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "data_parallel_size": plan.data_parallel_size,
    }


def _add_companions(folder: Path, plan: RunPlan, progress: Progress) -> None:
    """Adds what makes the checkpoint self-contained: the manifest and Hugging Face's files."""
    hf = folder / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(plan.student.checkpoint.config, indent=2))
    for file in plan.student.checkpoint.companion_files():
        shutil.copyfile(file, hf / file.name)
    manifest = {
        "format": "torch_dist",
        "megatron_oprd": megatron_oprd.__version__,
        **dataclasses.asdict(progress),
        "student": dataclasses.asdict(plan.student.architecture),
        "teacher": dataclasses.asdict(plan.teacher.architecture),
        "layout": _layout(plan),
        "settings": dataclasses.asdict(plan.config),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
