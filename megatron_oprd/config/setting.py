"""The declaration of a setting: its default, its range, and the settings it has an effect with."""

import copy
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

_RULES = "rules"


@dataclass(frozen=True, kw_only=True)
class When:
    """A condition on another setting.

    Attributes:
        setting: The other setting, with its groups.
        values: Values that meet the condition. Without any, every value but the default meets it.
        instead: For ``no_effect_with``: advice to the user.
    """

    setting: str
    values: tuple[Any, ...] = ()
    instead: str = "leave one of the two out"


def when(setting: str, *values: Any, instead: str = When.instead) -> When:
    """A condition that ``setting`` has one of ``values``; see `When`."""
    return When(setting=setting, values=values, instead=instead)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules for a setting's value, which hold whatever the models are.

    A range holds for a number and for each number of a list. None is in every range, NaN and the
    infinities are in none.

    Attributes:
        ge: The value is at least this.
        gt: The value is above this.
        le: The value is at most this.
        lt: The value is below this.
        because: Reason for the range, or values to use instead.
        not_empty: Content that an empty value lacks. Empty values are allowed if this is empty.
        only_with: Conditions of which one has to be met for the setting to have an effect.
        no_effect_with: Conditions that keep the setting from having an effect.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    because: str = ""
    not_empty: str = ""
    only_with: tuple[When, ...] = ()
    no_effect_with: tuple[When, ...] = ()

    @property
    def has_range(self) -> bool:
        """Whether numbers are bounded."""
        return any(bound is not None for bound in (self.ge, self.gt, self.le, self.lt))

    def admits(self, value: Any) -> bool:
        """Whether a value lies in the range."""
        if isinstance(value, list):
            return all(self.admits(item) for item in value)
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if not self.has_range or value is None:
            return True
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def range_in_words(self, *, of_floats: bool) -> str:
        """The range, as in "above 0, and finite"."""
        if self.ge is not None and self.le is not None:
            return f"from {self.ge} to {self.le}"
        bounds = (
            ("at least", self.ge), ("above", self.gt), ("at most", self.le), ("below", self.lt),
        )  # fmt: skip
        words = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
        if of_floats and self.le is None and self.lt is None:
            return f"{words}, and finite" if words else "finite"
        return words


def setting(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    because: str = "",
    not_empty: str = "",
    only_with: When | tuple[When, ...] = (),
    no_effect_with: When | tuple[When, ...] = (),
) -> Any:
    """Declares a field of a group of settings; `Rules` describes the arguments.

    The string below the field is its meaning, from which docs/configuration.md is generated.
    """
    rules = Rules(
        ge=ge,
        gt=gt,
        le=le,
        lt=lt,
        because=because,
        not_empty=not_empty,
        only_with=only_with if isinstance(only_with, tuple) else (only_with,),
        no_effect_with=no_effect_with if isinstance(no_effect_with, tuple) else (no_effect_with,),
    )
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata={_RULES: rules})
    return field(default=default, metadata={_RULES: rules})


def group(settings: type, *, only_with: When | tuple[When, ...] = ()) -> Any:
    """Declares a group of settings, none of which has an effect without ``only_with``."""
    conditions = only_with if isinstance(only_with, tuple) else (only_with,)
    return field(default_factory=settings, metadata={_RULES: Rules(only_with=conditions)})


def spelled(path: str) -> str:
    """The setting of a field, or of fields with full stops between them, as users write it.

    A field cannot have one of Python's keywords as its name, and has an underscore behind it.
    """
    return ".".join(part.removesuffix("_") for part in path.split("."))


def rules_of(declared: Any) -> Rules:
    """The rules of a dataclass field that `setting` or `group` declared."""
    return declared.metadata[_RULES]


def default_of(declared: Any) -> Any:
    """The default of a dataclass field."""
    return declared.default if declared.default is not MISSING else declared.default_factory()


@dataclass(frozen=True, kw_only=True)
class Found:
    """A setting as it was found in a configuration.

    Attributes:
        key: Its name, with its groups.
        value: Its value.
        default: Its default.
        rules: Its own rules.
        of_groups: The rules of the groups that it is in, the outermost first.
    """

    key: str
    value: Any
    default: Any
    rules: Rules
    of_groups: tuple[Rules, ...] = ()


def settings_of(
    config: Any, prefix: str = "", of_groups: tuple[Rules, ...] = ()
) -> Iterator[Found]:
    """All settings of a group and of the groups in it, lists of groups included.

    Args:
        config: The group, an instance of a dataclass.
        prefix: Name of the group, with a full stop; empty for a whole configuration.
        of_groups: The rules of the group and of those that it is in.
    """
    for declared in fields(config):
        key, rules = f"{prefix}{spelled(declared.name)}", rules_of(declared)
        value = getattr(config, declared.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{key}.", (*of_groups, rules))
            continue
        yield Found(
            key=key, value=value, default=default_of(declared), rules=rules, of_groups=of_groups
        )
        for number, item in enumerate(value if isinstance(value, list) else ()):
            if is_dataclass(item):
                yield from settings_of(item, f"{key}[{number}].", of_groups)


def shown(value: Any) -> str:
    """A setting's value as the user would write it, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and not (value and value.isprintable()):
        return repr(value)
    return str(value)
