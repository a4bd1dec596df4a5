"""TCP protocol between a trainer and its engine's workers, for the weight sync.

Both sides send lines of JSON; each tensor is a line with name and shape, followed by its bytes. No
received data is executed. A worker starts with a secret token that it got through the engine.
"""

import hmac
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

_SECONDS_TO_SAY_TOKEN = 5


class TrainerSocket:
    """The trainer's end. Its methods raise OSError if a worker disconnects or times out."""

    def __init__(self, host: str, *, seconds: float) -> None:
        """Listens on a free port."""
        # Timeout for connecting and for each read or write.
        self._seconds = seconds
        self._stack = ExitStack()
        # host is this machine's address as workers reach it, possibly IPv6.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = self._stack.enter_context(socket.create_server((host, 0), family=family))
        self._workers: list[_Worker] = []
        # Arguments of `WorkerSocket`, sent to workers through the engine.
        self.invitation: dict[str, Any] = {
            "host": host,
            "port": self._listener.getsockname()[1],
            "token": secrets.token_hex(),
            "seconds": seconds,
        }

    def __enter__(self) -> "TrainerSocket":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

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
            worker = _Worker(connection, connection.makefile("rb"))
            if self._knows_token(worker):
                connection.settimeout(self._seconds)
                self._stack.enter_context(connection)
                self._stack.enter_context(worker.file)
                self._workers.append(worker)
            else:
                worker.file.close()
                connection.close()

    def _knows_token(self, worker: "_Worker") -> bool:
        token = f"{self.invitation['token']}\n".encode()
        try:
            return hmac.compare_digest(worker.file.readline(len(token)), token)
        except OSError:
            return False

    def tell(self, message: Any, data: memoryview | None = None) -> None:
        """Sends a message, and optionally bytes after it, to every worker."""
        line = f"{json.dumps(message)}\n".encode()
        for worker in self._workers:
            worker.connection.sendall(line)
            if data is not None:
                worker.connection.sendall(data)

    def hear(self) -> list[Any]:
        """Receives one message from every worker."""
        return [_message(worker.file) for worker in self._workers]


class WorkerSocket:
    """A worker's end. Its methods raise OSError if the trainer disconnects or times out."""

    def __init__(self, *, host: str, port: int, token: str, seconds: float) -> None:
        """Connects to the trainer and sends the token; the timeout also applies to messages."""
        self._connection = socket.create_connection((host, port), timeout=seconds)
        # Answers are short lines that the trainer waits for; Nagle's algorithm would delay them.
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = cast(BufferedReader, self._connection.makefile("rb", buffering=2**20))
        self._connection.sendall(f"{token}\n".encode())

    def __enter__(self) -> "WorkerSocket":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._connection.close()

    def hear(self) -> Any:
        """Receives the trainer's next message."""
        return _message(self._file)

    def read_into(self, target: memoryview) -> None:
        """Reads the bytes after a message."""
        while target:
            count = self._file.readinto(target)
            if not count:
                raise ConnectionError("the other end left in the middle")
            target = target[count:]

    def tell(self, message: Any) -> None:
        """Sends the trainer a message."""
        self._connection.sendall(f"{json.dumps(message)}\n".encode())


@dataclass(frozen=True)
class _Worker:
    connection: socket.socket
    file: BufferedReader


def _message(file: BufferedReader) -> Any:
    line = file.readline()
    if not line.endswith(b"\n"):
        raise ConnectionError("the other end left")
    return json.loads(line)


def send_weights(
    stream: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype
) -> Iterator[tuple[Any, memoryview | None]]:
    """The messages (`TrainerSocket.tell`) that send tensors, converted to ``dtype`` on the way."""
    for name, tensor in stream:
        values = tensor.detach().to(dtype).cpu().contiguous().reshape(-1)
        head = {"name": name, "shape": list(tensor.shape)}
        # As bytes: numpy has no bf16.
        yield head, values.view(torch.uint8).numpy().data
    yield None, None


def receive_weights(trainer: WorkerSocket, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of `send_weights`, on the host."""
    while (head := trainer.hear()) is not None:
        tensor = torch.empty(head["shape"], dtype=dtype)
        trainer.read_into(tensor.reshape(-1).view(torch.uint8).numpy().data)
        yield head["name"], tensor
