"""Profiles some steps of a run on some ranks."""

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_oprd.config.schema import ProfileConfig, RunConfig
from megatron_oprd.errors import UserError

_ROWS = 60  # of the table of operations
_MEMORY_EVENTS = 1_000_000  # allocations and frees that are kept, the newest ones


def check_profile(config: RunConfig, *, num_ranks: int, has_gpu: bool) -> None:
    """Refuses a profile that this launch cannot make.

    Raises:
        UserError: A rank does not exist, or the kind needs a GPU.
    """
    profile = config.profile
    if profile.start is None:
        return
    if max(profile.ranks) >= num_ranks:
        raise UserError(
            f"profile.ranks = {profile.ranks} has rank {max(profile.ranks)}, but the run has "
            f"{num_ranks}; give ranks from 0 to {num_ranks - 1}"
        )
    if profile.kind != "torch" and not has_gpu:
        raise UserError(
            f"profile.kind = {profile.kind} needs a GPU, and this machine has none; use torch"
        )


class Profiler:
    """Records the steps from ``profile.start`` to before ``profile.end`` on this rank.

    Args:
        settings: The group ``profile``.
        output_dir: The run's folder; files go to ``profile/`` in it.
        rank: This rank.
    """

    def __init__(self, settings: ProfileConfig, output_dir: Path, *, rank: int) -> None:
        self._settings = settings
        self._rank = rank
        self._is_chosen = settings.start is not None and rank in settings.ranks
        self._path = output_dir / "profile" / f"step_{settings.start}_rank_{rank}"
        self._torch: Any = None
        self._is_recording = False

    def begin(self, step: int) -> None:
        """Starts recording if ``step`` is the first one."""
        # A run that resumes in the middle has no first step to record from.
        if not self._is_chosen or step != self._settings.start:
            return
        self._is_recording = True
        match self._settings.kind:
            case "torch":
                activities = [torch.profiler.ProfilerActivity.CPU]
                if torch.cuda.is_available():
                    activities.append(torch.profiler.ProfilerActivity.CUDA)
                self._torch = torch.profiler.profile(activities=activities)
                self._torch.start()
            case "nsys":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            case "memory":
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)

    def end(self, step: int) -> None:
        """Writes the record if ``step`` is the last one."""
        if self._is_recording and step + 1 == self._settings.end:
            self.close()

    def close(self) -> None:
        """Writes what was recorded; also of a run that ends before the last step."""
        if not self._is_recording:
            return
        self._is_recording = False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        match self._settings.kind:
            case "torch":
                self._torch.stop()
                self._torch.export_chrome_trace(f"{self._path}.json.gz")
                by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
                table = self._torch.key_averages().table(sort_by=by, row_limit=_ROWS)
                self._path.with_suffix(".txt").write_text(table)
            case "nsys":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            case "memory":
                torch.cuda.memory._dump_snapshot(f"{self._path}.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
        # Not `say`, which prints on rank 0 only.
        print(
            f"profile.kind = {self._settings.kind}: rank {self._rank} has recorded its steps",
            file=sys.stderr,
            flush=True,
        )
