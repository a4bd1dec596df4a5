"""Weights from a trainer to a vLLM server's workers, over TCP.

Of each tensor a line of JSON (name and shape), then its bytes; at the end a line with null. Nothing
that is received is executed. The workers call back, with a token that only the server was told.
"""

import hmac
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from io import BufferedReader
from types import TracebackType
from typing import cast

import torch
from torch import Tensor

_SECONDS_TO_SAY_TOKEN = 5


class WeightSender:
    """The trainer's end: waits for workers, and sends all of them the same."""

    def __init__(self, host: str, token: str, *, seconds: float) -> None:
        """Listens on a free port.

        Args:
            host: This machine's address, as the server sees it.
            token: What a worker has to say.
            seconds: How long a worker may take to call back, or to take a part of a tensor.
        """
        self._token = token
        self._seconds = seconds
        self._stack = ExitStack()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = self._stack.enter_context(socket.create_server((host, 0), family=family))
        self._workers: list[socket.socket] = []

    @property
    def port(self) -> int:
        """Where workers call back."""
        return self._listener.getsockname()[1]

    def __enter__(self) -> "WeightSender":
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
                worker, _ = self._listener.accept()
            except TimeoutError:
                if in_vain() or time.monotonic() > end:
                    raise
                continue
            if self._knows_token(worker):
                self._workers.append(self._stack.enter_context(worker))
            else:
                worker.close()

    def _knows_token(self, worker: socket.socket) -> bool:
        worker.settimeout(_SECONDS_TO_SAY_TOKEN)  # a mute stranger must not keep the others waiting
        try:
            with worker.makefile("rb") as file:
                said = file.readline(len(self._token) + 1)
        except OSError:
            return False
        worker.settimeout(self._seconds)
        return hmac.compare_digest(said, f"{self._token}\n".encode())

    def send(self, stream: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype) -> None:
        """Sends the stream's tensors, converted on the way.

        Raises:
            OSError: A worker left, or takes too long.
        """
        for name, tensor in stream:
            line = json.dumps({"name": name, "shape": list(tensor.shape)})
            values = tensor.detach().to(dtype).cpu().contiguous().reshape(-1)
            for worker in self._workers:
                worker.sendall(f"{line}\n".encode())
                worker.sendall(values.view(torch.uint8).numpy().data)
        for worker in self._workers:
            worker.sendall(b"null\n")


def receive_weights(
    host: str, port: int, token: str, *, dtype: torch.dtype, seconds: float
) -> Iterator[tuple[str, Tensor]]:
    """A worker's end: the tensors that a `WeightSender` sends, on the host.

    Args:
        host: Where the sender listens.
        port: Where the sender listens.
        token: What it wants to hear.
        dtype: What it sends.
        seconds: How long it may take for a part of a tensor.

    Raises:
        OSError: It left in the middle, or takes too long.
    """
    with socket.create_connection((host, port), timeout=seconds) as sender:
        sender.sendall(f"{token}\n".encode())
        with cast(BufferedReader, sender.makefile("rb", buffering=2**20)) as file:
            while (head := _line(file.readline())) is not None:
                tensor = torch.empty(head["shape"], dtype=dtype)
                rest = tensor.reshape(-1).view(torch.uint8).numpy().data
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise ConnectionError("the trainer left in the middle of a tensor")
                    rest = rest[count:]
                yield head["name"], tensor


def _line(line: bytes) -> dict | None:
    if not line.endswith(b"\n"):
        raise ConnectionError("the trainer left before the end of its weights")
    return json.loads(line)
