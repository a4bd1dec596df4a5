"""A process that has done a test rank's imports, and forks ranks that start at once.

``python -m tests.helpers.rank_server FD [MODULE ...]``: imports the modules and takes one start
after another over the connection FD: a job file, and environment and log of each rank. It answers
with the ranks' exit codes when all have ended, one has failed, or a message says to stop (`STOP`);
whatever then still runs is killed. When the connection's other end closes, the server kills its
ranks and ends.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

STOP = "stop"
# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1


def serve(connection: Connection, modules: Sequence[str]) -> None:
    """Takes starts until the connection closes. In a forked rank, runs the job and returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest decides what ends the ranks
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "a lock that another thread holds would stay locked in a fork"
    gc.freeze()  # what is imported stays, and stays shared between the ranks
    gc.enable()
    while True:
        try:
            message = connection.recv()
            if message == STOP:  # it crossed the answer
                continue
            job_file, ranks = message
        except EOFError:
            return
        children = []
        for environment, log in ranks:
            child = os.fork()
            if child == 0:
                connection.close()
                _become_rank(environment, log)
                run_job(Path(job_file))
                return
            _group(child)
            children.append(child)
        try:
            codes = _wait(children, connection)
        except EOFError:
            return
        connection.send(codes)


def run_job(job_file: Path) -> None:
    """Runs all cases of a job in this rank; each has a port at which its ranks meet."""
    job = json.loads(job_file.read_text())
    worker = importlib.import_module(f"tests.workers.{job['worker']}")
    for case, port in zip(job["cases"], job["ports"], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        worker.run(case, job_file.parent)


def _become_rank(environment: dict[str, str], log: str) -> None:
    _group(0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    # As in a process of its own, which draws its own seed. Python's generator does so at a fork.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _group(process: int) -> None:
    """Makes a rank a group with the processes it starts, as Megatron does to write checkpoints.

    Called on either side of a fork, so that it is done whichever goes on first.
    """
    os.setpgid(process, process)


def _wait(children: list[int], connection: Connection) -> list[int | None]:
    """The exit codes, None for a rank that still ran in the end; leaves no process of any."""
    codes: dict[int, int | None] = dict.fromkeys(children)
    try:
        while None in codes.values() and not any(codes.values()):
            if connection.poll(0.01):
                assert connection.recv() == STOP
                break
            for child in [child for child, code in codes.items() if code is None]:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
    finally:
        for child, code in codes.items():
            with contextlib.suppress(ProcessLookupError):  # a group that has ended by itself
                os.killpg(child, signal.SIGKILL)
            if code is None:
                os.waitpid(child, 0)
    return list(codes.values())


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2:])
