"""Ending a run before its last step: on a signal, or after a time, at the end of a step."""

import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from megatron_oprd.config.schema import CheckpointConfig
from megatron_oprd.parallel.context import ParallelContext

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What all ranks do at the end of a step.

    Attributes:
        stops_on: Why the run ends here; None if it goes on.
        saves: Whether a checkpoint is due by the clock.
    """

    stops_on: str | None
    saves: bool


class StopRequests:
    """Takes note of signals inside its block, and of the time.

    A signal that a batch system sends (SIGTERM, or SIGUSR1 some time before it) would end the
    process at once and lose the steps since the last checkpoint. A second one is taken note of like
    the first: torchrun passes a signal on that its processes may have got themselves.

    Args:
        settings: Of checkpoints.
        context: This rank's place.
    """

    def __init__(self, settings: CheckpointConfig, context: ParallelContext) -> None:
        self._settings = settings
        self._context = context
        self._signal = 0
        self._started = self._saved = time.monotonic()

    def __enter__(self) -> Self:
        # Python lets the main thread only set handlers; tests run workers in other threads, too.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

    def saved(self) -> None:
        """A checkpoint was written just now."""
        self._saved = time.monotonic()

    def agree(self) -> Decision:
        """What to do at the end of a step; the same on every rank, each of which has to call.

        The clock is rank 0's; a signal counts whichever ranks have got it.
        """
        now = time.monotonic()
        leads = self._context.rank == 0

        def is_due(minutes: float | None, since: float) -> int:
            return int(leads and minutes is not None and now - since >= 60 * minutes)

        votes = torch.tensor(
            [
                self._signal,
                is_due(self._settings.exit_after_minutes, self._started),
                is_due(self._settings.save_interval_minutes, self._saved),
            ],
            device=self._context.device,
        )
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        number, exits, saves = votes.tolist()
        reason = None
        if number:
            reason = signal.Signals(number).name
        elif exits:
            reason = f"checkpoint.exit_after_minutes = {self._settings.exit_after_minutes:g}"
        return Decision(stops_on=reason, saves=bool(saves))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
