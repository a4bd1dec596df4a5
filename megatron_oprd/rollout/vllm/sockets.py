"""The TCP conversation between a trainer and its engine's workers, by which weights travel.

Lines of JSON go both ways; of each tensor the workers get name, shape and bytes. Nothing that is
received is executed. A worker begins with a token that only the engine knows.
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
    """The trainer's end: waits for workers, and tells all of them the same."""

    def __init__(self, host: str, *, seconds: float) -> None:
        """Listens on a free port.

        Args:
            host: This machine's address, as the workers see it.
            seconds: How long a worker may take to call, or for a part of the conversation.

        Raises:
            OSError: There is no port.
        """
        self._seconds = seconds
        self._stack = ExitStack()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = self._stack.enter_context(socket.create_server((host, 0), family=family))
        self._workers: list[_Worker] = []
        # What `WorkerSocket` needs to call.
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
        """Waits for so many workers.

        Args:
            num_workers: How many.
            in_vain: Asked now and then; true if they will not come.

        Raises:
            OSError: They do not come.
        """
        end = time.monotonic() + self._seconds
        self._listener.settimeout(0.2)
        while len(self._workers) < num_workers:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if in_vain() or time.monotonic() > end:
                    raise
                continue
            # A mute stranger must not keep the others waiting.
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
        """Tells every worker a message, and bytes behind it.

        Raises:
            OSError: A worker left, or takes too long.
        """
        line = f"{json.dumps(message)}\n".encode()
        for worker in self._workers:
            worker.connection.sendall(line)
            if data is not None:
                worker.connection.sendall(data)

    def hear(self) -> list[Any]:
        """What every worker says next.

        Raises:
            OSError: A worker left, or takes too long.
        """
        return [_message(worker.file) for worker in self._workers]


class WorkerSocket:
    """A worker's end."""

    def __init__(self, *, host: str, port: int, token: str, seconds: float) -> None:
        """Calls the trainer.

        Args:
            host: Where it listens.
            port: Where it listens.
            token: What it wants to hear.
            seconds: How long it may take for a part of the conversation.

        Raises:
            OSError: It is not there.
        """
        self._connection = socket.create_connection((host, port), timeout=seconds)
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
        """The trainer's next message.

        Raises:
            OSError: It left, or takes too long.
        """
        return _message(self._file)

    def read_into(self, target: memoryview) -> None:
        """The bytes that come behind a message.

        Raises:
            OSError: The trainer left, or takes too long.
        """
        while target:
            count = self._file.readinto(target)
            if not count:
                raise ConnectionError("the other end left in the middle")
            target = target[count:]

    def tell(self, message: Any) -> None:
        """Tells the trainer a message.

        Raises:
            OSError: It left.
        """
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
    workers: TrainerSocket, stream: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype
) -> None:
    """Sends every worker the stream's tensors, converted on the way.

    Raises:
        OSError: A worker left, or takes too long.
    """
    for name, tensor in stream:
        values = tensor.detach().to(dtype).cpu().contiguous().reshape(-1)
        head = {"name": name, "shape": list(tensor.shape)}
        workers.tell(head, values.view(torch.uint8).numpy().data)
    workers.tell(None)


def receive_weights(trainer: WorkerSocket, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `send_weights` sends, on the host.

    Raises:
        OSError: The trainer left in the middle, or takes too long.
    """
    while (head := trainer.hear()) is not None:
        tensor = torch.empty(head["shape"], dtype=dtype)
        trainer.read_into(tensor.reshape(-1).view(torch.uint8).numpy().data)
        yield head["name"], tensor
