"""TCP connections from a trainer to a server's workers, for weights that go through host memory.

A worker starts with a secret token that it got through the server. After that only the tensors'
bytes cross, and nothing that is received is executed: what comes next, and how much of it, is said
in vLLM's call of the update.
"""

import hmac
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

_SECONDS_TO_SAY_TOKEN = 5


class TrainerSocket:
    """The trainer's end. Its methods raise OSError if a worker disconnects or times out."""

    def __init__(self, host: str, *, seconds: float) -> None:
        """Listens on a free port."""
        # Timeout for connecting and for each write.
        self._seconds = seconds
        self._stack = ExitStack()
        # host is this machine's address as workers reach it, possibly IPv6.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = self._stack.enter_context(socket.create_server((host, 0), family=family))
        self._workers: list[socket.socket] = []
        # Arguments of `WorkerSocket`, sent to workers through the server.
        self.invitation: dict[str, Any] = {
            "host": host,
            "port": self._listener.getsockname()[1],
            "token": secrets.token_hex(),
            "seconds": seconds,
        }

    def accept(self, num_workers: int, *, in_vain: Callable[[], bool]) -> None:
        """Waits for the workers; ``in_vain`` is polled and tells that they will not connect."""
        end = time.monotonic() + self._seconds
        # Short, so that in_vain is polled.
        self._listener.settimeout(0.2)
        while len(self._workers) < num_workers:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if in_vain() or time.monotonic() > end:
                    raise
                continue
            # Short timeout: a connection that sends nothing must not hold up the workers.
            connection.settimeout(_SECONDS_TO_SAY_TOKEN)
            if self._knows_token(connection):
                connection.settimeout(self._seconds)
                self._stack.enter_context(connection)
                self._workers.append(connection)
            else:
                connection.close()
        self._listener.close()

    def _knows_token(self, connection: socket.socket) -> bool:
        token = self.invitation["token"].encode()
        try:
            return hmac.compare_digest(_read(connection, len(token)), token)
        except OSError:
            return False

    def send(self, tensor: Tensor) -> None:
        """Sends the tensor's bytes to every worker."""
        # As bytes: numpy has no bf16.
        values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for connection in self._workers:
            connection.sendall(values)

    def give_up(self) -> None:
        """Ends a `send` of another thread, which raises OSError."""
        for connection in self._workers:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connections. A second call does nothing."""
        self._stack.close()


class WorkerSocket:
    """A worker's end. Its methods raise OSError if the trainer disconnects or times out."""

    def __init__(self, *, host: str, port: int, token: str, seconds: float) -> None:
        """Connects to the trainer and sends the token; the timeout also applies to reads."""
        self._connection = socket.create_connection((host, port), timeout=seconds)
        self._connection.sendall(token.encode())

    def receive(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """The next tensor of `TrainerSocket.send`, on the host."""
        tensor = torch.empty(shape, dtype=dtype)
        _read_into(self._connection, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def _read(connection: socket.socket, length: int) -> bytes:
    found = bytearray(length)
    _read_into(connection, memoryview(found))
    return bytes(found)


def _read_into(connection: socket.socket, target: memoryview) -> None:
    while target:
        count = connection.recv_into(target)
        if not count:
            raise ConnectionError("the other end left")
        target = target[count:]
