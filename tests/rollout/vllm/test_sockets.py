"""Who may call a trainer, and what workers hear of it; both ways that weights take."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from megatron_oprd.rollout.vllm.bucket import (
    ReceivingBucket,
    SendingBucket,
    receive_through,
    send_through,
)
from megatron_oprd.rollout.vllm.sockets import (
    TrainerSocket,
    WorkerSocket,
    receive_weights,
    send_weights,
)

BF16 = torch.bfloat16
Receive = Callable[[WorkerSocket], Iterator[tuple[str, Tensor]]]
Send = Callable[[TrainerSocket], None]


def tensors() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"a": (3, 5), "b": (), "large": (60, 11), "d": (1, 2, 1)}.items():
        yield name, torch.randn(shape, generator=generator)
    yield "transposed", torch.arange(20.0).view(4, 5).t()


@pytest.fixture(params=["network", "buffer"])
def way(request: pytest.FixtureRequest) -> Iterator[tuple[Send, Receive]]:
    if request.param == "network":
        yield (
            _send_over_the_network,
            lambda trainer: receive_weights(trainer, dtype=BF16),
        )
        return
    bucket = SendingBucket(num_bytes=64, dtype=BF16, device=torch.device("cpu"))
    handle = bucket.handle
    yield (
        lambda workers: send_through(bucket, workers, tensors()),
        lambda trainer: receive_through(ReceivingBucket(handle), trainer),
    )
    bucket.close()


def _send_over_the_network(workers: TrainerSocket) -> None:
    for message, data in send_weights(tensors(), dtype=BF16):
        workers.tell(message, data)


def test_every_worker_gets_every_tensor(way: tuple[Send, Receive]) -> None:
    send, receive = way

    def take(workers: TrainerSocket) -> list[tuple[str, Tensor]]:
        with WorkerSocket(**workers.invitation) as trainer:
            return list(receive(trainer))

    with TrainerSocket("127.0.0.1", seconds=20) as workers, ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(take, workers) for _ in range(3)]
        workers.accept(3, in_vain=lambda: False)
        send(workers)
        for of_worker in taken:
            received = of_worker.result(timeout=30)
            for (name, tensor), (expected_name, expected) in zip(received, tensors(), strict=True):
                assert name == expected_name
                assert torch.equal(tensor, expected.to(BF16))


def test_a_worker_that_leaves(way: tuple[Send, Receive]) -> None:
    send, receive = way

    def leave(workers: TrainerSocket) -> None:
        with WorkerSocket(**workers.invitation) as trainer:
            next(receive(trainer))

    with TrainerSocket("127.0.0.1", seconds=20) as workers, ThreadPoolExecutor(1) as pool:
        pool.submit(leave, workers)
        workers.accept(1, in_vain=lambda: False)
        with pytest.raises(OSError, match=r"left|reset|pipe"):
            # What fits into the system's buffers is sent in any case.
            all(send(workers) is None for _ in range(1000))


def test_a_trainer_that_leaves(way: tuple[Send, Receive]) -> None:
    _, receive = way
    with TrainerSocket("127.0.0.1", seconds=20) as workers:
        trainer = WorkerSocket(**workers.invitation)
        workers.accept(1, in_vain=lambda: False)
    with trainer, pytest.raises(ConnectionError, match="the other end left"):
        list(receive(trainer))


def test_nobody_else_gets_weights() -> None:
    """Who does not know the token is told nothing, and those who do are."""
    with TrainerSocket("127.0.0.1", seconds=5) as workers:
        stranger = socket.create_connection(("127.0.0.1", workers.invitation["port"]))
        stranger.sendall(b"guess" * 20 + b"\n")
        trainer = WorkerSocket(**workers.invitation)
        workers.accept(1, in_vain=lambda: False)
        workers.tell({"a": [1, 2]})
        assert trainer.hear() == {"a": [1, 2]}
        trainer.tell("taken")
        assert workers.hear() == ["taken"]
        trainer.__exit__(None, None, None)
        assert stranger.recv(1) == b""


def test_workers_that_do_not_come() -> None:
    answered = threading.Event()
    with TrainerSocket("127.0.0.1", seconds=60) as workers:
        threading.Timer(0.3, answered.set).start()
        with pytest.raises(TimeoutError):
            workers.accept(1, in_vain=answered.is_set)
    with TrainerSocket("127.0.0.1", seconds=0.3) as workers, pytest.raises(TimeoutError):
        workers.accept(1, in_vain=lambda: False)
