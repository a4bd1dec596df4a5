"""A process for each call, forked from one interpreter that has made the imports.

The imports of PyTorch, Megatron-Core and transformers take longer than a small run's steps.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")

# The server of forks has one thread, and only imports. A fork of the program itself could inherit a
# lock that another thread holds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "megatron_oprd.train",
        "megatron_oprd.build_bridge",
        "transformers.models.llama.modeling_llama",
        "matplotlib.figure",
    ]
)


def in_processes(call: Callable[[_T], _R], arguments: Iterable[_T], *, jobs: int) -> Iterator[_R]:
    """Calls a function on each argument, ``jobs`` at a time, and yields the results in order.

    An exception of a call is raised here.
    """
    with _CONTEXT.Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap(call, arguments)
        # Leaving the block kills processes, and the last ones may still be cleaning up.
        pool.close()
        pool.join()


def log_to(path: Path) -> None:
    """Sends all output of this process to a file from now on."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
