"""Progress of long work, in bytes or other units, with rate and remaining time."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.file_proxy import FileProxy
from tqdm import tqdm

_LINE = (
    "{desc}: {percentage:.0f}% of {total_fmt}{unit}, {rate_noinv_fmt}, {elapsed} since start, "
    "{remaining} left"
)


class Progress:
    """A bar on a terminal; in a log, a line every ten seconds (none for shorter work)."""

    def __init__(
        self,
        description: str,
        total: int,
        *,
        unit: str = "B",  # with a space in front where it is a word
        stream: TextIO | None = None,
        shown: bool = True,  # False on all ranks except one
        clock: Callable[[], float] = time.monotonic,  # in seconds
    ) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._done = 0
        self._stream = stream or sys.stderr
        self._clock = clock
        self._started = clock()
        self._next_line = self._started + 10 if shown else float("inf")
        self._bar: tqdm | None = None
        # During a run the terminal shows the run's live view, which replaces stderr; a bar would
        # destroy it.
        is_bar = self._stream.isatty() and not isinstance(self._stream, FileProxy)
        if shown and is_bar:
            self._bar = tqdm(
                desc=description,
                total=total,
                unit=unit,
                unit_scale=True,
                file=self._stream,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: int) -> None:
        """Reports ``amount`` more as done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._clock() >= self._next_line:
            self._next_line = self._clock() + 10
            print(self._line(), file=self._stream, flush=True)

    def _line(self) -> str:
        return tqdm.format_meter(
            self._done,
            self._total,
            self._clock() - self._started,
            prefix=self._description,
            unit=self._unit,
            unit_scale=True,
            bar_format=_LINE,
        )
