"""A run on the terminal: a live view of its last step; in a log a line a step."""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from megatron_oprd.console import make_console
from megatron_oprd.training.samples import TextSample
from megatron_oprd.training.step_line import step_fields, step_line

_STEPS_OF_ESTIMATE = 20


class TerminalLogger:
    """Shows each step on stderr.

    Args:
        first_step: The step that the process begins with.
        num_steps: Steps of the whole run.
        clock: Seconds.
    """

    def __init__(
        self, *, first_step: int, num_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_steps = num_steps
        self._clock = clock
        self._bar = ProgressBar(total=num_steps, completed=first_step, width=60)
        # When the last steps ended: evaluations and checkpoints between steps count as well.
        self._ends: deque[float] = deque(maxlen=_STEPS_OF_ESTIMATE + 1)
        self._live: Live | None = None
        if sys.stderr.isatty():
            # While it is shown, other lines on stderr appear above it.
            self._live = Live(self._bar, console=make_console(stderr=True), redirect_stdout=False)
            self._live.start()

    def log(self, metrics: dict[str, Any]) -> None:
        """Shows a step."""
        now = self._clock()
        if not self._ends:
            # Not since this object was made: engines start in between.
            self._ends.append(now - metrics["seconds_step"])
        self._ends.append(now)
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        steps_left = self._num_steps - metrics["step"] - 1
        fields = step_fields(metrics, steps_left=steps_left, seconds_left=seconds * steps_left)
        if self._live is None:
            print(step_line(fields), file=sys.stderr, flush=True)
            return
        self._bar.update(metrics["step"] + 1)
        table = Table.grid(padding=(0, 2))
        for name, value in fields.items():
            table.add_row(name, value)
        self._live.update(Group(self._bar, table))

    def log_samples(self, step: int, samples: Sequence[TextSample]) -> None:
        """Shows nothing: responses are long."""

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Shows nothing: the loop says it, also without this logger."""

    def close(self) -> None:
        """Leaves the last step on the terminal."""
        if self._live is not None:
            self._live.stop()
