"""YAML file and command line -> a checked `RunConfig`.

What can be checked without a model is checked here; what needs the models' configurations is
checked in `megatron_oprd.training.plan`.
"""

import difflib
import functools
import keyword
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_oprd.config.aliases import ALIASES
from megatron_oprd.config.checks import check_values
from megatron_oprd.config.ride import with_base_as_teacher
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.config.setting import spelled
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
    return with_base_as_teacher(config)


def load_settings(path: Path, overrides: Sequence[str], schema: type[Settings]) -> Settings:
    """Loads a YAML file as ``schema``, a dataclass, and applies dotted overrides.

    Raises:
        UserError: The file cannot be read, a key is unknown, a value has the wrong type or is not
            one of those allowed, or a required setting is missing.
    """
    try:
        given: Any = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read as YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(given):
        raise UserError(
            f"--config {path} has no settings at its top level; it has to be a YAML file of key: "
            "value"
        )
    for override in overrides:
        if "=" not in override:
            raise UserError(
                f"override {override!r} has no =; it has to be key=value, as in optimizer.lr=1e-5"
            )
        try:
            given.merge_with(OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, TypeError, yaml.YAMLError) as error:
            raise UserError(f"override {override!r}: {_one_line(error)}") from error
    origins = _origins(overrides)
    try:
        root: type = schema  # for mypy, to which type[Settings] has no hash
        given = OmegaConf.create(_field_names(OmegaConf.to_container(given)))
        _check_keys(OmegaConf.to_container(given), schema, prefix="", root=root)
        merged = OmegaConf.merge(_defaults(root), given)
        if unset := sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{unset[0]} is not set; give it in the YAML file or as {unset[0]}=...")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or _failing_key(given, schema)
        key = spelled(key)
        origin = next(
            (where for of, where in origins.items() if key == of or key.startswith(f"{of}.")),
            f"--config {path}",
        )
        value = OmegaConf.select(given, key) if key else None
        if isinstance(value, str | int | float) and "ListConfig" in str(error):
            raise UserError(
                f"{origin}: {key} = {value} has to be a list; write {key}: [{value}] in the file, "
                f"or {key}=[{value}] on the command line"
            ) from error
        where = f" (setting {key})" if key else ""
        raise UserError(f"{origin}: {str(error).splitlines()[0]}{where}") from error
    assert isinstance(config, schema)
    return config


@functools.cache
def _defaults(schema: type) -> Any:
    """The settings of ``schema`` with their defaults, for `OmegaConf.merge`, which copies them.

    Made once, because OmegaConf takes longer to read the dataclasses than for all the rest.
    """
    return OmegaConf.structured(schema)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _origins(overrides: Sequence[str]) -> dict[str, str]:
    """What to call the place that a setting comes from, for those of the command line."""
    return {
        override.partition("=")[0]: f"override {override!r}" for override in reversed(overrides)
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _failing_key(given: Any, schema: type) -> str:
    """The setting that cannot be merged alone, where OmegaConf's error does not name it."""
    found = ""
    group = given
    while OmegaConf.is_dict(group):
        for name in group:
            key = f"{found}.{name}".lstrip(".")
            alone = OmegaConf.create()
            OmegaConf.update(alone, key, group[name], force_add=True)
            try:
                OmegaConf.merge(_defaults(schema), alone)
            except OmegaConfBaseException:
                found, group = key, group[name]
                break
        else:
            break
    return found


def _field_names(given: Any) -> Any:
    """The settings with the names of their fields, see `spelled`."""
    if not isinstance(given, dict):
        return given
    return {
        f"{key}_" if keyword.iskeyword(str(key)) else key: _field_names(value)
        for key, value in given.items()
    }


def _check_keys(given: Any, schema: type, prefix: str, *, root: type) -> None:
    """Refuses a key that no dataclass has, and names the nearest one that exists."""
    if not isinstance(given, dict):
        raise UserError(
            f"setting {prefix.rstrip('.')!r} is {given!r}; it has to be a group of settings"
        )
    hints = get_type_hints(schema)
    for key, value in given.items():
        full = f"{prefix}{key}"
        if key not in hints:
            known = all_keys(root)
            meant = ALIASES.get(str(key))
            if meant in known:
                raise UserError(f"unknown setting {full!r}; here it is called {meant!r}")
            elsewhere = [k for k in known if k.rsplit(".", 1)[-1] == str(key)]
            near = difflib.get_close_matches(str(key), map(spelled, hints), n=1, cutoff=0.0)
            nearest = elsewhere[0] if elsewhere else f"{prefix}{near[0]}"
            raise UserError(f"unknown setting {full!r}; the nearest is {nearest!r}")
        if is_dataclass(hints[key]):
            _check_keys(value, hints[key], prefix=f"{full}.", root=root)


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """The dotted names of all settings of a dataclass."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            keys += all_keys(hint, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{spelled(name)}")
    return keys
