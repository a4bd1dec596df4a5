"""Runs a vLLM server, and leaves nothing of it: ``server_guard.py PARENT COMMAND ...``.

A server is several processes, and when the first of them is killed the others go on and keep their
GPUs. This one starts the server in a process group of its own, and kills what is left of the group
when the server has ended, at a SIGINT, and some seconds after a SIGTERM or the end of the parent,
in which the server may end itself. It is run as a file and imports nothing of the package, so that
it is small and there at once.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

SECONDS_TO_END = 10
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def guard(parent: int, command: Sequence[str]) -> int:
    """Runs the command while the parent lives; its exit code, 128 + n where signal n ended it.

    Args:
        parent: The parent's process id.
        command: Program and arguments.
    """
    # Blocked and waited for, so that none comes between two lines.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _signal_when_parent_ends(signal.SIGTERM)
    if os.getppid() != parent:
        return 128 + signal.SIGTERM
    server = subprocess.Popen(command, process_group=0, preexec_fn=_prepare)
    while not _has_ended(server.pid):
        if (received := signal.sigwait(_SIGNALS)) == signal.SIGTERM:
            server.terminate()
            end = time.monotonic() + SECONDS_TO_END
            while not _has_ended(server.pid) and (left := end - time.monotonic()) > 0:
                signal.sigtimedwait([signal.SIGCHLD], left)
        if received != signal.SIGCHLD:
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    code = server.wait()
    return code if code >= 0 else 128 - code


def _prepare() -> None:
    """In the server, before its program starts."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    _signal_when_parent_ends(signal.SIGKILL)


def _signal_when_parent_ends(number: int) -> None:
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; it stays there, so that its process group's id is not reused."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
