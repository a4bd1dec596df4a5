"""Where tables are printed."""

from typing import Any

from rich.console import Console

_WIDTH_OF_A_LOG = 160


def make_console(**options: Any) -> Console:
    """A console as wide as the terminal; a log, which has no width, gets the widest tables."""
    console = Console(**options)
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_LOG, **options)
