"""Weights from a trainer to a server's workers, over TCP: of each tensor name, shape, bytes."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_oprd.rollout.worker_socket import TrainerSocket, WorkerSocket


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
