"""Writes docs/configuration.md: ``python -m megatron_oprd.reference``.

A test compares the file with `reference`, so run this after every change of a setting.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_oprd.bridge_build.config import BuildBridgeConfig
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.config.setting import Rules, When, default_of, rules_of, shown, spelled

FILE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

_NO_RULES = Rules()
_HEAD = """# Configuration

`python -m megatron_oprd.reference` generates this file from `megatron_oprd/config/schema.py`,
`megatron_oprd/config/engines/` and `megatron_oprd/bridge_build/config.py`. Edit those, not this
file.

A setting is given in the YAML file of `--config`, or as `group.setting=value` on the command line.
A setting that is not given has its default; a required setting has none. The rules of a setting are
its range and the settings with which it has an effect: "only with" some, or "not with" some. A
value that is out of range or has no effect is refused before anything runs. Numbers are finite.

"""


def main() -> None:
    """Writes the file."""
    FILE.write_text(reference())


def reference() -> str:
    """The text of docs/configuration.md."""
    run = list(_sections(RunConfig))
    of_run = {schema for _, schema, _ in run}
    build = [one for one in _sections(BuildBridgeConfig) if one[1] not in of_run]
    shared = [
        f"`{name}`" for name, hint in get_type_hints(BuildBridgeConfig).items() if hint in of_run
    ]
    return (
        _HEAD
        + "## Training: `megatron_oprd.train` and `megatron_oprd.plan`\n\n"
        + "\n".join(_section(*one) for one in run)
        + "\n## Building a bridge: `megatron_oprd.build_bridge`\n\n"
        + f"The groups {', '.join(shared)} are those of training.\n\n"
        + "\n".join(_section(*one) for one in build)
    )


def _sections(
    schema: type, prefix: str = "", rules: Rules = _NO_RULES
) -> Iterator[tuple[str, type, Rules]]:
    """A group of settings and the groups in it: each with its prefix, its class and its rules."""
    yield prefix, schema, rules
    hints = get_type_hints(schema)
    for declared in fields(schema):
        hint = hints[declared.name]
        if (inner := _group(hint)) is not None:
            brackets = "[]" if get_origin(hint) is list else ""
            yield from _sections(inner, f"{prefix}{declared.name}{brackets}.", rules_of(declared))


def _group(hint: Any) -> type | None:
    """The class of a group of settings, or of a list of groups; None for a setting."""
    if get_origin(hint) is list:
        (hint,) = get_args(hint)
    return hint if is_dataclass(hint) and isinstance(hint, type) else None


def _section(prefix: str, schema: type, of_group: Rules) -> str:
    meanings, hints = _meanings(schema), get_type_hints(schema)
    rows = []
    for declared in fields(schema):
        name, hint = declared.name, hints[declared.name]
        if _group(hint) is not None:
            continue
        rules, default = rules_of(declared), default_of(declared)
        is_required = default == "???" or (rules.not_empty and not default)
        cells = (
            f"`{prefix}{spelled(name)}`",
            _type(hint),
            "required" if is_required else _code(shown(default)),
            _rules(rules, is_list="list" in str(hint)),
            meanings[name].replace("``", "`"),
        )
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    title = f"### {_code(prefix.rstrip('.'))}\n\n" if prefix else ""
    about = inspect.cleandoc(schema.__doc__ or "").replace("``", "`")
    if condition := _conditions(of_group):
        about += f"\n\nThe settings of this group have an effect {condition}."
    return (
        f"{title}{about}\n\n"
        "| setting | type | default | rules | meaning |\n"
        "|---|---|---|---|---|\n" + "".join(rows)
    )


def _meanings(schema: type) -> dict[str, str]:
    """The strings below the fields of a class and its bases, which Python itself does not keep."""
    meanings = {}
    for one in filter(is_dataclass, schema.__mro__):
        (definition,) = ast.parse(inspect.getsource(one)).body
        assert isinstance(definition, ast.ClassDef)
        for statement, below in zip(definition.body, definition.body[1:], strict=False):
            match statement, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    meanings[name] = " ".join(text.split())
    return meanings


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(_code(value) for value in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {_type(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    if members := get_args(hint):
        kinds = [_type(member) for member in members if member is not NoneType]
        return ", or ".join([*kinds, *(["`null`"] if NoneType in members else [])])
    return hint.__name__


def _rules(rules: Rules, *, is_list: bool) -> str:
    parts = []
    if rules.has_range:
        # The head of the file says that numbers are finite.
        reason = f" ({rules.because})" if rules.because else ""
        parts.append("each " * is_list + rules.range_in_words(of_floats=False) + reason)
    if rules.not_empty:
        parts.append("not empty")
    if condition := _conditions(rules):
        parts.append(condition)
    return "; ".join(parts)


def _conditions(rules: Rules) -> str:
    parts = []
    if rules.only_with:
        parts.append(f"only with {' or '.join(_condition(one) for one in rules.only_with)}")
    if rules.no_effect_with:
        parts.append(f"not with {' or '.join(_condition(one) for one in rules.no_effect_with)}")
    return ", ".join(parts)


def _condition(condition: When) -> str:
    values = [shown(value) for value in condition.values]
    if len(values) == 1:
        return _code(f"{condition.setting} = {values[0]}")
    return " = ".join(
        part for part in (_code(condition.setting), " or ".join(map(_code, values))) if part
    )


def _code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    main()
