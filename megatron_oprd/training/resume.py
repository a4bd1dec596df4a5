"""Chooses the checkpoint that a run resumes from, and checks that it belongs to the same run."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError, say
from megatron_oprd.models.architecture import Architecture, MixtureOfExperts, Rope
from megatron_oprd.rollout.registry import ENGINES
from megatron_oprd.training.checkpoint_files import broken_content, broken_size
from megatron_oprd.training.checkpoints import (
    BrokenCheckpointError,
    checkpoint_folder,
    read_manifest,
    whole_checkpoints,
)
from megatron_oprd.training.identity import RunIdentity
from megatron_oprd.training.plan import RunPlan, export_folder
from megatron_oprd.weights.output_folder import MANIFEST_FILE

# Prefixes of settings that change how a run is computed or how long it is, but not what it
# computes.
_MAY_CHANGE = (
    "output_dir",
    "train_iters",
    "tensorboard",
    "samples_interval",
    "trackers",
    "project_name",
    "experiment_name",
    "export.",
    "profile.",
    "teacher.offload",
    "teacher.target_memory_gb",
    "teacher.max_tokens",
    "parallel.",
    "batch.",
    "recompute.",
    "checkpoint.",
    "evaluation.",
    "rollout.max_batch_size",
    "rollout.logprob_",
    *(setting for kind in ENGINES.values() for setting in kind.may_change),
    "optimizer.overlap_",
    "optimizer.offload_states",
    "optimizer.max_skipped_in_a_row",
    "optimizer.use_distributed_optimizer",
)
# Paths: their contents are compared instead, see `RunIdentity.contents`.
_BY_CONTENT = (
    "model.student", "model.student_hf_config", "model.teacher", "model.teacher_hf_config",
    "data.prompts", "bridge.path",
)  # fmt: skip
# Free-form mappings, compared as a whole: their keys are not settings with defaults.
_WHOLE = (
    "data.chat_template_kwargs", "teacher_prompt.chat_template_kwargs", "teacher.when",
)  # fmt: skip
# Of an entry of extra_teachers: compared by content, or free to change.
_NOT_OF_EXTRA = ("model", "hf_config", "bridge", "offload")
_PASSED_OVER = "{} is not whole and is passed over: {}"


def checkpoint_to_resume(
    plan: RunPlan, *, without: Collection[Path] = (), says: bool = True
) -> Path | None:
    """The newest usable checkpoint of the run's folder, or None. Reads only manifests.

    Checkpoints with a missing file or a file of another size are skipped.

    Args:
        plan: The run.
        without: Further checkpoints to skip.
        says: Whether to print the skipped ones, on rank 0.

    Raises:
        UserError: The folder holds another run, a run that must not be resumed, or only broken
            checkpoints.
    """
    config = plan.config
    output_dir = Path(config.output_dir)
    checkpoints = whole_checkpoints(output_dir)
    if not checkpoints:
        check_export(config, None)
        return None
    if config.checkpoint.resume == "never":
        raise UserError(
            f"output_dir = {config.output_dir} has checkpoints (newest: {checkpoints[-1].name}), "
            "but checkpoint.resume = never; give another output_dir, or checkpoint.resume = auto"
        )
    for checkpoint in reversed(checkpoints):
        if checkpoint in without:
            continue
        try:
            manifest = read_manifest(checkpoint)
            if (broken := broken_size(checkpoint, manifest["files"])) is not None:
                raise BrokenCheckpointError(broken)
        except BrokenCheckpointError as error:
            if says:
                say(_PASSED_OVER.format(checkpoint, error))
            continue
        _check_same_run(plan, checkpoint, manifest)
        check_export(config, RunIdentity.of_manifest(manifest))
        return checkpoint
    raise UserError(
        f"output_dir = {config.output_dir}: none of the {len(checkpoints)} checkpoints in "
        f"{checkpoint_folder(output_dir)} is whole; give another folder to start anew"
    )


def resumable_checkpoint(plan: RunPlan) -> Path | None:
    """Like `checkpoint_to_resume`, with the checksums of all files compared.

    All ranks have to call; the UserErrors are raised on all.
    """
    broken: set[Path] = set()
    while True:
        checkpoint, files, refused = _chosen_by_rank_0(plan, broken)
        if refused is not None:
            raise UserError(refused)
        if checkpoint is None:
            return None
        wrong = broken_content(checkpoint, files)
        if wrong is None:
            return checkpoint
        say(_PASSED_OVER.format(checkpoint, wrong))
        broken.add(checkpoint)


def _chosen_by_rank_0(
    plan: RunPlan, broken: Collection[Path]
) -> tuple[Path | None, dict[str, Any], str | None]:
    """The checkpoint, its manifest's files, and the reason for refusing; the same on every rank."""
    choice: list[tuple[Path | None, dict[str, Any], str | None]] = [(None, {}, None)]
    # Rank 0 decides for all: machines may see different states of a shared file system.
    if dist.get_rank() == 0:
        try:
            checkpoint = checkpoint_to_resume(plan, without=broken, says=False)
            files = {} if checkpoint is None else read_manifest(checkpoint)["files"]
            choice = [(checkpoint, files, None)]
        except UserError as error:
            choice = [(None, {}, str(error))]
    dist.broadcast_object_list(choice)
    return choice[0]


def with_schedule_of(plan: RunPlan, identity: RunIdentity) -> RunPlan:
    """The plan with the learning-rate schedule that the run began with."""
    if plan.config.decay_iters == identity.lr_decay_iters:
        return plan
    say(
        f"train_iters = {plan.config.train_iters}: the learning rate keeps the schedule that the "
        f"run began with, optimizer.lr_decay_iters = {identity.lr_decay_iters}"
    )
    optimizer = dataclasses.replace(plan.config.optimizer, lr_decay_iters=identity.lr_decay_iters)
    return plan.with_config(dataclasses.replace(plan.config, optimizer=optimizer))


def check_contents(checkpoint: Path, identity: RunIdentity, found: Mapping[str, str]) -> None:
    """Raises a UserError if prompts, tokenizers or models have changed since the run began."""
    for what, digest in identity.contents.items():
        if found.get(what) != digest:
            raise UserError(
                f"{checkpoint} was written with other contents of {what} than there are now; a run "
                "goes on with what it began with. Give the old one, or another output_dir"
            )


def _defaults(record: type) -> dict[str, Any]:
    """The defaults of a dataclass's fields that have one."""
    return {
        field.name: field.default
        for field in dataclasses.fields(record)
        if field.default is not dataclasses.MISSING
    }


def _architecture(written: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture of a manifest; fields that are newer than it have their defaults."""
    whole = _defaults(Architecture) | dict(written)
    for name, record in (
        ("rope", Rope),
        ("sliding_rope", Rope),
        ("moe", MixtureOfExperts),
    ):
        if whole.get(name) is not None:
            whole[name] = _defaults(record) | whole[name]
    return {name: _as_written(value) for name, value in whole.items()}


def _as_written(value: Any) -> Any:
    """A value of an architecture as JSON has it, without what is empty."""
    if isinstance(value, dict):
        written = {name: _as_written(one) for name, one in value.items()}
        return {name: one for name, one in written.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_as_written(one) for one in value] or None
    return value


def _check_same_run(plan: RunPlan, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    config = plan.config
    layout = plan.layout
    for setting, model, source in (
        ("student", layout.student, plan.student_checkpoint),
        ("teacher", layout.teacher, plan.teachers[0].checkpoint),
    ):
        before = _architecture(manifest[setting])
        for field, ours in dataclasses.asdict(model.architecture).items():
            found, value = before.get(field), _as_written(ours)
            if found != value:
                raise UserError(
                    f"{checkpoint} is of another model: {field} = {found!r}, but model.{setting} "
                    f"({source.folder}) has {value!r}; give another output_dir"
                )
    # Settings that are newer than the checkpoint had their defaults.
    defaults = _compared(dataclasses.asdict(RunConfig()))
    before, now = defaults | _compared(manifest["settings"]), _compared(dataclasses.asdict(config))
    for key, value in now.items():
        # None means the schedule of the run's first start.
        if key == "optimizer.lr_decay_iters":
            began_with = manifest["run"]["lr_decay_iters"]
            if value not in (None, began_with):
                raise UserError(
                    f"{checkpoint} was written with {key} = {began_with}, now it is {value}; a "
                    "run keeps its schedule. Give the old value or none, or another output_dir"
                )
        elif before[key] != value:
            raise UserError(
                f"{checkpoint} was written with {key} = {before[key]!r}, now it is {value!r}; a "
                "run goes on with the settings it has. Give the old value, or another output_dir"
            )
    if config.train_iters < manifest["step"]:
        raise UserError(
            f"train_iters = {config.train_iters} is less than the {manifest['step']} steps of "
            f"{checkpoint}; give at least as many, or another output_dir"
        )


def check_export(config: RunConfig, identity: RunIdentity | None) -> None:
    """Raises a UserError if the export would replace a student that this run has not written."""
    folder = export_folder(config)
    if not (folder.is_dir() and any(folder.iterdir())):
        return
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        writer = manifest["run"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"output_dir = {config.output_dir} would have the student in {folder}, which exists "
            "and was not written by a run; give another output_dir"
        ) from None
    if identity is None or writer != identity.name:
        raise UserError(
            f"output_dir = {config.output_dir} holds the student of "
            f"{'a finished run without checkpoints' if identity is None else 'another run'} "
            f"({folder}); give another output_dir"
        )


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that must not change, by their full names."""
    extra = [
        {name: value for name, value in one.items() if name not in _NOT_OF_EXTRA}
        for one in settings["extra_teachers"]
    ]
    flat = _flat({**settings, "extra_teachers": extra})
    return {
        key: value
        for key, value in flat.items()
        if not key.startswith(_MAY_CHANGE) and key not in _BY_CONTENT
    }


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} --> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and prefix + name not in _WHOLE:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
