"""YAML file and command line -> a checked `RunConfig`.

What can be checked without a model is checked here; what needs the models' configurations is
checked in `megatron_oprd.training.plan`.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_oprd.config import ParallelConfig, RunConfig
from megatron_oprd.errors import UserError


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads a YAML file and applies dotted overrides (``optimizer.lr=1e-5``), the last one wins.

    Raises:
        UserError: The file cannot be read, a key is unknown, a value has the wrong type or is not
            allowed, a required setting is missing, or two settings contradict each other.
    """
    try:
        given: Any = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read: {_one_line(error)}") from error
    if not OmegaConf.is_dict(given):
        raise UserError(f"--config {path}: expected settings (key: value), found something else")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r}: expected key=value, as in optimizer.lr=1e-5")
        try:
            given = OmegaConf.merge(given, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, TypeError, yaml.YAMLError) as error:
            raise UserError(f"override {override!r}: {_one_line(error)}") from error
    try:
        _check_keys(OmegaConf.to_container(given), RunConfig, prefix="")
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), given)
        if unset := sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{unset[0]} is not set; give it in the YAML file or as {unset[0]}=...")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        where = f" (setting {key})" if key else ""
        raise UserError(f"--config {path}: {str(error).splitlines()[0]}{where}") from error
    assert isinstance(config, RunConfig)
    _check_values(config)
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_keys(given: Any, schema: type, prefix: str) -> None:
    """Refuses a key that no dataclass has, and names the nearest one that exists."""
    if not isinstance(given, dict):
        raise UserError(
            f"setting {prefix.rstrip('.')!r}: expected a group of settings, found {given!r}"
        )
    hints = get_type_hints(schema)
    for key, value in given.items():
        full = f"{prefix}{key}"
        if key not in hints:
            elsewhere = [k for k in _all_keys(RunConfig) if k.rsplit(".", 1)[-1] == str(key)]
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            nearest = elsewhere[0] if elsewhere else f"{prefix}{near[0]}"
            raise UserError(f"unknown setting {full!r}; the nearest is {nearest!r}")
        if is_dataclass(hints[key]):
            _check_keys(value, hints[key], prefix=f"{full}.")


def _all_keys(schema: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            keys += _all_keys(hint, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _check_values(config: RunConfig) -> None:
    """Refuses values and combinations that are wrong whatever the models are."""
    for key in ("output_dir", "model.student", "model.teacher"):
        if not _get(config, key):
            raise UserError(f"{key} is empty; give a folder")
    if not config.data.prompts:
        raise UserError("data.prompts is empty; name at least one JSONL or parquet file")
    _check_numbers(config)

    taps = config.taps
    needs_k = taps.positions in ("last_k", "first_k")
    if needs_k and taps.k is None:
        raise UserError(f"taps.positions = {taps.positions} needs taps.k, the number of tokens")
    if not needs_k and taps.k is not None:
        raise UserError(
            f"taps.k = {taps.k} has no effect with taps.positions = {taps.positions}; "
            "use last_k or first_k"
        )
    _check_parallel(config.parallel)
    recompute = config.recompute
    full = recompute.recompute_granularity == "full"
    for name in ("recompute_method", "recompute_num_layers"):
        if (getattr(recompute, name) is not None) != full:
            raise UserError(
                f"recompute.{name} = {getattr(recompute, name)} with "
                f"recompute.recompute_granularity = {recompute.recompute_granularity}: it is "
                "needed for full and for nothing else"
            )


def _check_parallel(parallel: ParallelConfig) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    if parallel.sequence_parallel and tp == 1:
        raise UserError(
            "parallel.sequence_parallel = true needs parallel.tensor_model_parallel_size > 1, "
            "found 1"
        )
    if vpp is not None and (vpp < 2 or pp < 2):
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size = {vpp} with "
            f"parallel.pipeline_model_parallel_size = {pp}: both have to be at least 2"
        )
    layers = parallel.num_layers_per_stage
    if layers is not None and len(layers) != pp * (vpp or 1):
        raise UserError(
            f"parallel.num_layers_per_stage has {len(layers)} entries; "
            f"{pp * (vpp or 1)} are needed, one for each stage"
        )


def _check_numbers(config: RunConfig) -> None:
    at_least_one = (
        "train_iters",
        "model.make_vocab_size_divisible_by",
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "parallel.distributed_timeout_minutes",
        "taps.k",
        "data.max_prompt_tokens",
        "rollout.prompts_per_step",
        "rollout.samples_per_prompt",
        "rollout.max_new_tokens",
        "rollout.max_batch_size",
        "batch.max_tokens",
        "batch.micro_batch_size",
        "optimizer.max_skipped_in_a_row",
        "recompute.recompute_num_layers",
        "checkpoint.save_interval",
        "checkpoint.keep",
    )
    for key in at_least_one:
        value = _get(config, key)
        if value is not None and value < 1:
            raise UserError(f"{key} = {value}: has to be at least 1")
    not_negative = (
        "optimizer.lr",
        "optimizer.min_lr",
        "optimizer.weight_decay",
        "optimizer.clip_grad",
        "loss.coefficient",
        "rollout.temperature",
        "rollout.top_k",
        "seed",
    )
    for key in not_negative:
        if not 0 <= _get(config, key) < math.inf:
            raise UserError(f"{key} = {_get(config, key)}: has to be 0 or more, and finite")
    if config.optimizer.min_lr > config.optimizer.lr:
        raise UserError(
            f"optimizer.min_lr = {config.optimizer.min_lr} is above optimizer.lr = "
            f"{config.optimizer.lr}"
        )
    for key in ("lr_warmup_fraction", "adam_beta1", "adam_beta2"):
        value = _get(config.optimizer, key)
        if not 0 <= value < 1:
            raise UserError(f"optimizer.{key} = {value}: has to be in [0, 1)")
    if not 0 < config.optimizer.adam_eps < math.inf:
        raise UserError(f"optimizer.adam_eps = {config.optimizer.adam_eps}: has to be above 0")
    if not 0 < config.rollout.top_p <= 1:
        raise UserError(f"rollout.top_p = {config.rollout.top_p}: has to be in (0, 1]")


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
