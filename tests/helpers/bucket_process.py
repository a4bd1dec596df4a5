"""A process that takes weights through a buffer which it shares with the test's."""

from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.rollout.vllm.bucket import (
    BucketHandle,
    ReceivingBucket,
    SendingBucket,
    receive_through,
    send_through,
)
from megatron_oprd.rollout.vllm.sockets import TrainerSocket, WorkerSocket

DTYPE = torch.bfloat16


def tensors(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Of several sizes, some larger than the buffer."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"a": (3, 5), "b": (), "large": (600, 1100), "d": (1, 2, 1)}.items():
        yield name, torch.randn(shape, generator=generator).to(device)


def check_other_process(device: torch.device, other_device: torch.device) -> None:
    """Every tensor arrives in another process, on a device of its own, as it was sent."""
    context = get_context("spawn")
    answers: SimpleQueue = context.SimpleQueue()
    bucket = SendingBucket(num_bytes=10**5, dtype=DTYPE, device=device)
    with TrainerSocket("127.0.0.1", seconds=120) as workers:
        child = context.Process(
            target=_take, args=(bucket.handle, workers.invitation, str(other_device), answers)
        )
        child.start()
        workers.accept(1, in_vain=lambda: not child.is_alive())
        send_through(bucket, workers, tensors(device))
        arrived = answers.get()
    child.join()
    bucket.close()
    for name, tensor in tensors(device):
        values, found_on = arrived.pop(name)
        assert found_on == str(other_device)
        assert values == tensor.to(DTYPE).tolist()
    assert not arrived


def _take(
    handle: BucketHandle, invitation: dict[str, Any], device: str, answers: SimpleQueue
) -> None:
    if device != "cpu":
        torch.cuda.set_device(device)
    with WorkerSocket(**invitation) as trainer:
        stream = receive_through(ReceivingBucket(handle), trainer)
        answers.put({name: (t.tolist(), str(t.device)) for name, t in stream})
