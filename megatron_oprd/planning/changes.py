"""Changes of a run's settings that a plan proposes."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from megatron_oprd.config.checks import check_values
from megatron_oprd.config.schema import RunConfig


@dataclass(frozen=True)
class Change:
    """Settings that are changed together, as (dotted name, value)."""

    settings: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        """The settings as they are written on the command line."""
        return " ".join(f"{key}={_as_written(value)}" for key, value in self.settings)

    def is_in(self, config: RunConfig) -> bool:
        """Whether the settings have these values already."""
        return all(attrgetter(key)(config) == value for key, value in self.settings)

    def new_in(self, config: RunConfig) -> "Change":
        """Those of the settings that have other values now."""
        return Change(tuple(one for one in self.settings if attrgetter(one[0])(config) != one[1]))


def changed(config: RunConfig, changes: Iterable[Change]) -> RunConfig:
    """A copy of the configuration with the changes; raises UserError if they are incompatible."""
    result = unchecked(config, changes)
    check_values(result)
    return result


def unchecked(config: RunConfig, changes: Iterable[Change]) -> RunConfig:
    """A copy of the configuration with the changes, compatible or not."""
    result = copy.copy(config)
    copied: set[str] = set()
    for change in changes:
        for key, value in change.settings:
            *groups, name = key.split(".")
            owner: Any = result
            for depth, group in enumerate(groups, start=1):
                path = ".".join(groups[:depth])
                # Only the groups that change: a search makes thousands of copies.
                if path not in copied:
                    setattr(owner, group, copy.copy(getattr(owner, group)))
                    copied.add(path)
                owner = getattr(owner, group)
            setattr(owner, name, value)
    return result


def _as_written(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
