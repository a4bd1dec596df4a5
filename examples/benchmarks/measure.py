"""Wall-clock and peak memory of a process on Linux, or of its GPU."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

# Freed tensors go back to the system at once, so that the resident set is what is in use. It makes
# tensors slow to get.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def measure(work: Callable[[], object]) -> tuple[float, int]:
    """Runs ``work``: on a GPU if there is one.

    Returns:
        Seconds, and the bytes that the GPU's tensors grew by at their largest; without a GPU what
        `measure_on_host` gives.
    """
    if not torch.cuda.is_available():
        return measure_on_host(work)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def measure_on_host(work: Callable[[], object]) -> tuple[float, int]:
    """Runs ``work``.

    Returns:
        Seconds, and the bytes that the resident set grew by at its largest. The bytes are exact to
        a few megabytes, and the seconds then too long, in the second process of `time_and_memory`.
    """
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return seconds, _status("VmHWM") - before


def in_a_process(
    script: str, arguments: list[str], *, threads: int, variables: Mapping[str, str] | None = None
) -> dict:
    """Runs a script and returns the JSON that is its last line.

    Args:
        script: The file.
        arguments: Its arguments.
        threads: Threads of a tensor operation.
        variables: Added to the environment.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **(variables or {})}
    out = subprocess.run(
        [sys.executable, script, *arguments], env=environment, check=True, stdout=subprocess.PIPE
    )
    return json.loads(out.stdout.splitlines()[-1])


def time_and_memory(script: str, arguments: list[str], *, threads: int) -> tuple[dict, dict]:
    """Runs a script as `in_a_process` does, twice on the CPU.

    Returns:
        What a run gave whose seconds count, and one whose bytes do.
    """
    timed = in_a_process(script, arguments, threads=threads)
    if torch.cuda.is_available():
        return timed, timed
    return timed, in_a_process(script, arguments, threads=threads, variables=_ALLOCATOR)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
