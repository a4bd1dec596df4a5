"""Training checkpoints: `torch_dist` folders, written atomically, that any layout can load."""

import dataclasses
import json
import queue
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker

import megatron_oprd
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError, say
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.training.checkpoint_files import Files, describe_checkpoint_files
from megatron_oprd.training.identity import RunIdentity
from megatron_oprd.training.optimizer import TrainState
from megatron_oprd.training.optimizer_states import load_states, sharded_states
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.teacher_refresh import TeacherRefresh
from megatron_oprd.weights.disk import sync, write_json
from megatron_oprd.weights.hf_files import copy_companions

MANIFEST = "manifest.json"
_MANIFEST_KEYS = {
    "version", "run", "step", "skipped_steps", "unsupervised_steps", "student", "teacher", "layout",
    "settings", "files",
}  # fmt: skip
# Version of a checkpoint's content. Only checkpoints of the same version are resumed from.
_VERSION = 2
_NAME = re.compile(r"step_(\d{7,})")
_TEMPORARY = re.compile(r"\.step_\d{7,}\.tmp")
# Each layer under its own name. By default Megatron stacks all layers in one tensor, which has no
# place for the missing optimizer states of frozen layers.
_MODEL_METADATA = {"non_homogeneous_layers": True}


class BrokenCheckpointError(Exception):
    """A checkpoint is incomplete or damaged; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was written."""

    folder: Path
    num_bytes: int
    seconds: float  # wall-clock, checksums included


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run."""

    step: int = 0  # steps done, skipped ones included
    skipped_steps: int = 0  # loss or gradient not finite
    unsupervised_steps: int = 0  # without any supervised position
    waiting: tuple[int, ...] = ()  # see `megatron_oprd.training.surplus.Surplus`


def is_due(steps_done: int, config: RunConfig) -> bool:
    """Whether a checkpoint is saved after ``steps_done`` steps."""
    interval = config.checkpoint.save_interval
    if steps_done == config.train_iters:
        return config.checkpoint.is_on
    return interval is not None and steps_done % interval == 0


def checkpoint_folder(output_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return output_dir / "checkpoints"


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """A run's checkpoints, oldest first. Unfinished ones have another name and are left out."""
    folder = checkpoint_folder(output_dir)
    found = folder.iterdir() if folder.is_dir() else ()
    # As numbers: names grow longer after step 9,999,999.
    return sorted((p for p in found if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint.

    Raises:
        BrokenCheckpointError: It cannot be read, or is not a manifest.
        UserError: It is of another version of this package.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BrokenCheckpointError(f"{path} cannot be read: {error}") from error
    known = set(manifest if isinstance(manifest, dict) else ())
    if {"step", "settings"} <= known and manifest.get("version") != _VERSION:
        raise UserError(
            f"{path} is of version {manifest.get('version', 1)} of training checkpoints, this is "
            f"version {_VERSION}; give another output_dir, with {checkpoint} as model.student to "
            "go on from its weights"
        )
    if missing := sorted(_MANIFEST_KEYS - known):
        raise BrokenCheckpointError(f"{path} lacks {', '.join(missing)}")
    return manifest


def save(
    plan: RunPlan,
    state: TrainState,
    progress: Progress,
    *,
    context: ParallelContext,
    identity: RunIdentity,
    refresh: TeacherRefresh | None = None,
) -> Saved:
    """Writes a checkpoint, then removes the run's oldest beyond ``keep``. All ranks have to call.

    It is written under a temporary name and renamed when complete. A teacher that is refreshed is
    part of it.
    """
    started = time.perf_counter()
    folder = checkpoint_folder(Path(plan.config.output_dir))
    final = folder / f"step_{progress.step:07d}"
    temporary = folder / f".{final.name}.tmp"
    if context.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    # No rank writes before the folder is there.
    dist.barrier()
    # Otherwise the last update may not have reached this rank's parameters yet.
    state.gather_parameters()
    with state.states_on_device():
        content = _sharded_state(state, context, is_loading=False, with_rng=True)
        # Also the optimizer's number of updates, see `load_states`.
        content["scheduler_steps"] = state.scheduler.num_steps
        if refresh is not None:
            content["teacher"] = refresh.sharded_state_dict(metadata=dict(_MODEL_METADATA))
        # Megatron takes its writers' answers from a queue in a process of its own, for saves in the
        # background. That process imports torch at the first save of each rank and stays. This
        # save returns when all is written, so a queue of this process does. A signal that stops the
        # run reaches the processes of the step, and would end that one, too.
        filesystem_async._results_queue = queue.Queue()
        dist_checkpointing.save(content, str(temporary))
    dist.barrier()
    if context.rank == 0:
        _add_companions(temporary, plan)
    # All ranks: they share the work of reading the files back.
    files = describe_checkpoint_files(temporary)
    if context.rank == 0:
        _add_manifest(temporary, plan, progress, identity, files)
        _make_room(final, identity)
        # After the files are on disk (_add_manifest syncs them): a checkpoint with its final name
        # is complete.
        temporary.rename(final)
        sync(folder)
        # Only now: had the write failed, the old ones would still be needed.
        for old in own_checkpoints(folder.parent, identity)[: -plan.config.checkpoint.keep]:
            shutil.rmtree(old)
    dist.barrier()
    return Saved(
        folder=final,
        num_bytes=sum(size for size, _ in files.values()),
        seconds=time.perf_counter() - started,
    )


def own_checkpoints(output_dir: Path, identity: RunIdentity) -> list[Path]:
    """The checkpoints in a folder that this run has written, oldest first."""
    return [path for path in whole_checkpoints(output_dir) if _is_of(path, identity)]


def _is_of(checkpoint: Path, identity: RunIdentity) -> bool:
    try:
        return RunIdentity.of_manifest(read_manifest(checkpoint)).name == identity.name
    except (BrokenCheckpointError, UserError):
        return False


def _make_room(final: Path, identity: RunIdentity) -> None:
    """Removes this run's checkpoint of the same name; moves another run's aside."""
    if not final.exists():
        return
    if _is_of(final, identity):
        shutil.rmtree(final)
        return
    _set_aside(final, "is none of this run's checkpoints, or a broken one")


def set_aside_newer(resumed: Path) -> None:
    """Moves the checkpoints that are newer than the resumed one aside.

    They are broken and were skipped. Left in place they would count for ``keep``, and whole ones
    would be removed instead.
    """
    newer = [path for path in whole_checkpoints(resumed.parent.parent) if path.name > resumed.name]
    for path in newer:
        _set_aside(path, "is not whole")


def _set_aside(checkpoint: Path, why: str) -> None:
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}.aside-{number}")).exists():
        number += 1
    checkpoint.rename(aside)
    say(f"{checkpoint} {why}; it is now {aside.name}")


def load(
    checkpoint: Path,
    plan: RunPlan,
    state: TrainState,
    *,
    context: ParallelContext,
    refresh: TeacherRefresh | None = None,
) -> Progress:
    """Restores a run's state in place, in any layout, and returns its progress.

    Random states are restored if the layout is the same.
    """
    manifest = read_manifest(checkpoint)
    # Each rank has its own random states, which mean nothing in another layout.
    same_layout = manifest["layout"] == _layout(plan)
    with state.states_on_device():
        content = _sharded_state(state, context, is_loading=True, with_rng=same_layout)
        if refresh is not None:
            content["teacher"] = refresh.sharded_state_dict(metadata=dict(_MODEL_METADATA))
        loaded = dist_checkpointing.load(content, str(checkpoint))
        for name, module in _named_modules(state):
            module.load_state_dict(loaded[name])
        for number, optimizer in enumerate(state.optimizer.chained_optimizers):
            load_states(
                optimizer,
                state.modules,
                # A data-parallel rank that owns no parameter has read nothing.
                loaded.get("optimizer", {}).get(number, {}),
                num_updates=loaded["scheduler_steps"],
            )
        if refresh is not None:
            refresh.load(loaded["teacher"])
    # step() adds to num_steps, and sets the learning rate in the optimizer.
    state.scheduler.num_steps = 0
    state.scheduler.step(increment=loaded["scheduler_steps"])
    if same_layout:
        rng = loaded["rng_state"]
        torch.set_rng_state(rng["cpu"])
        torch.cuda.set_rng_state(rng["device"])
        get_cuda_rng_tracker().set_states(rng["tracker"])
    return Progress(
        step=manifest["step"],
        skipped_steps=manifest["skipped_steps"],
        unsupervised_steps=manifest["unsupervised_steps"],
        # Older checkpoints of this version are of runs without `rollout.oversample`.
        waiting=tuple(manifest.get("waiting", ())),
    )


def remove_unfinished(output_dir: Path) -> None:
    """Removes the remains of interrupted writes."""
    for folder, pattern in (
        (checkpoint_folder(output_dir), _TEMPORARY),
        (output_dir, re.compile(r"\.student\.[0-9a-f]{8}\.tmp")),
    ):
        for path in list(folder.iterdir()) if folder.is_dir() else ():
            if pattern.fullmatch(path.name):
                shutil.rmtree(path)


def _sharded_state(
    state: TrainState, context: ParallelContext, *, is_loading: bool, with_rng: bool
) -> dict[str, Any]:
    modules = _named_modules(state)
    content: dict[str, Any] = {
        name: module.sharded_state_dict(metadata=dict(_MODEL_METADATA)) for name, module in modules
    }
    for name, _ in modules:
        # The padding of the vocabulary depends on the tensor-parallel size. Megatron allows that
        # for the embedding, but for the head only with post_process, which a head that is not run
        # does not have.
        if "output_layer.weight" in content[name]:
            content[name]["output_layer.weight"].allow_shape_mismatch = True
    model = dict(content)
    content["optimizer"] = {
        number: sharded_states(optimizer, state.modules, model, is_loading=is_loading)
        for number, optimizer in enumerate(state.optimizer.chained_optimizers)
    }
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


def _named_modules(state: TrainState) -> list[tuple[str, GPTModel]]:
    """This rank's chunks, named as in Megatron's training script."""
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
        "data_parallel_size": plan.layout.data_parallel_size,
    }


def _add_companions(folder: Path, plan: RunPlan) -> None:
    """Adds Hugging Face's config and tokenizer files, so that the checkpoint is self-contained."""
    hf = folder / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(plan.student_checkpoint.config, indent=2))
    copy_companions(plan.student_checkpoint.companion_files(), hf)


def _add_manifest(
    folder: Path, plan: RunPlan, progress: Progress, identity: RunIdentity, files: Files
) -> None:
    """Adds the manifest and syncs everything to disk."""
    manifest = {
        "format": "torch_dist",
        "version": _VERSION,
        "run": identity.as_json(),
        "megatron_oprd": megatron_oprd.__version__,
        **dataclasses.asdict(progress),
        "student": dataclasses.asdict(plan.layout.student.architecture),
        "teacher": dataclasses.asdict(plan.layout.teacher.architecture),
        "layout": _layout(plan),
        "settings": dataclasses.asdict(plan.config),
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)
    for path in [*folder.rglob("*"), folder]:
        sync(path)
