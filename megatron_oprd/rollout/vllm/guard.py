"""Runs a vLLM server and ends all of its processes: ``server_guard.py PARENT COMMAND ...``.

If a server's main process is killed, its other processes continue and keep their GPUs. The guard
therefore starts the server in its own process group and kills the group's remaining processes when
the server exits; on SIGINT at once; on SIGTERM or the parent's end after a grace period. It runs as
a file and imports nothing from the package, to be small and start at once.
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
    """Runs the command while the parent process lives.

    Returns the command's exit code, or 128 + n if signal n ended it.
    """
    # Blocked, and received by sigwait: no signal can arrive between a check and the wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _signal_when_parent_ends(signal.SIGTERM)
    # The parent may have ended before the death signal was set.
    if os.getppid() != parent:
        return 128 + signal.SIGTERM
    # If the guard itself is killed, the kernel kills the server (_prepare).
    server = subprocess.Popen(command, process_group=0, preexec_fn=_prepare)
    while not _has_ended(server.pid):
        if (received := signal.sigwait(_SIGNALS)) == signal.SIGTERM:
            server.terminate()
            end = time.monotonic() + SECONDS_TO_END
            while not _has_ended(server.pid) and (left := end - time.monotonic()) > 0:
                signal.sigtimedwait([signal.SIGCHLD], left)
        # SIGCHLD: the loop's condition checks whether the server ended.
        if received != signal.SIGCHLD:
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    code = server.wait()
    return code if code >= 0 else 128 - code


def _prepare() -> None:
    """Runs in the server process before its program starts."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    _signal_when_parent_ends(signal.SIGKILL)


def _signal_when_parent_ends(number: int) -> None:
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; leaves it unreaped, so that its group id is not reused."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
