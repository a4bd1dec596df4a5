"""Who may connect to a trainer, and what workers get of it."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oprd.rollout.engine import RolloutEngineError
from megatron_oprd.rollout.vllm.shared_memory import chunks
from megatron_oprd.rollout.vllm.sockets import TrainerSocket, WorkerSocket
from megatron_oprd.rollout.vllm.transfers import TCPTransfer

BF16 = torch.bfloat16


def tensors() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"a": (3, 5), "b": (), "large": (60, 11), "d": (1, 2, 1)}.items():
        yield name, torch.randn(shape, generator=generator)
    yield "transposed", torch.arange(20.0).view(4, 5).t()


class Workers:
    """A client of three workers, which are threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(3)
        self._sockets: list[WorkerSocket] = []
        self.arrived: list[dict[str, Tensor]] = [{} for _ in range(3)]
        self.error: Exception | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        self._sockets = list(self._pool.map(lambda _: WorkerSocket(**init_info), range(3)))

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        if self.error is not None:
            raise self.error
        list(self._pool.map(lambda number: self._take(number, **update_info), range(3)))

    def _take(self, number: int, names: Any, dtype_names: Any, shapes: Any) -> None:
        for name, dtype, shape in zip(names, dtype_names, shapes, strict=True):
            tensor = self._sockets[number].receive(shape, getattr(torch, dtype))
            self.arrived[number][name] = tensor

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


def connect(workers: Workers, seconds: float = 20) -> TCPTransfer:
    return TCPTransfer(workers, host="127.0.0.1", num_workers=3, seconds=seconds)


def test_every_worker_gets_every_tensor() -> None:
    workers = Workers()
    transfer = connect(workers)
    for chunk in chunks(tensors(), dtype=BF16, num_bytes=100):
        transfer.send(chunk)
    transfer.close()
    for arrived in workers.arrived:
        assert list(arrived) == [name for name, _ in tensors()]
        assert all(torch.equal(arrived[name], tensor.to(BF16)) for name, tensor in tensors())


def test_a_server_that_fails() -> None:
    """Its error is the one that is raised, and soon, though its workers do not read."""
    workers = Workers()
    workers.error = RolloutEngineError("out of memory")
    with pytest.raises(RolloutEngineError, match="out of memory"):
        connect(workers)
    workers.error = None
    transfer = connect(workers)
    workers.error = RolloutEngineError("out of memory")
    # More than the system's buffers hold.
    with pytest.raises(RolloutEngineError, match="out of memory"):
        transfer.send([("large", torch.zeros(10**8, dtype=torch.uint8))])
    transfer.close()


def test_a_worker_that_leaves() -> None:
    workers = TrainerSocket("127.0.0.1", seconds=20)
    worker = WorkerSocket(**workers.invitation)
    workers.accept(1, in_vain=lambda: False)
    worker.close()
    # More than the system's buffers hold, which is sent in any case.
    with pytest.raises(OSError, match=r"reset|pipe"):
        workers.send(torch.zeros(10**8, dtype=torch.uint8))
    workers.close()


def test_a_trainer_that_leaves() -> None:
    workers = TrainerSocket("127.0.0.1", seconds=20)
    worker = WorkerSocket(**workers.invitation)
    workers.accept(1, in_vain=lambda: False)
    workers.send(torch.arange(3.0))
    workers.close()
    with pytest.raises(ConnectionError, match="the other end left"):
        worker.receive([4], torch.float32)
    worker.close()


def test_nobody_else_gets_weights() -> None:
    """Who does not know the token is told nothing, and those who do are."""
    workers = TrainerSocket("127.0.0.1", seconds=5)
    stranger = socket.create_connection(("127.0.0.1", workers.invitation["port"]))
    stranger.sendall(b"guess" * 20)
    worker = WorkerSocket(**workers.invitation)
    workers.accept(1, in_vain=lambda: False)
    workers.send(torch.arange(3.0))
    assert worker.receive([3], torch.float32).tolist() == [0, 1, 2]
    # Reset, if it is closed with bytes unread.
    with contextlib.suppress(ConnectionResetError):
        assert stranger.recv(1) == b""
    worker.close()
    workers.close()


def test_workers_that_do_not_come() -> None:
    answered = threading.Event()
    workers = TrainerSocket("127.0.0.1", seconds=60)
    threading.Timer(0.3, answered.set).start()
    with pytest.raises(TimeoutError):
        workers.accept(1, in_vain=answered.is_set)
    workers.close()
    workers = TrainerSocket("127.0.0.1", seconds=0.3)
    with pytest.raises(TimeoutError):
        workers.accept(1, in_vain=lambda: False)
    workers.close()
