"""The self-test's results as a table and as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megatron_oprd.console import make_console
from megatron_oprd.selftest.cases import Result, Status

_COLORS = {
    Status.OK: "green",
    Status.WARNING: "yellow",
    Status.FAILED: "red",
    Status.SKIPPED: "dim",
    Status.NOT_RUN: "yellow",
}


def print_table(results: Sequence[Result]) -> None:
    """Prints a row for each case."""
    shown = Table(title="self-test")
    for column in ("part", "case", "ranks", "result", "seconds", "found"):
        shown.add_column(column, overflow="fold")
    for one in results:
        status = Text(one.status, style=_COLORS[one.status])
        seconds = f"{one.seconds:.1f}" if one.seconds else ""
        shown.add_row(one.part, one.name, str(one.num_ranks), status, seconds, one.found)
    make_console().print(shown)


def write_json(file: Path, results: Sequence[Result], *, seconds: float) -> None:
    """Writes all results, and the seconds of the whole."""
    content = {"seconds": seconds, "results": [dataclasses.asdict(one) for one in results]}
    file.write_text(json.dumps(content, indent=1) + "\n")
