"""Where tables are printed."""

import os
from typing import Any

from rich.console import Console

_WIDTH_OF_A_LOG = 160


def make_console(**options: Any) -> Console:
    """A console as wide as the terminal; a log, which has no width, gets the widest tables.

    The variable COLUMNS sets the width of both. Text is printed as it is, without rich's markup: a
    message that names an extra, as in megatron-oprd[te], would lose it.
    """
    options = {"markup": False, **options}
    console = Console(**options)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(width=_WIDTH_OF_A_LOG, **options)
