"""Ends a run early at the end of a step, on a signal or after a time."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from megatron_oprd.config.schema import CheckpointConfig
from megatron_oprd.parallel.context import ParallelContext

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision of all ranks at the end of a step."""

    stops_on: str | None  # the reason to stop; None goes on
    saves: bool  # whether a checkpoint is due by the clock


class StopRequests:
    """Records signals and the elapsed time inside its block.

    A signal from a batch system (SIGTERM, or SIGUSR1 some time before it) would otherwise end the
    process at once and lose the steps since the last checkpoint. Further signals only count as the
    first: torchrun passes on signals that its processes may have received themselves.
    """

    def __init__(self, settings: CheckpointConfig, context: ParallelContext) -> None:
        self._settings = settings
        self._context = context
        self._signal = 0
        self._started = self._saved = time.monotonic()

    def __enter__(self) -> Self:
        # Python allows only the main thread to set handlers; tests also run workers in other
        # threads.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

    def saved(self) -> None:
        """Restarts the clock of ``save_interval_minutes``."""
        self._saved = time.monotonic()

    def agree(self) -> Decision:
        """The decision at the end of a step, the same on every rank. Every rank has to call."""
        now = time.monotonic()
        leads = self._context.rank == 0

        # Rank 0's clock decides for all.
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
        # A signal counts whichever rank received it.
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


@contextlib.contextmanager
def helpers_outlive_signals() -> Iterator[None]:
    """Processes that are started inside do not end on the signals that stop a run.

    torchrun and some batch systems signal a rank's children, too, also those that its last
    checkpoint needs. This process gets such a signal at the end of the block at the latest.
    """
    # Its start would unblock SIGTERM; once it runs, it stays.
    resource_tracker.ensure_running()
    # Children inherit what is blocked; handlers they would lose.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
