"""YAML file and command line -> a checked `RunConfig`.

What can be checked without a model is checked here; what needs the models' configurations is
checked in `megatron_oprd.training.plan`.
"""

import difflib
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_oprd.config import RunConfig
from megatron_oprd.config_checks import check_values
from megatron_oprd.errors import UserError

Settings = TypeVar("Settings")


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads a YAML file and applies dotted overrides (``optimizer.lr=1e-5``), the last one wins.

    Raises:
        UserError: The file cannot be read, a key is unknown, a value has the wrong type or is not
            allowed, a required setting is missing, or two settings contradict each other.
    """
    config = load_settings(path, overrides, RunConfig)
    check_values(config)
    return config


def load_settings(path: Path, overrides: Sequence[str], schema: type[Settings]) -> Settings:
    """Loads a YAML file as ``schema``, a dataclass, and applies dotted overrides.

    Raises:
        UserError: The file cannot be read, a key is unknown, a value has the wrong type or is not
            one of those allowed, or a required setting is missing.
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
        _check_keys(OmegaConf.to_container(given), schema, prefix="", root=schema)
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
        if unset := sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{unset[0]} is not set; give it in the YAML file or as {unset[0]}=...")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        where = f" (setting {key})" if key else ""
        raise UserError(f"--config {path}: {str(error).splitlines()[0]}{where}") from error
    assert isinstance(config, schema)
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_keys(given: Any, schema: type, prefix: str, *, root: type) -> None:
    """Refuses a key that no dataclass has, and names the nearest one that exists."""
    if not isinstance(given, dict):
        raise UserError(
            f"setting {prefix.rstrip('.')!r}: expected a group of settings, found {given!r}"
        )
    hints = get_type_hints(schema)
    for key, value in given.items():
        full = f"{prefix}{key}"
        if key not in hints:
            elsewhere = [k for k in _all_keys(root) if k.rsplit(".", 1)[-1] == str(key)]
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            nearest = elsewhere[0] if elsewhere else f"{prefix}{near[0]}"
            raise UserError(f"unknown setting {full!r}; the nearest is {nearest!r}")
        if is_dataclass(hints[key]):
            _check_keys(value, hints[key], prefix=f"{full}.", root=root)


def _all_keys(schema: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            keys += _all_keys(hint, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
