"""The process of a rollout engine: start, pipe, and detection of failures."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from megatron_oprd.rollout.engine import RolloutEngineError

_SECONDS_TO_END = 10


class EngineProcess:
    """A child process with calls (method, arguments) -> (True, result) or (False, traceback).

    `send` and `receive` raise RolloutEngineError if the process ended or exceeds the time limit, in
    seconds; it is then killed.
    """

    def __init__(
        self, module: str, *, environment: Mapping[str, str], descriptors: Sequence[int] = ()
    ) -> None:
        """Starts ``python -m module DESCRIPTOR ...``: the pipe's other end, then those given."""
        self._connection, theirs = Pipe()
        given = [theirs.fileno(), *descriptors]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, given)],
            env=environment,
            pass_fds=given,
            # torchrun and Slurm signal the trainer's process group. The trainer then finishes its
            # step, for which it still needs the engine.
            start_new_session=True,
        )
        theirs.close()
        # Becomes readable when the process ends, even if its children hold the pipe open.
        self._ended = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, message: Any, *, seconds: float) -> None:
        """Sends a message; the limit applies until the child has read it."""
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            self._process.kill()

        # A message larger than the pipe's buffer blocks until it is read; only the reader's end
        # unblocks send().
        alarm = threading.Timer(seconds, end)
        alarm.daemon = True
        alarm.start()
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            if is_late.is_set():
                raise RolloutEngineError(
                    f"the vLLM process {self.pid} has not taken a message for {seconds:.3g} s"
                ) from error
            raise self._failure() from error
        finally:
            alarm.cancel()

    def has_answered(self) -> bool:
        """Whether `receive` would return or raise at once."""
        return bool(wait([self._connection, self._ended], 0))

    def receive(self, *, seconds: float, setting: str) -> Any:
        """Returns a call's result; errors name ``setting`` as the source of the limit."""
        ready = wait([self._connection, self._ended], seconds)
        if not ready:
            self._process.kill()
            raise RolloutEngineError(
                f"the vLLM process {self.pid} has not answered for {seconds:.3g} s ({setting})"
            )
        # An answer sent just before the end is still in the pipe.
        if self._connection not in ready and not self._connection.poll():
            raise self._failure()
        try:
            succeeded, answer = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._failure() from error
        if not succeeded:
            raise RolloutEngineError(f"the vLLM process failed:\n{answer}")
        return answer

    def close(self) -> None:
        """Ends the process, after a few seconds' grace. A second call does nothing."""
        if not self._connection.closed:
            self._connection.close()
            self._exit_code()
            os.close(self._ended)

    def _exit_code(self) -> int:
        try:
            return self._process.wait(timeout=_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _failure(self) -> RolloutEngineError:
        return RolloutEngineError(
            f"the vLLM process ended with exit code {self._exit_code()}; what it said last is in "
            "the output above (a negative code is a signal, -9 often too little memory)"
        )
