"""Names a step's phases for profilers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A range of this name in torch's profiler and in Nsight Systems; also a decorator."""
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield
