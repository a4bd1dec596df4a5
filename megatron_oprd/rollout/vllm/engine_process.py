"""A rollout engine's process: started here, talked to over a pipe, noticed when it fails."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from megatron_oprd.rollout.engine import RolloutEngineError

_SECONDS_TO_END = 10


class EngineProcess:
    """A child that answers calls: (method, arguments) -> (True, result) or (False, traceback)."""

    def __init__(self, module: str, *, environment: Mapping[str, str]) -> None:
        """Starts ``python -m module DESCRIPTOR``, the pipe's other end being the descriptor.

        Args:
            module: The child's entry point.
            environment: All of its environment.
        """
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            # torchrun and Slurm signal the trainer's group: it ends at its step's end, and needs
            # the engine until then.
            start_new_session=True,
        )
        theirs.close()
        # Readable when the process has ended, whoever else still has its end of the pipe.
        self._ended = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, message: Any, *, seconds: float) -> None:
        """Sends a message.

        Raises:
            RolloutEngineError: The process has ended. One that does not take the message in time
                is ended.
        """
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            self._process.kill()

        # A message larger than the pipe waits for its reader, and nothing but the reader's end
        # ends that.
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
        """Whether `receive` would not have to wait, be it that the process has ended."""
        return bool(wait([self._connection, self._ended], 0))

    def receive(self, *, seconds: float, setting: str) -> Any:
        """What a call returned.

        Args:
            seconds: How long to wait for it.
            setting: Where that comes from, as the error names it.

        Raises:
            RolloutEngineError: It ended, failed, or did not answer in time; then it is ended.
        """
        ready = wait([self._connection, self._ended], seconds)
        if not ready:
            self._process.kill()
            raise RolloutEngineError(
                f"the vLLM process {self.pid} has not answered for {seconds:.3g} s ({setting})"
            )
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
        """Ends the process, which gets some seconds to do so itself. A second call does nothing."""
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
